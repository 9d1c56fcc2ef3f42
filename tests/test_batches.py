from dataclasses import dataclass, replace

import pytest
import torch

from llmrl.batches import Batch, Experience, GRPOExperience, Prompts, Rollout, Scores, Sequences, StopReason


def tensor(*rows, dtype=torch.long):
    return torch.tensor(rows, dtype=dtype)


def make_experience(prompts, responses, scores, *, first_group=0) -> GRPOExperience:
    """Rows of ids, padded with 99; the log-probabilities are the ids over 100."""
    width, length = max(map(len, prompts)), max(map(len, responses))
    ids = tensor(*([99] * (width - len(p)) + list(p) for p in prompts))
    response_ids = tensor(*(list(r) + [99] * (length - len(r)) for r in responses))
    mask = tensor(*([True] * len(r) + [False] * (length - len(r)) for r in responses), dtype=torch.bool)
    sequences = Sequences(
        prompt_ids=ids,
        prompt_mask=tensor(*([False] * (width - len(p)) + [True] * len(p) for p in prompts), dtype=torch.bool),
        response_ids=response_ids,
        response_mask=mask,
        response_lengths=torch.tensor([len(r) for r in responses]),
    )
    rollout = Rollout(
        sequences=sequences,
        rollout_logprobs=response_ids / 100,
        stop_reason=torch.where(torch.tensor([len(r) < length for r in responses]), StopReason.EOS, StopReason.LENGTH),
        group_ids=torch.arange(len(prompts)) + first_group,
        rows=tuple({"prompt": p} for p in prompts),
    )
    total = torch.tensor(scores)
    return GRPOExperience(
        rollout=rollout,
        scores=Scores(total=total, per_token=torch.zeros(mask.shape), parts={"correct": total, "format": -total}),
        old_logprobs=response_ids / 100,
        advantages=response_ids / 10,
        ref_logprobs=response_ids / 1000,
    )


@pytest.fixture
def short():
    return make_experience([[1], [2, 3]], [[10], [11]], [0.0, 1.0])


@pytest.fixture
def wide():
    return make_experience([[4, 5, 6]], [[12, 13, 14]], [float("nan")], first_group=2)


def test_cat_pads_prompts_on_the_left_and_all_else_on_the_right(short, wide):
    both = GRPOExperience.cat([short, wide])
    assert both.sequences.prompt_ids.tolist() == [[0, 99, 1], [0, 2, 3], [4, 5, 6]]
    assert both.sequences.prompt_mask.tolist() == [[False, False, True], [False, True, True], [True, True, True]]
    assert both.sequences.response_ids.tolist() == [[10, 0, 0], [11, 0, 0], [12, 13, 14]]
    assert both.sequences.response_mask.tolist() == [[True, False, False], [True, False, False], [True, True, True]]
    assert both.sequences.response_lengths.tolist() == [1, 1, 3]
    assert torch.equal(both.rollout.rollout_logprobs, torch.tensor([[0.1, 0, 0], [0.11, 0, 0], [0.12, 0.13, 0.14]]))
    assert both.rollout.stop_reason.tolist() == [StopReason.LENGTH] * 3
    assert both.rollout.group_ids.tolist() == [0, 1, 2]
    assert [row["prompt"] for row in both.rollout.rows] == [[1], [2, 3], [4, 5, 6]]
    assert both.scores.parts["format"][:2].tolist() == [0.0, -1.0]
    assert both.scores.parts.keys() == {"correct", "format"}
    assert both.scores.per_token.shape == both.advantages.shape == both.ref_logprobs.shape == (3, 3)


def test_a_response_is_finished_unless_the_length_limit_cut_it(short):
    stop_reason = torch.tensor([StopReason.LENGTH, StopReason.EOS])
    assert replace(short.rollout, stop_reason=stop_reason).finished.tolist() == [False, True]


def test_cat_of_prompts():
    def prompts(*ids):
        return Prompts(ids=tensor(ids), mask=tensor([True] * len(ids), dtype=torch.bool), rows=({"n": len(ids)},))

    both = Prompts.cat([prompts(7, 8, 9), prompts(5)])
    assert both.ids.tolist() == [[7, 8, 9], [0, 0, 5]]
    assert both.mask.tolist() == [[True, True, True], [False, False, True]]
    assert both.rows == ({"n": 3}, {"n": 1})


def test_cat_of_one_changes_nothing(short):
    alone = GRPOExperience.cat([short])
    assert torch.equal(alone.sequences.prompt_ids, short.sequences.prompt_ids)
    assert torch.equal(alone.scores.parts["correct"], short.scores.parts["correct"])


def test_select_takes_rows_in_the_order_named(short, wide):
    both = GRPOExperience.cat([short, wide])
    some = both.select(torch.tensor([2, 0, 2]))
    assert isinstance(some, GRPOExperience)
    assert some.sequences.response_ids.tolist() == [[12, 13, 14], [10, 0, 0], [12, 13, 14]]
    assert [row["prompt"] for row in some.rollout.rows] == [[4, 5, 6], [1], [4, 5, 6]]
    assert some.scores.parts["correct"][1] == 0.0
    assert some.ref_logprobs[1].tolist() == pytest.approx([0.01, 0.0, 0.0])
    assert both.select(torch.tensor([], dtype=torch.long)).rollout.rows == ()


def test_select_undoes_cat(short, wide):
    both = GRPOExperience.cat([short, wide])
    assert both.select(torch.tensor([0, 1])).rollout.rows == short.rollout.rows
    assert torch.equal(both.select(torch.tensor([2])).advantages, wide.advantages)


def test_to_moves_every_tensor_and_nothing_else(short):
    moved = short.to("meta")
    assert moved.sequences.prompt_ids.device.type == "meta"
    assert moved.scores.parts["format"].device.type == "meta"
    assert moved.ref_logprobs.device.type == "meta"
    assert moved.rollout.rows is short.rollout.rows
    assert short.advantages.device.type == "cpu"


@dataclass(frozen=True, kw_only=True)
class Named(Batch):
    name: str


def test_a_batch_of_something_else_is_an_error():
    with pytest.raises(TypeError, match="not str"):
        Named(name="ab").select(torch.tensor([0]))
    with pytest.raises(TypeError, match="not str"):
        Named.cat([Named(name="ab"), Named(name="c")])


def test_tokens_of_a_row():
    """Prompt and response, tool output included, padding not."""
    sequences = Sequences(
        prompt_ids=tensor([0, 7], [8, 9]),
        prompt_mask=tensor([0, 1], [1, 1], dtype=torch.bool),
        response_ids=tensor([5, 5, 5], [5, 0, 0]),
        response_mask=tensor([1, 0, 1], [1, 0, 0], dtype=torch.bool),
        response_lengths=torch.tensor([3, 1]),
    )
    assert sequences.num_tokens.tolist() == [4, 3]


def test_what_could_not_be_scored_does_not_count(short, wide):
    both = Experience.cat([short, wide])
    assert both.sequences.response_mask.sum(dim=1).tolist() == [1, 1, 3]
    assert both.response_mask.sum(dim=1).tolist() == [1, 1, 0]


def test_batches_cannot_be_changed(short):
    with pytest.raises(AttributeError):
        short.advantages = torch.zeros(2, 1)
    assert isinstance(short, Batch)


# --- by_token_budget --------------------------------------------------------------------------------------------------


# --- parts_of_rank ----------------------------------------------------------------------------------------------------
