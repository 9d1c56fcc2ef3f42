"""Several rewards as one."""

from collections.abc import Sequence

import torch

from llmrl.experience import Rollout, Scores
from llmrl.roles import RewardFunction


class CombinedReward:
    """The sum of several rewards, weighted by themselves. What one of them cannot score, the sum cannot either."""

    def __init__(self, rewards: Sequence[RewardFunction]) -> None:
        self.rewards = rewards

    def __call__(self, rollout: Rollout) -> Scores:
        """Totals and per-token scores added up, parts side by side."""
        scores = [reward(rollout) for reward in self.rewards]
        return Scores(
            total=torch.stack([each.total for each in scores]).sum(dim=0),
            per_token=torch.stack([each.per_token for each in scores]).sum(dim=0),
            parts={name: part for each in scores for name, part in each.parts.items()},
        )
