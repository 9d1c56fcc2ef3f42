"""Rewards that environments gave to episodes."""

from dataclasses import replace

import torch

from llmrl.batches import Rollout, Scores


class EpisodeReward:
    """`RewardFunction` of the rewards in a rollout's episodes: those of turns land on the last token of each turn, that
    of the whole episode is its score. An episode that failed cannot be scored.

    Args:
        label: Name of the part; None: there are no rewards, and a reward beside this one scores what has not failed.
    """

    def __init__(self, label: str | None) -> None:
        self.label = label

    def __call__(self, rollout: Rollout) -> Scores:
        episodes = rollout.episodes
        assert episodes is not None, "an environment answered the rollout"
        failed = episodes.failed
        total = episodes.end_reward if self.label is not None else torch.full_like(episodes.end_reward, torch.nan)
        per_token = torch.zeros_like(rollout.rollout_logprobs)
        rows, turns = (episodes.turn_ends > 0).nonzero(as_tuple=True)
        per_token[rows, episodes.turn_ends[rows, turns] - 1] = episodes.turn_rewards[rows, turns]
        scores = Scores(
            total=total.masked_fill(failed, torch.nan),
            per_token=per_token.masked_fill(failed[:, None], 0.0),
            parts={},
        )
        return scores if self.label is None else replace(scores, parts={self.label: scores.per_response})
