"""SIGKILL at a random moment, or at a file operation in the output folder; then the same command until it is done."""

import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.reliability.commands import Command, run
from tests.reliability.runs import TRAINERS, difference, has_traceback, new_folder, undisturbed

OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}
"""Audit events of Python before it changes a file or a folder."""
MOST_KILLS = 3
"""Kills of one run, at most."""


def trials(seed: int, num: int, work: Path) -> Iterator[dict[str, Any]]:
    """Every second trial kills at a file operation, the others at a random moment."""
    num_operations = {trainer: _count_operations(trainer, work) for trainer in TRAINERS}
    for number in range(num):
        draw = random.Random(f"kills {seed} {number}")
        trainer = TRAINERS[number % len(TRAINERS)]
        at_operation = number // len(TRAINERS) % 2 == 0
        folder = new_folder(work, "killed")
        kills: list[str] = []
        for _ in range(draw.randint(1, MOST_KILLS)):
            if at_operation:
                chosen = draw.randint(1, num_operations[trainer])
                ended = run(folder, trainer, f"{trainer}.yaml", plant=_killer(folder / "out", chosen))
                kills.append(f"operation {chosen}" if ended.status == -signal.SIGKILL else "not reached")
            else:
                after = draw.uniform(0.0, 1.1) * undisturbed(trainer, work).ended.seconds
                command = Command(folder, trainer, f"{trainer}.yaml")
                while not command.is_over and time.monotonic() - command.started < after:
                    time.sleep(0.002)
                command.send(signal.SIGKILL)
                ended = command.wait()
                kills.append(f"after {after:.2f} s" if ended.status == -signal.SIGKILL else "after the end")
        ended = run(folder, trainer, f"{trainer}.yaml")
        wrong = difference(folder / "out", undisturbed(trainer, work).left)
        if ended.status or has_traceback(ended.told):
            wrong = f"status {ended.status}: {ended.told[-500:]}"
        yield {"trainer": trainer, "kills": kills, "wrong": wrong}


def _killer(output: Path, chosen: int) -> Callable[[], None]:
    """Plants a SIGKILL at the n-th operation on a file of the output folder."""

    def strike(count: int) -> None:
        if count == chosen:
            os.kill(os.getpid(), signal.SIGKILL)

    return lambda: on_operations(output, strike)


def on_operations(output: Path, act: Callable[[int], object]) -> None:
    """Calls `act` with the number of each operation that changes a file or folder in `output`, before it happens."""
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in OPERATIONS or not str(arguments[0]).startswith(str(output)):
            return
        if event == "open" and isinstance(arguments[1], str) and not set(arguments[1]) & set("wax+"):
            return
        count += 1
        act(count)

    sys.addaudithook(hook)


def _count_operations(trainer: str, work: Path) -> int:
    """How many operations a run makes that nothing disturbs."""
    folder = new_folder(work, "counted")
    counted = folder / "operations"
    ended = run(
        folder,
        trainer,
        f"{trainer}.yaml",
        plant=lambda: on_operations(folder / "out", lambda count: counted.write_text(str(count))),
    )
    assert ended.status == 0, ended.told
    return int(counted.read_text())
