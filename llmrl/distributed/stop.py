"""Signals that stop a run: a handler that only notes them, and the main thread, which leaves where nothing is lost.

Slurm's ``--signal=USR1``, ``docker stop`` and ``kubectl delete`` (SIGTERM), Ctrl-C (SIGINT) and a terminal that is
closed (SIGHUP) all mean the same.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

SAME_S = 2.0
"""Seconds after the first signal in which others count as that one: a launcher passes on what the terminal has sent
already."""

SHOW_CURSOR = b"\x1b[?25h\n"
"""What gives a terminal the cursor back that a live display hides."""

Handler = Callable[[int, Any], object]


class Interrupted(KeyboardInterrupt):
    """A signal ends what the main thread does. A KeyboardInterrupt, which code that retries or names failures lets
    pass."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


def _never() -> bool:
    return False


class Stop:
    """Whether a signal has asked this process to stop, and whether the main thread may leave where it is."""

    def __init__(self) -> None:
        self.number = 0
        """The first signal that came; 0: none."""
        self.came_at = 0.0
        """When, by the monotonic clock."""
        self.is_told = False
        """Whether `notice` has returned its line."""
        self.raises: bool | None = None
        """Whether the handler raises `Interrupted` by itself; None: it is not installed."""
        self.may_leave: Callable[[], bool] = _never
        """Whether nothing would be lost by leaving here."""
        self.before: dict[int, Any] = {}
        """The handlers before the outermost `listening`."""
        self.is_alone = True
        """Whether this process may leave by itself; else all ranks leave after the same collective."""

    @contextmanager
    def listening(self, *, raises: bool) -> Iterator[None]:
        """Context in which signals are noted. With `raises`, where nothing is lost by it, the first one raises
        `Interrupted` at once.

        What came before the outermost one is forgotten.
        """
        outer, self.raises = self.raises, raises
        before = install(self.handle)
        if outer is None:
            self.number, self.is_told, self.before = 0, False, before
        try:
            yield
        finally:
            restore(before)
            self.raises = outer

    @contextmanager
    def leaving(self, may_leave: Callable[[], bool], *, alone: bool) -> Iterator[None]:
        """Context in which `look`, where this process is alone, and `look_together` raise, wherever `may_leave` is
        True."""
        self.may_leave, self.is_alone = may_leave, alone
        try:
            yield
        finally:
            self.may_leave = _never

    def handle(self, number: int, _: Any = None) -> None:
        """Handler of the signals. Prints nothing and takes no lock: it runs in the middle of whatever does."""
        if self.note(number):
            if self.raises:
                raise Interrupted(number)
        elif time.monotonic() - self.came_at >= SAME_S:
            exit_at_once(number)

    def note(self, number: int) -> bool:
        """Notes a signal. Returns whether it is the first one."""
        if self.number:
            return False
        self.number, self.came_at = number, time.monotonic()
        return True

    def look(self) -> None:
        """Called between two units of work: raises `Interrupted` if a signal came and this process may leave here."""
        if self.number and self.is_alone and self.may_leave():
            raise Interrupted(self.number)

    def look_together(self, numbers: list[int]) -> None:
        """Called by all ranks after the same collective, with what each has noted: all raise `Interrupted`, or none."""
        if any(numbers) and self.may_leave():
            raise Interrupted(max(numbers))

    def release(self) -> None:
        """Gives a child that was forked the handlers of before: else its parent could not terminate it."""
        if self.raises is not None:
            restore(self.before)

    def notice(self) -> str | None:
        """Message on a signal that came, once; else None."""
        if not self.number or self.is_told:
            return None
        self.is_told = True
        name = signal.Signals(self.number).name
        return f"{name}: stops as soon as everything is saved; a second signal stops at once"


STOP = Stop()
"""What was asked of this process."""

os.register_at_fork(after_in_child=STOP.release)


def handlers() -> dict[int, Any]:
    """The handlers of the signals that stop a run, for `restore`.

    Without an ignored SIGHUP, which stays so: under nohup a run outlives its terminal. Empty outside of the main
    thread, where Python takes no handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    present: dict[int, Any] = {number: signal.getsignal(number) for number in SIGNALS}
    if present[signal.SIGHUP] == signal.SIG_IGN:
        del present[signal.SIGHUP]
    return present


def install(handler: Handler) -> dict[int, Any]:
    """Has `handler` receive the signals of `handlers`. Returns what these were before, for `restore`."""
    before = handlers()
    for number in before:
        signal.signal(number, handler)
    return before


def restore(before: dict[int, Any]) -> None:
    """Gives the signals back to the handlers that `handlers` or `install` returned."""
    for number, handler in before.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: it is not of Python


def exit_at_once(number: int) -> None:
    """Ends this process with the status of the signal. Nothing is harmed: files are written whole or not at all."""
    if os.isatty(1):
        with suppress(OSError):
            os.write(1, SHOW_CURSOR)
    os._exit(128 + number)
