"""Numbers far from all others: by hand, against the definition one by one, and what must not matter."""

import math

import pytest
import torch

from llmrl.functional.extremes import EXTREME, find_extremes
from llmrl.functional.masking import masked_moments

ALL = {"dtype": torch.bool}


def extremes_of(numbers, moments=(0.0, 0.0, 0.0)):
    x = torch.tensor(numbers)
    return find_extremes(x, torch.ones(len(x), **ALL), moments=moments)


def found(numbers, moments=(0.0, 0.0, 0.0)):
    return extremes_of(numbers, moments)[0].nonzero().flatten().tolist()


def moments_of(*numbers):
    return float(len(numbers)), math.fsum(numbers), math.fsum(x * x for x in numbers)


@pytest.mark.parametrize(
    ("numbers", "places"),
    [
        ([0.1, 0.5, 0.9, 1e30], [3]),
        ([0.1, -1e30, 0.9, 1e30, 1e30, 0.2, 0.3], [1, 3, 4]),  # several do not hide each other
        ([1e30, 0.5], [0]),
        ([1e30], []),  # nothing to compare with
        ([1e30, 1e30, 0.5], []),
        ([0.0] * 99 + [1.0], []),
        ([0.0] * 9 + [1000.0], []),
        ([0.0] * 9 + [1001.0], [9]),
        ([5.0] * 9 + [6000.0], []),  # within 1000 (1 + 5)
        ([], []),
    ],
)
def test_by_hand(numbers, places):
    assert found(numbers) == places


def test_mean_and_scale_are_of_the_others():
    extreme, mean, scale = extremes_of([1.0, 3.0, 1e30, -1e30])
    assert extreme.tolist() == [False, False, True, True]
    assert mean == 2.0
    assert scale == 1.0 + 2.0 + 1.0


def test_earlier_numbers_are_what_a_batch_is_compared_with():
    earlier = moments_of(*[0.0, 1.0] * 50)
    assert found([1e30, 1e30, 1e30], earlier) == [0, 1, 2]
    assert found([1.0, 0.0, 1999.0], earlier) == []
    assert found([1.0, 0.0, 2100.0], earlier) == [2]  # mean and std 1/2: scale 2
    assert found([0.0, 0.0, 1.0], moments_of(*[0.0] * 1000)) == []  # the first that differs at all


def one_by_one(numbers, earlier):
    """The definition: from the centre outwards, each compared with everything less far out."""
    center = sum(earlier) / len(earlier) if earlier else sorted(numbers)[(len(numbers) - 1) // 2]
    others, order = list(earlier), sorted(range(len(numbers)), key=lambda i: abs(numbers[i] - center))
    for place, index in enumerate(order):
        if others:
            mean = math.fsum(others) / len(others)
            std = math.sqrt(math.fsum((x - mean) ** 2 for x in others) / len(others))
            if abs(numbers[index] - mean) > EXTREME * (1 + abs(mean) + std):
                return sorted(order[place:])
        others.append(numbers[index])
    return []


@pytest.mark.parametrize("num_earlier", [0, 1, 40])
@pytest.mark.parametrize("power", [1, 9, 61])
def test_against_the_definition(power, num_earlier):
    generator = torch.Generator().manual_seed(power)
    drawn = torch.randn(200, generator=generator, dtype=torch.float64)
    numbers = (drawn.abs() ** power * drawn.sign()).float().tolist()  # ever heavier tails
    earlier = torch.randn(num_earlier, generator=generator, dtype=torch.float64).tolist()
    assert found(numbers, moments_of(*earlier)) == one_by_one(numbers, earlier)
    assert power < 61 or found(numbers, moments_of(*earlier))


def test_no_draw_of_a_usual_distribution_is_extreme():
    generator = torch.Generator().manual_seed(0)
    for numbers in (
        torch.randn(5000, generator=generator),
        torch.bernoulli(torch.full((5000,), 1e-3), generator=generator),
        1e6 + torch.randn(5000, generator=generator),
        torch.empty(5000).cauchy_(generator=generator),
        torch.empty(5000).log_normal_(0.0, 2.0, generator=generator),
    ):
        for size in (4, 64, 5000):
            moments = (0.0, 0.0, 0.0)
            for batch in numbers.split(size):
                mask = torch.ones(len(batch), **ALL)
                extreme, _, _ = find_extremes(batch, mask, moments=moments)
                assert not extreme.any()
                moments = tuple(a + float(b) for a, b in zip(moments, masked_moments(batch, mask), strict=True))


def test_order_and_what_is_outside_the_mask_do_not_matter():
    x = torch.tensor([0.5, 1e30, math.nan, 0.25, -1e25, math.inf])
    mask = torch.tensor([True, True, False, True, True, False])
    extreme, mean, scale = find_extremes(x, mask)
    assert extreme.tolist() == [False, True, False, False, True, False]
    flipped, *same = find_extremes(x.flip(0), mask.flip(0))
    assert flipped.flip(0).equal(extreme)
    assert same == [mean, scale]


def test_shapes_are_checked():
    with pytest.raises((ValueError, TypeError), match=r"shapes do not fit|mask"):
        find_extremes(torch.zeros(3), torch.ones(2, **ALL))
