"""A reward of a user's own as one of a run."""

from llmrl.batches import Rollout, Scores
from llmrl.rewards.calls import RewardError
from llmrl.roles import RewardFunction


class NamedReward:
    """A reward with a weight, and a name among the parts of a score.

    Args:
        reward: Scores a rollout.
        label: Its name in the metrics.
        weight: Factor on its scores.
    """

    def __init__(self, reward: RewardFunction, *, label: str, weight: float) -> None:
        self.reward = reward
        self.label = label
        self.weight = weight

    def __call__(self, rollout: Rollout) -> Scores:
        """Its scores times the weight; the parts stay without it.

        Raises:
            RewardError: It returned no scores.
        """
        scores = self.reward(rollout)
        if not isinstance(scores, Scores):
            raise RewardError(f"reward {self.label} returned a {type(scores).__name__}; expected llmrl.batches.Scores")
        return Scores(
            total=self.weight * scores.total,
            per_token=self.weight * scores.per_token,
            parts={self.label: scores.per_response, **scores.parts},
            failed=scores.failed,
        )
