"""One long run over two processes, killed, stopped, damaged and without room again and again.

At its end it has left the same as the run that was left in peace.
"""

import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.processes import command, environment
from tests.reliability.damage import DAMAGES
from tests.reliability.runs import difference, left_by, new_folder

NUM_PROCESSES = 2
SECONDS_PER_ITERATION = 0.5
"""Iterations of the run are chosen by it, so that the disturbed run takes about as long as asked."""
BETWEEN_FAULTS_S = (12.0, 30.0)
"""Seconds from a start to its fault: a start takes about ten of them."""
ROOM_BYTES = 20_000
"""The largest file that a process may write, where there is no room: less than a checkpoint."""


def trials(seed: int, seconds: int, work: Path) -> Iterator[dict[str, Any]]:
    """A line for each fault, and at the end one for the run."""
    settings = (
        f"run.num_iterations={max(10, round(seconds / SECONDS_PER_ITERATION / 4))}",
        "run.checkpoint_every=5",
        "algorithm.max_redraws=0",  # in the end every group scores the same
    )
    quiet = new_folder(work, "quiet")
    status, told, memory = _undisturbed(quiet, settings)
    assert status == 0, told
    draw, folder = random.Random(f"soak {seed}"), new_folder(work, "soaked")
    started, status = time.monotonic(), None
    while status != 0:
        is_last = time.monotonic() - started > seconds
        name = None if is_last else draw.choice(list(FAULTS))
        done, status, told = _disturbed(folder, settings, name, draw)
        wrong = None if status in (0, *EXPECTED[name]) else f"status {status}: {told[-800:]}"
        yield {"fault": done, "after_s": round(time.monotonic() - started), "status": status, "wrong": wrong}
        if wrong:
            break
    grown = memory[-1] / memory[0] if memory else 1.0
    yield {
        "fault": "none: the whole run",
        "memory_grown_by": round(grown - 1, 3),
        "wrong": difference(folder / "out", left_by(quiet / "out")) or (None if grown < 1.1 else f"memory x {grown}"),
    }


def kill_a_rank(launched: subprocess.Popen[str], draw: random.Random, _: Path) -> str:
    """SIGKILL to one of the ranks."""
    ranks = _ranks(launched.pid)
    if not ranks:
        return "no rank to kill yet"
    number = draw.randrange(len(ranks))
    os.kill(ranks[number], signal.SIGKILL)
    return f"rank {number} killed"


def kill_all(launched: subprocess.Popen[str], _: random.Random, __: Path) -> str:
    """SIGKILL to the launcher and all ranks."""
    os.killpg(launched.pid, signal.SIGKILL)
    return "all killed"


def stop(launched: subprocess.Popen[str], draw: random.Random, _: Path) -> str:
    """A signal to the launcher, which passes it on."""
    number = draw.choice((signal.SIGTERM, signal.SIGINT))
    launched.send_signal(number)
    return number.name


def damage(launched: subprocess.Popen[str], draw: random.Random, folder: Path) -> str:
    """Everything is killed, and the newest checkpoint damaged, if it is not the only one."""
    os.killpg(launched.pid, signal.SIGKILL)
    launched.wait()
    checkpoints = sorted((folder / "out" / "checkpoints").glob("step_??????"))
    if len(checkpoints) < 2:
        return "all killed"
    return draw.choice(DAMAGES)(draw, checkpoints[-1], checkpoints[-2])


def no_room(launched: subprocess.Popen[str], _: random.Random, __: Path) -> str:
    """No process may write a file as large as a checkpoint any more."""
    for pid in _ranks(launched.pid):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (ROOM_BYTES, ROOM_BYTES))
    return "no room"


FAULTS: dict[str, Callable[[subprocess.Popen[str], random.Random, Path], str]] = {
    "kill a rank": kill_a_rank,
    "kill all": kill_all,
    "stop": stop,
    "damage": damage,
    "no room": no_room,
}
EXPECTED: dict[str | None, tuple[int, ...]] = {
    None: (),
    "kill a rank": (1,),
    "kill all": (-signal.SIGKILL,),
    "stop": (1, 130, 143, -signal.SIGTERM, -signal.SIGINT),
    "damage": (-signal.SIGKILL,),
    "no room": (1,),
}
"""Exit statuses of the launcher after each fault, besides 0: the run was done before."""


def _start(folder: Path, settings: tuple[str, ...], stream: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command("grpo", "grpo.yaml", *settings, num_processes=NUM_PROCESSES),
        cwd=folder, env=environment(), stdout=stream, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def _disturbed(folder: Path, settings: tuple[str, ...], name: str | None, draw: random.Random) -> tuple[str, int, str]:
    """What was done to a start of the run, its status, and what it printed."""
    output = folder / "output.txt"
    with output.open("w") as stream:
        launched = _start(folder, settings, stream)
        done = "nothing"
        if name is not None:
            ends = time.monotonic() + draw.uniform(*BETWEEN_FAULTS_S)
            while launched.poll() is None and time.monotonic() < ends:
                time.sleep(0.05)
            if launched.poll() is None:
                done = FAULTS[name](launched, draw, folder)
        status = launched.wait(timeout=600)
    return done, status, output.read_text(errors="replace")


def _undisturbed(folder: Path, settings: tuple[str, ...]) -> tuple[int, str, list[int]]:
    """Status of the run left in peace, what it printed, and the resident bytes of rank 0, from the first fifth on."""
    output, metrics, resident = folder / "output.txt", folder / "out" / "metrics.jsonl", dict[int, int]()
    with output.open("w") as stream:
        launched = _start(folder, settings, stream)
        while launched.poll() is None:
            time.sleep(0.2)
            done = metrics.read_text().count("\n") if metrics.exists() else 0
            if done and (ranks := _ranks(launched.pid)):
                resident[done] = _resident(ranks[0])
    values = [size for _, size in sorted(resident.items())][len(resident) // 5 :]
    return launched.returncode, output.read_text(errors="replace"), [value for value in values if value]


def _ranks(launcher: int) -> list[int]:
    """Processes that a launcher has started."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children")
    return [int(pid) for pid in children.read_text().split()] if children.exists() else []


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
