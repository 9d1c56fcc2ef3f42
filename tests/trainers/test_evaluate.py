"""Evaluation on scripted responses: every number by hand."""

import math
from typing import Any

import pytest
import torch

from llmrl.batches import Prompts, Rollout, Scores
from llmrl.functional.streams import Purpose
from llmrl.reports.progress import Silent
from llmrl.roles import RewardFunction, Sampling
from llmrl.rollout.scripted import ScriptedEngine
from llmrl.trainers.config import EvaluationConfig
from llmrl.trainers.evaluate import Evaluator, PerPrompt, mean_scores, paired_difference

NAN = math.nan


class Engine(ScriptedEngine):
    """Response n has n + 1 tokens, and all but those of odd number end by themselves. Remembers how it was asked."""

    def __init__(self) -> None:
        super().__init__(lambda _, number: ([7] * (number + 1), [-1.0] * (number + 1), number % 2 == 0))
        self.asked: list[Sampling] = []

    def generate(self, prompts: Prompts, sampling: Sampling) -> Rollout:
        self.asked.append(sampling)
        return super().generate(prompts, sampling)


class Counter(Silent):
    """Progress that remembers."""

    def __init__(self) -> None:
        self.phases: list[tuple[str, int]] = []

    def phase(self, name: str, total: int) -> None:
        self.phases.append((name, total))


def prompts(count: int) -> Prompts:
    return Prompts(
        ids=torch.ones(count, 2, dtype=torch.long),
        mask=torch.ones(count, 2, dtype=torch.bool),
        rows=tuple({"row": n} for n in range(count)),
    )


def reward(parts: list[float], totals: list[float] | None, failed: dict[str, list[bool]]) -> RewardFunction:
    def score(rollout: Rollout) -> Scores:
        return Scores(
            total=torch.tensor(parts if totals is None else totals),
            per_token=torch.zeros(rollout.rollout_logprobs.shape),
            parts={"other": torch.full((len(parts),), 9.0), "correct": torch.tensor(parts)},
            failed={name: torch.tensor(each) for name, each in failed.items()},
        )

    return score


def make(
    num_prompts: int,
    parts: list[float],
    *,
    totals: list[float] | None = None,
    failed: dict[str, list[bool]] | None = None,
    engine: Engine | None = None,
    progress: Silent | None = None,
    **config: Any,
) -> Evaluator:
    return Evaluator(
        EvaluationConfig(**config),
        engine=engine or Engine(),
        reward=reward(parts, totals, failed or {}),
        prompts=prompts(num_prompts),
        criterion="correct",
        max_response_tokens=16,
        seed=5,
        progress=progress or Silent(),
    )


def test_one_greedy_response_each():
    # 3 of 4 correct: Wilson's interval with z = 1.959964, from its textbook form
    p, n, zz = 0.75, 4, 1.959964**2
    half = 1.959964 * math.sqrt(p * (1 - p) / n + zz / (4 * n * n))
    low, high = (p + zz / (2 * n) - half) / (1 + zz / n), (p + zz / (2 * n) + half) / (1 + zz / n)
    assert (round(low, 4), round(high, 4)) == (0.3006, 0.9544)

    assert make(4, [1.0, 0.0, 1.0, 0.75]).evaluate() == {
        "eval/accuracy": 0.75,
        "eval/accuracy_low": pytest.approx(low),
        "eval/accuracy_high": pytest.approx(high),
        "eval/num_prompts": 4.0,
        "eval/unscored": 0.0,
        "eval/response_length": 2.5,
        "eval/finished_fraction": 0.5,
        "eval/score": 0.6875,
        "eval/score/correct": 0.6875,
        "eval/score/other": 9.0,
    }


@pytest.mark.parametrize(("correct", "low", "high"), [(0.0, 0.0, 0.4899), (1.0, 0.5101, 1.0)])
def test_certainty_is_not_claimed_from_four(correct: float, low: float, high: float):
    values = make(4, [correct] * 4).evaluate()
    assert values["eval/accuracy"] == correct
    assert values["eval/accuracy_low"] == pytest.approx(low, abs=5e-5)
    assert values["eval/accuracy_high"] == pytest.approx(high, abs=5e-5)


