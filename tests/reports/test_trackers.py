"""The real packages: TensorBoard, Weights & Biases offline, Trackio in a folder; through a crash and a resume."""

import json
import os
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llmrl.reports.trackers import TrackerConfig, TrackerError, Trackers
from llmrl.settings import SettingError, read_recipe

SETTINGS = {"run": {"seed": 7}, "optimizer": {"learning_rate": 0.5}}


def make(folder: Path, *names: Any, num_done: int = 0, said: list[str] | None = None) -> Trackers:
    trackers = Trackers(TrackerConfig(names=names, project="p"), output_dir=folder)
    folder.mkdir(exist_ok=True)
    trackers.begin(num_done, SETTINGS, (said if said is not None else []).append)
    return trackers


# --- TensorBoard ------------------------------------------------------------------------------------------------------


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_reads_back_what_was_logged(tmp_path: Path):
    with make(tmp_path, "tensorboard") as board:
        board.log(1, {"score/mean": 0.25, "kl/mean": 0.5})
        board.log(2, {"score/mean": 0.75})
    assert scalars(tmp_path) == {"score/mean": [(1, 0.25), (2, 0.75)], "kl/mean": [(1, 0.5)]}


def test_tensorboard_has_the_settings(tmp_path: Path):
    with make(tmp_path, "tensorboard"):
        pass
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (text,) = events.Tensors("settings/text_summary")
    assert json.loads(text.tensor_proto.string_val[0].decode()) == SETTINGS


def test_tensorboard_is_on_disk_after_every_iteration(tmp_path: Path):
    make(tmp_path, "tensorboard").log(1, {"x": 1.0})  # and never closed
    assert scalars(tmp_path) == {"x": [(1, 1.0)]}


def test_tensorboard_drops_what_came_after_the_checkpoint(tmp_path: Path):
    first = make(tmp_path, "tensorboard")
    for number in range(5):
        first.log(number, {"x": float(number)})
    with make(tmp_path, "tensorboard", num_done=2) as again:
        for number in range(6):  # a run replays all that is done
            again.log(number, {"x": 10.0 * number})
    assert scalars(tmp_path)["x"] == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0), (5, 50.0)]


def test_a_tracker_that_is_added_later_gets_what_was_before(tmp_path: Path):
    with make(tmp_path):
        pass
    with make(tmp_path, "tensorboard", num_done=2) as added:
        for number in (1, 2, 3):
            added.log(number, {"x": float(number)})
    assert scalars(tmp_path)["x"] == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_events_that_were_removed_are_written_again(tmp_path: Path):
    make(tmp_path, "tensorboard").log(1, {"x": 1.0})
    for file in (tmp_path / "tensorboard").iterdir():
        file.unlink()
    (tmp_path / "tensorboard").rmdir()
    make(tmp_path, "tensorboard", num_done=1).log(1, {"x": 1.0})
    assert scalars(tmp_path) == {"x": [(1, 1.0)]}


def test_nothing_is_written_before_the_run_begins_and_nothing_without_trackers(tmp_path: Path):
    Trackers(TrackerConfig(names=("tensorboard",)), output_dir=tmp_path)
    with make(tmp_path) as none:
        none.log(1, {"score/mean": 0.25})
    assert list(tmp_path.iterdir()) == []


# --- Weights & Biases and Trackio, in processes of their own ----------------------------------------------------------

PROCESS = """
import os, sys
from pathlib import Path
from llmrl.reports.trackers import TrackerConfig, Trackers

name, folder, num_done, first, last, dies = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:])
folder.mkdir(exist_ok=True)
with Trackers(TrackerConfig(names=(name,), project="p"), output_dir=folder) as trackers:
    trackers.begin(num_done, {"run": {"seed": 7}}, print)
    for number in range(first, last + 1):
        trackers.log(number, {"score/mean": number / 4, "kl/mean": float("nan")})
    if dies:
        __import__("time").sleep(1.5)
        os._exit(3)
"""


