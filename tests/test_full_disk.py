"""The command on a disk that is full, and with nobody who reads what it prints: real processes, real errors."""

import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmrl.trainers.checkpoint import list_checkpoints, verify_checkpoint
from tests.processes import environment, lines, write_recipes

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_recipes(tmp_path)
    return tmp_path


@pytest.fixture
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system with room for one checkpoint, of 4.1 MiB, and not for two."""
    place = folder / "disk"
    place.mkdir()
    if mount(place, "size=6m").returncode:
        pytest.skip("file systems cannot be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def mount(place: Path, options: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(place)], capture_output=True, check=False)


def start(folder: Path, *arguments: str, limit: int | None = None, **streams: Any) -> subprocess.Popen[str]:
    """The command, under a limit on the size of every file."""

    def restrict() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, "-m", "llmrl", "sft", "sft.yaml", *arguments]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "preexec_fn": restrict} | streams
    return subprocess.Popen(command, cwd=folder, env=environment(), text=True, **streams)


def iterations(run: Path) -> list[int]:
    for step in list_checkpoints(run / "checkpoints"):
        verify_checkpoint(step)
    return [line["iteration"] for line in lines(run / "metrics.jsonl")]


def test_a_run_whose_disk_is_full_ends_with_a_line_and_goes_on_once_there_is_room(folder: Path, small_disk: Path):
    arguments = ("run.output_dir=disk/out", "run.num_iterations=6", "run.checkpoint_every=2")
    run = start(folder, *arguments)
    _, told = run.communicate()
    assert run.returncode == 1
    assert re.match(r"error: \S+/checkpoints/step_00000\d cannot be written: No space left on device \(", told)
    assert re.search(r"\(4.05 MiB needed, 1\.\d+ MiB free\)$", told.splitlines()[0])
    assert "Traceback" not in told
    done = iterations(small_disk / "out")
    assert done == list(range(1, len(done) + 1))
    assert list_checkpoints(small_disk / "out" / "checkpoints")
    assert mount(small_disk, "remount,size=40m").returncode == 0
    run = start(folder, *arguments, "run.resume=true")
    _, told = run.communicate()
    assert (run.returncode, told) == (0, "")
    assert iterations(small_disk / "out") == [1, 2, 3, 4, 5, 6]
    assert (small_disk / "out" / "final" / "model.safetensors").exists()


def test_a_file_that_may_not_grow_ends_the_run_with_a_line(folder: Path):
    run = start(folder, limit=2_000_000)
    _, told = run.communicate()
    assert run.returncode == 1
    assert re.match(r"error: \S+/checkpoints/step_00000\d cannot be written: File too large \(.*\n$", told)
    assert "(4.05 MiB needed, " in told
    done = iterations(folder / "out")
    assert done
    assert done == list(range(1, len(done) + 1))


def test_a_pipe_that_is_closed_ends_no_run(folder: Path):
    run = start(folder)
    assert run.stdout is not None
    assert run.stdout.readline().startswith("Each of 3 iterations")
    run.stdout.close()
    assert run.stderr is not None
    told = run.stderr.read()
    assert run.wait() == 0
    assert told == ""
    assert iterations(folder / "out") == [1, 2, 3]
    assert (folder / "out" / "final" / "model.safetensors").exists()


def test_output_that_cannot_be_written_anywhere_ends_no_run(folder: Path):
    with open("/dev/full", "w") as full:
        run = start(folder, stdout=full, stderr=full)
    assert run.wait() == 0
    closed = start(folder, "run.output_dir=again", preexec_fn=lambda: os.closerange(1, 3), stdout=None, stderr=None)
    assert closed.wait() == 0
    assert iterations(folder / "out") == iterations(folder / "again") == [1, 2, 3]
