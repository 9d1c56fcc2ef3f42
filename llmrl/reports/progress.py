"""How far the run is: one live block on a terminal, plain lines in pipes and files."""

import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from time import monotonic
from typing import Protocol, runtime_checkable

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from llmrl import roles
from llmrl.distributed.activity import BETWEEN_ITERATIONS
from llmrl.messages import class_and_message, shown

PARTS = "score/*"
"""Stands for the parts of the score, which are shown where there are several."""
NO_PARTS = ("score/mean", "score/std", "score/unscored")
HEADLINES = (
    "loss",
    "pairs/accuracy",
    "score/mean",
    "score/std",
    PARTS,
    "group/flat_fraction",
    "kl/sequence",
    "response/length",
    "response/finished_fraction",
    "policy/entropy",
    "policy/clip_fraction",
    "value/explained_variance",
    "actor/grad_norm",
    "reward_model/grad_norm",
    "tokens/per_s",
    "tokens/trained_per_s",
)
"""The metrics that an iteration's line shows, in this order, those that it has: what it learned, and what a dead or
broken run shows."""

HEARTBEAT_S = 30.0
"""The longest that plain progress is silent while work is being done."""

BREATH_S = 1.0
"""The least time between two lines of plain progress on iterations, except the last one."""


@runtime_checkable
class Stream(Protocol):
    """What plain progress writes to: standard output, a file, a test's buffer."""

    def write(self, text: str, /) -> object: ...

    def flush(self) -> object: ...


def make_progress() -> "SteadyProgress | PlainProgress":
    """Live on a terminal, plain lines elsewhere."""
    plain = PlainProgress(sys.stdout)
    return SteadyProgress(LiveProgress(Console(file=sys.stdout)), plain) if sys.stdout.isatty() else plain


def format_number(x: float) -> str:
    """Three significant digits, and every digit before the point: ``0.412``, ``1e-05``, ``12,345``."""
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


def format_duration(seconds: float) -> str:
    """``7:31``, or ``2:07:31`` from an hour on."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def format_headlines(values: Mapping[str, float]) -> str:
    """``score/mean 0.412  kl/sequence 0.01``: the headlines among the metrics of an iteration."""
    parts = [name for name in values if name.startswith("score/") and name not in NO_PARTS]
    shown = [name for headline in HEADLINES for name in (parts if headline == PARTS else [headline])]
    if len(parts) == 1:
        shown.remove(parts[0])
    return "  ".join(f"{name} {format_number(values[name])}" for name in shown if name in values)


class Pace:
    """The time that iterations take, counted in this process only: a resumed run may be on another machine."""

    def __init__(self, num_iterations: int) -> None:
        self.num_iterations = num_iterations
        self.num_done = 0
        self.started = self.last = monotonic()

    def lap(self, number: int) -> tuple[float, float]:
        """``(seconds that iteration `number` took, seconds left at the mean pace)``."""
        now = monotonic()
        seconds, self.last = now - self.last, now
        self.num_done += 1
        return seconds, (now - self.started) / self.num_done * (self.num_iterations - number)


def format_pace(num_done: int, total: int, seconds: float) -> str:
    """``0.4/s  2:10 left in this phase``: units per second, and the time for those that are left at that pace."""
    rate = num_done / seconds if seconds > 0 else 0.0
    if not rate:
        return ""
    return f"{format_number(rate)}/s  {format_duration((total - num_done) / rate)} left in this phase"


class PaceColumn(ProgressColumn):
    """The pace of the phase: before the first iteration is done there is no other."""

    def render(self, task: Task) -> Text:
        return Text(format_pace(int(task.completed), int(task.total or 0), task.elapsed or 0.0), style="cyan")


class LiveProgress:
    """One block at the bottom of a terminal: iterations with the time left, the current phase, the last numbers.

    Used as a context manager; the terminal is given back as it was, after an exception too.
    """

    def __init__(self, console: Console) -> None:
        self.pace = Pace(1)
        columns = TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn()
        self.iterations = Progress(*columns, TextColumn("{task.fields[left]}", style="cyan"))
        self.bar = self.iterations.add_task("iteration", total=1, left="")
        self.phases = Progress(*columns, PaceColumn())
        self.headlines = Text()
        self.live = Live(Group(self.iterations, self.phases, self.headlines), console=console, refresh_per_second=4)

    def __enter__(self) -> "LiveProgress":
        self.live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.live.stop()

    def begin(self, num_iterations: int, num_done: int = 0) -> None:
        """Called once, before the first iteration of this process; `num_done` were done before a resume."""
        self.pace = Pace(num_iterations)
        self.iterations.update(self.bar, total=num_iterations, completed=num_done)

    def phase(self, name: str, total: int) -> None:
        """A new phase begins: `total` units of work."""
        for task in self.phases.task_ids:
            self.phases.remove_task(task)
        self.phases.add_task(name, total=total)

    def advance(self, amount: int = 1) -> None:
        """`amount` more units of the current phase are done."""
        self.phases.advance(self.phases.task_ids[0], amount)

    def iteration(self, number: int, values: Mapping[str, float]) -> None:
        """Iteration `number`, counted from 1, is done."""
        _, left = self.pace.lap(number)
        self.iterations.update(self.bar, completed=number, left=f"{format_duration(left)} left")
        self.headlines.plain = shown(format_headlines(values))

    def message(self, text: str) -> None:
        """A line that stays, above the block."""
        self.live.console.print(shown(text), markup=False, highlight=False, soft_wrap=True)


class PlainProgress:
    """One line an iteration, unless they are quicker than one can read, and a line every half minute in between."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.pace = Pace(1)
        self.name, self.done, self.total = "", 0, 0
        self.num_done: int | None = None
        """Iterations; None where there are none."""
        self.last_line = self.phase_began = monotonic()
        self.last_iteration = self.last_line
        """When the last line on an iteration was written."""

    def __enter__(self) -> "PlainProgress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.stream.flush()

    def begin(self, num_iterations: int, num_done: int = 0) -> None:
        """Called once, before the first iteration of this process; `num_done` were done before a resume."""
        self.pace = Pace(num_iterations)
        self.num_done = num_done

    def phase(self, name: str, total: int) -> None:
        """A new phase begins: `total` units of work."""
        self.name, self.done, self.total = name, 0, total
        self.phase_began = monotonic()

    def advance(self, amount: int = 1) -> None:
        """`amount` more units of the current phase are done."""
        self.done += amount
        if monotonic() - self.last_line >= HEARTBEAT_S:
            pace = format_pace(self.done, self.total, monotonic() - self.phase_began)
            self.message(f"{self.name} {self.done}/{self.total}{self._place()}  {pace}".rstrip())

    def _place(self) -> str:
        """Where the phase is among the iterations."""
        if self.num_done is None:
            return ""
        is_between = self.name in BETWEEN_ITERATIONS
        where = f"after iteration {self.num_done}" if is_between else f"in iteration {self.num_done + 1}"
        return f" {where}/{self.pace.num_iterations}"

    def iteration(self, number: int, values: Mapping[str, float]) -> None:
        """Iteration `number`, counted from 1, is done."""
        seconds, left = self.pace.lap(number)
        self.num_done = number
        if monotonic() - self.last_iteration < BREATH_S and number < self.pace.num_iterations:
            return
        self.last_iteration = monotonic()
        parts = [f"iteration {number}/{self.pace.num_iterations}", format_headlines(values)]
        parts += [f"{seconds:.1f} s", f"left {format_duration(left)}"]
        self.message("  ".join(part for part in parts if part))

    def message(self, text: str) -> None:
        """A line of its own."""
        self.last_line = monotonic()
        print(shown(text), file=self.stream, flush=True)


