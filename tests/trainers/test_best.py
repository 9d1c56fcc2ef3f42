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

    chosen = {"metric": "x", "warmup_iterations": 0, "collectives": OneProcess(), "report": print} | settings
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


@pytest.mark.parametrize(
    "record",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"metric": "x", "value": "1", "iteration": 1}',
        '{"metric": "x", "value": NaN, "iteration": 1}',
    ],
)
def test_a_model_whose_record_cannot_be_read_is_set_aside_and_named(tmp_path, record):
    said = []
    best = make(tmp_path, metric="x", report=said.append)
    best.update(5, {"x": 1.0})
    (best.folder / "best.json").write_text(record)
    assert best.record() is None
    (tmp_path / "best.damaged").mkdir()
    (tmp_path / "best.damaged" / "older").touch()
    best.discard_after(9)
    assert [path.name for path in tmp_path.iterdir()] == ["best.damaged"]
    assert [path.name for path in (tmp_path / "best.damaged").iterdir()] == ["best.json"]
    assert said == [
        f"warning: {best.folder / 'best.json'} cannot be read: the model is kept as {tmp_path / 'best.damaged'}"
    ]
    best.update(10, {"x": 0.5})
    best.discard_after(10)
    assert best.record() == {"metric": "x", "value": 0.5, "iteration": 10}
    assert len(said) == 1


def test_an_empty_folder_is_a_place_for_the_best(tmp_path):
    said = []
    best = make(tmp_path, metric="x", report=said.append)
    best.folder.mkdir()
    best.discard_after(1)
    best.update(1, {"x": 1.0})
    assert best.record() is not None
    assert said == []


def test_through_a_link_it_is_saved_replaced_and_discarded(tmp_path):
    best = make(tmp_path, metric="x")
    (tmp_path / "disk").mkdir()
    best.folder.symlink_to(tmp_path / "disk" / "mine")
    for number in (1, 2):
        best.update(number, {"x": float(number)})
    assert (tmp_path / "disk" / "mine" / "best.json").exists()
    best.discard_after(1)
    assert best.folder.is_symlink()
    assert list((tmp_path / "disk").iterdir()) == []
    best.update(2, {"x": 1.0})
    assert best.record() == {"metric": "x", "value": 1.0, "iteration": 2}


def test_what_a_kill_left_is_put_right_at_the_next_start(tmp_path):
    best = make(tmp_path, metric="x")
    best.update(1, {"x": 1.0})
    best.folder.rename(tmp_path / ".best.old")
    for name in (".best.new", "..best.new.new", "..best.new.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "torso").touch()
    best.discard_after(1)
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    assert best.record() is not None
