"""Commands of llmrl in processes that are forked from this one, which has everything imported already."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import accelerate  # noqa: F401  # imported here, so that no child has to
import torch
import transformers  # noqa: F401

import llmrl.wiring.reward_model
import llmrl.wiring.rl
import llmrl.wiring.sft  # noqa: F401
from llmrl.cli import main

LIMIT_S = 300.0
"""Seconds after which a command counts as hanging."""


def nothing() -> None:
    """Plants nothing."""


@dataclass(frozen=True)
class Ended:
    """A command that has ended."""

    status: int
    """Exit status; negative: the signal that killed it."""
    told: str
    """Everything that it printed."""
    seconds: float


class Command:
    """A command under way.

    Args:
        folder: Working folder.
        arguments: Arguments of `llmrl`.
        plant: Called in the new process before the command begins.
    """

    def __init__(self, folder: Path, *arguments: str, plant: Callable[[], object] = nothing) -> None:
        self.output = folder / "output.txt"
        self.output.touch()  # it may be killed before it gets that far
        self.started = time.monotonic()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _run(folder, arguments, self.output, plant)

    @property
    def is_over(self) -> bool:
        """Whether it has ended; `wait` has its status."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def send(self, number: int) -> None:
        """Sends a signal."""
        os.kill(self.pid, number)

    def wait(self) -> Ended:
        """Waits until it ends; one that hangs is killed."""
        while not self.is_over:
            if time.monotonic() - self.started > LIMIT_S:
                self.send(signal.SIGKILL)
            time.sleep(0.002)
        seconds = time.monotonic() - self.started
        _, status = os.waitpid(self.pid, 0)
        return Ended(os.waitstatus_to_exitcode(status), self.output.read_text(errors="replace"), seconds)


def run(folder: Path, *arguments: str, plant: Callable[[], object] = nothing) -> Ended:
    """A command that runs to its end."""
    return Command(folder, *arguments, plant=plant).wait()


def _run(folder: Path, arguments: tuple[str, ...], output: Path, plant: Callable[[], object]) -> None:
    """The new process: as `llmrl ARGUMENTS` in a folder, with its output in a file."""
    status = 70
    try:
        os.chdir(folder)
        os.setpgid(0, 0)
        for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)  # whatever this program was started by ignores
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stream = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number in (1, 2):
            os.dup2(stream, number)
        torch.set_num_threads(1)
        sys.argv = ["llmrl", *arguments]
        plant()
        main()
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
