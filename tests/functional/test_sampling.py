import math

import pytest
import torch
from torch.testing import assert_close

from llmrl.functional.sampling import BLOCK, _running_sums, _search, draw_tokens, inverse_cdf
from llmrl.functional.streams import Purpose, uniforms
from tests import oracles

ALMOST_ONE = 1 - 2.0**-53


def draw(row, us):
    us = torch.tensor(us, dtype=torch.float64)
    return inverse_cdf(row.expand(len(us), -1), us).tolist()


def test_by_hand():
    p = torch.tensor([0.25, 0.0, 0.5, 0.25])
    # The boundaries themselves belong to the next id: the cumulative probability must exceed u.
    assert draw(p, [0.0, 0.2499, 0.25, 0.7499, 0.75, ALMOST_ONE]) == [0, 0, 2, 2, 3, 3]


def test_rows_need_not_sum_to_1():
    assert draw(torch.tensor([1.0, 2.0, 1.0]) * 1e-20, [0.2, 0.3, 0.7, 0.8]) == [0, 1, 1, 2]


@pytest.mark.parametrize("v", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_by_definition_at_every_size(v, dtype):
    p = (3 * torch.randn(v)).softmax(0).to(dtype)
    us = [*torch.rand(50, dtype=torch.float64).tolist(), 0.0, ALMOST_ONE]
    assert draw(p, us) == [oracles.inverse_cdf(p.double().tolist(), u) for u in us]


def test_equals_the_full_cumulative_sum_in_float64():
    p = torch.randn(64, 5003).mul(2).softmax(1)
    u = torch.rand(64, dtype=torch.float64)
    cumulative = p.double().cumsum(1)
    expected = torch.searchsorted(cumulative, (u * cumulative[:, -1])[:, None], right=True).squeeze(1)
    assert_close(inverse_cdf(p, u), expected)


def test_block_boundaries():
    p = torch.zeros(2 * BLOCK + 5)
    chosen = [0, BLOCK - 1, BLOCK, 2 * BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 4]
    p[chosen] = 1.0
    us = [(i + fraction) / 6 for i in range(6) for fraction in (0.01, 0.5, 0.99)]
    assert draw(p, us) == [c for c in chosen for _ in range(3)]
    assert draw(p, [i / 6 for i in (0, 3)]) == [0, 2 * BLOCK - 1]


def test_zero_probabilities_are_never_drawn():
    v = 3 * BLOCK + 17
    p = torch.rand(200, v) * 1e-3
    p[torch.rand(200, v) < 0.97] = 0.0
    p[:, -40:] = 0.0
    p[:, 100] = 1e-30  # so small that no sum notices
    for u in (0.0, 1e-300, 0.5, ALMOST_ONE, 1 - 1e-12):
        ids = inverse_cdf(p, torch.full((200,), u, dtype=torch.float64))
        assert (p.gather(1, ids[:, None]) > 0).all()
    assert (inverse_cdf(p[:, :BLOCK], torch.full((200,), ALMOST_ONE, dtype=torch.float64)) < BLOCK).all()


def test_a_target_that_rounding_put_out_of_reach_still_finds_the_last_id():
    """The sum of a block and its cumulative sum round differently, and u is as large as can be."""
    p = torch.rand(500, 200, dtype=torch.float64)
    p[:, 160:] = 0.0
    sums, cumulative = p.sum(1), p.cumsum(1)[:, -1]
    assert (sums > cumulative).any()
    u = torch.full((500,), ALMOST_ONE, dtype=torch.float64)
    assert (inverse_cdf(p, u) == 159).all()
    assert (inverse_cdf(p[:, :160], u) == 159).all()


def test_a_target_that_rounding_put_below_0_finds_the_first_id():
    """A parallel cumulative sum need not be monotone, so a remainder may come out negative."""
    index, _ = _search(torch.tensor([[0.0, 1.0, 1.0]]).double(), torch.tensor([-1e-17]).double())
    assert index.tolist() == [1]


def test_frequencies_are_the_probabilities():
    p = torch.tensor([0.05, 0.2, 0.0, 0.3, 0.45])
    u = uniforms(0, Purpose.TRAINING, torch.arange(20000), torch.zeros(20000, dtype=torch.long))
    counts = torch.bincount(inverse_cdf(p.expand(20000, -1), u), minlength=5)
    expected = 20000 * p
    assert counts[2] == 0
    assert ((counts - expected) ** 2 / expected)[p > 0].sum() < 16.3  # 0.999 quantile with 3 degrees of freedom


def test_a_row_does_not_depend_on_its_neighbours():
    p, u = torch.randn(16, 700).softmax(1), torch.rand(16, dtype=torch.float64)
    order = torch.randperm(16)
    whole = inverse_cdf(p, u)
    assert_close(inverse_cdf(p[order], u[order]), whole[order])
    assert inverse_cdf(p[3:4], u[3:4]) == whole[3]


@pytest.mark.usefixtures("production")
def test_shapes_are_checked_at_the_door():
    with pytest.raises(ValueError, match=r"probabilities \(2, 5\), uniforms \(3,\)"):
        inverse_cdf(torch.ones(2, 5), torch.zeros(3))


@pytest.mark.parametrize("rows", [1, 5])
def test_where_algorithms_have_to_be_deterministic_no_cumulative_sum_is_asked_for(rows, monkeypatch):
    """Torch refuses that on a GPU."""
    masses = torch.rand(rows, 600, dtype=torch.float64)
    expected, p, u = masses.cumsum(dim=1), torch.rand(rows, 2000), torch.rand(rows)
    drawn = inverse_cdf(p, u)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    monkeypatch.setattr(torch.Tensor, "cumsum", None)
    assert_close(_running_sums(masses), expected, rtol=1e-13, atol=0.0)
    assert torch.equal(inverse_cdf(p, u), drawn)


PROBABILITIES = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.97, 0.01, 0.01, 0.01]])


