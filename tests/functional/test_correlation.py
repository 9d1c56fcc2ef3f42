import math

import pytest
import torch

from llmrl.functional.correlation import pearson_correlation, spearman_correlation

BOTH = pytest.mark.parametrize("function", [pearson_correlation, spearman_correlation])


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_values() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, generator=generator, dtype=torch.float64)
    return x, x + torch.randn(50, generator=generator, dtype=torch.float64)


def test_pearson_by_hand():
    # deviations -1, 0, 1 and -1, 1, 0: 1 / sqrt(2 · 2)
    assert pearson_correlation(double(1, 2, 3), double(0, 2, 1)).item() == pytest.approx(0.5)


def test_pearson_by_definition():
    x, y = (values.tolist() for values in random_values())
    mean_x, mean_y = sum(x) / 50, sum(y) / 50
    products = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    squares = sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y)
    expected = products / math.sqrt(squares)
    assert pearson_correlation(*random_values()).item() == pytest.approx(expected)


def test_spearman_by_hand():
    # ranks 1, 2.5, 2.5, 4 and 4, 1, 2, 3: deviations -1.5, 0, 0, 1.5 and 1.5, -1.5, -0.5, 0.5
    expected = (-2.25 + 0.75) / math.sqrt(4.5 * 5)
    assert spearman_correlation(double(0, 7, 7, 100), double(9, 1, 2, 3)).item() == pytest.approx(expected)


def test_spearman_without_ties_is_the_formula_of_the_squared_rank_differences():
    x, y = random_values()
    ranks = [[sorted(v).index(entry) for entry in v] for v in (x.tolist(), y.tolist())]
    squares = sum((a - b) ** 2 for a, b in zip(*ranks, strict=True))
    assert spearman_correlation(x, y).item() == pytest.approx(1 - 6 * squares / (50 * (50**2 - 1)))


def test_spearman_of_ranks_reduces_to_pearson():
    x, y = double(1, 2, 3, 4, 5), double(2, 1, 4, 5, 3)
    assert spearman_correlation(x, y).item() == pytest.approx(pearson_correlation(x, y).item())


@BOTH
def test_a_line_is_1_and_its_mirror_minus_1(function):
    x, _ = random_values()
    assert function(x, 3 * x + 7).item() == pytest.approx(1)
    assert function(x, -2 * x).item() == pytest.approx(-1)


@BOTH
def test_rounding_takes_it_no_further_than_1(function):
    for num in range(2, 60):
        x = torch.arange(num, dtype=torch.float64)
        assert -1 <= function(x, -x).item() < function(x, x).item() <= 1


@BOTH
def test_scale_shift_order_and_sides_change_nothing(function):
    x, y = random_values()
    r = function(x, y).item()
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    for a, b in ((y, x), (10 * x - 3, y / 4 + 9), (x[order], y[order])):
        assert function(a, b).item() == pytest.approx(r)
    assert function(-x, y).item() == pytest.approx(-r)


def test_only_spearman_ignores_a_monotone_bend():
    x, y = random_values()
    assert spearman_correlation((3 * x).exp(), y).item() == pytest.approx(spearman_correlation(x, y).item())
    assert abs(pearson_correlation((3 * x).exp(), y) - pearson_correlation(x, y)) > 0.05


@BOTH
@pytest.mark.parametrize("x", [double(0.1, 0.1, 0.1), double(1, math.nan, 2)])
def test_without_a_correlation_it_is_nan(function, x: torch.Tensor):
    assert function(x, double(1, 2, 3)).isnan()
    assert function(double(1, 2, 3), x).isnan()


@BOTH
@pytest.mark.parametrize("values", [(), (1.0,)])
def test_of_less_than_two_there_is_none(function, values: tuple[float, ...]):
    assert function(double(*values), double(*values)).isnan()


@BOTH
@pytest.mark.usefixtures("production")
def test_shapes_are_checked_at_the_door(function):
    with pytest.raises(ValueError, match=r"x \(2,\), y \(2, 1\)"):
        function(torch.zeros(2), torch.zeros(2, 1))
