"""How token losses become one number, by name."""

from typing import Literal

Aggregation = Literal["token", "sequence", "constant"]
