"""What may lie in the folder that a run is to write."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmrl.distributed.collectives import OneProcess
from llmrl.lines import last_iteration
from llmrl.trainers.output import RunError, check_folder, check_models, locked

CONFIG = {"settings": {"run": {}}, "versions": {"torch": "2"}}


def check(folder: Path, *, resume: Any = "auto", **inputs: Path | str) -> None:
    check_folder(folder, resume=resume, inputs={name: str(path) for name, path in inputs.items()})


def tree(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def make_model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(b"x")
    return folder


def make_run(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "checkpoints" / "step_000002").mkdir(parents=True)
    return folder


# --- models and data --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", [False, True, "auto"])
@pytest.mark.parametrize("place", ["model", "model/run/a"])
def test_the_folder_of_the_model_that_is_read_is_refused(tmp_path: Path, resume: bool, place: str):
    model = make_model(tmp_path / "model")
    with pytest.raises(RunError, match=r"model\.path \(.*which the run reads; choose another folder$"):
        check(tmp_path / place, resume=resume, **{"model.path": model})


def test_so_it_is_by_another_name_and_from_another_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make_model(tmp_path / "model")
    (tmp_path / "link").symlink_to("model")
    monkeypatch.chdir(tmp_path / "model")
    with pytest.raises(RunError, match=r"is model\.path"):
        check(Path("."), resume=True, **{"model.path": "../link"})


@pytest.mark.parametrize("resume", [False, True, "auto"])
def test_any_other_folder_with_a_model_is_refused_without_advice_to_resume(tmp_path: Path, resume: bool):
    make_model(tmp_path / "model")
    with pytest.raises(RunError, match=r"holds config\.json, which no run of llmrl wrote.*; choose") as refused:
        check(tmp_path / "model", resume=resume)
    assert "resume" not in str(refused.value)


@pytest.mark.parametrize("name", ["adapter_config.json", "w.safetensors", "tokenizer.json", "final", "metrics.jsonl"])
def test_a_folder_with_anything_that_matters_is_refused(tmp_path: Path, name: str):
    (tmp_path / name).touch()
    with pytest.raises(RunError, match=f"holds {name}, which no run"):
        check(tmp_path, resume=True)


def test_a_model_in_the_place_of_the_record_of_a_run_makes_it_none(tmp_path: Path):
    """What an earlier llmrl, or a copy by hand, may have left."""
    run = make_model(tmp_path / "run")
    (run / "checkpoints" / "step_000002").mkdir(parents=True)
    with pytest.raises(RunError, match=r"holds config\.json"):
        check(run, resume=True)


def test_other_files_stay_and_data_beside_the_run_is_read(tmp_path: Path):
    (tmp_path / "notes.txt").touch()
    data = tmp_path / "train.jsonl"
    data.touch()
    check(tmp_path, **{"data.path": data, "model.path": "someone/on-the-hub"})


def test_a_folder_of_data_is_refused(tmp_path: Path):
    with pytest.raises(RunError, match=r"is inside data\.path"):
        check(tmp_path / "runs" / "x", **{"data.path": tmp_path})


@pytest.mark.parametrize("inside", ["final", "best", "checkpoints/step_000001", "final/nested"])
def test_what_a_run_reads_must_not_be_what_it_writes_over(tmp_path: Path, inside: str):
    run = make_run(tmp_path / "run")
    make_model(run / inside)
    with pytest.raises(RunError, match=r"holds model\.path \(.*and would write over; choose another folder$"):
        check(run, resume=True, **{"model.path": run / inside})
    (run / "finally").mkdir()
    (run / "train.jsonl").touch()
    check(run, resume=True, **{"model.path": run / "finally", "data.path": run / "train.jsonl"})


def test_a_name_on_the_hub_is_in_no_folder_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(make_run(tmp_path / "run"))
    check(Path("."), resume=True, **{"model.path": "best/model"})


# --- runs -------------------------------------------------------------------------------------------------------------


def test_a_run_is_resumed_or_refused(tmp_path: Path):
    run = make_run(tmp_path / "run")
    check(run, resume=True)
    check(run)
    with pytest.raises(RunError, match=r"already holds a run; leave run\.resume at auto"):
        check(run, resume=False)


@pytest.mark.parametrize("torn", [b"", b'{"settings": {', b"\xff\xfe"])
def test_a_run_whose_record_is_torn_is_known_by_its_checkpoints(tmp_path: Path, torn: bytes):
    (tmp_path / "config.json").write_bytes(torn)
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(RunError, match=r"holds config\.json"):
        check(tmp_path, resume=True)
    (tmp_path / "checkpoints" / "step_000002").mkdir(parents=True)
    check(tmp_path, resume=True)


@pytest.mark.parametrize("left", ["final/x", "best/x", "metrics.jsonl", "samples.jsonl"])
def test_what_a_run_without_checkpoints_left_is_not_begun_anew(tmp_path: Path, left: str):
    run = make_run(tmp_path / "run")
    (run / "checkpoints" / "step_000002").rmdir()
    check(run)
    (run / left).parent.mkdir(exist_ok=True)
    (run / left).write_text('{"iteration": 1}\n{"iteration": 2}\n')
    before = tree(run)
    with pytest.raises(RunError, match=rf"holds {left.removesuffix('x')} of a run, and no checkpoint to go on from"):
        check(run)
    assert tree(run) == before


def test_a_run_in_its_first_iteration_has_left_nothing(tmp_path: Path):
    run = make_run(tmp_path / "run")
    (run / "checkpoints" / "step_000002").rmdir()
    (run / "metrics.jsonl").write_text('{"iteration": 0}\n{"iteration": 1}\n{"iter')
    (run / "best").mkdir()
    (run / "best" / "best.json").write_text('{"metric": "x", "value": 1.0, "iteration": 1}')
    check(run)


def test_a_finished_run_may_lack_its_checkpoints(tmp_path: Path):
    run = make_run(tmp_path / "run")
    (run / "checkpoints" / "step_000002").rmdir()
    (run / "final").mkdir()
    (run / "final" / "model.safetensors").touch()
    (run / "config.json").write_text(json.dumps(CONFIG | {"finished": 9}))
    check(run)
    shutil.rmtree(run / "final")
    (run / "metrics.jsonl").write_text('{"iteration": 9}\n')
    with pytest.raises(RunError, match="no checkpoint to go on from"):
        check(run)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"iteration": null}', "\x00", "7"])
def test_lines_that_are_no_records_have_no_iteration(tmp_path: Path, content: str):
    (tmp_path / "metrics.jsonl").write_text(content)
    assert last_iteration(tmp_path / "metrics.jsonl") == last_iteration(tmp_path / "gone") == 0


# --- the lock ---------------------------------------------------------------------------------------------------------

HOLDS = """
import os, sys, time
from pathlib import Path
from llmrl.distributed.collectives import OneProcess
from llmrl.trainers.output import locked
with locked(Path(sys.argv[1]), OneProcess()):
    if len(sys.argv) > 2 and os.fork() == 0:
        time.sleep(60)  # as a worker of a reward function may, after its parent was killed
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("forks", [(), ("forks",)])
def test_a_folder_has_one_writer_and_a_dead_one_holds_nothing(tmp_path: Path, forks: tuple[str, ...]):
    folder = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLDS, str(folder), *forks], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunError, match="is being written by another process"), locked(folder, OneProcess()):
            pytest.fail("two writers")
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    with locked(folder, OneProcess()):
        pass


