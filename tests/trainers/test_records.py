"""The records by themselves; `test_run.py` has them within runs."""

import json
import math

import pytest

from llmrl.reports.progress import Silent
from llmrl.trainers.records import Records


@pytest.fixture
def records(tmp_path):
    return Records(tmp_path, {"run": {"seed": 1}}, {"data": "1f"}, Silent())


def test_lines_come_back_as_they_were_written(records):
    records.write(1, {"x": 0.5})
    records.write(2, {"x": math.inf, "y": 2.0})
    (_, first), (number, second) = records.lines()
    assert first == {"x": 0.5}
    assert (number, second["y"]) == (2, 2.0)
    assert math.isnan(second["x"])
    assert json.loads(records.metrics.file.read_text().splitlines()[1])["x"] is None


def test_the_last_line_can_be_replaced(records):
    records.write(1, {"x": 1.0})
    records.write(2, {"x": 2.0})
    records.rewrite_last(2, {"x": 2.0, "y": 3.0})
    assert records.lines() == [(1, {"x": 1.0}), (2, {"x": 2.0, "y": 3.0})]


def test_what_came_after_an_iteration_is_removed_from_metrics_and_samples(records):
    for number in (1, 2, 3):
        records.write(number, {"x": 1.0})
    records.samples.file.write_text(records.metrics.file.read_text())
    records.keep(2)
    assert [number for number, _ in records.lines()] == [1, 2]
    assert len(records.samples.file.read_text().splitlines()) == 2


def test_the_config_holds_the_settings_and_what_ran_them(records):
    records.write_config()
    config = json.loads(records.config_file.read_text())
    assert config["settings"] == {"run": {"seed": 1}}
    assert config["contents"] == {"data": "1f"}
    assert {"started", "python", "platform", "versions", "git"} <= config.keys()


def test_the_end_is_added_to_the_record_that_is_there(records):
    records.config_file.write_text('{"settings": {"run": {"seed": 2}}}')
    records.mark_finished(7)
    assert json.loads(records.config_file.read_text()) == {"settings": {"run": {"seed": 2}}, "finished": 7}
    records.config_file.write_text("")
    records.mark_finished(8)
    record = json.loads(records.config_file.read_text())
    assert (record["settings"], record["finished"]) == ({"run": {"seed": 1}}, 8)


@pytest.fixture
def said(records, monkeypatch):
    texts = []
    for lines in (records.metrics, records.samples):
        monkeypatch.setattr(lines, "report", texts.append)
    monkeypatch.setattr(records.progress, "message", texts.append)
    return texts


def test_iterations_without_a_line_are_named(records, said):
    for number in (0, 1, 3, 4, 7, 9):
        records.write(number, {})
    records.keep(8)
    assert said == [
        f"warning: {records.metrics.file} has no line of these iterations, which are done: 2, 5 to 6, 8",
    ]


@pytest.mark.parametrize("number", [1, 2])
def test_a_first_line_of_an_evaluation_is_no_hole_and_neither_are_samples_that_are_few(records, said, number):
    records.write(1, {})
    records.samples.append([{"iteration": 1}] * number)
    records.keep(1)
    assert said == []
    assert len(records.samples.file.read_text().splitlines()) == number


def test_what_is_no_number_is_no_metric(records):
    big = "1" + 400 * "0"
    records.metrics.file.write_text(
        f'{{"iteration": 1, "x": "a", "y": 2, "z": [1], "u": {{}}, "v": true, "w": {big}, "n": null, "f": 1e999}}\n'
    )
    ((number, values),) = records.lines()
    assert (number, values.keys()) == (1, {"y", "n", "f"})
    assert (values["y"], values["f"]) == (2, math.inf)


def test_a_run_that_fails_reports_what_it_cannot_write(records, said):
    records.metrics.file.mkdir()
    records.write(1, {})
    records.samples.append([{"iteration": 1}])
    records.sync_or_report()
    assert said[0].endswith("its lines are kept, and written with the next ones")
    assert said[1].startswith(f"warning: {records.metrics.file} cannot be written: Is a directory")
    assert said[1].endswith("its last lines are lost")
    assert records.samples.unsynced == []
