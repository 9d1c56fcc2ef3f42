"""Settings of rewards that are functions."""

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

ROLLOUT_COLUMNS = ("prompts", "responses")
"""What every reward function can ask for beside the columns of the data."""


@dataclass(frozen=True, kw_only=True)
class RewardFunctionConfig:
    """One function that scores responses."""

    name: str
    """``path/to/file.py:function``, relative to the current folder, or ``package.module:function``."""
    weight: float = 1.0
    """What its scores are multiplied by before they are summed."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Extra keyword arguments of the function, such as the pattern of ``llmrl.rewards.rules:matches_pattern``."""

    def __post_init__(self) -> None:
        if not _looks_loadable(self.name):
            raise ValueError(
                f"reward.functions.<n>.name ({self.name!r}) must name a function: "
                "path/to/file.py:function or package.module:function"
            )
        if not math.isfinite(self.weight) or self.weight == 0:
            raise ValueError(
                f"reward.functions.<n>.weight ({self.weight}) of {self.name} must be a finite number other than 0; "
                "to switch the function off, leave it out of the list"
            )
        for name in ROLLOUT_COLUMNS:
            if name in self.arguments:
                raise ValueError(
                    f"reward.functions.<n>.arguments of {self.name} must not set {name!r}: it comes from the rollout; "
                    "give the function's own parameter another name"
                )


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Functions whose weighted scores add up to a response's score."""

    functions: tuple[RewardFunctionConfig, ...]
    """At least one."""

    def __post_init__(self) -> None:
        if not self.functions:
            raise ValueError(
                "reward.functions is empty and must hold at least one function, such as {name: rule.py:score}"
            )
        name, uses = Counter(function.name for function in self.functions).most_common(1)[0]
        if uses > 1:
            raise ValueError(
                f"reward.functions names {name} {uses} times and must name it once; "
                "write a function of your own that calls it twice"
            )

    @property
    def labels(self) -> tuple[str, ...]:
        """What each function's scores are called: the part after the colon, or the whole name where two share that."""
        short = [function.name.rpartition(":")[2] for function in self.functions]
        return tuple(
            function.name if short.count(label) > 1 else label
            for function, label in zip(self.functions, short, strict=True)
        )


def _looks_loadable(name: str) -> bool:
    source, _, function = name.rpartition(":")
    is_module = all(part.isidentifier() for part in source.split("."))
    return function.isidentifier() and (source.endswith(".py") or is_module)