def in_process(name: str, folder: Path, *numbers: int, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROCESS, name, str(folder), *(str(int(n)) for n in numbers)]
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    return subprocess.run(command, capture_output=True, text=True, env=kept | environment, cwd=Path.cwd())


def records(file: Path) -> Iterator[Any]:
    """Of a .wandb file: a header of 7 bytes, then LevelDB's log of protocol buffers, in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    content, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


@pytest.mark.slow
def test_wandb_has_one_run_with_each_step_once_after_a_crash(tmp_path: Path):
    crash = in_process("wandb", tmp_path / "run", 0, 0, 4, True, WANDB_MODE="offline")
    resume = in_process("wandb", tmp_path / "run", 2, 0, 6, False, WANDB_MODE="offline")
    assert (crash.returncode, resume.returncode) == (3, 0), crash.stderr + resume.stderr
    assert resume.stdout == "wandb has iterations up to 4 from before: it is not sent them again\n"
    assert crash.stdout + crash.stderr + resume.stderr == ""
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    assert len({file.name for file in files}) == 1  # the id of the run
    steps, configs, names = [], [], set()
    for record in (record for file in files for record in records(file)):
        if record.HasField("history"):
            values = {
                item.nested_key[0] if item.nested_key else item.key: item.value_json for item in record.history.item
            }
            steps.append((record.history.step.num, json.loads(values["score/mean"])))
        if record.HasField("run"):
            names.add((record.run.project, record.run.display_name))
            configs.append({item.key: item.value_json for item in record.run.config.update}["run"])
    assert steps == [(number, number / 4) for number in range(7)]
    assert names == {("p", "run")}
    assert [json.loads(config) for config in configs] == [{"seed": 7}] * 2


@pytest.mark.slow
def test_wandb_without_a_login_says_the_way_out_and_waits_for_nobody(tmp_path: Path):
    refused = in_process("wandb", tmp_path / "run", 0, 1, 1, False, HOME=str(tmp_path), NETRC=str(tmp_path / "none"))
    assert refused.returncode == 1
    said = refused.stderr.splitlines()[-1]
    assert said.startswith("llmrl.reports.trackers.TrackerError: trackers.names (wandb) does not start: No API key")
    assert "set WANDB_MODE=offline" in said


@pytest.mark.slow
def test_trackio_has_one_run_with_each_step_once_after_a_crash(tmp_path: Path):
    where = {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    crash = in_process("trackio", tmp_path / "run", 0, 0, 4, True, **where)
    resume = in_process("trackio", tmp_path / "run", 2, 0, 6, False, **where)
    assert (crash.returncode, resume.returncode) == (3, 0), crash.stderr + resume.stderr
    assert resume.stdout == "trackio has iterations up to 4 from before: it is not sent them again\n"
    assert crash.stdout + crash.stderr + resume.stderr == ""
    with sqlite3.connect(tmp_path / "trackio" / "p.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics order by step").fetchall()
        configs = database.execute("select config from configs").fetchall()
    assert [(step, json.loads(metrics)["score/mean"]) for _, step, metrics in rows] == [(n, n / 4) for n in range(7)]
    run_id = json.loads((tmp_path / "run" / "trackers.json").read_text())["trackio"]["id"]
    assert {name for name, _, _ in rows} == {f"run-{run_id}"}
    assert [json.loads(config)["run"] for (config,) in configs] == [{"seed": 7}]


@pytest.mark.slow
def test_trackio_is_sent_again_what_a_crash_kept_it_from_writing(tmp_path: Path):
    where = {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    in_process("trackio", tmp_path / "run", 0, 0, 2, False, **where)
    record = json.loads((tmp_path / "run" / "trackers.json").read_text())
    record["trackio"]["last"] = 4  # as if 3 and 4 had been queued when the process died
    (tmp_path / "run" / "trackers.json").write_text(json.dumps(record))
    in_process("trackio", tmp_path / "run", 4, 0, 5, False, **where)
    with sqlite3.connect(tmp_path / "trackio" / "p.db") as database:
        assert [step for (step,) in database.execute("select step from metrics order by step")] == list(range(6))


# --- failures, of a package that does as it is told -------------------------------------------------------------------


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Puts a package in the place of wandb whose calls fail as asked. Returns the list of its calls."""

    def put(
        *,
        init: BaseException | None = None,
        log: BaseException | None = None,
        finish: BaseException | None = None,
        num_failures: int = 10**9,
    ) -> list[Any]:
        calls: list[Any] = []
        left = [num_failures]

        class Run:
            def log(self, values: dict[str, float], *, step: int, commit: bool) -> None:
                left[0] -= 1
                if log is not None and left[0] >= 0:
                    raise log
                calls.append((step, values))

            def finish(self, exit_code: int = 0) -> None:
                calls.append(("finish", exit_code))
                if finish is not None:
                    raise finish

        def make_run(**options: Any) -> Run:
            if init is not None:
                raise init
            calls.append(options)
            return Run()

        wandb = ModuleType("wandb")
        wandb.__spec__ = ModuleSpec("wandb", None, origin="here")
        wandb.init = make_run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "wandb", wandb)
        return calls

    return put


