"""Both controllers by hand, by their formulas written once more, and in the loop that each of them closes."""

import math
import random

import pytest

from llmrl.algorithms.kl_control import KLControl, StepKLControl


@pytest.mark.parametrize(
    ("kl", "factor"),
    [
        (6.0, 1.0),  # on target
        (6.6, 1 + 0.1 * 256 / 10_000),  # a tenth above
        (5.4, 1 - 0.1 * 256 / 10_000),
        (7.2, 1 + 0.2 * 256 / 10_000),  # where the clip begins
        (600.0, 1 + 0.2 * 256 / 10_000),  # far beyond it
        (0.0, 1 - 0.2 * 256 / 10_000),
        (-3.0, 1 - 0.2 * 256 / 10_000),  # an estimate by k1 may be negative
    ],
)
def test_one_adaptive_update_by_hand(kl, factor):
    control = KLControl(coef=0.1, target=6.0, horizon=10_000)
    control.update(kl, 256)
    assert control.coef == pytest.approx(0.1 * factor, rel=1e-12)


def test_many_adaptive_updates_are_the_products_of_the_paper():
    """arXiv:1909.08593, section 2.2: e_t = clip((KL - target) / target, -0.2, 0.2), β_{t+1} = β_t (1 + K e_t)."""
    draw = random.Random(0)
    control, expected = KLControl(coef=0.2, target=4.0, horizon=500), 0.2
    for _ in range(50):
        kl, num_responses = draw.uniform(-1, 9), draw.randint(1, 64)
        control.update(kl, num_responses)
        error = (kl - 4.0) / 4.0
        expected *= 1 + (-0.2 if error < -0.2 else 0.2 if error > 0.2 else error) * num_responses / 500
    assert control.coef == pytest.approx(expected, rel=1e-12)


def test_a_horizon_of_responses_changes_the_coefficient_by_a_fifth():
    control = KLControl(coef=1.0, target=1.0, horizon=1000)
    control.update(math.inf, 1000)
    assert control.coef == pytest.approx(1.2)
    in_parts = KLControl(coef=1.0, target=1.0, horizon=1000)
    for _ in range(100):
        in_parts.update(math.inf, 10)
    assert in_parts.coef == pytest.approx(1.002**100)


def test_a_rollout_beyond_the_horizon_changes_the_coefficient_by_a_fifth_too():
    control = KLControl(coef=1.0, target=1.0, horizon=100)
    for kl, coef in ((math.inf, 1.2), (0.0, 1.2 * 0.8)):
        control.update(kl, 1000)
        assert control.coef == pytest.approx(coef)


def test_the_adaptive_coefficient_brings_the_kl_to_its_target():
    # a policy at its optimum for scores of spread 1 pays about 1 / (2 coef^2) nats
    control = KLControl(coef=3.0, target=2.0, horizon=200)
    for _ in range(200):
        control.update(1 / (2 * control.coef**2), 64)
    assert control.coef == pytest.approx(0.5, rel=1e-3)


def test_a_fixed_coefficient_stays():
    control = KLControl(coef=0.05, target=None, horizon=1)
    for kl in (0.0, 100.0, -5.0, math.inf):
        control.update(kl, 10**6)
    assert control.coef == 0.05


def test_the_adaptive_coefficient_is_saved_and_restored():
    first = KLControl(coef=0.05, target=1.0, horizon=100)
    first.update(3.0, 50)
    assert first.state_dict() == {"coef": pytest.approx(0.055)}
    second = KLControl(coef=0.7, target=1.0, horizon=100)
    second.load_state_dict(first.state_dict())
    for control in (first, second):
        control.update(0.9, 10)
    assert second.coef == first.coef


def test_a_fixed_coefficient_is_what_the_settings_say_now():
    control = KLControl(coef=0.7, target=None, horizon=100)
    control.load_state_dict({"coef": 0.05})
    assert control.coef == 0.7


@pytest.mark.parametrize(
    ("kl", "factor"),
    [
        (0.0, 1 / 1.5),
        (0.0133, 1 / 1.5),
        (0.0134, 1.0),  # 0.02 / 1.5 = 0.01333...: inside the band from here
        (0.02, 1.0),
        (0.0299, 1.0),
        (0.0301, 1.5),  # 0.02 * 1.5 = 0.03
        (7.0, 1.5),
    ],
)
def test_the_step_coefficient_moves_outside_its_band_only(kl, factor):
    control = StepKLControl(coef=0.8, target=0.02)
    control.update(kl)
    assert control.coef == pytest.approx(0.8 * factor, rel=1e-12)


def test_the_edges_of_the_band_belong_to_it():
    for kl in (3.0, 2.0 / 1.5):
        control = StepKLControl(coef=1.0, target=2.0)
        control.update(kl)
        assert control.coef == 1.0


def test_up_and_down_again_is_where_it_was():
    control = StepKLControl(coef=1.0, target=0.01)
    for kl in (1.0, 1.0, 0.0, 0.0):
        control.update(kl)
    assert control.coef == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize(("kl", "furthest"), [(0.0, 0.3 / 1000), (7.0, 0.3 * 1000)])
def test_the_step_coefficient_stays_within_three_orders_of_magnitude(kl, furthest):
    control = StepKLControl(coef=0.3, target=0.02)
    for _ in range(100):
        control.update(kl)
    assert control.coef == pytest.approx(furthest, rel=1e-12)
    continued = StepKLControl(coef=0.3, target=0.02)
    continued.load_state_dict(control.state_dict())
    continued.update(kl)
    assert continued.coef == control.coef


def test_the_step_coefficient_is_saved_and_restored():
    first = StepKLControl(coef=1.0, target=0.01)
    first.update(1.0)
    assert first.state_dict() == {"coef": 1.5}
    second = StepKLControl(coef=0.3, target=0.01)
    second.load_state_dict(first.state_dict())
    assert second.coef == 1.5
