"""A run in miniature on a disk that fails: at any call, once and for good. What is on it can be continued from."""

import errno
import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from llmrl.files import WriteError, replaced_folder
from llmrl.lines import LineFile
from llmrl.trainers import records
from llmrl.trainers.checkpoint import list_checkpoints, read_state, verify_checkpoint
from llmrl.trainers.run import Run
from tests.trainers.test_run import WEIGHTS, Bench

CALLS = ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "truncate", "write")
ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS, errno.EACCES)


STRIDE = 1 if os.environ.get("RELIABILITY") else 7
"""Calls from one that fails to the next: RELIABILITY=1 tries every one; prime to the number of errors."""


class Disk:
    """Fails the calls from number `first` to number `last` that change something below a folder."""

    def __init__(self, folder: Path, first: int, last: int) -> None:
        self.folder = str(folder)
        self.first, self.last = first, last
        self.num_calls = 0

    def pass_or_fail(self, place: str) -> None:
        if not place.startswith(self.folder):
            return
        self.num_calls += 1
        if self.first <= self.num_calls <= self.last:
            number = ERRORS[self.first % len(ERRORS)]
            raise OSError(number, os.strerror(number))


class FaultyFile(io.FileIO):
    """A file whose writes fail as its disk does, after half of what they are given."""

    disk: Disk

    def write(self, content: Any) -> int:
        try:
            self.disk.pass_or_fail(os.readlink(f"/proc/self/fd/{self.fileno()}"))
        except OSError:
            super().write(bytes(content)[: len(content) // 2])
            raise
        return super().write(content)

    def truncate(self, size: int | None = None) -> int:
        self.disk.pass_or_fail(str(self.name))
        return super().truncate(size)


@contextmanager
def on(disk: Disk) -> Iterator[None]:
    """Context in which every file is on that disk."""
    real_open = io.open

    def faulty_open(
        file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, *rest: Any, **named: Any
    ) -> Any:
        if mode.strip("b") not in ("w", "a") or not str(file).startswith(disk.folder):
            return real_open(file, mode, buffering, encoding, *rest, **named)
        disk.pass_or_fail(str(file))
        raw = FaultyFile(file, mode.strip("b"))
        raw.disk = disk
        if buffering == 0:
            return raw
        return io.BufferedWriter(raw) if "b" in mode else io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8")

    def faulty(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(first: Any, *rest: Any, dir_fd: int | None = None, **named: Any) -> Any:
            base = first if isinstance(first, int) else dir_fd
            place = str(first) if base is None else os.readlink(f"/proc/self/fd/{base}")
            disk.pass_or_fail(place)
            return real(first, *rest, **({} if dir_fd is None else {"dir_fd": dir_fd}), **named)

        return call

    def faulty_save(tensors: Any, file: Any) -> None:
        disk.pass_or_fail(str(file))
        save_file(tensors, file)

    from safetensors.torch import save_file

    with pytest.MonkeyPatch.context() as patch:
        for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir"):
            patch.setattr(os, name, faulty(getattr(os, name)))
        patch.setattr(io, "open", faulty_open)
        patch.setattr("safetensors.torch.save_file", faulty_save)
        yield


class Sampled(Bench):
    """Runs that keep the best model and two samples of each iteration, and save models as llmrl does."""

    def start(self, num_iterations: int = 4) -> Run:
        samples = LineFile(self.folder / "samples.jsonl", self.said.message)

        def save_model(folder: Path) -> None:
            with replaced_folder(folder) as new:
                (new / "weight").write_text(str(self.trainer.weight.item()))

        def sample() -> None:
            samples.append({"iteration": self.trainer.iteration + 1, "row": row} for row in (0, 1))

        hooks = {(number, "early"): sample for number in range(1, num_iterations + 1)}
        settings: dict[str, Any] = {"best_metric": "weight", "checkpoint_every": 2, "keep_checkpoints": 1}
        return self.make(
            num_iterations,
            hooks=hooks,
            save=save_model,
            samples=samples,
            evaluate=lambda: {"eval/x": float(self.trainer.iteration)},
            evaluate_every=2,
            resume="auto",
            **settings,
        )

    def assert_complete(self) -> None:
        """The records and models of a run that nothing has disturbed."""
        assert [line.get("weight") for line in self.lines()] == [None, *WEIGHTS[:4]]
        assert [line["iteration"] for line in self.lines()] == [0, 1, 2, 3, 4]
        assert [line["iteration"] for line in self.lines() if "eval/x" in line] == [0, 2, 4]
        samples = [(line["iteration"], line["row"]) for line in self.lines("samples.jsonl")]
        assert samples == [(number, row) for number in (1, 2, 3, 4) for row in (0, 1)]
        assert self.model() == self.model("best") == WEIGHTS[3]
        assert self.best()["iteration"] == 4
        assert newest(self.folder) == 4


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_git", lambda *_: None)
    monkeypatch.setattr(os, "fsync", lambda _: None)


def newest(folder: Path) -> int:
    steps = list_checkpoints(folder / "checkpoints")
    for step in steps:
        verify_checkpoint(step)
        assert read_state(step)["iteration"] == int(step.name.removeprefix("step_"))
    return len(steps) and int(steps[-1].name.removeprefix("step_"))


@pytest.mark.slow
@pytest.mark.parametrize(("times", "every"), [(1, 1), (3, 4), (10**9, 4)])
def test_whatever_call_fails_the_last_checkpoint_loads_and_the_records_have_no_hole(
    tmp_path: Path, times: int, every: int
):
    for k in range(1, 1000, every * STRIDE):
        bench = Sampled(tmp_path / str(k))
        run, disk, failure = bench.start(), Disk(bench.folder, k, k + times - 1), None
        try:
            with on(disk):
                run.train()
        except WriteError as error:
            failure = str(error)
        if disk.num_calls < k:
            break
        if failure is not None:
            assert str(bench.folder) in failure
            assert "cannot be written: " in failure
            assert "\n" not in failure
            newest(bench.folder)
            for _ in range(2):
                bench.said.messages.clear()
                bench.start().train()
                assert not any("no line of" in text for text in bench.said.messages), bench.said.messages
                bench.assert_complete()
            left = {path.name for path in bench.folder.iterdir()} - {".lock"}
            assert left == {"best", "checkpoints", "config.json", "final", "metrics.jsonl", "samples.jsonl"}
        else:
            bench.assert_complete()
        shutil.rmtree(bench.folder)
    assert k > 100
    assert failure is None
