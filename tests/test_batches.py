from dataclasses import dataclass, replace

import pytest
import torch

from llmrl.batches import (
    Batch,
    Experience,
    GRPOExperience,
    PreferencePairs,
    Prompts,
    Rollout,
    Scores,
    Sequences,
    StopReason,
    TokenOutputs,
)


def tensor(*rows, dtype=torch.long):
    return torch.tensor(rows, dtype=dtype)


def make_experience(prompts, responses, scores, *, first_group=0) -> GRPOExperience:
    """Rows of ids, padded with 99; the log-probabilities are the ids over 100."""
    width, length = max(map(len, prompts)), max(map(len, responses))
    ids = tensor(*([99] * (width - len(p)) + list(p) for p in prompts))
    response_ids = tensor(*(list(r) + [99] * (length - len(r)) for r in responses))
    mask = tensor(*([True] * len(r) + [False] * (length - len(r)) for r in responses), dtype=torch.bool)
    sequences = Sequences.from_rows(
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
        learned=torch.ones(len(prompts), dtype=torch.bool),
        ref_logprobs=response_ids / 1000,
    )


@pytest.fixture
def short():
    return make_experience([[1], [2, 3]], [[10], [11]], [0.0, 1.0])


@pytest.fixture
def wide():
    return make_experience([[4, 5, 6]], [[12, 13, 14]], [float("nan")], first_group=2)


def test_cat_pads_routes_and_has_none_where_one_has_none(short, wide):
    long, one = torch.arange(6).view(1, 3, 2).short() + 1, torch.full((2, 1, 2), 9).short()
    parts = [replace(short.rollout, routes=one), replace(wide.rollout, routes=long)]
    both = Rollout.cat(parts)
    assert both.routes.tolist() == [[[9, 9], [0, 0], [0, 0]]] * 2 + [[[1, 2], [3, 4], [5, 6]]]
    assert both.select(torch.tensor([2])).routes.equal(long)
    for rollouts in ([parts[0], wide.rollout], [short.rollout, parts[1]]):
        assert Rollout.cat(rollouts).routes is None


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
    sequences = Sequences.from_rows(
        prompt_ids=tensor([0, 7], [8, 9]),
        prompt_mask=tensor([0, 1], [1, 1], dtype=torch.bool),
        response_ids=tensor([5, 5, 5], [5, 0, 0]),
        response_mask=tensor([1, 0, 1], [1, 0, 0], dtype=torch.bool),
        response_lengths=torch.tensor([3, 1]),
    )
    assert sequences.num_tokens.tolist() == [4, 3]


def test_tokens_of_a_pass():
    """Each row with its prompt, or its prompt once for all its rows."""
    batch = make_experience([[1], [2, 3]], [[10], [11, 12, 13]], [0.0, 1.0]).sequences.select(torch.tensor([0, 1, 1]))
    padded, packed = (batch.pass_tokens(packed=packed) for packed in (False, True))
    assert padded.own.tolist() == [2, 5, 5]
    assert padded.prompt_of_row is padded.of_prompt is None
    assert packed.own.tolist() == [1, 3, 3]
    assert packed.prompt_of_row.tolist() == [0, 1, 1]
    assert packed.of_prompt.tolist() == [1, 2]


def ragged_pairs() -> PreferencePairs:
    chosen = make_experience([[1], [2, 3]], [[10], [11, 12]], [0.0, 0.0]).sequences
    rejected = make_experience([[1], [2, 3]], [[20, 21, 22], [23]], [0.0, 0.0]).sequences
    return PreferencePairs(chosen=chosen, rejected=rejected, margin=torch.zeros(2))


def test_tokens_of_a_pass_over_pairs():
    """Of rows 2 and 4, 4 and 3 tokens: two rows of the longer, or the prompt once."""
    padded, packed = (ragged_pairs().pass_tokens(packed=packed) for packed in (False, True))
    assert padded.own.tolist() == [8, 8]
    assert packed.own.tolist() == [4, 3]
    assert packed.prompt_of_row.tolist() == [0, 1]
    assert packed.of_prompt.tolist() == [1, 2]


def test_the_sides_of_pairs_as_rows():
    """Chosen and rejected in turn, two rows to a prompt."""
    rows = ragged_pairs().sequences
    assert rows.unique_prompt_ids.tolist() == [[99, 1], [2, 3]]
    assert rows.prompt_of_row.tolist() == [0, 0, 1, 1]
    assert rows.response_lengths.tolist() == [1, 3, 2, 1]
    ids = [row[:length].tolist() for row, length in zip(rows.response_ids, rows.response_lengths, strict=True)]
    assert ids == [[10], [20, 21, 22], [11, 12], [23]]
    assert rows.response_mask.sum(dim=1).tolist() == [1, 3, 2, 1]
    assert rows.response_mask.dtype == torch.bool
    assert ragged_pairs().select(torch.tensor([], dtype=torch.long)).sequences.response_ids.shape[0] == 0


