import pytest
import torch
from torch.testing import assert_close

from llmrl.batches import StopReason
from llmrl.rollout.responses import Responses

from .tiny import make_prompts, make_sampling

PROMPTS = make_prompts([7, 8], [9])
NONE, EOS, LENGTH, *_ = StopReason


def make_responses(eos_ids=(2,), **changes):
    return Responses(PROMPTS, make_sampling(first_response=12, **changes), eos_ids=eos_ids)


def append(responses, ids, logprob=-1.0):
    """Appends these chosen ids, by row; returns their stop reasons."""
    rows = torch.tensor(list(ids))
    reasons = responses.append(rows, torch.tensor(list(ids.values())), torch.full((len(ids),), logprob))
    return reasons.tolist()


def positions(responses):
    return responses.stream_positions(torch.arange(4)).tolist()


def test_responses_are_numbered_on_from_the_first():
    responses = make_responses(num_responses=3)
    assert responses.numbers.tolist() == [12, 13, 14, 15, 16, 17]
    assert responses.ids.shape == responses.logprobs.shape == responses.chosen.shape == (6, 12)
    assert not responses.chosen.any()
    assert responses.lengths.tolist() == responses.stop_reason.tolist() == [0] * 6


def test_a_rollout_by_hand():
    responses = make_responses(max_response_tokens=5)
    append(responses, {0: 4, 1: 5, 2: 2, 3: 8}, -0.5)
    append(responses, {3: 9, 0: 2, 1: 6}, -1.5)
    append(responses, {1: 7}, -2.0)
    responses.stop_reason[torch.tensor([1, 3])] = LENGTH
    rollout = responses.rollout()
    sequences = rollout.sequences
    assert sequences.prompt_of_row.tolist() == [0, 0, 1, 1]
    assert sequences.prompt_ids.tolist() == [[2, 7, 8], [2, 7, 8], [2, 2, 9], [2, 2, 9]]
    assert sequences.prompt_mask.int().tolist() == [[0, 1, 1], [0, 1, 1], [0, 0, 1], [0, 0, 1]]
    assert sequences.response_ids.tolist() == [[4, 2, 0], [5, 6, 7], [2, 0, 0], [8, 9, 0]]
    assert sequences.response_mask.int().tolist() == [[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert sequences.response_lengths.tolist() == [2, 3, 1, 2]
    assert_close(
        rollout.rollout_logprobs, torch.tensor([[-0.5, -1.5, 0], [-0.5, -1.5, -2.0], [-0.5, 0, 0], [-0.5, -1.5, 0]])
    )
    assert rollout.stop_reason.tolist() == [EOS, LENGTH, EOS, LENGTH]
    assert rollout.finished.tolist() == [True, False, True, False]
    assert rollout.group_ids.tolist() == [6, 6, 7, 7]
    assert [row["row"] for row in rollout.rows] == [0, 0, 1, 1]


def test_a_chosen_eos_or_the_length_limit_ends_a_response():
    responses = make_responses(eos_ids=(2, 5), max_response_tokens=2)
    assert append(responses, {0: 4, 1: 5, 2: 4, 3: 4}) == [NONE, EOS, NONE, NONE]
    assert append(responses, {3: 4, 0: 2, 2: 3}) == [LENGTH, EOS, LENGTH]
    assert responses.stop_reason.tolist() == [EOS, EOS, LENGTH, LENGTH]


def test_without_an_eos_only_the_limit_ends_a_response():
    responses = make_responses(eos_ids=(), max_response_tokens=2)
    assert append(responses, {0: 2}) == [NONE]
    assert append(responses, {0: 2}) == [LENGTH]


def test_fed_tokens_are_attended_and_neither_chosen_nor_drawn():
    """The picture at the top of the file, in row 1, beside a row that is fed nothing and one that begins with it."""
    responses = make_responses(max_response_tokens=8)
    append(responses, {1: 10, 2: 20})
    responses.feed({3: [5]})
    append(responses, {1: 11})
    responses.feed({1: [31, 32]})
    assert positions(responses) == [0, 2, 1, 0]
    assert responses.last_ids(torch.tensor([1, 2, 3])).tolist() == [32, 20, 5]
    append(responses, {1: 12, 3: 13})
    append(responses, {1: 2})
    assert positions(responses) == [0, 4, 1, 1]
    rollout = responses.rollout()
    assert rollout.sequences.response_ids.tolist()[1:] == [[10, 11, 31, 32, 12, 2], [20] + [0] * 5, [5, 13] + [0] * 4]
    assert rollout.sequences.response_mask.int().tolist()[1:] == [[1, 1, 0, 0, 1, 1], [1] + [0] * 5, [0, 1] + [0] * 4]
    assert rollout.rollout_logprobs.tolist()[1:] == [[-1, -1, 0, 0, -1, -1], [-1] + [0] * 5, [0, -1] + [0] * 4]
    assert rollout.sequences.response_lengths.tolist() == [0, 6, 1, 2]
    assert rollout.stop_reason.tolist() == [NONE, EOS, NONE, NONE]


def test_feeding_undoes_an_eos_and_a_fed_eos_ends_nothing():
    responses = make_responses()
    append(responses, {0: 2, 1: 2})
    responses.feed({1: [2, 2]})
    assert responses.stop_reason.tolist() == [EOS, NONE, NONE, NONE]


def test_a_response_that_is_fed_up_to_the_limit_is_cut():
    responses = make_responses(max_response_tokens=3)
    append(responses, {0: 4, 1: 4})
    responses.feed({0: [5, 6], 1: [5]})
    assert responses.stop_reason.tolist() == [LENGTH, NONE, NONE, NONE]


def test_tokens_without_room_are_refused_and_nothing_is_fed():
    responses = make_responses(max_response_tokens=3)
    append(responses, {1: 4})
    with pytest.raises(ValueError, match=r"3 tokens to feed to response 1 .* has 1, must be at most 2: "):
        responses.feed({0: [5, 6], 1: [5, 6, 7]})
    assert responses.lengths.tolist() == [0, 1, 0, 0]
    assert not responses.fed.any()