def test_every_rank_learns_that_the_folder_is_taken(tmp_path: Path):
    class Second(OneProcess):
        rank, world_size = 1, 2

        def gather(self, x: Any) -> list[Any]:
            return ["taken", x]

    with pytest.raises(RunError, match="taken"), locked(tmp_path / "run", Second()):
        pytest.fail("two writers")
    assert not (tmp_path / "run").exists()


# --- places -----------------------------------------------------------------------------------------------------------


def test_a_place_that_can_be_made_is_left_as_it_is(tmp_path: Path):
    check(tmp_path / "a" / "b" / "ein ördner")
    check(tmp_path)
    assert tree(tmp_path) == []


def test_a_place_below_a_file_is_refused(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"file\) is a file; name a folder"):
        check(tmp_path / "file")
    with pytest.raises(RunError, match=r"cannot be made: .*file is a file; name a folder"):
        check(tmp_path / "file" / "run")


def test_a_link_to_nowhere_is_refused(tmp_path: Path):
    (tmp_path / "link").symlink_to("gone")
    with pytest.raises(RunError, match="is no folder; name a folder"):
        check(tmp_path / "link")


@pytest.mark.parametrize("name", ["x" * 300, "x\0y"])
def test_a_name_that_the_file_system_refuses(tmp_path: Path, name: str):
    with pytest.raises(RunError, match=r"cannot be written: .*; choose another folder"):
        check(tmp_path / name)


def test_a_place_where_nothing_can_be_written_is_refused(tmp_path: Path):
    place = Path("/proc") if os.geteuid() == 0 else tmp_path / "closed"
    if place != Path("/proc"):
        place.mkdir(mode=0o500)
    with pytest.raises(RunError, match=rf"cannot be written: {place}: .*; choose another folder"):
        check(place / "run")


# --- places of models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["best", "final"])
def test_an_empty_folder_is_a_place_for_a_model_and_so_is_a_link_to_one(tmp_path: Path, name: str):
    (tmp_path / "disk" / "model").mkdir(parents=True)
    run = tmp_path / "run"
    run.mkdir()
    (run / name).symlink_to(tmp_path / "disk" / "model")
    check(run)
    check_models(run)
    (run / name).unlink()
    (run / name).mkdir()
    check(run)
    check_models(run)
    (run / name / "model.safetensors").touch()
    with pytest.raises(RunError, match=f"holds {name}, which no run"):
        check(run)


def test_a_link_may_lead_to_a_folder_that_is_to_be_made(tmp_path: Path):
    (tmp_path / "final").symlink_to(tmp_path / "made_later")
    check(tmp_path)
    check_models(tmp_path)


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ("gone/final", r"final is a link to .*gone/final, and there is no folder .*gone;"),
        ("file", "final is a file;"),
        ("final", "final is a link that leads nowhere;"),
        ("/proc", r"final is the root of a file system \(/proc\), which cannot be replaced;"),
    ],
)
def test_a_link_that_no_model_could_be_written_through_is_refused(tmp_path: Path, target: str, problem: str):
    (tmp_path / "file").touch()
    (tmp_path / "final").symlink_to(target)
    with pytest.raises(RunError, match=problem):
        check_models(tmp_path)


@pytest.mark.parametrize("name", ["best", "final"])
def test_a_file_in_the_place_of_a_model_is_refused(tmp_path: Path, name: str):
    (tmp_path / name).touch()
    with pytest.raises(RunError, match=rf"run\.output_dir \(.*\): {name} is a file; move it away"):
        check_models(tmp_path)
