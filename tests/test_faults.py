"""Two processes, the second of which fails, dies, freezes or hangs: the first ends too, soon, and says why."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from llmrl.distributed.heartbeat import WORKING_S
from tests.processes import ROOT, command, environment, write_recipes

pytestmark = pytest.mark.slow

LAUNCHER_SAW_AN_END = "closing signal"
AT_THE_ENDS = "run.checkpoint_every=0"
"""Checkpoints after the first iteration and the last one: any other is one of a rank that saves what it can."""


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


def broken(folder: Path, fault: str, place: str, *settings: str, launch: dict[str, str] | None = None) -> Outcome:
    """A run in which rank 1 comes to a place, as in "reward 2", and something happens to it."""
    arguments = ["ppo", "ppo.yaml", "run.output_dir=out", "distributed.silent_after_s=3", *settings]
    program = (str(ROOT / "tests" / "faulty.py"), fault, *place.split())
    output, started = folder / "output.txt", folder / "fault.json"
    with output.open("w") as stream:
        launched = subprocess.Popen(
            command(*arguments, num_processes=2, program=program),
            cwd=folder, env=environment() | (launch or {}), stdout=stream, stderr=subprocess.STDOUT,
        )  # fmt: skip
        until(lambda: launched.poll() is not None or LAUNCHER_SAW_AN_END in output.read_text())
        begun = json.loads(started.read_text())
        if fault == "freezes":
            seconds = time.time() - begun["time"]
            os.kill(begun["pid"], signal.SIGKILL)  # or the launcher would, in half a minute
            launched.wait(timeout=60)
        else:
            launched.wait(timeout=60)
            seconds = time.time() - begun["time"]
    return Outcome(launched.returncode, seconds, output.read_text().splitlines())


@pytest.fixture(autouse=True)
def nothing_stays_frozen(folder: Path) -> Iterator[None]:
    yield
    with suppress(FileNotFoundError, ProcessLookupError):
        os.kill(json.loads((folder / "fault.json").read_text())["pid"], signal.SIGKILL)


def until(condition: Callable[[], bool]) -> None:
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("nothing has ended for two minutes")


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "out" / "checkpoints").glob("step_*"))


def in_words(place: str) -> str:
    phase, iteration = place.split()
    return f"the phase {phase} of iteration {iteration}"


@pytest.mark.parametrize(
    ("place", "kept"),
    [
        ("rollout 3", "step_000002"),
        ("reward 3", "step_000002"),
        ("logprobs 3", "step_000002"),
        ("update 3", "step_000002"),
        ("evaluation 2", "step_000002"),
        ("checkpoint 4", "step_000004"),
    ],
)
def test_an_exception_ends_both_ranks(place: str, kept: str, folder: Path):
    """One traceback, that of rank 1; one line of rank 0, which still saves what both had learned."""
    outcome = broken(folder, "fails", place, AT_THE_ENDS)
    assert outcome.status != 0
    assert outcome.seconds < 30
    told = f"rank 0 ends: rank 1 failed in {in_words(place)}: AssertionError: planted"
    assert outcome.lines_of("rank 0 ") == [told]
    assert outcome.lines_of("planted") == [told, '    raise AssertionError("planted")', "AssertionError: planted"]
    assert outcome.lines_of("gloo") == outcome.lines_of("rank 1 ends") == []
    assert checkpoints(folder) == ["step_000001", kept]


@pytest.mark.parametrize(("place", "setting"), [("update 3", "update.microbatch_tokens"), ("reward 3", "reward.model")])
def test_full_memory_of_one_rank_ends_both_with_a_line(place: str, setting: str, folder: Path):
    outcome = broken(folder, "has no memory", place, AT_THE_ENDS)
    assert outcome.status != 0
    (own,) = outcome.lines_of("error: ")
    assert own.startswith(f"error: out of memory in {place.split()[0]} on rank 1 ")
    assert f"lower {setting}" in own
    (told,) = outcome.lines_of("rank 0 ")
    assert told.startswith(f"rank 0 ends: rank 1 failed in {in_words(place)}: ")
    assert len(outcome.lines_of("Traceback")) == 1  # the launcher's
    assert checkpoints(folder) == ["step_000001", "step_000002"]


@pytest.mark.parametrize("fault", ["is killed", "freezes"])
@pytest.mark.parametrize("place", ["rollout 3", "update 3"])
def test_a_rank_that_gives_no_sign_of_life_is_named(fault: str, place: str, folder: Path):
    """Where it was killed, its connections end, so that rank 0 can still save."""
    outcome = broken(folder, fault, place, AT_THE_ENDS)
    assert outcome.status != 0
    assert outcome.seconds < 30
    (told,) = outcome.lines_of("rank 0 ")
    assert told.startswith("rank 0 ends: rank 1 gave no sign of life for ")
    assert told.endswith(f" s; it was last seen in {in_words(place)}")
    assert outcome.lines_of("gloo") == []
    assert checkpoints(folder) == ["step_000001", "step_000002"][: 2 if fault == "is killed" else 1]


ZERO3 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize(("launch", "fault"), [(ZERO3, "fails"), (FSDP, "freezes")], ids=["zero3", "fsdp"])
def test_where_weights_are_split_all_end_too(launch: dict[str, str], fault: str, folder: Path):
    """And nothing more is saved, for which all ranks would be needed.

    A rank that waits inside FSDP2 is not seen to wait, and has `WORKING_S` from when the other's silence was noticed.
    """
    outcome = broken(folder, fault, "update 3", AT_THE_ENDS, launch=launch)
    assert outcome.status != 0
    assert outcome.seconds < 30 + WORKING_S
    (told,) = outcome.lines_of("rank 0 ends: rank 1 ")
    assert told.split("phase ")[1].startswith("update of iteration 3")
    assert checkpoints(folder) == ["step_000001"]


def test_a_phase_that_never_ends_shows_who_keeps_the_others_waiting(folder: Path):
    outcome = broken(folder, "hangs", "reward 2", "distributed.phase_timeout_s=8")
    assert outcome.status != 0
    assert outcome.seconds < 30
    for rank in (0, 1):
        (told,) = outcome.lines_of(f"rank {rank} ends")
        assert "longer than distributed.phase_timeout_s (8 s): rank 0 waits for others, " in told
        assert "; rank 1 works, " in told
        assert told.count(f" s in {in_words('reward 2')}") == 2
    assert outcome.lines_of("rank 0 is at") == []
    assert outcome.lines_of("rank 1 is at") == ["rank 1 is at:"]
    assert outcome.lines_of("in hang") != []


def test_an_error_that_all_ranks_have_is_told_in_one_line(folder: Path):
    (folder / "fails.py").write_text("def rule(responses):\n    return [1.0] * (len(responses) - 1)\n")
    settings = ["reward.functions=[{name: 'fails.py:rule'}]", "evaluation_data.num_rows=4"]
    done = subprocess.run(
        command("evaluate", "ppo.yaml", *settings, num_processes=2),
        cwd=folder, env=environment(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert [line for line in done.stderr.splitlines() if "fails.py" in line] == [
        "error: reward function fails.py:rule returned 1 scores; expected a list of 2 numbers or None, one for each "
        "response"
    ]
