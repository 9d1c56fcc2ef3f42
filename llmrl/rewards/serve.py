"""Main loop of the worker process: loads the reward functions of a recipe and calls them, one request after another.

It ends when its parent is gone, whatever a function does: see `end_with`. What a function prints goes where the parent
prints, and is lost where that is closed, such as by ``| head``; standard input is empty.
"""

import inspect
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from inspect import Parameter
from multiprocessing.connection import Connection
from typing import Any

from llmrl.child_process import end_with, flush_output
from llmrl.output_streams import lasting_output
from llmrl.rewards.calls import Answer, Calls, Columns, Failure, Pending
from llmrl.rewards.loading import bind_arguments, check_columns, load_function, takes
from llmrl.user_code import UserCodeError, name_of, source_file


@dataclass(frozen=True)
class Load:
    """Request: the function that a recipe names, with the arguments that it fills in. Reply: `Loaded`."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A function of the worker, as its parent has to know it."""

    name: str
    """As `name_of` writes it."""
    source_file: str | None
    parameters: tuple[tuple[str, int, bool], ...]
    """``(name, kind, whether it has a default)`` of each parameter that no argument fills in."""


@dataclass(frozen=True)
class Check:
    """Request: whether the functions of these names get what they need from data of these columns. Reply: None."""

    names: tuple[str, ...]
    columns: tuple[str, ...]


@dataclass(frozen=True)
class Refused:
    """Reply to what a user wrote and what cannot be used: the text of a `UserCodeError`."""

    text: str


@dataclass(frozen=True)
class Ask:
    """Request: a call of a function. Reply: `Answered`."""

    name: str
    columns: Columns


@dataclass(frozen=True)
class Gather:
    """Request: what the functions of these names returned is awaited. Reply: `Answered` for each, as they end."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class Answered:
    """Answer of a function."""

    name: str
    answer: Answer | Pending
    moved_to: str | None
    """Working folder that the function left; None: the one it was called in."""


Request = Load | Check | Ask | Gather


def serve(requests: int, lifeline: int) -> None:
    """Serves the parent until it closes the connection.

    Args:
        requests: File descriptor of the connection to the parent.
        lifeline: File descriptor of the pipe that ends with the parent.
    """
    end_with(lifeline)
    with lasting_output(warns=False):  # the run prints to the same, and warns
        _serve(Connection(requests))


def _serve(connection: Connection) -> None:
    worker, process = _Worker(), os.getpid()
    with suppress(EOFError, ConnectionError):  # the parent is gone
        while True:
            _reply(connection, worker, process)


def _reply(connection: Connection, worker: "_Worker", process: int) -> None:
    """Answers one request, by as many replies as it has."""
    request = connection.recv()
    for reply in worker.replies(request):
        if os.getpid() != process:
            os._exit(0)  # a child that a function has forked, and that came back
        flush_output()
        connection.send(reply)


class _Worker:
    def __init__(self) -> None:
        self.calls = Calls({}, passes=())  # a KeyboardInterrupt here is the function's own
        self.folder = os.getcwd()

    def replies(self, request: Request) -> Iterator[Any]:
        match request:
            case Load(name, arguments):
                yield self._load(name, arguments)
            case Check(names, columns):
                yield self._check(names, columns)
            case Ask(name, columns):
                yield self._answered(name, self.calls.ask(name, columns))
            case Gather(names):
                for name, answer in self.calls.gather(dict.fromkeys(names)):
                    yield self._answered(name, answer)

    def _load(self, name: str, arguments: Mapping[str, Any]) -> Loaded | Refused:
        try:
            function = bind_arguments(load_function(name), arguments)
        except UserCodeError as error:
            return Refused(str(error))
        finally:
            self._come_back()
        self.calls.functions[name] = function
        parameters = inspect.signature(function).parameters.values()
        return Loaded(
            name=name_of(function),
            source_file=source_file(function),
            parameters=tuple(
                (p.name, int(p.kind), p.default is not p.empty)
                for p in parameters
                if p.kind in (Parameter.VAR_KEYWORD, Parameter.VAR_POSITIONAL) or takes(function, p.name)
            ),
        )

    def _check(self, names: tuple[str, ...], columns: tuple[str, ...]) -> Refused | None:
        try:
            for name in names:
                check_columns(self.calls.functions[name], columns)
        except UserCodeError as error:
            return Refused(str(error))
        return None

    def _answered(self, name: str, answer: Answer | Pending) -> Answered:
        if isinstance(answer, Failure):
            answer = replace(answer, cause=None)  # an exception may hold what cannot be sent
        return Answered(name, answer, self._come_back())

    def _come_back(self) -> str | None:
        """Goes back to the working folder of the run; returns where the code of the user had gone."""
        try:
            place = os.getcwd()
        except OSError:  # it was removed
            place = "a folder that is gone"
        if place == self.folder:
            return None
        os.chdir(self.folder)
        return place
