from pathlib import Path
from typing import Any

import pytest
from accelerate.utils import LoggerType
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llmrl.reports import trackers
from llmrl.reports.trackers import TrackerConfig, Trackers
from llmrl.settings import SettingError, read_recipe


def test_tensorboard_reads_back_what_was_logged(tmp_path: Path):
    with Trackers(TrackerConfig(names=("tensorboard",)), output_dir=tmp_path) as board:
        board.log(1, {"score/mean": 0.25, "kl/mean": 0.5})
        board.log(2, {"score/mean": 0.75})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    read = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert read == {"score/mean": [(1, 0.25), (2, 0.75)], "kl/mean": [(1, 0.5)]}


def test_nothing_is_written_before_the_run_starts(tmp_path: Path):
    Trackers(TrackerConfig(names=("tensorboard",)), output_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_tracker_is_no_work(tmp_path: Path):
    with Trackers(TrackerConfig(), output_dir=tmp_path) as none:
        none.log(1, {"score/mean": 0.25})
    assert list(tmp_path.iterdir()) == []


def test_every_tracker_is_told_and_closed_after_an_exception_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    calls: list[Any] = []

    class Recorder(trackers.GeneralTracker):
        name, requires_logging_directory, tracker = "recorder", False, None

        def __init__(self, project: str, **options: Any) -> None:
            self.project = project
            calls.append(("made", project, options))

        def start(self) -> None:
            calls.append(("start", self.project))

        def log(self, values: dict[str, Any], step: int | None = None, **options: Any) -> None:
            calls.append(("log", values, step))

        def finish(self) -> None:
            calls.append(("finish", self.project))

    monkeypatch.setattr(trackers, "get_available_trackers", lambda: [LoggerType.WANDB, LoggerType.TRACKIO])
    monkeypatch.setattr(trackers, "WandBTracker", Recorder)
    monkeypatch.setattr(trackers, "TrackioTracker", Recorder)
    config = TrackerConfig(names=("wandb", "trackio"), project="p")

    def fail() -> None:
        with Trackers(config, output_dir=tmp_path / "first") as both:
            both.log(7, {"x": 1.0})
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert calls == [
        ("made", "p", {"name": "first", "dir": str(tmp_path / "first")}),
        ("made", "p", {"name": "first"}),
        *[("start", "p")] * 2,
        *[("log", {"x": 1.0}, 7)] * 2,
        *[("finish", "p")] * 2,
    ]


def test_a_missing_package_is_named_before_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(trackers, "get_available_trackers", list)
    with pytest.raises(ValueError, match=r'trackers\.names \(wandb\) .* pip install "llmrl\[wandb\]"'):
        Trackers(TrackerConfig(names=("wandb",)), output_dir=tmp_path)


def test_a_recipe_can_name_trackers(tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("names: [tensorboard]")
    assert read_recipe(TrackerConfig, recipe, []) == TrackerConfig(names=("tensorboard",))
    with pytest.raises(SettingError, match=r"names\.0: 'tensorbord' is not one of 'tensorboard', 'wandb' or 'trackio'"):
        read_recipe(TrackerConfig, recipe, ["names=[tensorbord]"])
