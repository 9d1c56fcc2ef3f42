"""Runs as their metrics show them: dead, broken, healthy."""

import math
from typing import Any

import pytest

from llmrl.trainers.alarms import Alarms

HEALTHY = {
    "score/mean": 0.5,
    "score/std": 0.4,
    "score/unscored": 0.0,
    "group/flat_fraction": 0.3,
    "policy/entropy": 0.4,
    "policy/rollout_gap": 1e-6,
    "policy/approx_kl": 0.002,
    "policy/loss": 0.01,
    "kl/mean": 0.05,
    "kl/sequence": 6.0,
    "actor/grad_norm": 0.7,
    "actor/skipped_steps": 0.0,
}


def told(*iterations: dict[str, float], **settings: Any) -> list[list[str]]:
    """What each iteration warns of, then what the end says again."""
    alarms = Alarms(**settings)
    return [*(alarms.observe(values) for values in iterations), alarms.at_the_end()]


def test_a_healthy_run_is_left_alone():
    assert told(*[HEALTHY] * 9, HEALTHY | {"eval/accuracy": 0.5, "eval/accuracy_low": 0.4}) == [[]] * 11


# --- nothing to learn -------------------------------------------------------------------------------------------------

FLAT = HEALTHY | {"score/mean": 0.0, "score/std": 0.0, "group/flat_fraction": 1.0, "actor/grad_norm": 0.0}


def test_a_reward_that_is_always_the_same_is_told_once_and_at_the_end():
    *seen, end = told(*[FLAT] * 7)
    assert [len(new) for new in seen] == [0, 0, 1, 0, 0, 0, 0]
    assert seen[2][0].startswith("every response to a prompt got the same score in 3 iterations in a row (mean 0)")
    assert len(end) == 1
    assert "in 7 iterations in a row" in end[0]


def test_a_short_run_says_it_at_its_end_if_it_never_learned():
    assert [len(new) for new in told(FLAT, FLAT)] == [0, 0, 1]
    assert told(HEALTHY, FLAT) == [[], [], []]


def test_a_run_that_recovered_is_not_called_dead_for_its_last_batch():
    *_, end = told(*[FLAT] * 3, *[HEALTHY] * 15, FLAT)
    assert end == []
    assert len(told(*[FLAT] * 3, *[HEALTHY] * 15, *[FLAT] * 3)[-1]) == 1
    assert told(*[{"loss": 4.85}] * 9, {"loss": 99.0})[-1] == []
    assert len(told(*[{"loss": 4.85}] * 9, *[{"loss": 99.0}] * 3)[-1]) == 1


def test_one_iteration_is_no_plural():
    assert "the same score in 1 iteration (mean" in told(FLAT)[-1][0]


def test_without_groups_scores_of_all_prompts_are_compared():
    no_groups = {name: value for name, value in FLAT.items() if name != "group/flat_fraction"}
    assert len(told(*[no_groups | {"score/mean": 2.5, "score/std": 3e-9}] * 3)[2]) == 1
    assert told(*[no_groups | {"score/std": 0.01}] * 3) == [[]] * 4


def test_groups_that_are_flat_since_everything_is_solved_are_no_failure():
    rising = [HEALTHY | {"score/mean": mean} for mean in (0.3, 0.7, 0.98)]
    assert told(*rising, *[FLAT | {"score/mean": 0.95}] * 5) == [[]] * 9
    assert len(told(*rising, *[FLAT | {"score/mean": 0.2}] * 5)[-1]) == 1  # every response alike, and wrong


def test_a_penalty_for_length_is_learned_from():
    assert told(*[FLAT | {"score/overlong_penalty": -0.3}] * 5) == [[]] * 6


def test_responses_that_no_rule_scores_are_told_at_once_with_a_way_out():
    nothing = {"score/unscored": 24.0, "response/length": 8.0}
    seen = told(nothing, nothing, HEALTHY)
    assert len(seen[0]) == 1
    assert seen[0][0].startswith("none of 24 responses could be scored in 1 iteration, so nothing is learned there")
    assert "reward.functions" in seen[0][0]
    assert seen[1:] == [[], [], []]
    assert told(HEALTHY | {"score/unscored": 23.0}) == [[], []]
    assert told(*[HEALTHY] * 9, nothing)[-1] == []  # rows of another task
    assert "24 responses could be scored in 2 iterations in a row" in told(nothing, nothing)[-1][0]


# --- broken -----------------------------------------------------------------------------------------------------------


def test_a_policy_without_entropy_has_collapsed():
    *seen, end = told(HEALTHY, *[HEALTHY | {"policy/entropy": 7e-23}] * 3)
    assert [len(new) for new in seen] == [0, 0, 0, 1]
    assert "its entropy is 7e-23 nats per token, 0.4 at the start" in end[0]
    assert told(*[HEALTHY | {"policy/entropy": 0.01}] * 4) == [[]] * 5


