"""Reward by a frozen reward model."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from llmrl.batches import Rollout, Scores, Sequences
from llmrl.roles import Scorer

LABEL = "model"


class LearnedReward:
    """Scores whole responses by a reward model, frozen.

    Args:
        scorer: Scores sequences of the reward model's own tokens.
        encode: Encodes a rollout in these tokens.
        normalize: Applied to the raw scores.
        weight: Factor on the normalized scores in `total`.
    """

    def __init__(
        self,
        scorer: Scorer,
        *,
        encode: Callable[[Rollout], Sequences],
        normalize: Callable[[Float[Tensor, " B"]], Float[Tensor, " B"]],
        weight: float,
    ) -> None:
        self.scorer = scorer
        self.encode = encode
        self.normalize = normalize
        self.weight = weight

    def __call__(self, rollout: Rollout) -> Scores:
        """The weighted score as `total`, the normalized one as the part ``model``.

        Raises:
            FloatingPointError: A score is not finite.
        """
        scores = self.normalize(self.scorer.scores(self.encode(rollout))).to(rollout.rollout_logprobs.device)
        check_finite(scores)
        return Scores(
            total=self.weight * scores,
            per_token=torch.zeros_like(rollout.rollout_logprobs),
            parts={LABEL: scores},
        )


def check_finite(scores: Float[Tensor, " B"], *, way_out: str = "set model.dtype=float32, or train it again") -> None:
    """Raises FloatingPointError, which names the first response whose score is no finite number, if there is one."""
    if not bool(scores.isfinite().all()):
        row = int((~scores.isfinite()).nonzero()[0])
        raise FloatingPointError(
            f"the reward model's score of response {row} (counted from 0) is not finite: its weights are damaged, "
            f"or overflow in this precision; {way_out}"
        )
