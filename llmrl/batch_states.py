"""Batches in checkpoints: as nested tensors and what JSON holds."""

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from llmrl.batches import AuxiliaryExperience, Batch, Episodes, Rollout, Scores, Sequences

KINDS: dict[str, type[Batch]] = {
    kind.__name__: kind for kind in (Rollout, Sequences, Episodes, Scores, AuxiliaryExperience)
}
"""Batches that are kept in checkpoints."""
BITS = {torch.float32: torch.int32, torch.float64: torch.int64}
"""Floats are saved as their bits: a checkpoint refuses NaN, which in a score means "could not be scored"."""


def state_of(value: Any) -> Any:
    """A batch, or a field of one, as a checkpoint holds it; a value of a data row that JSON cannot hold is a text."""
    match value:
        case Batch():
            return {"kind": type(value).__name__} | {f.name: state_of(getattr(value, f.name)) for f in fields(value)}
        case Tensor() if value.dtype in BITS:
            return {
                "dtype": str(value.dtype).removeprefix("torch."),
                "bits": value.contiguous().view(BITS[value.dtype]),
            }
        case Mapping():  # of tensors by names of rewards, which may have a slash
            parts = {str(number): state_of(part) for number, part in enumerate(value.values())}
            return {"names": list(value), "parts": parts}
        case tuple():
            return json.loads(json.dumps(value, default=str, skipkeys=True))
    return value


def batch_of(state: Any) -> Any:
    """The batch, or field of one, that `state_of` wrote."""
    match state:
        case {"kind": kind, **parts}:
            return KINDS[kind](**{name: batch_of(part) for name, part in parts.items()})
        case {"dtype": dtype, "bits": bits}:
            return bits.view(getattr(torch, dtype))
        case {"names": names, "parts": parts}:
            return {name: batch_of(parts[str(number)]) for number, name in enumerate(names)}
        case list():
            return tuple(tuple(row) if isinstance(row, list) else row for row in state)
    return state
