"""Paths as people write them."""

from typing import Annotated

UserPath = Annotated[str, "path"]
"""A setting that is a path of this machine, or may be one: a recipe or an override of it may begin with ``~``, which no
shell expands after ``key=``."""
