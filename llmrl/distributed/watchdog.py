"""Time limit on a phase in a single process, which has no other rank to notice that it hangs."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread, main_thread

from llmrl.distributed.activity import HERE, Activity

LOOK_S = 0.5
"""Seconds between two looks at the clock."""


class PhaseTimeout(BaseException):
    """A phase exceeds its time limit. Not an `Exception`: a function that retries would swallow it."""


@contextmanager
def phases_limited(limit_s: float, activity: Activity = HERE) -> Iterator[None]:
    """Raises `PhaseTimeout` in the main thread, whatever it waits for, when a phase lasts longer than the limit."""
    is_over = Event()

    def stop(*_: object) -> None:
        iteration = f" of iteration {activity.iteration}" if activity.iteration else ""
        raise PhaseTimeout(
            f"the phase {activity.phase}{iteration} has lasted longer than distributed.phase_timeout_s ({limit_s:g} s)"
        )

    before = signal.signal(signal.SIGUSR2, stop)
    thread = Thread(target=_watch, args=(limit_s, activity, is_over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        signal.signal(signal.SIGUSR2, before)


def _watch(limit_s: float, activity: Activity, is_over: Event) -> None:
    seconds, num_phases, last = 0.0, activity.num_phases, time.monotonic()
    while seconds <= limit_s:
        if is_over.wait(LOOK_S):
            return
        now = time.monotonic()
        seconds += min(now - last, 2 * LOOK_S)  # not the time in which the process was suspended
        last = now
        if activity.num_phases != num_phases:
            seconds, num_phases = 0.0, activity.num_phases
    signal.pthread_kill(main_thread().ident or 0, signal.SIGUSR2)
