"""Scored rollouts that wait to be learned from, and their state in a checkpoint."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from llmrl.batch_states import batch_of, state_of
from llmrl.batches import Rollout, Scores

Scored = tuple[Rollout, Scores]


class StoredRollouts:
    """The newest scored rollouts, oldest first, on the CPU.

    With `staleness` k and `num_replayed` m an iteration adds one and learns from the m + 1 oldest of k + m + 1. The
    first iteration samples all of them, so that each learns from as many.
    """

    def __init__(self, *, staleness: int, num_replayed: int) -> None:
        self.num_learned = num_replayed + 1
        self.num_kept = staleness + num_replayed
        """Rollouts that stay from one iteration to the next."""
        self.waiting: tuple[Scored, ...] = ()

    @property
    def num_missing(self) -> int:
        """Rollouts to sample before the next iteration can learn."""
        return max(self.num_kept + 1 - len(self.waiting), 1)

    def exchange(self, new: Sequence[Scored]) -> Scored:
        """Takes the `num_missing` rollouts that were sampled, and returns as one those to learn from.

        What waits is dropped where a resumed run has other groups or other parts of scores. The functions that failed
        are left out: metrics count them in the iteration that sampled.
        """
        if not self.num_kept:
            return new[-1]
        device = new[-1][0].device
        sampled = tuple((rollout.to("cpu"), scores.to("cpu")) for rollout, scores in new)
        fits = all(_kind(old) == _kind(sampled[0]) for old in self.waiting)
        kept = ((*self.waiting, *sampled) if fits else sampled)[-(self.num_kept + 1) :]
        self.waiting = kept[1:]
        rollouts, scores = zip(*kept[: self.num_learned], strict=True)
        scores = [replace(each, failed={}) for each in scores]
        return Rollout.cat(rollouts).to(device), Scores.cat(scores).to(device)

    def state_dict(self) -> dict[str, Any]:
        """The rollouts that wait, as a checkpoint holds them."""
        return {
            str(number): {"rollout": state_of(rollout), "scores": state_of(scores)}
            for number, (rollout, scores) in enumerate(self.waiting)
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pairs = (state[str(number)] for number in range(len(state)))
        self.waiting = tuple((batch_of(pair["rollout"]), batch_of(pair["scores"])) for pair in pairs)


def _kind(scored: Scored) -> tuple[int, int, list[str]]:
    """Number of responses and of groups, and names of the parts of the scores."""
    rollout, scores = scored
    return len(rollout.rows), len(rollout.group_ids.unique()), sorted(scores.parts)