def test_a_batch_is_on_the_device_of_its_tensors(short):
    assert short.device.type == "cpu"
    assert short.to("meta").device.type == "meta"


def test_what_could_not_be_scored_does_not_count(short, wide):
    both = Experience.cat([short, wide])
    assert both.sequences.response_mask.sum(dim=1).tolist() == [1, 1, 3]
    assert both.counted.sum(dim=1).tolist() == [1, 1, 0]


def test_a_sum_of_scores_that_is_not_finite_is_no_score():
    """In the score of the response, in one token's, or in their sum; all other scores stay as they are."""
    huge, inf = 3e38, float("inf")
    total = torch.tensor([1.0, inf, -inf, float("nan"), 2.0, huge])
    per_token = torch.tensor([[0.5, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, -inf], [huge, 0.0]])
    scores = Scores(total=total, per_token=per_token, parts={"part": total}).only_finite()
    assert scores.per_response.nan_to_num(-7.0).tolist() == [1.5, -7.0, -7.0, -7.0, -7.0, -7.0]
    assert scores.parts["part"] is total


def test_batches_cannot_be_changed(short):
    with pytest.raises(AttributeError):
        short.advantages = torch.zeros(2, 1)
    assert isinstance(short, Batch)


# --- prompts of sequences ---------------------------------------------------------------------------------------------


def grouped(prompts, prompt_of_row, *, first_id=10) -> Sequences:
    """Row b responds to prompt `prompt_of_row[b]` with the one id `first_id` + b."""
    rows = make_experience(prompts, [[1]] * len(prompts), [0.0] * len(prompts)).sequences
    count = len(prompt_of_row)
    return Sequences(
        unique_prompt_ids=rows.prompt_ids,
        unique_prompt_mask=rows.prompt_mask,
        prompt_of_row=torch.tensor(prompt_of_row),
        response_ids=first_id + torch.arange(count)[:, None],
        response_mask=torch.ones(count, 1, dtype=torch.bool),
        response_lengths=torch.ones(count, dtype=torch.long),
    )


def prompts_of(sequences: Sequences) -> list[list[int]]:
    """The prompt of each row, padding gone."""
    return [ids[mask].tolist() for ids, mask in zip(sequences.prompt_ids, sequences.prompt_mask, strict=True)]


def test_each_row_reads_its_prompt():
    sequences = grouped([[1], [2, 3]], [1, 0, 1])
    assert sequences.prompt_ids.tolist() == [[2, 3], [99, 1], [2, 3]]
    assert sequences.prompt_mask.int().tolist() == [[1, 1], [0, 1], [1, 1]]
    assert sequences.num_tokens.tolist() == [3, 2, 3]


def test_rows_with_prompts_of_their_own():
    sequences = grouped([[1], [2, 3]], [0, 1])
    fields = ("prompt_ids", "prompt_mask", "response_ids", "response_mask", "response_lengths")
    same = Sequences.from_rows(**{name: getattr(sequences, name) for name in fields})
    assert same.prompt_of_row.tolist() == [0, 1]
    assert same.unique_prompt_ids.tolist() == [[99, 1], [2, 3]]
    assert same.response_ids.tolist() == [[10], [11]]


@pytest.mark.parametrize(
    ("index", "unique", "prompt_of_row"),
    [
        ([0, 1], [[99, 4]], [0, 0]),
        ([4, 2, 0], [[99, 4], [99, 5], [6, 7]], [2, 1, 0]),  # prompts keep their order, whatever that of the rows
        ([5, 5, 1], [[99, 4], [6, 7]], [1, 1, 0]),
        ([3], [[99, 5]], [0]),  # and their width
        ([], [], []),
    ],
)
def test_select_keeps_the_prompts_that_are_responded_to(index, unique, prompt_of_row):
    sequences = grouped([[4], [5], [6, 7]], [0, 0, 1, 1, 2, 2])
    some = sequences.select(torch.tensor(index, dtype=torch.long))
    assert some.unique_prompt_ids.tolist() == unique
    assert some.unique_prompt_ids.shape == some.unique_prompt_mask.shape == (len(unique), 2)
    assert some.prompt_of_row.tolist() == prompt_of_row
    assert some.response_ids.flatten().tolist() == [10 + row for row in index]
    assert torch.equal(some.prompt_ids, sequences.prompt_ids[index])
    assert torch.equal(some.prompt_mask, sequences.prompt_mask[index])


