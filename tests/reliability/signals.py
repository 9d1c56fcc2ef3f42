"""A signal at a random moment, in some trials a second one while the state is saved; then the same command."""

import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.reliability.commands import Command, nothing, run
from tests.reliability.kills import on_operations
from tests.reliability.runs import TRAINERS, difference, has_traceback, new_folder, undisturbed

KINDS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
SLOW_S = 0.5
"""Seconds of each operation on a checkpoint in trials with a second signal: it comes before the first has ended the
run."""
SECOND_AFTER_S = 2.5
"""Signals within two seconds are one: launchers pass on what a terminal has sent already."""
LIMIT_S = 60.0
"""Seconds in which a run must end after a signal; a unit of work of these runs takes milliseconds."""


def trials(seed: int, num: int, work: Path) -> Iterator[dict[str, Any]]:
    """Every fifth trial sends a second signal."""
    for number in range(num):
        draw = random.Random(f"signals {seed} {number}")
        trainer, kind = TRAINERS[number % len(TRAINERS)], KINDS[number // len(TRAINERS) % len(KINDS)]
        second = draw.choice(KINDS) if number % 5 == 4 else None
        after = draw.uniform(0.1, 0.9) * undisturbed(trainer, work).ended.seconds
        folder = new_folder(work, "stopped")
        command = Command(folder, trainer, f"{trainer}.yaml", plant=_slowly(folder) if second else nothing)
        while second and not command.is_over and not (folder / "out" / "metrics.jsonl").exists():
            time.sleep(0.002)
        _sleep_beside(command, after)
        sent = time.monotonic()
        command.send(kind)
        if second:
            _sleep_beside(command, SECOND_AFTER_S)
            command.send(second)
        ended = command.wait()
        latency_s = time.monotonic() - sent
        allowed = {0, 128 + kind, 128 + (second or kind)}
        wrong = None if ended.status in allowed and latency_s < LIMIT_S else f"status {ended.status}: {ended.told}"
        again = run(folder, trainer, f"{trainer}.yaml")
        if again.status or has_traceback(again.told):
            wrong = f"status {again.status} then: {again.told[-500:]}"
        yield {
            "trainer": trainer,
            "signal": kind.name,
            "second": second and second.name,
            "after_s": round(after, 2),
            "latency_s": round(latency_s, 2),
            "status": ended.status,
            "wrong": wrong or difference(folder / "out", undisturbed(trainer, work).left),
        }


def _slowly(folder: Path) -> Callable[[], object]:
    """Plants a slow disk under the checkpoints."""
    return lambda: on_operations(folder / "out" / "checkpoints", lambda _: time.sleep(SLOW_S))


def _sleep_beside(command: Command, seconds: float) -> None:
    """Returns after this time, or as soon as the command is over."""
    ends = time.monotonic() + seconds
    while not command.is_over and time.monotonic() < ends:
        time.sleep(0.002)
