import math

import pytest
import torch
from torch.testing import assert_close

from llmrl.functional.streams import uniforms
from llmrl.rollout.responses import Response
from llmrl.rollout.sampler import Sampler, draw

from .tiny import Counter, make_sampling

PROBABILITIES = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.97, 0.01, 0.01, 0.01]])


def make_sampler(progress=None, vocab_size=4, eos_ids=(2,), **changes):
    return Sampler(make_sampling(**changes), eos_ids=eos_ids, vocab_size=vocab_size, progress=progress or Counter())


def drawn(probabilities, count=400, **changes):
    """Ids and log-probabilities of this many rows with the same probabilities, each of its own stream."""
    numbers = torch.arange(count)
    return draw(
        torch.tensor([probabilities]).log().expand(count, -1),
        numbers,
        torch.zeros_like(numbers),
        make_sampling(**changes),
    )


def test_a_draw_is_where_the_uniform_number_falls():
    numbers, tokens = torch.tensor([3, 8]), torch.tensor([0, 5])
    sampling = make_sampling()
    ids, logprobs = draw(PROBABILITIES.log(), numbers, tokens, sampling)
    u = uniforms(sampling.seed, sampling.purpose, numbers, tokens).tolist()
    for row in range(2):
        edges = PROBABILITIES[row].cumsum(0).tolist()
        assert ids[row] == next(i for i, edge in enumerate(edges) if u[row] < edge)
        assert_close(logprobs[row], PROBABILITIES[row, ids[row]].log())


def test_a_row_draws_the_same_among_other_rows():
    numbers, tokens = torch.arange(64), torch.arange(64) % 7
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(0))
    together, _ = draw(logits, numbers, tokens, make_sampling())
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    apart, _ = draw(logits[order], numbers[order], tokens[order], make_sampling())
    assert together[order].equal(apart)


def test_an_impossible_token_is_never_drawn():
    ids, _ = drawn([0.0, 0.5, 0.0, 0.5])
    assert set(ids.tolist()) == {1, 3}


def test_temperature_divides_the_logits():
    ids, logprobs = drawn([0.2, 0.8], temperature=0.5)
    expected = torch.tensor([0.04, 0.64]) / 0.68
    assert_close(logprobs, expected.log()[ids])
    assert abs((ids == 0).float().mean() - expected[0]) < 4 * math.sqrt(expected[0] / 400)


def test_greedy_takes_the_likeliest():
    ids, logprobs = drawn([0.2, 0.5, 0.3], greedy=True, temperature=2.0)
    assert ids.eq(1).all()
    assert_close(
        logprobs[0], torch.tensor(math.log(math.sqrt(0.5) / (math.sqrt(0.2) + math.sqrt(0.5) + math.sqrt(0.3))))
    )


def test_extend_appends_one_token_to_each_response_and_counts_the_complete_ones():
    progress = Counter()
    sampler = make_sampler(progress, greedy=True, max_response_tokens=2)
    ended, cut = Response(number=0), Response(number=1)
    sampler.extend([ended, cut], torch.tensor([[0.0, 9.0, 0.0, 0.0], [9.0, 0.0, 0.0, 0.0]]))
    assert (ended.ids, cut.ids) == ([1], [0])
    assert not sampler.is_complete(ended)
    assert progress.advanced == 0
    sampler.extend([ended, cut], torch.tensor([[0.0, 0.0, 9.0, 0.0], [0.0, 9.0, 0.0, 0.0]]))
    assert (ended.ids, cut.ids) == ([1, 2], [0, 1])
    assert (ended.finished, cut.finished) == (True, False)
    assert sampler.is_complete(ended)
    assert sampler.is_complete(cut)
    assert progress.advanced == 2
    assert ended.logprobs == pytest.approx([9 - math.log(math.exp(9) + 3)] * 2, abs=1e-6)


def test_ids_past_the_tokenizer_have_no_probability():
    response = Response(number=0)
    make_sampler(vocab_size=2, greedy=True).extend([response], torch.tensor([[0.0, 0.0, 50.0, 50.0]]))
    assert response.ids == [0]
    assert response.logprobs == pytest.approx([-math.log(2)])


def test_large_ids_survive_the_way_to_the_host():
    response = Response(number=0)
    logits = torch.zeros(1, 200_001)
    logits[0, 199_999] = 99.0
    make_sampler(vocab_size=200_001, greedy=True).extend([response], logits)
    assert response.ids == [199_999]


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_refused_by_name(bad, greedy):
    healthy, sick = Response(number=40), Response(number=43, ids=[1, 1], logprobs=[-1.0, -1.0])
    logits = torch.zeros(2, 4)
    logits[1, 3] = bad
    with pytest.raises(
        FloatingPointError, match=r"prompt 1 of this rollout are not finite at response token 2 \(response number 43\)"
    ):
        make_sampler(greedy=greedy, first_response=40).extend([healthy, sick], logits)
    assert sick.ids == [1, 1]