def tokens(probabilities, *, temperature=1.0, count=400):
    """Ids and log-probabilities of this many draws from the same probabilities."""
    logits = torch.tensor(probabilities).log().expand(count, -1)
    numbers = torch.arange(count)
    return draw_tokens(
        logits, uniforms(0, Purpose.TRAINING, numbers, torch.zeros_like(numbers)), temperature=temperature
    )


def test_a_token_is_where_the_uniform_number_falls():
    u = [0.3001, 0.9699]
    ids, logprobs = draw_tokens(PROBABILITIES.log(), torch.tensor(u, dtype=torch.float64), temperature=1.0)
    assert ids.tolist() == [2, 0] == [oracles.inverse_cdf(p, x) for p, x in zip(PROBABILITIES.tolist(), u, strict=True)]
    assert_close(logprobs.exp(), torch.tensor([0.3, 0.97]))


def test_a_row_draws_the_same_among_other_rows():
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(0))
    u = torch.rand(64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    together, _ = draw_tokens(logits, u, temperature=1.0)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    reordered, _ = draw_tokens(logits[order], u[order], temperature=1.0)
    assert together[order].equal(reordered)


def test_an_impossible_token_is_never_drawn():
    ids, _ = tokens([0.0, 0.5, 0.0, 0.5])
    assert set(ids.tolist()) == {1, 3}


def test_temperature_divides_the_logits():
    ids, logprobs = tokens([0.2, 0.8], temperature=0.5)
    expected = torch.tensor([0.04, 0.64]) / 0.68
    assert_close(logprobs, expected.log()[ids])
    assert abs((ids == 0).float().mean() - expected[0]) < 4 * math.sqrt(expected[0] / 400)


def test_without_a_uniform_number_the_likeliest_token_is_taken():
    ids, logprobs = draw_tokens(torch.tensor([[0.2, 0.5, 0.3]]).log(), None, temperature=2.0)
    assert ids.tolist() == [1]
    assert_close(
        logprobs[0], torch.tensor(math.log(math.sqrt(0.5) / (math.sqrt(0.2) + math.sqrt(0.5) + math.sqrt(0.3))))
    )


@pytest.mark.parametrize("u", [None, torch.tensor([0.5], dtype=torch.float64)])
def test_logits_that_are_no_numbers_have_no_logprob(u):
    for bad in (math.nan, math.inf):
        _, logprobs = draw_tokens(torch.tensor([[0.0, bad, 0.0]]), u, temperature=1.0)
        assert logprobs.isnan().all()
