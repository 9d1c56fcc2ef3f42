"""Calls of reward functions in this process, and what comes back of them: plain numbers, or a failure in words.

Imports no heavy library: the worker process that calls the functions of a recipe starts with this.
"""

import inspect
import re
import time
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol, runtime_checkable

from llmrl.errors import Error
from llmrl.rewards.event_loop import start_in_loop
from llmrl.rewards.loading import Function, select_columns
from llmrl.user_code import describe_exception


class RewardError(Error, RuntimeError):
    """A reward function that failed; the message says which one, on which row, and what was expected of it."""


Columns = Mapping[str, list[Any]]
TRANSIENT = re.compile(
    r"Timeout|TimedOut|Connect|Network|RateLimit|TooMany|Unavailable|Overloaded|HTTP|URLError|Server"
)
"""Names of the exceptions of HTTP clients that may be gone at the next call: of httpx, aiohttp, requests, openai."""


@dataclass(frozen=True)
class Odd:
    """Something in a result that is neither a number nor None nor a list: only its text is kept."""

    text: str
    """As Python writes it, shortened."""
    kind: str
    """Name of its class."""

    def __repr__(self) -> str:
        return self.text

    def __str__(self) -> str:
        return f"{self.text} ({self.kind})"


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A call that brought no result."""

    what: str
    """Such as ``raised KeyError: 'gold' at rule.py:3``."""
    kind: str
    """What failures of the same cause have in common: the name of the exception's class."""
    seconds: float
    """Time that the call took."""
    is_transient: bool = False
    """Whether a further call may go well: a connection or a service failed, not the function."""
    is_stuck: bool = False
    """Whether it was ended at its time limit."""
    is_unloaded: bool = False
    """Whether there was no call: a fresh process could not load the function."""
    cause: BaseException | None = None
    """The exception; None where it was raised in another process."""


class Pending(Enum):
    """The function returned something to be awaited: its result comes from `Caller.gather`."""

    PENDING = 0


Answer = Any
"""A `Failure`, or the result in plain values: numbers, None, lists and tuples, and `Odd` in place of all else."""


@runtime_checkable
class Waiting(Protocol):
    """Receives what there is to say while a call is waited for, and limits it."""

    def look(self, seconds: float) -> bool:
        """Called several times a second, with the seconds since the last time. Whether the limit is exceeded."""
        ...

    def tell(self, text: str) -> None:
        """Prints a message about the function."""
        ...

    def limit(self) -> str:
        """The limit in words."""
        ...


@runtime_checkable
class Caller(Protocol):
    """Calls functions, in this process or in another one."""

    def ask(self, name: str, columns: Columns, waiting: Waiting) -> Answer | Pending:
        """What a function returned for these columns."""
        ...

    def gather(self, waiting: Mapping[str, Waiting]) -> Generator[tuple[str, Answer], None, None]:
        """Awaits what the functions of these names returned, together: ``(name, answer)`` as they come. One for which
        nothing comes was lost with the process that another one ended. Ending the iterator early cancels the others."""
        ...

    def drop(self) -> None:
        """Forgets what would still have to be awaited."""
        ...


class Calls:
    """`Caller` in this process: nothing can stop a call, and no limit is kept.

    Args:
        functions: By name.
        passes: Exceptions that are no failure of a function here.
    """

    def __init__(
        self, functions: Mapping[str, Function], *, passes: tuple[type[BaseException], ...] = (KeyboardInterrupt,)
    ) -> None:
        self.functions = dict(functions)
        self.passes = passes
        self.awaitables: dict[str, Awaitable[Any]] = {}

    def ask(self, name: str, columns: Columns, waiting: Waiting | None = None) -> Answer | Pending:
        """See `Caller`. The function gets copies: whatever it does to them changes nothing else."""
        function, started = self.functions[name], time.monotonic()
        try:
            result = function(**select_columns(function, columns))
            if not inspect.isawaitable(result):
                return plain(result)
        except self.passes:
            raise
        except BaseException as error:  # whatever it raises, SystemExit included, is the function's failure
            return _failure(function, error, started)
        self.awaitables[name] = result
        return Pending.PENDING

    def gather(self, waiting: Mapping[str, Waiting | None]) -> Generator[tuple[str, Answer], None, None]:
        """See `Caller`."""
        futures: dict[Future[Answer], str] = {
            start_in_loop(_awaited(self.functions[name], self.awaitables.pop(name))): name for name in waiting
        }
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            for future in futures:
                future.cancel()  # does nothing once it is done

    def drop(self) -> None:
        """See `Caller`."""
        for awaitable in self.awaitables.values():
            if inspect.iscoroutine(awaitable):
                awaitable.close()
        self.awaitables.clear()


def plain(value: Any) -> Answer:
    """Python's own numbers, lists and tuples in place of those of torch and numpy and of subclasses, at every depth;
    `Odd` in place of what is none."""
    if _is_array(value) and value.shape != ():
        value = value.tolist()
    if isinstance(value, list):
        return [_plain_item(item) for item in value]
    if isinstance(value, tuple):
        return tuple(_plain_item(item) for item in value)
    return odd(value)


def odd(value: Any) -> Odd:
    """A value by its text, shortened, and its class."""
    return Odd(shorten(value), type(value).__name__)


def shorten(value: Any, limit: int = 80) -> str:
    """A value as Python writes it, the first characters."""
    try:
        text = repr(value)
    except Exception as error:  # `__repr__` of a class that a user wrote
        text = f"<no repr: {type(error).__name__}>"
    return text if len(text) <= limit else f"{text[:limit]}..."


def _plain_item(value: Any) -> Any:
    value = value.tolist() if _is_array(value) else value
    match value:
        case None | bool():
            return value
        case int():
            return int.__int__(value)
        case float():
            return float.__float__(value)
        case list() | tuple():
            return plain(value)
    return odd(value)


def _is_array(value: Any) -> bool:
    """Whether a value is an array or a number of torch or numpy, which this process may not have imported."""
    modules = {kind.__module__.partition(".")[0] for kind in type(value).__mro__}
    return bool(modules & {"torch", "numpy"}) and hasattr(value, "tolist") and hasattr(value, "shape")


async def _awaited(function: Function, awaitable: Awaitable[Any]) -> Answer:
    started = time.monotonic()
    try:
        return plain(await awaitable)
    except BaseException as error:  # SystemExit too, which would end the loop
        return _failure(function, error, started)


def _failure(function: Callable[..., Any], error: BaseException, started: float) -> Failure:
    return Failure(
        what=describe_exception(function, error),
        kind=f"{type(error).__module__}.{type(error).__qualname__}",
        seconds=time.monotonic() - started,
        is_transient=is_transient(error),
        cause=error,
    )


def is_transient(error: BaseException) -> bool:
    """Whether an exception is that of a connection or a service, such as a time limit or too many requests; not that of
    a file."""
    if isinstance(error, OSError) and error.filename is None:
        return True
    names = [kind.__name__ for kind in type(error).__mro__ if kind not in (Exception, BaseException, object)]
    return any(TRANSIENT.search(name) for name in names)


def rows_of(columns: Columns, rows: Sequence[int]) -> dict[str, list[Any]]:
    """The columns of some of the rows."""
    return {name: [column[row] for row in rows] for name, column in columns.items()}
