"""Names of the ways to aggregate token losses into one number; see `token_weights`."""

from typing import Literal

Aggregation = Literal["token", "sequence", "constant"]