def test_the_id_of_a_run_stays_and_a_run_of_another_folder_has_its_own(package: Any, tmp_path: Path):
    calls = package()
    for folder in ("a", "a", "b"):
        with make(tmp_path / folder, "wandb"):
            pass
    first, again, other = (call["id"] for call in calls if isinstance(call, dict))
    assert first == again != other
    assert {call["resume"] for call in calls if isinstance(call, dict)} == {"allow"}


def test_a_tracker_that_does_not_start_is_one_line_with_the_way_out(package: Any, tmp_path: Path):
    package(init=RuntimeError("timed out.\nmore of that"))
    with pytest.raises(TrackerError) as refused:
        make(tmp_path / "run", "wandb")
    assert str(refused.value).startswith(
        "trackers.names (wandb) does not start: timed out; run `wandb login`, set WANDB_"
    )
    assert "\n" not in str(refused.value)


def test_a_tracker_that_fails_later_costs_one_warning_and_gets_the_rest_after_a_resume(package: Any, tmp_path: Path):
    said: list[str] = []
    package(log=RuntimeError("gone.\nmore of that"))
    with make(tmp_path / "run", "wandb", said=said) as trackers:
        for number in range(1, 12):
            trackers.log(number, {"x": float(number)})
        assert len(said) == 1
    assert said == [
        "warning: trackers.names (wandb) failed: gone; it gets what it lacks with the next iteration, and "
        "metrics.jsonl has everything",
        "warning: trackers.names (wandb) failed 12 times, last: gone; it lacks 11 iterations, and metrics.jsonl none",
    ]
    calls = package()
    with make(tmp_path / "run", "wandb", num_done=2) as again:
        for number in (1, 2, 3):
            again.log(number, {"x": float(number)})
    assert calls[1:] == [(1, {"x": 1.0}), (2, {"x": 2.0}), (3, {"x": 3.0}), ("finish", 0)]


@pytest.mark.parametrize("error", [RuntimeError("gone"), OSError(28, "full"), SystemExit(1)])
def test_a_tracker_that_fails_for_a_time_gets_everything_in_order(package: Any, tmp_path: Path, error: BaseException):
    said: list[str] = []
    calls = package(log=error, num_failures=3)
    with make(tmp_path / "run", "wandb", said=said) as trackers:
        for number in (1, 2, 3, 4, 5):
            trackers.log(number, {"x": float(number)})
    assert [call[0] for call in calls[1:]] == [1, 2, 3, 4, 5, "finish"]
    assert json.loads((tmp_path / "run" / "trackers.json").read_text())["wandb"]["last"] == 5
    assert len(said) == 2
    assert said[1].startswith("warning: trackers.names (wandb) failed 3 times, last: ")
    assert said[1].endswith("; it lacks none of the iterations, and metrics.jsonl none")


