"""Sum of several rewards."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from llmrl.batches import Rollout, Scores
from llmrl.roles import RewardFunction


class CombinedReward:
    """Sum of several rewards, each with its weight already applied. A reward that does not score a response is left out
    of its sum; a response that none of them scores, or that one excludes because it failed on it, gets NaN. So does an
    episode that failed, in every part too: what a function says of a conversation that broke off is no score."""

    def __init__(self, rewards: Sequence[RewardFunction]) -> None:
        self.rewards = rewards

    def __call__(self, rollout: Rollout) -> Scores:
        """Sums of totals and of per-token scores; the parts of all rewards side by side."""
        scores = [reward(rollout) for reward in self.rewards]
        total = sum_of_known([each.total for each in scores])
        for each in scores:
            for failed in each.failed.values():
                total = total.masked_fill(failed & each.total.isnan(), math.nan)
        parts = {name: part for each in scores for name, part in each.parts.items()}
        if rollout.episodes is not None:
            broken = rollout.episodes.failed
            total = total.masked_fill(broken, math.nan)
            parts = {name: part.masked_fill(broken, math.nan) for name, part in parts.items()}
        return Scores(
            total=total,
            per_token=torch.stack([each.per_token for each in scores]).sum(dim=0),
            parts=parts,
            failed={name: failed for each in scores for name, failed in each.failed.items()},
        )


def sum_of_known(totals: Sequence[Float[Tensor, " B"]]) -> Float[Tensor, " B"]:
    """Sum over rewards of the scores that are not NaN, for each response; NaN where all are."""
    stacked = torch.stack(list(totals))
    return stacked.nansum(dim=0).masked_fill(stacked.isnan().all(dim=0), math.nan)
