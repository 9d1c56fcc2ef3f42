"""Batches in checkpoints: what is written comes back, NaN and data rows too."""

import json
import math
from dataclasses import fields
from pathlib import Path

import torch

from llmrl.batch_states import batch_of, state_of
from llmrl.batches import AuxiliaryExperience, Batch, Scores, Sequences
from llmrl.trainers.checkpoint import join_state, not_finite, split_state


def sequences() -> Sequences:
    return Sequences.from_rows(
        prompt_ids=torch.tensor([[0, 5], [6, 7]]),
        prompt_mask=torch.tensor([[False, True], [True, True]]),
        response_ids=torch.tensor([[8, 9], [3, 0]]),
        response_mask=torch.tensor([[True, True], [True, False]]),
        response_lengths=torch.tensor([2, 1]),
    )


def through_a_checkpoint(batch: Batch) -> Batch:
    """The batch after its state was split into tensors and JSON, as checkpoints are."""
    state = state_of(batch)
    assert not_finite(state) is None
    tensors, rest = split_state(state)
    return batch_of(join_state({name: x.clone() for name, x in tensors.items()}, json.loads(json.dumps(rest))))


def assert_same(ours: object, theirs: object) -> None:
    assert type(ours) is type(theirs)
    if isinstance(ours, Batch):
        for field in fields(ours):
            assert_same(getattr(ours, field.name), getattr(theirs, field.name))
    elif isinstance(ours, torch.Tensor):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()  # type: ignore[attr-defined]
        for name, part in ours.items():
            assert_same(part, theirs[name])  # type: ignore[index]
    else:
        assert ours == theirs


def test_numbers_come_back_to_the_bit_and_so_do_names_with_a_slash():
    total = torch.tensor([math.nan, -0.0])
    parts = {"rules.py/sum": total, "exact": torch.tensor([1 / 3, 2.0], dtype=torch.float64)}
    scores = Scores(total=total, per_token=torch.tensor([[1.0, math.inf], [0.0, 0.1]]), parts=parts)
    assert_same(through_a_checkpoint(scores), scores)


def test_a_batch_in_a_batch_comes_back_and_so_does_what_is_not_there():
    kept = AuxiliaryExperience(
        sequences=sequences(),
        counted=torch.tensor([[True, False], [True, False]]),
        returns=torch.tensor([[0.5, 0.0], [1.5, 0.0]]),
        rollout_logprobs=torch.tensor([[-1.0, 0.0], [-2.0, 0.0]]),
        old_logprobs=None,
    )
    assert_same(through_a_checkpoint(kept), kept)


def test_what_json_cannot_hold_becomes_a_text():
    assert state_of(({"path": Path("a"), "n": 1},)) == [{"path": "a", "n": 1}]