def test_several_responses_each_and_pass_at_k():
    # correct of 3: 2, 0, 1; pass@1 = 2/3, 0, 1/3; pass@2 = 1 - C(1,2)/C(3,2) = 1, 0, 1 - C(2,2)/C(3,2) = 2/3
    parts = [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    values = make(3, parts, num_responses=3, pass_at=(1, 2, 3)).evaluate()
    assert values["eval/accuracy"] == pytest.approx(1 / 3)
    assert values["eval/pass_at_1"] == pytest.approx(1 / 3)
    assert values["eval/pass_at_2"] == pytest.approx(5 / 9)
    assert values["eval/pass_at_3"] == pytest.approx(2 / 3)
    # standard deviation of 2/3, 0, 1/3 with N - 1: 1/3; half width 1.96 / 3 / sqrt(3) = 0.377 is wider than the mean
    assert values["eval/accuracy_low"] == 0.0
    assert values["eval/accuracy_high"] == pytest.approx(1 / 3 + 1.959964 / 3 / 3**0.5)
    # of 1, 0, 2/3: mean 5/9, squared deviations 16/81, 25/81, 1/81, variance 42/162
    assert values["eval/pass_at_2_low"] == 0.0
    assert values["eval/pass_at_2_high"] == 1.0
    assert 5 / 9 + 1.959964 * (42 / 162 / 3) ** 0.5 > 1.0
    assert values["eval/num_prompts"] == 3.0


def test_several_responses_to_a_single_prompt_say_nothing_about_others():
    values = make(1, [1.0, 0.0], num_responses=2).evaluate()
    assert [values[f"eval/accuracy{end}"] for end in ("", "_low", "_high")] == [0.5, 0.0, 1.0]


def test_an_unscored_response_is_not_correct_and_is_counted():
    values = make(4, [1.0, NAN, 1.0, NAN], totals=[3.0, NAN, 5.0, NAN]).evaluate()
    assert values["eval/accuracy"] == 0.5
    assert values["eval/unscored"] == 2.0
    assert values["eval/score"] == 4.0


def test_without_any_score_there_is_no_mean_score():
    values = make(2, [NAN, NAN]).evaluate()
    assert "eval/score" not in values
    assert (values["eval/accuracy"], values["eval/unscored"]) == (0.0, 2.0)


def test_of_several_parts_each_has_its_mean():
    scores = Scores(
        total=torch.tensor([1.0, NAN, 4.0]),
        per_token=torch.zeros(3, 2),
        parts={
            "rule": torch.tensor([0.5, 1.0, 3.0]),
            "judge": torch.tensor([2.0, NAN, 4.0]),
            "mute": torch.full((3,), NAN),
        },
    )
    assert mean_scores(scores) == {"eval/score": 2.5, "eval/score/rule": 1.5, "eval/score/judge": 3.0}


@pytest.mark.parametrize(("threshold", "accuracy"), [(0.5, 0.5), (0.0, 0.75), (2.0, 0.25), (-1.0, 1.0)])
def test_correct_is_more_than_the_threshold_by_the_criterion_alone(threshold: float, accuracy: float):
    values = make(4, [0.0, 0.5, 2.0, 3.0], totals=[9.0] * 4, correct_above=threshold).evaluate()
    assert values["eval/accuracy"] == accuracy


@pytest.mark.parametrize(("num_responses", "greedy"), [(1, True), (2, False)])
def test_the_same_random_numbers_each_time(num_responses: int, greedy: bool):
    engine, counter = Engine(), Counter()
    evaluator = make(
        2, [1.0] * 2 * num_responses, engine=engine, progress=counter, num_responses=num_responses, temperature=0.7
    )
    assert evaluator.evaluate() == evaluator.evaluate()
    expected = Sampling(
        temperature=0.7,
        num_responses=num_responses,
        max_response_tokens=16,
        greedy=greedy,
        seed=5,
        purpose=Purpose.EVALUATION,
        first_response=0,
    )
    assert engine.asked == [expected, expected]
    assert counter.phases == [("evaluation", 2 * num_responses)] * 2


def test_responses_on_which_a_function_failed_are_not_in_the_accuracy():
    """The criterion failed on responses 1 and 3; another function failed on 2, which the criterion judges."""
    failed = {"correct": [False, True, False, True], "other": [False, False, True, False]}
    values = make(4, [1.0, NAN, 0.0, NAN], totals=[1.0, NAN, NAN, NAN], failed=failed, pass_at=(1,)).evaluate()
    expected = {"eval/accuracy": 0.5, "eval/pass_at_1": 0.5, "eval/num_prompts": 2.0, "eval/failed": 2.0}
    assert {name: values[name] for name in expected} == expected
    nothing = make(2, [NAN, NAN], failed={"correct": [True, True]}, pass_at=(1,)).evaluate()
    assert (nothing["eval/num_prompts"], nothing["eval/failed"]) == (0.0, 2.0)
    assert not any(name.startswith(("eval/accuracy", "eval/pass_at")) for name in nothing)
    assert "eval/failed" not in make(1, [1.0], failed={"correct": [False]}).evaluate()


def test_of_several_responses_each_prompt_counts_by_those_that_are_judged():
    # correct of those that are judged: 1 of 2, 0 of 3, 1 of 1; pass@2 = 1, 0, and too few
    parts = [1.0, NAN, 0.0, 0.0, 0.0, 0.0, NAN, 1.0, NAN]
    values = make(3, parts, failed={"correct": [x != x for x in parts]}, num_responses=3, pass_at=(2,)).evaluate()
    assert values["eval/accuracy"] == pytest.approx((1 / 2 + 0 + 1) / 3)
    assert values["eval/pass_at_2"] == 0.5
    assert (values["eval/num_prompts"], values["eval/failed"]) == (3.0, 3.0)


def test_a_response_of_another_task_on_which_a_function_failed_is_not_wrong():
    values = make(2, [1.0, NAN], totals=[1.0, NAN], failed={"other": [False, True]}).evaluate()
    assert (values["eval/num_prompts"], values["eval/accuracy"]) == (1.0, 1.0)


def test_prompts_of_another_task_are_not_in_the_accuracy():
    """The criterion has nothing to say of prompts 1 and 2; nothing could score prompt 3, which is wrong."""
    parts, totals = [1.0, NAN, NAN, NAN, 0.0], [1.0, 2.0, 3.0, NAN, 0.0]
    values = make(5, parts, totals=totals).evaluate()
    assert (values["eval/num_prompts"], values["eval/accuracy"]) == (3.0, pytest.approx(1 / 3))
    nothing = make(2, [NAN, NAN], totals=[1.0, 2.0], pass_at=(1,)).evaluate()
    assert nothing["eval/num_prompts"] == 0.0
    assert not any(name.startswith(("eval/accuracy", "eval/pass_at")) for name in nothing)


def per_prompt(accuracy: list[float], score: list[float]) -> PerPrompt:
    values = (torch.tensor(values, dtype=torch.float64) for values in (accuracy, score))
    return PerPrompt(**dict(zip(("accuracy", "score"), values, strict=True)))


def test_two_evaluations_are_compared_prompt_by_prompt():
    """Differences of 1, 0 and 0.5, beside a prompt that only one of them judged: mean 0.5, s 0.5, 3 prompts."""
    before = per_prompt([0.0, 1.0, 0.5, NAN], [NAN] * 4)
    after = per_prompt([1.0, 1.0, 1.0, 1.0], [0.0] * 4)
    half = 1.959964 * 0.5 / math.sqrt(3)
    expected = {
        "difference/accuracy": 0.5,
        "difference/accuracy_low": 0.5 - half,
        "difference/accuracy_high": 0.5 + half,
    }
    assert paired_difference(before, after) == pytest.approx(expected)
    assert paired_difference(after, after)["difference/accuracy_high"] == 0.0
