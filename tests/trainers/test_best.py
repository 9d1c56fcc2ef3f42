"""The best model by itself; `test_run.py` has it within runs."""

import math
from pathlib import Path
from typing import Any

import pytest

from llmrl.distributed.collectives import OneProcess
from llmrl.trainers.best import BestModel
from llmrl.trainers.output import RunError


def make(folder: Path, **settings: Any) -> BestModel:
    def save_model(to: Path) -> None:
        to.mkdir(parents=True, exist_ok=True)

    chosen = {"metric": "x", "warmup_iterations": 0, "collectives": OneProcess()} | settings
    return BestModel(folder, save_model=save_model, **chosen)


@pytest.mark.parametrize(("metric", "iteration"), [("x", 4), ("-x", 2)])
def test_it_is_of_the_iteration_with_the_best_finite_value(tmp_path, metric, iteration):
    best = make(tmp_path, metric=metric)
    for number, value in enumerate([2.0, 1.0, math.inf, 3.0, 3.0, 1.0, math.nan], start=1):
        best.update(number, {"x": value})
    record = best.record()
    assert record is not None
    assert (record["metric"], record["iteration"]) == ("x", iteration)
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_no_metric_keeps_no_model(tmp_path):
    best = make(tmp_path, metric=None)
    best.update(1, {"x": 1.0})
    assert best.record() is None


@pytest.mark.parametrize("metric", ["y", "-y"])
def test_a_name_is_judged_after_the_warm_up(tmp_path, metric):
    best = make(tmp_path, metric=metric, warmup_iterations=2)
    best.update(2, {"x": 1.0})
    with pytest.raises(RunError, match=r"run\.best_metric \(y\) is not measured"):
        best.update(3, {"x": 1.0})


@pytest.mark.parametrize(("iteration", "is_kept"), [(4, False), (5, True), (6, True)])
def test_a_resume_from_before_it_discards_it(tmp_path, iteration, is_kept):
    best = make(tmp_path)
    best.update(5, {"x": 1.0})
    best.discard_after(iteration)
    assert best.folder.exists() == is_kept
