"""Current activity of this process: its iteration and phase, and whether it works or waits for other ranks."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from llmrl.distributed.stop import STOP, Stop
from llmrl.roles import Progress

BETWEEN_ITERATIONS = ("report card", "checkpoint", "saving")
"""Phases that run after the iteration whose number they carry."""


class Activity:
    """Current iteration and phase: written by the main thread, read by the heartbeat."""

    def __init__(self) -> None:
        self.iteration = 0
        """The current iteration, counted from 1; 0: none."""
        self.phase = "start"
        self.num_phases = 0
        """Phases begun so far: distinguishes a phase from the next one of the same name."""
        self.is_waiting = False
        """Whether it is in a collective, where it waits for other ranks."""

    def enter(self, phase: str, iteration: int) -> None:
        """Records the start of a phase."""
        self.phase, self.iteration = phase, iteration
        self.num_phases += 1

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Context of a collective: `is_waiting` is True in it."""
        self.is_waiting = True
        try:
            yield
        finally:
            self.is_waiting = False


HERE = Activity()
"""The activity of this process."""


class FollowedProgress:
    """`Progress` that also records the activity of this process. Code that waits calls ``advance(0)`` a few times a
    second.

    Raises:
        Interrupted: By `phase` and `advance`: a signal came, and the process may leave here, see `Stop.leaving`.
    """

    def __init__(self, progress: Progress, activity: Activity = HERE, stop: Stop = STOP) -> None:
        self.progress = progress
        self.activity = activity
        self.stop = stop
        self.num_done: int | None = None
        """Iterations done; None: no iteration has begun, or the process runs none."""

    def begin(self, num_iterations: int, num_done: int = 0) -> None:
        """See `Progress`."""
        self.num_done = num_done
        self.progress.begin(num_iterations, num_done)

    def phase(self, name: str, total: int) -> None:
        """See `Progress`."""
        is_next = name not in BETWEEN_ITERATIONS
        self.activity.enter(name, 0 if self.num_done is None else self.num_done + is_next)
        self.progress.phase(name, total)
        self._look()

    def advance(self, amount: int = 1) -> None:
        """See `Progress`."""
        self.progress.advance(amount)
        self._look()

    def iteration(self, number: int, values: Mapping[str, float]) -> None:
        """See `Progress`."""
        self.num_done = number
        self.progress.iteration(number, values)

    def message(self, text: str) -> None:
        """See `Progress`."""
        self.progress.message(text)

    def _look(self) -> None:
        if line := self.stop.notice():
            self.progress.message(line)
        self.stop.look()
