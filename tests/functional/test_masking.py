import math

import pytest
import torch
from torch.testing import assert_close

from llmrl.functional.masking import check_shapes, masked_mean, masked_moments, masked_sum, standardize
from tests import oracles


@pytest.fixture
def x(mask):
    return torch.randn(mask.shape)


def entries(x, mask):
    return oracles.masked_entries(x.double().tolist(), mask.tolist())


def test_by_hand():
    x, mask = torch.tensor([1.0, 2.0, 100.0, 6.0]), torch.tensor([True, True, False, True])
    assert masked_sum(x, mask) == 9
    assert masked_mean(x, mask) == 3
    assert [m.item() for m in masked_moments(x, mask)] == [3, 9, 41]
    # variance 41/3 - 9 = 14/3
    assert_close(standardize(x, mask), torch.tensor([-2.0, -1.0, 0.0, 3.0]) / (14 / 3 + 1e-8) ** 0.5)


def test_by_definition(x, mask):
    values = entries(x, mask)
    assert masked_sum(x, mask).item() == pytest.approx(sum(values), rel=1e-5)
    assert masked_mean(x, mask).item() == pytest.approx(sum(values) / len(values), rel=1e-5)
    count, total, square = masked_moments(x, mask)
    assert (count.dtype, total.dtype, square.dtype) == (torch.float64,) * 3
    expected = (len(values), sum(values), sum(v * v for v in values))
    assert (count.item(), total.item(), square.item()) == pytest.approx(expected, rel=1e-12)


def test_standardized_has_mean_0_and_variance_1(x, mask):
    values = entries(standardize(x * 3 + 7, mask), mask)
    mean = sum(values) / len(values)
    assert_close(mean, 0.0, atol=1e-6, rtol=0)
    assert_close(sum((v - mean) ** 2 for v in values) / len(values), 1.0)
    assert (standardize(x, mask)[~mask] == 0).all()


def test_parts_that_share_moments_are_cut_from_the_whole(x, mask):
    whole = standardize(x, mask)
    parts = [(x[:2], mask[:2]), (x[2:], mask[2:])]
    moments = [sum(m) for m in zip(*(masked_moments(*part) for part in parts), strict=True)]
    assert_close(torch.cat([standardize(*part, moments=moments) for part in parts]), whole)
    assert_close(torch.cat([standardize(*part, moments=torch.stack(moments)) for part in parts]), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 0.1, -1e6 / 3, 1e-7 / 3, 7.7e11])
def test_equal_values_standardize_to_exactly_0(value, dtype):
    x = torch.full((3, 333), value, dtype=dtype)
    assert (standardize(x, torch.ones_like(x, dtype=torch.bool)) == 0).all()


def test_a_single_value_standardizes_to_exactly_0():
    assert standardize(torch.tensor([3.3, 9.9]), torch.tensor([True, False])).tolist() == [0, 0]


def test_small_differences_on_a_large_offset_survive():
    x = torch.tensor([1e6, 1e6 + 0.0625])  # neighbours in float32
    assert_close(standardize(x, torch.tensor([True, True])), torch.tensor([-1.0, 1.0]), rtol=1e-2, atol=0)


def test_a_variance_near_0_does_not_blow_up():
    x = torch.tensor([0.0, 2e-5], dtype=torch.float64)  # population variance 1e-10
    expected = 1e-5 / (1e-10 + 1e-8) ** 0.5
    assert standardize(x, torch.tensor([True, True])).tolist() == pytest.approx([-expected, expected])


def test_nothing_counted_gives_0():
    x, mask = torch.full((2, 3), torch.nan), torch.zeros(2, 3, dtype=torch.bool)
    assert masked_sum(x, mask) == 0
    assert masked_mean(x, mask) == 0
    assert [m.item() for m in masked_moments(x, mask)] == [0, 0, 0]
    assert (standardize(x, mask) == 0).all()


@pytest.mark.parametrize("junk", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("reduce", [masked_sum, masked_mean, lambda x, m: standardize(x, m).square().sum()])
def test_what_stands_outside_changes_neither_value_nor_gradient(x, mask, junk, reduce):
    clean, dirty = x.clone().requires_grad_(), torch.where(mask, x, junk).requires_grad_()
    assert_close(reduce(dirty, mask), reduce(clean, mask), rtol=0, atol=0)
    reduce(clean, mask).backward()
    reduce(dirty, mask).backward()
    assert_close(dirty.grad, clean.grad, rtol=0, atol=0)
    assert (dirty.grad[~mask] == 0).all()


def test_standardize_ignores_shift_and_scale(x, mask):
    assert_close(standardize(5 * x - 3, mask), standardize(x, mask))


@pytest.mark.parametrize("function", [masked_sum, masked_mean, masked_moments, standardize])
@pytest.mark.usefixtures("production")
def test_shapes_are_checked_at_the_door(function):
    with pytest.raises(ValueError, match=r"x \(2, 3\), mask \(3,\)"):
        function(torch.zeros(2, 3), torch.ones(3, dtype=torch.bool))


@pytest.mark.usefixtures("production")
def test_shapes_are_checked_where_moments_are_handed_in():
    x, mask = torch.zeros(2, 3), torch.ones(3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"x \(2, 3\), mask \(3,\)"):
        standardize(x, mask, moments=masked_moments(x[0], mask))


def test_check_shapes_binds_each_letter_once():
    check_shapes(a=(torch.zeros(2, 3), "B T"), b=(torch.zeros(2), "B"), c=(torch.zeros(3), "T"))
    with pytest.raises(ValueError, match=r"a \(2, 3\), b \(3,\) must be \(B, T\), \(B\)"):
        check_shapes(a=(torch.zeros(2, 3), "B T"), b=(torch.zeros(3), "B"))
    with pytest.raises(ValueError, match=r"a \(2,\)"):
        check_shapes(a=(torch.zeros(2), "B T"))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_standardized_values_are_none_where_one_is_not_finite(bad):
    """And not 0, which would look like values that are all equal."""
    x, mask = torch.tensor([1.0, bad, 2.0, 3.0]), torch.tensor([True, True, True, False])
    assert standardize(x, mask).isnan().tolist() == [True, True, True, False]
    assert standardize(x, mask & x.isfinite()).isfinite().all()
