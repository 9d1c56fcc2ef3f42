"""Where this process is: its iteration and phase, and whether it works or waits for other ranks."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from llmrl.roles import Progress

BETWEEN_ITERATIONS = ("report card", "checkpoint", "saving")
"""Phases that come after the iteration whose number they are told with."""


class Activity:
    """Written by the main thread, read by the thread that gives the signs of life."""

    def __init__(self) -> None:
        self.iteration = 0
        """The current one, counted from 1; 0 where there is none."""
        self.phase = "start"
        self.num_phases = 0
        """Phases begun so far: tells a phase from the next one of the same name."""
        self.is_waiting = False
        """In a collective, for other ranks to come to it."""

    def enter(self, phase: str, iteration: int) -> None:
        """A new phase begins."""
        self.phase, self.iteration = phase, iteration
        self.num_phases += 1

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around a collective."""
        self.is_waiting = True
        try:
            yield
        finally:
            self.is_waiting = False


HERE = Activity()
"""That of this process."""


class FollowedProgress:
    """`Progress` that also notes where this process is."""

    def __init__(self, progress: Progress, activity: Activity = HERE) -> None:
        self.progress = progress
        self.activity = activity
        self.num_done: int | None = None
        """Iterations; None where there are none, or not yet."""

    def begin(self, num_iterations: int, num_done: int = 0) -> None:
        """See `Progress`."""
        self.num_done = num_done
        self.progress.begin(num_iterations, num_done)

    def phase(self, name: str, total: int) -> None:
        """See `Progress`."""
        is_next = name not in BETWEEN_ITERATIONS
        self.activity.enter(name, 0 if self.num_done is None else self.num_done + is_next)
        self.progress.phase(name, total)

    def advance(self, amount: int = 1) -> None:
        """See `Progress`."""
        self.progress.advance(amount)

    def iteration(self, number: int, values: Mapping[str, float]) -> None:
        """See `Progress`."""
        self.num_done = number
        self.progress.iteration(number, values)

    def message(self, text: str) -> None:
        """See `Progress`."""
        self.progress.message(text)
