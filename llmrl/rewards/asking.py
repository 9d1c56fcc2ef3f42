"""Questions to one reward function: repeated where a service failed, split where it failed on some of the responses."""

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from llmrl.rewards.calls import Answer, Caller, Columns, Failure, Pending, rows_of
from llmrl.rewards.config import RewardFunctionConfig
from llmrl.rewards.patience import Patience
from llmrl.roles import Progress

T = TypeVar("T")

LONGEST_PAUSE_S = 60.0
"""Longest pause before a call is repeated."""
LOOK_S = 0.2
"""Seconds between two looks whether the run is to stop, in such a pause."""
SEARCH_S = 10.0
"""Time limit of the search for the response on which a call failed, unless that call took longer itself."""
SEARCH_CALLS = 64
"""Most calls that find out which responses are excluded."""


class Budget:
    """Limits of a search, in calls and in seconds (None: no limit)."""

    def __init__(self, *, calls: int, seconds: float | None) -> None:
        self.calls = calls
        self.ends = None if seconds is None else time.monotonic() + seconds

    def take(self) -> bool:
        """Whether one more call may be made; it counts."""
        self.calls -= 1
        return self.calls >= 0 and (self.ends is None or time.monotonic() <= self.ends)

    @property
    def seconds(self) -> float | None:
        """Those that are left, at least a hundredth; None: no limit."""
        return None if self.ends is None else max(self.ends - time.monotonic(), 0.01)


class Asker:
    """Asks one function about the responses of a call.

    Args:
        caller: Calls the function.
        config: Settings of the function.
        place: Place of these settings.
        progress: Receives messages.
    """

    def __init__(self, caller: Caller, config: RewardFunctionConfig, *, place: str, progress: Progress) -> None:
        self.caller = caller
        self.config = config
        self.place = place
        self.progress = progress
        self.name = config.name

    def waiting(self, num_responses: int, limit_s: float | None = None) -> Patience:
        """The wait for one call."""
        return Patience(
            self.progress,
            name=self.name,
            setting=self.place,
            timeout_s=self.config.timeout_s,
            limit_s=limit_s,
            num_responses=num_responses,
        )

    def begin(self, columns: Columns) -> Answer | Pending:
        """The answer to a call, or that it has to be awaited."""
        return self.caller.ask(self.name, columns, self.waiting(_num_rows(columns)))

    def ask(self, columns: Columns, limit_s: float | None = None) -> Answer:
        """The answer to a call, awaited where it has to be."""
        answer = self.caller.ask(self.name, columns, self.waiting(_num_rows(columns), limit_s))
        if answer is Pending.PENDING:
            ((_, answer),) = self.caller.gather({self.name: self.waiting(_num_rows(columns), limit_s)})
        return answer

    def repeat(self, answer: Answer | Pending, columns: Columns) -> Answer:
        """The answer, or that of a further call as long as it is a failure that may pass."""
        for attempt in range(self.config.retries):
            if not (isinstance(answer, Failure) and answer.is_transient):
                break
            pause = min(2.0**attempt, LONGEST_PAUSE_S)
            self.progress.message(f"reward function {self.name} {answer.what}; it is called again in {pause:g} s")
            self._pause(pause)
            answer = self.ask(columns)
        return answer

    def is_final(self, answer: Answer) -> bool:
        """Whether an answer is a failure that ends the run."""
        is_failure = isinstance(answer, Failure) and not (answer.is_transient and self.config.retries)
        return is_failure and self.config.on_error == "end"

    def failing_row(self, failure: Failure, columns: Columns) -> int | None:
        """The first row that by itself fails in the same way, found by halves in about log2(rows) calls; None where
        no row that was tried alone does, or the time is over.

        Raises:
            TimeoutError: The time is over, or a fresh process cannot load the function.
        """
        rows, budget = range(_num_rows(columns)), Budget(calls=SEARCH_CALLS, seconds=max(SEARCH_S, failure.seconds))
        is_known = False
        while len(rows) > 1 or (rows and not is_known):
            if not budget.take():
                raise TimeoutError
            first, second = halves(rows)
            answer = self.ask(rows_of(columns, first), budget.seconds)
            if isinstance(answer, Failure) and answer.is_unloaded:
                raise TimeoutError
            is_known = isinstance(answer, Failure) and answer.kind == failure.kind
            rows = first if is_known else second
        return rows[0] if rows else None

    def spare(
        self,
        failure: Failure,
        columns: Columns,
        groups: Sequence[Sequence[int]],
        read: Callable[[Answer, int], Sequence[Any]],
    ) -> dict[int, Any]:
        """Results for the rows on which the function does not fail, by row; after a failure for all rows.

        Groups of rows are split where there is no other way: a group has its results from a call for all of its rows on
        which the function does not fail. Rows that are not found out within the limits of the search are left out.
        `read` makes the results of this many rows from an answer.
        """
        if failure.is_transient or failure.is_stuck or failure.is_unloaded:
            return {}
        budget = Budget(calls=SEARCH_CALLS, seconds=self.config.timeout_s)

        def answer_for(rows: Sequence[int]) -> Answer:
            return self.ask(rows_of(columns, rows), budget.seconds) if rows and budget.take() else None

        def of_groups(groups: Sequence[Sequence[int]]) -> dict[int, Any]:
            """Results for groups that fail together."""
            found: dict[int, Any] = {}
            for part in halves(groups) if len(groups) > 1 else [[sound(groups[0])]]:
                rows = [row for group in part for row in group]
                answer = answer_for(rows)
                if isinstance(answer, Failure):
                    found |= of_groups(part) if len(groups) > 1 else {}
                elif answer is not None:
                    found |= zip(rows, read(answer, len(rows)), strict=True)
            return found

        def sound(rows: Sequence[int]) -> list[int]:
            """Those of some rows that fail together which are not to blame."""
            kept: list[int] = []
            for half in halves(rows) if len(rows) > 1 else ():
                answer = answer_for(half)
                if isinstance(answer, Failure) and answer.kind == failure.kind:
                    kept += sound(half)
                elif answer is not None:
                    kept += half
            return kept

        return of_groups(groups)

    def _pause(self, seconds: float) -> None:
        ends = time.monotonic() + seconds
        while (left := ends - time.monotonic()) > 0:
            self.progress.advance(0)
            time.sleep(min(left, LOOK_S))


def halves(items: Sequence[T]) -> tuple[Sequence[T], Sequence[T]]:
    """The first half, which has at least one, and the rest."""
    middle = max(len(items) // 2, 1)
    return items[:middle], items[middle:]


def _num_rows(columns: Columns) -> int:
    return len(columns["responses"])
