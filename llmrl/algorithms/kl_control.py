"""Who sets the price of a nat: of moving away from the reference, and of one iteration's step.

Both are coefficients that move by what the last iteration measured. Their state is a number, which is saved.
"""

from dataclasses import dataclass
from typing import Any

BAND = 1.5
"""Of `StepKLControl`: how far from its target, as a factor, the KL may be before the coefficient moves, and by what."""
FURTHEST = 1000.0
"""Of `StepKLControl`: how far from the first coefficient, as a factor, it may come. Else a target that a run cannot
reach would let it vanish, and the target would mean nothing for as long again once it can."""
LARGEST_ERROR = 0.2
"""Of `KLControl`: bounds how much one iteration can change the coefficient, relatively, per horizon."""


@dataclass
class KLControl:
    """The price of a nat between actor and reference: fixed, or steered so that `kl/sequence` comes to a target.

        error = clip(kl / target - 1, -0.2, 0.2)
        coef  = coef * (1 + error * num_responses / horizon)

    Reference: Ziegler et al. 2019, arXiv:1909.08593, section 2.2.
    """

    coef: float
    target: float | None
    """Nats per response; None keeps the coefficient as it is."""
    horizon: int
    """Responses in which a constant error of 0.2 changes the coefficient by a fifth."""

    def update(self, kl: float, num_responses: int) -> None:
        """After a rollout of so many responses, whose KL to the reference summed to `kl` on average."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -LARGEST_ERROR), LARGEST_ERROR)
            self.coef *= 1 + error * num_responses / self.horizon

    def state_dict(self) -> dict[str, Any]:
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over the coefficient where it is steered; a fixed one is what the settings say now."""
        if self.target is not None:
            self.coef = state["coef"]


@dataclass
class StepKLControl:
    """The price of a nat between the actor before an iteration's updates and after them: penalized TRPO.

        coef = coef * 1.5  where  kl > 1.5 * target
        coef = coef / 1.5  where  kl < target / 1.5
        coef = clip(coef, first / 1000, first * 1000)

    Reference: Schulman et al. 2017, arXiv:1707.06347, section 4, whose factor is 2 where this is 1.5.
    """

    coef: float
    target: float
    """Nats per token."""

    def __post_init__(self) -> None:
        self.first = self.coef

    def update(self, kl: float) -> None:
        """After the updates of an iteration, which moved the actor by `kl` on average over its tokens."""
        if kl > self.target * BAND:
            self.coef *= BAND
        elif kl < self.target / BAND:
            self.coef /= BAND
        self.coef = min(max(self.coef, self.first / FURTHEST), self.first * FURTHEST)

    def state_dict(self) -> dict[str, Any]:
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.coef = state["coef"]
