"""Two processes, the second of which fails, dies, freezes or hangs: the first ends too, soon, and says why."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.processes import ROOT, command, environment, run, write_recipes

pytestmark = pytest.mark.slow

LAUNCHER_SAW_AN_END = "closing signal"


@dataclass
class Outcome:
    status: int
    seconds: float
    """From the fault until rank 0 and, where it can, rank 1 had ended."""
    told: list[str]

    def lines_of(self, text: str) -> list[str]:
        return [line for line in self.told if text in line]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_recipes(tmp_path)
    return tmp_path


def broken(folder: Path, fault: str, place: str, *settings: str, algorithm: str = "ppo") -> Outcome:
    """A run in which rank 1 comes to a place, as in "reward 2", and something happens to it."""
    program = (str(ROOT / "tests" / "faulty.py"), fault, *place.split())
    arguments = [algorithm, f"{algorithm}.yaml", "distributed.silent_after_s=4", *settings]
    output = folder / "output.txt"
    with output.open("w") as stream, rank_1_ends_with_the_test(folder):
        launched = subprocess.Popen(
            command(*arguments, num_processes=2, program=program),
            cwd=folder, env=environment(), stdout=stream, stderr=subprocess.STDOUT,
        )  # fmt: skip
        while launched.poll() is None and LAUNCHER_SAW_AN_END not in output.read_text():
            time.sleep(0.1)
        if fault == "freezes":
            seconds = time.time() - (folder / "rank1.pid").stat().st_mtime
            os.kill(int((folder / "rank1.pid").read_text()), signal.SIGKILL)
            launched.wait(timeout=60)
        else:
            launched.wait(timeout=60)
            seconds = time.time() - (folder / "rank1.pid").stat().st_mtime
    return Outcome(launched.returncode, seconds, output.read_text().splitlines())


@contextmanager
def rank_1_ends_with_the_test(folder: Path) -> Iterator[None]:
    """What is frozen would stay for ever."""
    try:
        yield
    finally:
        with suppress(FileNotFoundError, ProcessLookupError):
            os.kill(int((folder / "rank1.pid").read_text()), signal.SIGKILL)


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "out" / "checkpoints").glob("step_*"))


def in_words(place: str) -> str:
    phase, iteration = place.split()
    return f"the phase {phase} of iteration {iteration}"


@pytest.mark.parametrize("place", ["rollout 2", "reward 2", "logprobs 2", "update 2", "evaluation 2", "checkpoint 2"])
def test_an_exception_ends_both_ranks(place: str, folder: Path):
    """One traceback, that of rank 1; one line of rank 0; and where weights have not moved, a checkpoint."""
    outcome = broken(folder, "fails", place)
    assert outcome.status != 0
    assert outcome.seconds < 30
    told = f"rank 0 ends: rank 1 failed in {in_words(place)}: AssertionError: planted"
    assert outcome.lines_of("rank 0 ends") == [told]
    assert outcome.lines_of("rank 1 ends") == []
    assert outcome.lines_of("AssertionError: planted") == [told, "AssertionError: planted"]
    assert outcome.lines_of("gloo") == []
    print(place, outcome.seconds, checkpoints(folder))


@pytest.mark.parametrize(
    ("fault", "place"), [(f, p) for f in ("is killed", "freezes") for p in ("rollout 2", "update 2")]
)
def test_a_rank_that_gives_no_sign_of_life_is_named(fault: str, place: str, folder: Path):
    outcome = broken(folder, fault, place)
    assert outcome.status != 0
    assert outcome.seconds < 30
    (told,) = outcome.lines_of("rank 0 ends")
    print(fault, place, outcome.seconds, checkpoints(folder), told)
    assert told.startswith("rank 0 ends: rank 1 gave no sign of life for ")
    assert told.endswith(f" s; it was last seen in {in_words(place)}")
    assert outcome.lines_of("gloo") == []


def test_a_phase_that_never_ends_shows_who_keeps_the_others_waiting(folder: Path):
    outcome = broken(folder, "hangs", "reward 2", "distributed.phase_timeout_s=3")
    assert outcome.status != 0
    assert outcome.seconds < 30
    print(outcome.seconds, checkpoints(folder), "\n".join(outcome.told))
