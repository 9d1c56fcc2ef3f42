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


def test_rewards_that_are_compared_one_by_one_teach_though_their_sums_are_equal():
    unlike = FLAT | {"advantage/min": -1.0, "advantage/max": 1.0}
    alike = FLAT | {"advantage/min": 0.0, "advantage/max": 0.0}
    assert told(*[unlike] * 30) == [[]] * 31
    mostly = HEALTHY | {"group/flat_fraction": 0.95, "score/mean": 0.02}
    assert told(HEALTHY, unlike, *[mostly] * 40) == [[]] * 43
    assert len(told(HEALTHY, alike, *[mostly] * 40)[-1]) == 1
    assert len(told(*[alike] * 3)[2]) == 1
    assert len(told(*[unlike | {"value/loss": 0.1}] * 3)[2]) == 1  # a critic's advantages differ for other reasons


def test_an_iteration_whose_responses_are_all_cut_off_is_no_lesson():
    learned = {"actor/grad_norm", "actor/skipped_steps"}
    cut_off = {name: x for name, x in HEALTHY.items() if name not in learned} | {"response/finished_fraction": 0.0}
    *seen, end = told(*[cut_off] * 4)
    assert [len(new) for new in seen] == [0, 0, 1, 0]
    assert seen[2][0].startswith("no response was learned from in 3 iterations in a row: algorithm.mask_truncated")
    assert "0 % ended by themselves; raise rollout.max_response_tokens" in end[0]
    assert told(*[HEALTHY | {"response/finished_fraction": 0.0}] * 4) == [[]] * 5  # they are learned from
    assert told(cut_off, HEALTHY, cut_off, HEALTHY)[-1] == []


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


# --- shares of what is lost -------------------------------------------------------------------------------------------

DRAWN = HEALTHY | {"tokens/sampled": 640.0, "response/length": 10.0}
"""64 responses."""


def test_a_share_of_unscored_responses_is_told_once_with_its_numbers():
    seen = told(*[DRAWN | {"score/unscored": 40.0}] * 30)
    assert [len(new) for new in seen] == [0] * 19 + [1] + [0] * 10 + [1]
    assert seen[-1][0].startswith("800 of the 1280 responses of the last 20 iterations could not be scored")
    assert told(*[DRAWN | {"score/unscored": 30.0}] * 30) == [[]] * 31


def test_where_most_responses_fail_a_short_run_says_so():
    """11 iterations in which 40 of 64 episodes fail; nothing is said of 30, nor of rows that no rule is for."""
    failed = DRAWN | {"score/unscored": 40.0, "environment/failed": 40.0, "environment/failed/respond": 40.0}
    seen = told(*[failed] * 11)
    assert [len(new) for new in seen] == [0, 0, 1] + [0] * 8 + [1]
    assert seen[2][0] == (
        "120 of the 192 responses of the last 3 iterations could not be scored, and nothing is learned from those: the "
        "environment (respond) failed on responses; a warning says how, so mend that first"
    )
    fewer = DRAWN | {"score/unscored": 30.0, "environment/failed": 30.0, "environment/failed/respond": 30.0}
    assert told(*[fewer] * 11) == [[]] * 12
    assert told(*[DRAWN | {"score/unscored": 40.0}] * 11) == [[]] * 12


def test_equal_scores_are_not_blamed_on_the_reward_where_episodes_failed():
    (text,) = told(*[FLAT | {"environment/failed": 3.0, "environment/failed/add": 3.0}] * 3)[2]
    assert text.startswith("every response to a prompt got the same score in 3 iterations in a row")
    assert "the environment (add) failed on responses" in text
    assert "the reward never" not in text


def test_a_share_of_flat_groups_is_told_once_with_its_numbers():
    mostly = HEALTHY | {"group/flat_fraction": 0.95, "score/mean": 0.02}
    seen = told(HEALTHY, *[mostly] * 40)
    assert sum(map(len, seen[:-1])) == 1
    assert seen[-1][0].startswith("95 % of the groups of the last 20 iterations had equal scores")
    assert "(mean score 0.02)" in seen[-1][0]
    assert told(*[HEALTHY | {"group/flat_fraction": 0.85}] * 40) == [[]] * 41
    assert told(HEALTHY, *[mostly] * 40, compares_sums=False) == [[]] * 42  # where siblings are not compared


def test_mostly_flat_groups_of_a_task_that_is_solved_are_no_loss():
    rising = [HEALTHY | {"score/mean": mean} for mean in (0.3, 0.7, 0.98)]
    assert told(*rising, *[HEALTHY | {"score/mean": 0.97, "group/flat_fraction": 0.95}] * 40) == [[]] * 44


def test_an_extreme_score_is_told_once_with_its_size_and_a_way_out():
    extreme = HEALTHY | {"score/extreme": 1.0, "score/extreme_size": 1e30, "score/mean": 1e28, "score/std": 1e29}
    seen = told(HEALTHY, extreme, HEALTHY, extreme, HEALTHY)
    assert [len(new) for new in seen] == [0, 1, 0, 0, 0, 0]
    assert seen[1][0].startswith("1 score is far from all others, by size up to 1e+30")
    assert "algorithm.score_clip" in seen[1][0]
    assert "2 scores are far" in told(extreme | {"score/extreme": 2.0})[0][0]


