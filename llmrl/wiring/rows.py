"""The rows of a recipe: read, and told about where some were dropped."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from llmrl.data.config import DataConfig
from llmrl.data.rows import is_file
from llmrl.roles import Progress

C = TypeVar("C", bound=DataConfig)
R = TypeVar("R", bound=list)

EVALUATION = "evaluation_data"


def read_rows(config: C, load: Callable[[C], R], unchecked: list[str], *, dry: bool, section: str = "data") -> R | None:
    """The rows that a config names. A dry run passes over a file that a command is still to make, and over the hub."""
    if dry and not is_file(config.path):
        unchecked.append(f"{section}.path ({config.path}) is a data set on the hub, which a dry run does not fetch")
    elif dry and config.made_by and not Path(config.path).exists():
        unchecked.append(f"{section}.path ({config.path}) does not exist yet; `{config.made_by}` makes it")
    else:
        return load(config)
    return None


def report_dropped(num_dropped: int, section: str, limit: str, progress: Progress) -> None:
    """Says how many rows a length limit dropped, if it dropped any."""
    if num_dropped:
        progress.message(f"{section}: {num_dropped} rows are longer than {section}.{limit} and were dropped")
