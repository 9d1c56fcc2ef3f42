import math

import pytest
import torch
from torch.testing import assert_close

from llmrl.batches import StopReason
from llmrl.functional.streams import uniforms
from llmrl.rollout.responses import Responses
from llmrl.rollout.sampler import Sampler

from .tiny import make_prompts, make_sampling

EOS = 2


def make(*, rows=2, vocab_size=4, **changes):
    """A sampler, the responses to as many prompts, and the index of each."""
    sampling = make_sampling(num_responses=1, **changes)
    responses = Responses(make_prompts(*[[7]] * rows), sampling, eos_ids=(EOS,))
    return Sampler(sampling, vocab_size=vocab_size), responses, torch.arange(rows)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_a_draw_is_where_the_uniform_number_of_the_next_position_falls(temperature):
    sampler, responses, rows = make(first_response=30, vocab_size=3, temperature=temperature)
    probabilities = torch.tensor([[0.1, 0.3, 0.6], [0.5, 0.25, 0.25]])
    responses.feed({1: [1, 1]})  # draws nothing
    for position in range(8):
        responses.stop_reason.zero_()
        sampler.extend(responses, rows, probabilities.log())
        tempered = probabilities ** (1 / temperature)
        tempered /= tempered.sum(dim=1, keepdim=True)
        u = uniforms(11, sampler.sampling.purpose, torch.tensor([30, 31]), torch.full((2,), position)).tolist()
        for row, column in ((0, position), (1, position + 2)):
            edges = tempered[row].cumsum(0).tolist()
            token_id = next(i for i, edge in enumerate(edges) if u[row] < edge)
            assert responses.ids[row, column] == token_id
            assert_close(responses.logprobs[row, column], tempered[row, token_id].log())


def test_extend_appends_one_token_to_each_row_and_says_which_are_complete():
    sampler, responses, rows = make(greedy=True, max_response_tokens=2)
    reasons = sampler.extend(responses, rows, torch.tensor([[0.0, 9.0, 0.0, 0.0], [9.0, 0.0, 0.0, 0.0]]))
    assert responses.ids[:, 0].tolist() == [1, 0]
    assert reasons == [StopReason.NONE, StopReason.NONE]
    reasons = sampler.extend(responses, rows, torch.tensor([[0.0, 0.0, 9.0, 0.0], [0.0, 9.0, 0.0, 0.0]]))
    assert responses.ids.tolist() == [[1, 2], [0, 1]]
    assert reasons == [StopReason.EOS, StopReason.LENGTH]
    assert_close(responses.logprobs, torch.full((2, 2), 9 - math.log(math.exp(9) + 3)))


def test_only_the_rows_that_are_asked_for_grow():
    sampler, responses, rows = make(rows=3, greedy=True)
    sampler.extend(responses, rows[[2, 0]], torch.tensor([[0.0, 9.0, 0.0, 0.0], [0.0, 0.0, 0.0, 9.0]]))
    assert responses.lengths.tolist() == [1, 0, 1]
    assert responses.ids[:, 0].tolist() == [3, 0, 1]


def test_ids_past_the_tokenizer_have_no_probability():
    sampler, responses, rows = make(rows=1, vocab_size=2, greedy=True)
    sampler.extend(responses, rows, torch.tensor([[0.0, 0.0, 50.0, 50.0]]))
    assert responses.ids[0, 0] == 0
    assert_close(responses.logprobs[0, 0], torch.tensor(-math.log(2)))


def test_large_ids_survive():
    sampler, responses, rows = make(rows=1, vocab_size=200_001, greedy=True)
    logits = torch.zeros(1, 200_001)
    logits[0, 199_999] = 99.0
    sampler.extend(responses, rows, logits)
    assert responses.ids[0, 0] == 199_999


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_refused_by_name(bad, greedy):
    sampler, responses, rows = make(rows=3, greedy=greedy, first_response=40)
    responses.feed({1: [1, 1]})
    logits = torch.zeros(2, 4)
    logits[1, 3] = bad
    with pytest.raises(
        FloatingPointError, match=r"prompt 1 of this rollout are not finite at response token 2 \(response number 41\)"
    ):
        sampler.extend(responses, rows[:2], logits)


def test_the_prompt_of_a_bad_row_is_that_of_its_group():
    sampling = make_sampling(num_responses=2, first_response=40)
    responses = Responses(make_prompts([7], [8]), sampling, eos_ids=())
    with pytest.raises(FloatingPointError, match=r"prompt 1 .* response token 0 \(response number 43\)"):
        Sampler(sampling, vocab_size=4).extend(responses, torch.tensor([3]), torch.full((1, 4), math.nan))