def test_cat_of_groups():
    """A prompt that two parts hold is held twice."""
    parts = [grouped([[1], [2]], [0, 0, 1]), grouped([[3, 4, 5], [2]], [1, 0], first_id=20)]
    both = Sequences.cat([*parts, parts[0].select(torch.tensor([2]))])
    assert both.unique_prompt_ids.tolist() == [[0, 0, 1], [0, 0, 2], [3, 4, 5], [99, 99, 2], [0, 0, 2]]
    assert both.prompt_of_row.tolist() == [0, 0, 1, 3, 2, 4]
    assert prompts_of(both) == [[1], [1], [2], [2], [3, 4, 5], [2]]
    assert both.response_ids.flatten().tolist() == [10, 11, 12, 20, 21, 12]


def test_a_batch_that_is_cut_and_put_together_reads_as_before():
    """Whatever the cut: a group may be torn apart by it."""
    sequences = grouped([[4], [5], [6, 7]], [0, 0, 1, 1, 2, 2])
    parts = torch.tensor([3, 0, 5, 1, 2, 4]).split([1, 3, 2])
    again = Sequences.cat([sequences.select(part) for part in parts]).select(torch.cat(parts).argsort())
    assert torch.equal(again.prompt_ids, sequences.prompt_ids)
    assert torch.equal(again.prompt_mask, sequences.prompt_mask)
    assert torch.equal(again.response_ids, sequences.response_ids)


def test_pairs_and_rollouts_select_their_prompts():
    sequences = grouped([[4], [5]], [0, 0, 1])
    pairs = PreferencePairs(chosen=sequences, rejected=sequences, margin=torch.zeros(3))
    assert pairs.num_tokens.tolist() == [4, 4, 4]
    assert pairs.select(torch.tensor([2])).rejected.unique_prompt_ids.tolist() == [[5]]
    assert prompts_of(PreferencePairs.cat([pairs, pairs]).chosen) == [[4], [4], [5]] * 2


def test_prompts_of_sequences_move():
    moved = grouped([[4], [5]], [0, 1]).to("meta")
    assert {moved.unique_prompt_ids.device.type, moved.unique_prompt_mask.device.type} == {"meta"}
    assert moved.prompt_of_row.device.type == "meta"


# --- outputs by name --------------------------------------------------------------------------------------------------


def outputs(first: float) -> TokenOutputs:
    """Of two rows: one output of each shape, and one without a property."""
    table = first + torch.arange(4.0).view(2, 2)
    return TokenOutputs(named={"logprobs": table, "last_values": -table[:, 0], "auxiliary": 10 * table})


def test_outputs_are_read_by_name():
    named = {name: torch.full((1, 2), float(n)) for n, name in enumerate(["logprobs", "entropy", "values"])}
    every = TokenOutputs(named={**named, "last_values": torch.tensor([3.0])})
    read = (every.logprobs, every.entropy, every.values, every.last_values)
    assert [float(x.flatten()[0]) for x in read] == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize("name", ["logprobs", "entropy", "values", "last_values"])
def test_an_output_that_the_module_does_not_have_is_an_error(name):
    with pytest.raises(KeyError, match=name):
        getattr(TokenOutputs(named={}), name)


def test_outputs_of_two_modules_become_one():
    policy, critic = (
        TokenOutputs(named={"logprobs": torch.zeros(1, 2)}),
        TokenOutputs(named={"values": torch.ones(1, 2)}),
    )
    both = policy.merge(critic)
    assert list(both.named) == ["logprobs", "values"]
    assert both.logprobs is policy.logprobs
    assert both.values is critic.values
    assert list(policy.named) == ["logprobs"]


def test_every_output_is_selected_moved_and_put_together():
    """Those without a property too; tables are padded on the right."""
    wide = TokenOutputs(
        named={
            "logprobs": torch.full((1, 3), 9.0),
            "last_values": torch.tensor([8.0]),
            "auxiliary": torch.full((1, 3), 7.0),
        }
    )
    both = TokenOutputs.cat([outputs(0.0), wide])
    assert both.logprobs.tolist() == [[0, 1, 0], [2, 3, 0], [9, 9, 9]]
    assert both.last_values.tolist() == [0, -2, 8]
    assert both.named["auxiliary"].tolist() == [[0, 10, 0], [20, 30, 0], [7, 7, 7]]
    some = both.select(torch.tensor([2, 0]))
    assert some.last_values.tolist() == [8, 0]
    assert some.named["auxiliary"].tolist() == [[7, 7, 7], [0, 10, 0]]
    assert {x.device.type for x in both.to("meta").named.values()} == {"meta"}