def test_an_extreme_score_is_no_measure_for_others():
    """Neither as the start nor as the best: all flat afterwards is told where it is, and not where all is solved."""
    extreme = HEALTHY | {"score/extreme": 1.0, "score/extreme_size": 1e30, "score/mean": 1e28, "value/loss": 1e36}
    assert "same score in 3 iterations" in told(extreme, HEALTHY, *[FLAT] * 3)[4][0]
    rising = [HEALTHY | {"score/mean": mean} for mean in (0.3, 0.7, 0.98)]
    assert told(*rising, extreme, *[FLAT | {"score/mean": 0.95}] * 5)[4:] == [[]] * 6
    begun = HEALTHY | {"value/loss": 0.5}
    assert "value/loss is 500" in told(extreme, begun, *[begun | {"value/loss": 500.0}] * 3)[-1][0]


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf, 1e30])
def test_numbers_that_are_odd_once_change_nothing_afterwards(odd: float):
    """Each metric alone, as the first value and later on: what is said of healthy iterations stays nothing, and what is
    said of broken ones stays the same."""
    named = {
        **HEALTHY,
        "loss": 2.0,
        "eval/loss": 2.0,
        "eval/accuracy": 0.5,
        "value/loss": 1.0,
        "critic/skipped_steps": 0.0,
    }
    broken = named | {"loss": 99.0, "value/loss": 1e3, "policy/entropy": 1e-9, "eval/loss": 9.0}
    for name in named.keys() - {"actor/skipped_steps", "critic/skipped_steps"}:
        if odd == 1e30 and not name.startswith(("score/", "value/")):
            continue  # a loss of that size at the start is what others are compared with
        extreme = {"score/extreme": 1.0, "score/extreme_size": odd} if odd == 1e30 else {}
        for before in (0, 5):
            alarms = Alarms()
            for values in (*[named] * before, named | {name: odd} | extreme):
                alarms.observe(values)
            assert [alarms.observe(named) for _ in range(5)] == [[]] * 5, name
            assert alarms.at_the_end() == [], name
            assert all(map(math.isfinite, alarms.start.values())), name
            assert math.isfinite(alarms.best_score), name
            assert abs(alarms.best_score) < 1e29, name
            num_new = 4 - ("held-out loss" in alarms.raised)
            assert len([text for _ in range(3) for text in alarms.observe(broken)]) == num_new, name


# --- verdicts ---------------------------------------------------------------------------------------------------------


def verdicts(*iterations: dict[str, float]) -> list[str | None]:
    alarms, seen = Alarms(), []
    for values in iterations:
        alarms.observe(values)
        seen.append(alarms.verdict)
    return seen


UNSCORED = {"score/unscored": 24.0, "response/length": 8.0, "tokens/sampled": 192.0}
IDLE = FLAT | {"actor/grad_norm_max": 0.0}
LEARNS = HEALTHY | {"actor/grad_norm_max": 0.7}


def test_ten_iterations_without_any_score_end_a_run():
    seen = verdicts(LEARNS, *[UNSCORED] * 9, LEARNS, *[UNSCORED] * 25)
    assert [n for n, verdict in enumerate(seen) if verdict] == [20, 30]  # and after a resume another ten
    assert seen[20].startswith("no response could be scored in 10 iterations in a row")  # type: ignore[union-attr]
    with_evaluation = [*[UNSCORED] * 5, {"eval/accuracy": 0.5}, *[UNSCORED] * 5]
    assert [bool(verdict) for verdict in verdicts(*with_evaluation)] == [False] * 10 + [True]


def test_a_hundred_iterations_of_nothing_but_zero_gradients_end_a_run():
    seen = verdicts(*[IDLE] * 205)
    assert [n for n, verdict in enumerate(seen) if verdict] == [99, 199]
    assert seen[99].startswith("the gradient was exactly 0 in 100 iterations, from the first one on")  # type: ignore[union-attr]


@pytest.mark.parametrize("taught", [LEARNS, IDLE | {"actor/grad_norm_max": 1e-9}, IDLE | {"critic/grad_norm_max": 0.1}])
def test_what_teaches_once_may_be_solved_later(taught: dict[str, float]):
    assert not any(verdicts(taught, *[IDLE] * 300))
    assert not any(verdicts(*[IDLE] * 99, taught, *[IDLE] * 300))


@pytest.mark.parametrize("ends", [1, 5, 10, 23])
def test_a_run_in_parts_comes_to_the_same_verdicts(ends: int):
    """A resume observes the lines of metrics.jsonl again."""
    lines = [*[UNSCORED] * 4, LEARNS, *[UNSCORED] * 30]
    alarms = Alarms()
    for values in lines[:ends]:
        alarms.observe(values)
    seen = []
    for values in lines[ends:]:
        alarms.observe(values)
        seen.append(alarms.verdict)
    assert seen == verdicts(*lines)[ends:]


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


