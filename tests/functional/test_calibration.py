import math

import pytest
import torch

from llmrl.functional.calibration import chance_calibration_error, expected_calibration_error
from llmrl.functional.streams import Purpose, uniforms


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_pairs(num: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(num, generator=generator, dtype=torch.float64)
    return probabilities, (torch.rand(num, generator=generator) < 0.3).double()


def test_by_hand():
    # (0, 0.5]: mean 0.3 against 1/2, two of five; (0.5, 1]: mean 0.8 against 2/3, three of five
    probabilities, outcomes = double(0.2, 0.4, 0.7, 0.8, 0.9), double(1, 0, 1, 0, 1)
    expected = 2 / 5 * 0.2 + 3 / 5 * (0.8 - 2 / 3)
    assert expected_calibration_error(probabilities, outcomes, num_bins=2).item() == pytest.approx(expected)


def test_by_definition():
    probabilities, outcomes = random_pairs()
    total = 0.0
    for low in (0.0, 0.25, 0.5, 0.75):
        inside = [
            (p, y) for p, y in zip(probabilities.tolist(), outcomes.tolist(), strict=True) if low < p <= low + 0.25
        ]
        confidence, rate = (sum(column) / len(inside) for column in zip(*inside, strict=True))
        total += len(inside) / 400 * abs(rate - confidence)
    assert expected_calibration_error(probabilities, outcomes, num_bins=4).item() == pytest.approx(total)


def test_a_bin_holds_its_upper_edge_and_the_first_holds_0():
    # apart: |1 - 0.5| / 2 + |0 - 0.75| / 2; in one bin the two would cancel to |1 - 1.25| / 2
    assert expected_calibration_error(double(0.5, 0.75), double(1, 0), num_bins=2).item() == 0.625
    assert expected_calibration_error(double(0.0, 0.25), double(1, 0), num_bins=2).item() == 0.375


def test_one_bin_reduces_to_the_gap_of_the_means():
    probabilities, outcomes = random_pairs()
    gap = abs(probabilities.mean() - outcomes.mean()).item()
    assert expected_calibration_error(probabilities, outcomes, num_bins=1).item() == pytest.approx(gap)


def test_what_always_happens_as_it_was_said_has_no_error():
    assert expected_calibration_error(double(0, 1, 1, 0.5), double(0, 1, 1, 0.5), num_bins=10) == 0
    assert expected_calibration_error(double(1, 1), double(0, 0), num_bins=10) == 1


def test_order_repetition_and_the_other_side_change_nothing():
    probabilities, outcomes = random_pairs()
    error = expected_calibration_error(probabilities, outcomes, num_bins=10).item()
    order = torch.randperm(len(outcomes), generator=torch.Generator().manual_seed(1))
    for p, y in (
        (probabilities[order], outcomes[order]),
        (probabilities.repeat(3), outcomes.repeat(3)),
        (1 - probabilities, 1 - outcomes),
    ):
        assert expected_calibration_error(p, y, num_bins=10).item() == pytest.approx(error)


def test_chance_by_hand():
    # variances 1/4 + 1/4 + 1/4 + 1/4 = 1 and 0.09 + 0.16 = 0.25
    probabilities = double(0.5, 0.5, 0.5, 0.5, 0.9, 0.8)
    expected = math.sqrt(2 / math.pi) * (1 + 0.5) / 6
    assert chance_calibration_error(probabilities, num_bins=2).item() == pytest.approx(expected)


def test_chance_falls_with_the_root_of_the_number_and_certainty_has_none():
    probabilities, _ = random_pairs()
    once = chance_calibration_error(probabilities, num_bins=10).item()
    assert chance_calibration_error(probabilities.repeat(4), num_bins=10).item() == pytest.approx(once / 2)
    assert chance_calibration_error(double(0, 1, 1), num_bins=10) == 0


def test_chance_is_what_right_probabilities_measure_on_average():
    probabilities = torch.linspace(0.05, 0.95, 90, dtype=torch.float64)
    number, token = torch.arange(500)[:, None].expand(500, 90), torch.arange(90).expand(500, 90)
    draws = (uniforms(0, Purpose.EVALUATION, number, token) < probabilities).double()
    measured = sum(expected_calibration_error(probabilities, row, num_bins=5).item() for row in draws) / 500
    assert chance_calibration_error(probabilities, num_bins=5).item() == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("bad", [-0.1, 1.1, math.nan])
def test_what_is_no_probability_is_refused(bad: float):
    with pytest.raises(ValueError, match=r"probabilities must lie in \[0, 1\]"):
        expected_calibration_error(double(0.5, bad), double(0, 1), num_bins=2)
    with pytest.raises(ValueError, match=r"probabilities must lie in \[0, 1\]"):
        chance_calibration_error(double(0.5, bad), num_bins=2)


def test_none_and_no_bins_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        expected_calibration_error(double(), double(), num_bins=2)
    with pytest.raises(ValueError, match=r"num_bins \(0\)"):
        chance_calibration_error(double(0.5), num_bins=0)


@pytest.mark.usefixtures("production")
def test_shapes_are_checked_at_the_door():
    with pytest.raises(ValueError, match=r"probabilities \(2,\), outcomes \(2, 1\)"):
        expected_calibration_error(torch.zeros(2), torch.zeros(2, 1), num_bins=2)
    with pytest.raises(ValueError, match=r"probabilities \(2, 1\)"):
        chance_calibration_error(torch.zeros(2, 1), num_bins=2)
