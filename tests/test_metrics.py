import statistics

import pytest
import torch

from llmrl.functional.statistics import Explained, Maximum, Mean, Minimum, Moments, Total
from llmrl.metrics import Metrics, pool


def metrics(**statistics):
    return Metrics(dict(statistics))


def test_a_pooled_mean_is_no_mean_of_means():
    """One token of loss 4 and three of loss 0: the mean is 1, that of the two means 2."""
    merged = metrics(loss=Mean(4.0, 1.0)).merge(metrics(loss=Mean(torch.tensor(0.0), torch.tensor(3))))
    assert merged.values() == {"loss": 1.0}


def test_totals_add_and_maxima_stay():
    merged = metrics(tokens=Total(3), ratio=Maximum(0.5)).merge(
        metrics(tokens=Total(torch.tensor(4)), ratio=Maximum(-1.0))
    )
    assert merged.values() == {"tokens": 7.0, "ratio": 0.5}


@pytest.mark.parametrize("left", [1.5, torch.tensor(1.5)])
@pytest.mark.parametrize("right", [2.5, torch.tensor(2.5)])
def test_maxima_of_numbers_and_tensors(left, right):
    assert metrics(x=pool(Maximum(left), Maximum(right))).values() == {"x": 2.5}
    assert metrics(x=pool(Maximum(right), Maximum(left))).values() == {"x": 2.5}


@pytest.mark.parametrize("left", [1.5, torch.tensor(1.5)])
@pytest.mark.parametrize("right", [-2.5, torch.tensor(-2.5)])
def test_minima_of_numbers_and_tensors(left, right):
    assert metrics(x=pool(Minimum(left), Minimum(right))).values() == {"x": -2.5}
    assert metrics(x=pool(Minimum(right), Minimum(left))).values() == {"x": -2.5}


def test_moments_of_the_whole():
    """1, 2 and 6: mean 3, deviations -2, -1, 3, population variance 14 / 3."""
    of_two, of_one = Moments(2, 3.0, 5.0), Moments(torch.tensor(1), torch.tensor(6.0), torch.tensor(36.0))
    values = metrics(score=of_two).merge(metrics(score=of_one)).values()
    assert values == {"score/mean": pytest.approx(3.0), "score/std": pytest.approx((14 / 3) ** 0.5)}


def test_equal_values_have_no_spread():
    """0.1 three times: rounding must not make the root of a negative number."""
    assert metrics(x=Moments(3, 0.3, 0.03)).values()["x/std"] == pytest.approx(0.0, abs=1e-8)
    assert metrics(x=Moments(3, 3.0, 3.0 - 1e-12)).values()["x/std"] == 0.0


def explained(targets, predictions):
    """Of these in one part."""
    targets = torch.tensor(targets, dtype=torch.float64)
    residuals = targets - torch.tensor(predictions, dtype=torch.float64)
    sums = targets.sum(), targets.square().sum(), residuals.sum(), residuals.square().sum()
    return Explained(torch.tensor(len(targets)), *sums)


TARGETS, PREDICTIONS = [1.0, 4.0, -2.0, 0.5, 3.0], [0.5, 3.0, -1.0, 0.0, 5.0]


@pytest.mark.parametrize("cut", [0, 1, 3, 5])
def test_the_explained_share_is_one_less_two_variances_of_the_whole(cut):
    residuals = [target - prediction for target, prediction in zip(TARGETS, PREDICTIONS, strict=True)]
    expected = 1 - statistics.pvariance(residuals) / statistics.pvariance(TARGETS)
    parts = [explained(TARGETS[part], PREDICTIONS[part]) for part in (slice(cut), slice(cut, None))]
    assert metrics(x=parts[0]).merge(metrics(x=parts[1])).values() == {"x": pytest.approx(expected)}


@pytest.mark.parametrize(
    ("predictions", "share"),
    [
        (TARGETS, 1.0),
        ([x + 7.0 for x in TARGETS], 1.0),  # a common shift is no spread
        ([2.0] * 5, 0.0),
        ([-x for x in TARGETS], -3.0),  # twice as far off as a constant: four times its variance
    ],
)
def test_the_explained_share_by_hand(predictions, share):
    assert metrics(x=explained(TARGETS, predictions)).values() == {"x": pytest.approx(share)}


