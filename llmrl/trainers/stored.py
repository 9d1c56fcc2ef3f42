"""Scored rollouts that wait to be learned from, and their state in a checkpoint."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from llmrl.batches import Batch, Episodes, Rollout, Scores, Sequences

Scored = tuple[Rollout, Scores]

_KINDS: dict[str, type[Batch]] = {kind.__name__: kind for kind in (Rollout, Sequences, Episodes, Scores)}
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}
"""Floats are saved as their bits: a checkpoint refuses NaN, which in a score means "could not be scored"."""


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
        """Takes the `num_missing` rollouts that were sampled, and returns as one those to learn from."""
        if not self.num_kept:
            return new[-1]
        device = new[-1][0].device
        kept = (*self.waiting, *((rollout.to("cpu"), scores.to("cpu")) for rollout, scores in new))
        kept = kept[-(self.num_kept + 1) :]
        self.waiting = kept[1:]
        rollouts, scores = zip(*kept[: self.num_learned], strict=True)
        return Rollout.cat(rollouts).to(device), Scores.cat(scores).to(device)

    def state_dict(self) -> dict[str, Any]:
        """The rollouts as nested tensors and what JSON holds; a value of a data row that it cannot hold is a text."""
        return {
            str(number): {"rollout": _encode(rollout), "scores": _encode(scores)}
            for number, (rollout, scores) in enumerate(self.waiting)
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pairs = (state[str(number)] for number in range(len(state)))
        self.waiting = tuple((_decode(pair["rollout"]), _decode(pair["scores"])) for pair in pairs)


def _encode(value: Any) -> Any:
    match value:
        case Batch():
            return {"kind": type(value).__name__} | {f.name: _encode(getattr(value, f.name)) for f in fields(value)}
        case Tensor() if value.dtype in _BITS:
            return {
                "dtype": str(value.dtype).removeprefix("torch."),
                "bits": value.contiguous().view(_BITS[value.dtype]),
            }
        case Mapping():  # of tensors by names of rewards, which may have a slash
            parts = {str(number): _encode(part) for number, part in enumerate(value.values())}
            return {"names": list(value), "parts": parts}
        case tuple():
            return json.loads(json.dumps(value, default=str, skipkeys=True))
    return value


def _decode(state: Any) -> Any:
    match state:
        case {"kind": kind, **parts}:
            return _KINDS[kind](**{name: _decode(part) for name, part in parts.items()})
        case {"dtype": dtype, "bits": bits}:
            return bits.view(getattr(torch, dtype))
        case {"names": names, "parts": parts}:
            return {name: _decode(parts[str(number)]) for number, name in enumerate(names)}
        case list():
            return tuple(tuple(row) if isinstance(row, list) else row for row in state)
    return state
