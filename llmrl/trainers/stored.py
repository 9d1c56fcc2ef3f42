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

    def drop_unlike(self, new: Scored) -> None:
        """Drops what waits if it cannot be learned from together with `new`: a resumed run may have other groups, other
        parts of scores, or an environment. As many are missing then as in a first iteration."""
        if any(_kind(old) != _kind(new) for old in self.waiting):
            self.waiting = ()

    def exchange(self, new: Sequence[Scored]) -> Scored:
        """Takes the `num_missing` rollouts that were sampled, and returns as one those to learn from.

        The functions that failed are left out: metrics count them in the iteration that sampled.
        """
        if not self.num_kept:
            return new[-1]
        device = new[-1][0].device
        kept = (*self.waiting, *((rollout.to("cpu"), scores.to("cpu")) for rollout, scores in new))
        kept = kept[-(self.num_kept + 1) :]
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


def _kind(scored: Scored) -> tuple[int, int, bool, list[str]]:
    """Number of responses and of groups, whether they are episodes, and names of the parts of the scores."""
    rollout, scores = scored
    return len(rollout.rows), len(rollout.group_ids.unique()), rollout.episodes is not None, sorted(scores.parts)