def test_a_critic_that_learns_alone_has_the_first_optimizer():
    begun = {"value/loss": 0.5, "critic/skipped_steps": 0.0}
    broken = begun | {"value/loss": 500.0, "critic/skipped_steps": 1.0}
    for settings, section in (({}, "critic_optimizer"), ({"critic_optimizer": "optimizer"}, "optimizer")):
        end = told(begun, *[broken] * 3, **settings)[-1]
        assert len(end) == 2
        assert all(f" {section}.learning_rate" in text for text in end)


def test_steps_that_were_skipped_are_counted_by_module():
    seen = told(HEALTHY, HEALTHY | {"actor/skipped_steps": 2.0}, HEALTHY | {"critic/skipped_steps": 1.0}, HEALTHY)
    assert [len(new) for new in seen] == [0, 1, 1, 0, 2]
    assert seen[1][0].startswith("optimizer steps of the actor that were skipped, as their gradient was not finite: 2;")
    assert "; lower optimizer.learning_rate" in seen[1][0]
    assert "; lower critic_optimizer.learning_rate" in seen[2][0]


def test_a_share_of_skipped_steps_is_told_once_with_its_numbers():
    half = [HEALTHY | {"actor/skipped_steps": n} for n in (1.0, 2.0)]
    seen = told(*half * 15, steps_per_iteration=3)
    assert [len(new) for new in seen] == [1, 1] + [0] * 28 + [1]  # the first one, then the share
    assert seen[1][0].startswith("3 of the last 6 optimizer steps of the actor were skipped, as their gradient was not")
    assert seen[-1][0].startswith("30 of the last 60 optimizer steps of the actor were skipped")
    assert "lower optimizer.learning_rate" in seen[-1][0]
    seldom = [*[HEALTHY | {"actor/skipped_steps": 1.0}], *[HEALTHY] * 9] * 3
    assert [new for new in told(*seldom)[:-1] if new] == [told(*seldom)[0]]  # one in ten is told as the first was
    ended = told(*half * 3, *[HEALTHY] * 20, steps_per_iteration=3)[-1]
    assert ended == [
        "optimizer steps of the actor that were skipped, as their gradient was not finite: 9; lower "
        "optimizer.learning_rate if there are more"
    ]


def test_steps_are_counted_in_iterations_that_took_some():
    warm_up = {name: x for name, x in HEALTHY.items() if not name.startswith("actor/")}
    seen = told(*[warm_up] * 9, *[HEALTHY | {"actor/skipped_steps": 1.0}] * 3)
    assert seen[-1][0].startswith("3 of the last 3 optimizer steps of the actor were skipped")


@pytest.mark.parametrize(
    ("dtype", "gap", "is_told"), [("float32", 0.02, True), ("bfloat16", 0.02, False), ("bfloat16", 0.3, True)]
)
def test_a_rollout_gap_beyond_rounding(dtype: str, gap: float, is_told: bool):
    seen = told(HEALTHY | {"policy/rollout_gap": gap}, dtype=dtype)
    assert bool(seen[0]) == is_told == bool(seen[1])
    assert not is_told or f"policy/rollout_gap is {gap} nats per token" in seen[0][0]


def test_the_gap_of_stale_responses_is_no_rounding():
    assert told(HEALTHY | {"policy/rollout_gap": 0.5}, learns_from_stale=True) == [[]] * 2


# --- held-out results -------------------------------------------------------------------------------------------------


def test_held_out_accuracy_below_what_chance_would_give_at_the_start():
    start = {"eval/accuracy": 0.5, "eval/accuracy_low": 0.45}
    assert told(start, HEALTHY, HEALTHY | {"eval/accuracy": 0.46}) == [[]] * 4
    assert told(start, HEALTHY | {"eval/accuracy": 0.1, "eval/accuracy_high": 0.55}) == [[]] * 3  # few problems
    seen = told(start, HEALTHY | {"eval/accuracy": 0.1, "eval/accuracy_high": 0.3}, HEALTHY)
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


def test_where_a_function_failed_on_responses_it_is_named_and_no_rule_is_blamed():
    failed = {"reward/judge/failed": 24.0, "reward/length/failed": 0.0}
    (line,) = Alarms().observe(UNSCORED | failed)
    assert "nothing is learned there: reward function judge failed on responses" in line
    alarms = Alarms()
    for _ in range(10):
        alarms.observe(UNSCORED | failed)
    assert alarms.verdict is not None
    assert "reward function judge failed on responses" in alarms.verdict
    share = told(*[DRAWN | {"score/unscored": 40.0} | failed] * 20)[-1][0]
    assert share.startswith("800 of the 1280 responses of the last 20 iterations could not be scored")
    assert "reward function judge failed on responses" in share
    assert not any("returned None" in text for text in (line, alarms.verdict, share))
