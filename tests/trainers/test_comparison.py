"""Evaluations compared prompt by prompt: numbers by hand, and what cannot be compared."""

import json
import math
from dataclasses import replace

import pytest
import torch

from llmrl.trainers.comparison import Evaluation, NotPaired, paired_differences, read_evaluation
from tests.trainers.test_evaluate import make

NAN = math.nan


def evaluation(accuracy, score=None, **changes):
    means = {"eval/accuracy": accuracy, "eval/score": score or accuracy}
    settings = {
        "values": {"eval/accuracy": 0.5},
        "num_responses": 2,
        "prompts": tuple(f"digest {n}" for n in range(len(accuracy))),
        "means": {name: torch.tensor(each, dtype=torch.float64) for name, each in means.items()},
    }
    return Evaluation(**settings | changes)


def test_differences_are_of_the_prompts_that_count_in_both():
    before = evaluation([0.0, 0.5, NAN, 0.5], [0.0, 0.0, 1.0, 1.0])
    after = evaluation([0.5, 0.5, 1.0, NAN], [1.0, 1.0, 2.0, 2.0])
    differences = paired_differences(after, before)
    half = 1.959964 * math.sqrt(0.125 / 2)  # of 0.5 and 0: variance 0.125
    assert differences["eval/accuracy"] == pytest.approx((0.25, 0.25 - half, 0.25 + half))
    assert differences["eval/score"] == (1.0, 1.0, 1.0)


def test_what_no_prompt_has_in_both_is_left_out():
    differences = paired_differences(evaluation([1.0, NAN], [1.0, 1.0]), evaluation([NAN, 1.0], [0.0, 0.0]))
    assert list(differences) == ["eval/score"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prompts": ("digest 1", "digest 0")}, r"are of other prompts \(2 then, 2 now\)"),
        ({"prompts": (), "means": {}}, "has no numbers for each prompt; evaluate that model again"),
        ({"num_responses": 4}, r"other numbers of responses per prompt \(4 then, 2 now\)"),
    ],
)
def test_evaluations_of_something_else_are_not_paired(changes, reason):
    before = replace(evaluation([1.0, 0.0]), **changes)
    with pytest.raises(NotPaired, match=reason):
        paired_differences(evaluation([1.0, 0.0]), before)


def test_an_evaluation_is_read_as_it_was_written():
    written = evaluation([1.0, NAN])
    read = read_evaluation(json.loads(json.dumps(written.to_record(), allow_nan=False)))
    assert (read.values, read.num_responses, read.prompts) == (written.values, 2, written.prompts)
    for name, means in written.means.items():
        assert torch.equal(read.means[name], means) or means.isnan().any()
    assert paired_differences(read, written)["eval/accuracy"][0] == 0.0


def test_an_evaluation_without_prompts_is_read_too():
    assert read_evaluation({"eval/accuracy": 0.5}).prompts == ()
    with pytest.raises(ValueError, match="a value of the evaluation is not a number"):
        read_evaluation({"eval/accuracy": "0.5"})


def test_what_an_evaluator_measures_of_each_prompt():
    """Two responses to each of three prompts; the criterion is above 0.5."""
    measured = make(3, [1.0, 0.0, 1.0, 1.0, 0.0, 0.0], num_responses=2).measure()
    assert measured.means["eval/accuracy"].tolist() == [0.5, 1.0, 0.0]
    assert measured.means["eval/score"].tolist() == [0.5, 1.0, 0.0]
    assert measured.num_responses == 2
    assert len(set(measured.prompts)) == 3
    assert measured.values["eval/accuracy"] == 0.5
    assert make(3, [0.0] * 6, num_responses=2).measure().prompts == measured.prompts


def test_prompts_of_another_task_and_failures_do_not_count():
    parts = [NAN, NAN, 1.0, NAN, 0.0, 1.0]
    totals = [2.0, 4.0, 1.0, NAN, 0.0, 1.0]  # the first prompt is of another task
    failed = {"judge": [False] * 3 + [True] + [False] * 2}
    means = make(3, parts, totals=totals, failed=failed, num_responses=2).measure().means
    assert means["eval/accuracy"].tolist() == pytest.approx([NAN, 1.0, 0.5], nan_ok=True)
    assert means["eval/score"].tolist() == [3.0, 1.0, 0.5]
