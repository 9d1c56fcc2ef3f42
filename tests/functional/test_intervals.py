import math

import pytest
import torch

from llmrl.functional.intervals import mean_interval, paired_interval, pass_at_k, wilson_interval
from llmrl.functional.streams import Purpose, uniforms
from tests import oracles


def test_wilson_by_hand():
    # z = 1: (p + 1/2n ± sqrt(p q / n + 1/4n²)) / (1 + 1/n) with n = 4, p = 1/2
    half = math.sqrt(0.25 / 4 + 1 / 64)
    assert wilson_interval(2, 4, z=1.0) == pytest.approx(((0.625 - half) / 1.25, (0.625 + half) / 1.25))


@pytest.mark.parametrize(("num_successes", "num_trials"), [(0, 5), (1, 7), (30, 60), (200, 200), (1, 10000)])
def test_wilson_bounds_solve_the_score_test(num_successes, num_trials):
    low, high = wilson_interval(num_successes, num_trials, z=1.96)
    assert low == pytest.approx(oracles.wilson_bound(num_successes, num_trials, 1.96, upper=False), abs=1e-9)
    assert high == pytest.approx(oracles.wilson_bound(num_successes, num_trials, 1.96, upper=True), abs=1e-9)


def test_wilson_is_symmetric_and_stays_within_0_and_1():
    low, high = wilson_interval(3, 20)
    assert wilson_interval(17, 20) == pytest.approx((1 - high, 1 - low))
    assert wilson_interval(0, 20)[0] == 0
    assert wilson_interval(20, 20)[1] == 1
    assert wilson_interval(0, 0) == (0, 1)


@pytest.mark.parametrize(("num_successes", "num_trials"), [(-1, 5), (6, 5), (0, -1)])
def test_wilson_refuses_impossible_counts(num_successes, num_trials):
    with pytest.raises(ValueError, match="num_successes"):
        wilson_interval(num_successes, num_trials)


def test_pass_at_k_by_hand():
    # 4 samples: with 1 correct, 2 of them hold it half the time; with 2, all but 1 of 6 pairs hold one.
    assert pass_at_k(torch.tensor([0, 1, 2, 3, 4]), 4, 2).tolist() == pytest.approx([0, 0.5, 5 / 6, 1, 1])


def test_pass_at_k_counts_subsets():
    for n in range(1, 8):
        for k in range(1, n + 1):
            expected = [oracles.pass_at_k(c, n, k) for c in range(n + 1)]
            assert pass_at_k(torch.arange(n + 1), n, k).tolist() == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_of_many_samples_is_stable():
    assert pass_at_k(torch.tensor([1]), 100_000, 1000).item() == pytest.approx(0.01, rel=1e-9)
    assert pass_at_k(torch.tensor([3]), 50, 1).item() == pytest.approx(3 / 50)


@pytest.mark.parametrize("k", [0, 5])
def test_pass_at_k_draws_from_what_there_is(k):
    with pytest.raises(ValueError, match=rf"k \({k}\).*num_samples \(4\)"):
        pass_at_k(torch.tensor([1]), 4, k)


def test_mean_by_hand():
    # sample variance of 1, 2, 3 is 1
    half = 2 / math.sqrt(3)
    assert mean_interval(torch.tensor([1.0, 2.0, 3.0]), z=2.0) == pytest.approx((2, 2 - half, 2 + half))


def test_mean_of_equal_values_is_certain_and_of_one_is_not():
    assert mean_interval(torch.full((9,), 0.25)) == (0.25, 0.25, 0.25)
    assert mean_interval(torch.tensor([0.5])) == (0.5, -math.inf, math.inf)
    with pytest.raises(ValueError, match="at least one"):
        mean_interval(torch.tensor([]))


def test_mean_intervals_hold_the_truth_as_often_as_they_say():
    number, token = torch.arange(2000)[:, None].expand(2000, 60), torch.arange(60).expand(2000, 60)
    draws = uniforms(0, Purpose.EVALUATION, number, token)
    held = sum(low <= 0.5 <= high for _, low, high in map(mean_interval, draws))
    assert 0.93 < held / 2000 < 0.965


def test_paired_by_hand():
    """Differences 0.5, 0, 1 of three prompts: mean 0.5, sample variance 0.25."""
    after, before = torch.tensor([1.0, 0.25, 1.0]), torch.tensor([0.5, 0.25, 0.0])
    half = 2 * 0.5 / math.sqrt(3)
    assert paired_interval(after, before, z=2.0) == pytest.approx((0.5, 0.5 - half, 0.5 + half))


def test_paired_has_the_variance_of_both_less_twice_the_covariance():
    hard = torch.tensor([0.0, 0.1, 0.4, 0.8, 0.9])
    after, before = hard + torch.tensor([0.1, 0.0, 0.1, 0.0, 0.1]), hard
    covariance = torch.cov(torch.stack([after, before]).double())
    variance = float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    difference, low, high = paired_interval(after, before)
    assert difference == pytest.approx(0.06)
    assert (high - low) / 2 == pytest.approx(1.959964 * math.sqrt(variance / 5), rel=1e-4)
    apart = 1.959964 * math.sqrt(float(covariance[0, 0] + covariance[1, 1]) / 5)
    assert (high - low) / 2 < apart / 5


def test_paired_changes_its_sign_with_its_order_and_nothing_differs_from_itself():
    after, before = torch.tensor([1.0, 0.5, 0.0]), torch.tensor([0.0, 0.25, 0.75])
    difference, low, high = paired_interval(after, before)
    assert paired_interval(before, after) == pytest.approx((-difference, -high, -low))
    assert paired_interval(after, after) == (0.0, 0.0, 0.0)


def test_paired_covers_the_true_difference_as_often_as_it_says():
    """400 experiments of 200 prompts whose difference is 0.1 on average and whose level varies far more."""
    u = uniforms(3, Purpose.EVALUATION, torch.arange(400)[:, None].expand(400, 400), torch.arange(400).expand(400, 400))
    before = u[:, :200] * 10
    after = before + 0.2 * u[:, 200:]
    covered = [
        low <= 0.1 <= high for _, low, high in (paired_interval(*pair) for pair in zip(after, before, strict=True))
    ]
    assert 0.92 <= sum(covered) / 400 <= 0.98


def test_paired_needs_two_measurements_of_each(production):
    with pytest.raises(ValueError, match=r"after.*before"):
        paired_interval(torch.zeros(3), torch.zeros(2))
    with pytest.raises(ValueError, match="at least one"):
        paired_interval(torch.zeros(0), torch.zeros(0))