@pytest.mark.parametrize(
    ("entropy", "kl", "is_told"), [(0.3, 1.2, True), (0.3, 0.9, False), (5.6, 4.6, False), (5.6, 12.0, True)]
)
def test_the_kl_is_judged_by_the_entropy_of_the_start(entropy: float, kl: float, is_told: bool):
    begun = HEALTHY | {"policy/entropy": entropy}
    seen = told(begun, *[begun | {"kl/mean": kl, "kl/sequence": 121.0}] * 3)
    assert bool(seen[3]) == is_told == bool(seen[-1])
    assert not is_told or "kl/sequence 121" in seen[-1][0]


def test_a_step_that_leaves_its_own_responses():
    seen = told(*[HEALTHY | {"policy/approx_kl": 3.0}] * 3)
    assert "moves the policy by 3 nats per token" in seen[2][0]


@pytest.mark.parametrize("loss", [911.0, math.nan, math.inf])
def test_a_loss_that_explodes(loss: float):
    seen = told({"loss": 4.85}, {"loss": loss}, {"loss": loss}, {"loss": loss})
    assert [len(new) for new in seen] == [0, 0, 0, 1, 1]
    assert "4.85 at the start" in seen[3][0]
    assert len(told({"loss": 4.85}, {"loss": loss})[-1]) == 1  # a short run
    assert told({"loss": 4.85}, {"loss": loss}, {"loss": 4.0})[-1] == []


def test_losses_that_differ_as_batches_do():
    assert told({"loss": 0.05}, *[{"loss": 0.9}] * 4) == [[]] * 6
    assert told({"loss": 2.0}, *[{"loss": 3.5}] * 4) == [[]] * 6


def test_a_critic_whose_loss_rises_with_the_rewards_is_healthy():
    begun = {"value/loss": 0.001, "reward/mean": 0.0, "reward/std": 0.1}
    assert told(begun, *[{"value/loss": 50.0, "reward/mean": 9.0, "reward/std": 3.0}] * 3) == [[]] * 5
    assert "value/loss is 500" in told(begun, *[begun | {"value/loss": 500.0}] * 3)[-1][0]


def test_steps_that_were_skipped_are_counted_by_module():
    seen = told(HEALTHY, HEALTHY | {"actor/skipped_steps": 2.0}, HEALTHY | {"critic/skipped_steps": 1.0}, HEALTHY)
    assert [len(new) for new in seen] == [0, 1, 1, 0, 2]
    assert seen[1][0].startswith("optimizer steps of the actor that were skipped, as their gradient was not finite: 2;")
    assert "; lower optimizer.learning_rate" in seen[1][0]
    assert "; lower critic_optimizer.learning_rate" in seen[2][0]


@pytest.mark.parametrize(
    ("dtype", "gap", "is_told"), [("float32", 0.02, True), ("bfloat16", 0.02, False), ("bfloat16", 0.3, True)]
)
def test_a_rollout_gap_beyond_rounding(dtype: str, gap: float, is_told: bool):
    seen = told(HEALTHY | {"policy/rollout_gap": gap}, dtype=dtype)
    assert bool(seen[0]) == is_told == bool(seen[1])
    assert not is_told or f"policy/rollout_gap is {gap} nats per token" in seen[0][0]


# --- held-out results -------------------------------------------------------------------------------------------------


def test_held_out_accuracy_below_what_chance_would_give_at_the_start():
    start = {"eval/accuracy": 0.5, "eval/accuracy_low": 0.45}
    assert told(start, HEALTHY, HEALTHY | {"eval/accuracy": 0.46}) == [[]] * 4
    seen = told(start, HEALTHY | {"eval/accuracy": 0.1}, HEALTHY)
    assert "0.1, 0.5 at the start" in seen[1][0]
    assert seen[-1] == seen[1]
    assert told(start, HEALTHY | {"eval/accuracy": 0.1}, {"eval/accuracy": 0.6})[-1] == []


@pytest.mark.parametrize("place", [0, 1])
def test_a_held_out_accuracy_that_is_not_known_has_not_fallen(place: int):
    measured = [{"eval/accuracy": 0.5}, HEALTHY | {"eval/accuracy": 0.5}]
    measured[place] = measured[place] | {"eval/accuracy": math.nan}
    assert told(*measured) == [[]] * 3


def test_held_out_loss_above_the_start():
    assert told({"eval/loss": 2.0}, {"loss": 2.0, "eval/loss": 2.05}) == [[]] * 3
    assert "2.5, 2 at the start" in told({"eval/loss": 2.0}, {"loss": 2.0, "eval/loss": 2.5})[1][0]