@pytest.mark.parametrize("target", [0.0, 0.1, 0.9, -3.7, 1e4])
def test_no_variance_is_explained_by_nobody(target):
    """The variance of equal numbers is rounding, and nothing is a share of that."""
    targets = torch.full((7,), target).tolist()
    assert metrics(x=explained(targets, [1.0, 2.0, 0.0, 0.0, 5.0, -1.0, 0.5])).values() == {}
    off = [x + 1e-7 * max(abs(x), 1.0) * (-1) ** n for n, x in enumerate(targets)]  # as float32 rounds
    assert metrics(x=explained(off, [1.0, 2.0, 0.0, 0.0, 5.0, -1.0, 0.5])).values() == {}


def test_a_small_variance_is_a_variance():
    small = [0.9 + 1e-4 * x for x in TARGETS]
    assert metrics(x=explained(small, small)).values() == {"x": pytest.approx(1.0)}


def test_a_mean_over_nothing_is_left_out():
    nothing = metrics(a=Mean(0.0, 0.0), b=Moments(0, 0.0, 0.0), c=Total(0), d=Explained(0, 0.0, 0.0, 0.0, 0.0))
    assert nothing.values() == {"c": 0.0}


def test_merge_keeps_what_only_one_has_and_changes_neither():
    left, right = metrics(a=Total(1)), metrics(b=Total(2))
    assert left.merge(right).values() == {"a": 1.0, "b": 2.0}
    assert left.values() == {"a": 1.0}
    assert right.values() == {"b": 2.0}


def test_merging_is_associative_and_starts_from_nothing():
    parts = [metrics(x=Mean(float(n), n + 1.0), y=Maximum(-float(n)), z=Moments(1, n, n * n)) for n in range(3)]
    forward = Metrics().merge(parts[0]).merge(parts[1]).merge(parts[2])
    backward = parts[0].merge(parts[1].merge(parts[2]))
    assert (
        forward.values()
        == backward.values()
        == {"x": 0.5, "y": 0.0, "z/mean": 1.0, "z/std": pytest.approx((2 / 3) ** 0.5)}
    )


@pytest.mark.parametrize("other", [Total(1), Maximum(1.0), Moments(1, 1.0, 1.0), Explained(1, 1.0, 1.0, 1.0, 1.0)])
def test_one_name_with_two_meanings_is_an_error(other):
    with pytest.raises(TypeError, match=f"cannot pool a Mean with a {type(other).__name__}"):
        metrics(x=Mean(1.0, 1.0)).merge(metrics(x=other))


def test_per_step_turns_totals_into_means_over_steps():
    """Two optimizer steps with losses 1 + 2 and 5 over their microbatches: 4 a step."""
    first = metrics(loss=Total(1.0)).merge(metrics(loss=Total(2.0))).per_step()
    second = metrics(loss=Total(5.0), kl=Mean(1.0, 4.0)).per_step()
    assert first.merge(second).values() == {"loss": 4.0, "kl": 0.25}


def test_without():
    assert metrics(a=Total(1), b=Total(2), c=Total(3)).without("a", "c", "not there").values() == {"b": 2.0}


def test_values_are_floats_in_the_order_of_the_names():
    mixed = metrics(
        a=Total(torch.tensor(3)),
        b=Mean(torch.tensor(1.0, requires_grad=True), 2),
        c=Maximum(7),
        d=Moments(torch.tensor(2), 4.0, torch.tensor(10.0)),
        e=Total(torch.tensor(True)),
    )
    values = mixed.values()
    assert list(values.items()) == [("a", 3.0), ("b", 0.5), ("c", 7.0), ("d/mean", 2.0), ("d/std", 1.0), ("e", 1.0)]
    assert all(type(value) is float for value in values.values())
    assert Metrics().values() == {}