def test_a_tracker_that_fails_for_ever_is_left_alone(package: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("llmrl.reports.trackers.MAX_WAITING", 3)
    said: list[str] = []
    calls = package(log=RuntimeError("gone"))
    with make(tmp_path / "run", "wandb", said=said) as trackers:
        for number in range(1, 10):
            trackers.log(number, {})
    assert len(calls) == 1
    assert said[1:] == [
        "warning: trackers.names (wandb) lacks 3 iterations and receives nothing more",
        "warning: trackers.names (wandb) failed 4 times, last: gone; it lacks 4 iterations, and metrics.jsonl none",
    ]


def test_a_record_of_trackers_that_cannot_be_written_is_told_once(
    package: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    said: list[str] = []
    calls = package()
    with make(tmp_path / "run", "wandb", said=said) as trackers:
        monkeypatch.setattr(os, "replace", refuse)
        trackers.log(1, {})
        trackers.log(2, {})
    assert [call[0] for call in calls[1:]] == [1, 2, "finish"]
    (warning,) = said
    assert "trackers.json cannot be written: No space" in warning


@pytest.mark.parametrize(
    "record", ["", "[]", '{"wandb": 3}', '{"wandb": {"id": 3, "last": 1}}', '{"wandb": {"id": "x"}}']
)
def test_a_record_of_trackers_that_cannot_be_read_begins_anew(package: Any, tmp_path: Path, record: str):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "trackers.json").write_text(record)
    calls = package()
    with make(tmp_path / "run", "wandb") as trackers:
        trackers.log(1, {})
    assert [call[0] for call in calls[1:]] == [1, "finish"]


def test_wandb_does_not_wait_for_a_network_for_ever(package: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT_RAISES", "false")
    package()
    with make(tmp_path / "run", "wandb"):
        assert os.environ["WANDB_FINISH_TIMEOUT"] == "600"
    assert os.environ["WANDB_FINISH_TIMEOUT_RAISES"] == "false"  # the user's own


def test_a_run_that_failed_is_marked_and_a_farewell_that_fails_hides_nothing(package: Any, tmp_path: Path):
    calls, said = package(finish=RuntimeError("no network")), []

    def fail() -> None:
        with make(tmp_path / "run", "wandb", said=said):
            raise MemoryError

    with pytest.raises(MemoryError):
        fail()
    assert calls[-1] == ("finish", 1)
    assert said == ["warning: trackers.names (wandb) did not finish: no network"]


@pytest.mark.parametrize("spec", [None, ModuleSpec("wandb", None)])
def test_a_missing_package_is_named_before_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, spec: Any):
    """A folder of that name, where wandb keeps its files, is no package."""
    monkeypatch.setattr("llmrl.reports.trackers.find_spec", lambda name: spec)
    with pytest.raises(ValueError, match=r'trackers\.names \(wandb\) .* pip install "llmrl\[wandb\]"'):
        Trackers(TrackerConfig(names=("wandb",)), output_dir=tmp_path)


def test_a_recipe_can_name_trackers(tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("names: [tensorboard]")
    assert read_recipe(TrackerConfig, recipe, []) == TrackerConfig(names=("tensorboard",))
    with pytest.raises(SettingError, match=r"names\.0: 'tensorbord' is not one of 'tensorboard', 'wandb' or 'trackio'"):
        read_recipe(TrackerConfig, recipe, ["names=[tensorbord]"])


def test_iterations_that_all_have_already_write_nothing(package: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    package()
    with make(tmp_path / "run", "wandb") as trackers:
        trackers.log(5, {"x": 1.0})
        with monkeypatch.context() as patch:
            patch.setattr("llmrl.reports.trackers.write_atomically", lambda *_, **__: pytest.fail("written"))
            trackers.log(4, {"x": 1.0})
        trackers.log(6, {"x": 1.0})
    assert json.loads((tmp_path / "run" / "trackers.json").read_text())["wandb"]["last"] == 6