class SteadyProgress:
    """The live block as long as it works, and plain lines once it has failed."""

    def __init__(self, live: LiveProgress, plain: PlainProgress) -> None:
        self.live = live
        self.plain = plain
        self.has_failed = False

    def __enter__(self) -> "SteadyProgress":
        self._show(self.live.__enter__)
        return self

    def __exit__(self, *exception: object) -> None:
        self._show(self.live.__exit__)

    def begin(self, num_iterations: int, num_done: int = 0) -> None:
        """Called once, before the first iteration of this process; `num_done` were done before a resume."""
        self.plain.begin(num_iterations, num_done)
        self._show(lambda: self.live.begin(num_iterations, num_done))

    def phase(self, name: str, total: int) -> None:
        """A new phase begins: `total` units of work."""
        self.plain.phase(name, total)
        self._show(lambda: self.live.phase(name, total))

    def advance(self, amount: int = 1) -> None:
        """`amount` more units of the current phase are done."""
        self._show(lambda: self.live.advance(amount), lambda: self.plain.advance(amount))

    def iteration(self, number: int, values: Mapping[str, float]) -> None:
        """Iteration `number`, counted from 1, is done."""
        self._show(lambda: self.live.iteration(number, values), lambda: self.plain.iteration(number, values))

    def message(self, text: str) -> None:
        """A line that stays."""
        self._show(lambda: self.live.message(text), lambda: self.plain.message(text))

    def _show(self, live: Callable[[], object], plain: Callable[[], object] = lambda: None) -> None:
        if not self.has_failed:
            try:
                live()
                return
            except Exception as error:  # rich's, whatever it is
                self.has_failed = True
                with suppress(Exception):
                    self.live.live.stop()
                self.plain.message(f"warning: the live display failed ({class_and_message(error)}); plain lines follow")
        plain()


class OfRank:
    """`Progress` of one of several ranks, whose messages are printed to stderr with its number: for what a rank alone
    knows. Everything else is that of `progress`."""

    def __init__(self, progress: roles.Progress, rank: int) -> None:
        self.progress = progress
        self.rank = rank

    def begin(self, num_iterations: int, num_done: int = 0) -> None:
        """See `roles.Progress`."""
        self.progress.begin(num_iterations, num_done)

    def phase(self, name: str, total: int) -> None:
        """See `roles.Progress`."""
        self.progress.phase(name, total)

    def advance(self, amount: int = 1) -> None:
        """See `roles.Progress`."""
        self.progress.advance(amount)

    def iteration(self, number: int, values: Mapping[str, float]) -> None:
        """See `roles.Progress`."""
        self.progress.iteration(number, values)

    def message(self, text: str) -> None:
        """In one write, so that lines of several ranks do not mix."""
        sys.stderr.write(f"{shown(f'rank {self.rank}: {text}')}\n")
        sys.stderr.flush()


class Silent:
    """Says nothing."""

    def begin(self, num_iterations: int, num_done: int = 0) -> None: ...

    def phase(self, name: str, total: int) -> None: ...

    def advance(self, amount: int = 1) -> None: ...

    def iteration(self, number: int, values: Mapping[str, float]) -> None: ...

    def message(self, text: str) -> None: ...
