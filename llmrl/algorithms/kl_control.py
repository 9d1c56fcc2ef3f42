"""Controllers of the two KL coefficients: against the reference, and against the policy before this iteration.

Each moves its coefficient by the KL that the last iteration measured. Its state is that coefficient, which is saved.
"""

import math
from dataclasses import dataclass
from typing import Any

BAND = 1.5
"""Factor of `StepKLControl`: the coefficient moves by it once the KL is off its target by more than it."""
MAX_DRIFT = 1000.0
"""Bound of `StepKLControl`: the largest factor between the coefficient and its start. Without it, a target that a run
cannot reach would let the coefficient vanish, and it would take as long to come back once the target can be reached."""
MAX_ERROR = 0.2
"""Bound of `KLControl`: how much one horizon, or one iteration, can change the coefficient, relatively."""


@dataclass
class KLControl:
    """KL coefficient against the reference: fixed, or steered so that `kl/sequence` approaches a target.

        error = clip(kl / target - 1, -0.2, 0.2)
        coef  = coef * (1 + error * min(num_responses, horizon) / horizon)

    Reference: Ziegler et al. 2019, arXiv:1909.08593, section 2.2, whose rollouts are shorter than the horizon.
    """

    coef: float
    """Penalty per nat, in units of the score."""
    target: float | None
    """Nats per response; None: the coefficient is fixed."""
    horizon: int = 10_000
    """Responses in which a constant error of 0.2 changes the coefficient by a fifth: Ziegler et al.'s."""

    def update(self, kl: float, num_responses: int) -> None:
        """Moves the coefficient after a rollout of this many responses; `kl` is their mean KL to the reference, nats
        per response. One that is not a number does not move it."""
        if self.target is not None and not math.isnan(kl):
            error = min(max(kl / self.target - 1, -MAX_ERROR), MAX_ERROR)
            self.coef *= 1 + error * min(num_responses, self.horizon) / self.horizon

    def state_dict(self) -> dict[str, Any]:
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a steered coefficient; a fixed one stays as the settings have it now."""
        if self.target is not None:
            self.coef = state["coef"]


@dataclass(kw_only=True)
class StepKLControl:
    """KL coefficient between the actor before and after an iteration's updates: PPO with an adaptive KL penalty.

        coef = coef * 1.5  where  kl > 1.5 * target
        coef = coef / 1.5  where  kl < target / 1.5
        coef = clip(coef, first / 1000, first * 1000)

    Reference: Schulman et al. 2017, arXiv:1707.06347, section 4, whose factor is 2 where this is 1.5.
    """

    coef: float = 1.0
    """Penalty per nat. Where it starts matters little: ten iterations can change it by a factor of 57."""
    target: float
    """Nats per token."""

    def __post_init__(self) -> None:
        self.first = self.coef

    def update(self, kl: float) -> None:
        """Moves the coefficient after the updates of an iteration; `kl` is KL(old, new), nats per token. One that is
        not a number does not move it."""
        if kl > self.target * BAND:
            self.coef *= BAND
        elif kl < self.target / BAND:
            self.coef /= BAND
        self.coef = min(max(self.coef, self.first / MAX_DRIFT), self.first * MAX_DRIFT)

    def state_dict(self) -> dict[str, Any]:
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.coef = state["coef"]
