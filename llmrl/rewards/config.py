"""Settings of rewards: functions and a reward model."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from llmrl.catalogue import reserved
from llmrl.paths import UserPath
from llmrl.section import Bound, Section
from llmrl.user_code import names_code

ROLLOUT_COLUMNS = ("prompts", "responses", "completions", "tokens")
"""Parameters that every reward function can have beside data columns; a column of the same name is not passed."""
ENVIRONMENT = "environment"
"""Name of the part of a score that an environment gives."""
AMBIGUOUS_COLUMNS = ("completions", "tokens")
"""Parameters of these names may be meant as data columns: refused if the data has one of that name."""


@dataclass(frozen=True, kw_only=True)
class RewardFunctionConfig(Section, place="reward.functions.<n>"):
    """One function that scores responses."""

    name: UserPath
    """``path/to/file.py:function``, relative to the current folder, or ``package.module:function``."""
    weight: Annotated[float, Bound()] = 1.0
    """Factor on its scores before they are summed; 0 only logs them in the metrics."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Extra keyword arguments of the function, such as the pattern of ``llmrl.rewards.rules:matches_pattern``."""
    timeout_s: Annotated[float | None, Bound(above=0)] = 600.0
    """Time limit of one call, in seconds; after it the call is ended, whatever it does. None: no limit."""
    retries: Annotated[int, Bound(least=0)] = 3
    """How often a call is repeated whose connection or service failed, after 1 s, 2 s, 4 s, ..."""
    on_error: Literal["end", "exclude"] = "end"
    """Where the function fails on a response: the run ends, or the response is excluded from learning as unscored and
    counted in ``reward/<part>/failed``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not names_code(self.name):
            raise ValueError(
                f"reward.functions.<n>.name ({self.name!r}) must name a function: "
                "path/to/file.py:function or package.module:function"
            )
        for name in ROLLOUT_COLUMNS:
            if name in self.arguments:
                raise ValueError(
                    f"reward.functions.<n>.arguments of {self.name} must not set {name!r}: it comes from the rollout; "
                    "give the function's own parameter another name"
                )


@dataclass(frozen=True, kw_only=True)
class LearnedRewardConfig(Section, place="reward.model"):
    """A reward model that scores responses: what `llmrl reward-model` leaves, or a decoder with a linear score head
    (one label)."""

    path: UserPath
    """A folder, or a name on the Hugging Face hub."""
    weight: Annotated[float, Bound()] = 1.0
    """Factor on its scores before they are summed."""
    normalize: bool = True
    """Standardizes by the mean and standard deviation stored with the model, if present."""
    microbatch_tokens: Annotated[int, Bound(least=1)] = 16384
    """Tokens per forward pass, padding included where it is not packed (`model.packing`). Changes memory, never the
    result."""
    on_actor_base: bool = False
    """Scores with the adapter that the reward model was trained with, on the actor's frozen base, in place of a second
    model in memory. Needs model.lora, and a reward model trained by LoRA from the actor's own model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight == 0:
            raise ValueError(
                f"reward.model.weight ({self.weight}) must be other than 0; "
                "to do without the reward model, leave reward.model out"
            )


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Functions and a reward model, whose weighted scores add up to a response's score."""

    functions: tuple[RewardFunctionConfig, ...] = ()
    """Programs that score responses."""
    model: LearnedRewardConfig | None = None
    """A model that scores responses."""
    combine: Literal["sum", "standardized"] = "sum"
    """How several rewards become advantages in llmrl grpo: their weighted sum is compared within the group, or each is
    compared by itself, in units of its spread there, and the weighted sum of that is taken (GDPO)."""

    def __post_init__(self) -> None:
        if not self.functions:
            return
        name, uses = Counter(function.name for function in self.functions).most_common(1)[0]
        if uses > 1:
            raise ValueError(
                f"reward.functions names {name} {uses} times and must name it once; "
                "write a function of your own that calls it twice"
            )

    @property
    def teaches(self) -> bool:
        """Whether there is anything to learn from."""
        return self.model is not None or any(function.weight for function in self.functions)

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each part that is learned from, by its label."""
        settings = (*self.functions, *(() if self.model is None else (self.model,)))
        return {label: part.weight for label, part in zip(self.labels, settings, strict=True) if part.weight}

    @property
    def labels(self) -> tuple[str, ...]:
        """Name of each part of a score: for a function the part after the colon, or its whole name where another part
        or a metric has that; for the reward model ``model``."""
        return self.function_labels + self._model_labels

    @property
    def function_labels(self) -> tuple[str, ...]:
        short = [function.name.rpartition(":")[2] for function in self.functions]
        taken = [*short, ENVIRONMENT, *self._model_labels, *reserved("score/<part>"), *reserved("eval/score/<part>")]
        return tuple(
            function.name if taken.count(label) > 1 else label
            for function, label in zip(self.functions, short, strict=True)
        )

    @property
    def _model_labels(self) -> tuple[str, ...]:
        return () if self.model is None else ("model",)
