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
    assert json.loads(records.metrics_file.read_text().splitlines()[1])["x"] is None


def test_the_last_line_can_be_replaced(records):
    records.write(1, {"x": 1.0})
    records.write(2, {"x": 2.0})
    records.rewrite_last(2, {"x": 2.0, "y": 3.0})
    assert records.lines() == [(1, {"x": 1.0}), (2, {"x": 2.0, "y": 3.0})]


def test_what_came_after_an_iteration_is_removed_from_metrics_and_samples(records):
    for number in (1, 2, 3):
        records.write(number, {"x": 1.0})
    records.samples_file.write_text(records.metrics_file.read_text())
    records.keep(2)
    assert [number for number, _ in records.lines()] == [1, 2]
    assert len(records.samples_file.read_text().splitlines()) == 2


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
