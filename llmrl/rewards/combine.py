"""Several rewards as one."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from llmrl.batches import Rollout, Scores
from llmrl.roles import RewardFunction


class CombinedReward:
    """The sum of several rewards, weighted by themselves. One that has nothing to say of a response is left out of its
    sum; what none of them can score, the sum cannot either."""

    def __init__(self, rewards: Sequence[RewardFunction]) -> None:
        self.rewards = rewards

    def __call__(self, rollout: Rollout) -> Scores:
        """Totals and per-token scores added up, parts side by side."""
        scores = [reward(rollout) for reward in self.rewards]
        return Scores(
            total=sum_of_known([each.total for each in scores]),
            per_token=torch.stack([each.per_token for each in scores]).sum(dim=0),
            parts={name: part for each in scores for name, part in each.parts.items()},
        )


def sum_of_known(totals: Sequence[Float[Tensor, " B"]]) -> Float[Tensor, " B"]:
    """For each response the sum of the scores that are not NaN; NaN where all are."""
    stacked = torch.stack(list(totals))
    return stacked.nansum(dim=0).masked_fill(stacked.isnan().all(dim=0), math.nan)
