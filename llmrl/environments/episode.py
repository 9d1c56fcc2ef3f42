"""`Episode`: an environment and its tools at work, and the lines in which they answer.

A line is JSON: ``["answer", value]`` or ``["failure", name, what]``; of an episode that has a process
of its own also ``["ended", exit status]`` and ``["closed"]``, where that has ended or closed its connection. So
whatever code of users returns arrives as texts, numbers, lists and objects, and is checked where it arrives.

Imports no heavy library: the processes in which environments run start with this.
"""

import asyncio
import inspect
import json
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

from pydantic import ValidationError

from llmrl.environments.calls import ToolCall
from llmrl.environments.environment import Environment, Message, Turn
from llmrl.environments.hosting import CLOSE, RESPOND, START
from llmrl.messages import class_and_message, in_one_line, nearest
from llmrl.rewards.calls import shorten
from llmrl.user_code import describe_exception, name_of

MAX_CHARACTERS = 10_000_000
"""Limit on the characters of a line."""


@dataclass(frozen=True)
class Open:
    """Request: the first of an episode."""

    row: dict[str, Any]
    opening_seed: int
    seed: int


@dataclass(frozen=True)
class Respond:
    """Request: the turn of the environment."""

    message: Message


@dataclass(frozen=True)
class Call:
    """Request: calls of tools. A line comes for each, in their order."""

    calls: tuple[ToolCall, ...]


@dataclass(frozen=True)
class Close:
    """Request: the last of an episode."""


Request = Open | Respond | Call | Close


class Episode:
    """One episode.

    Args:
        make: Makes its environment.
        tools: Functions by name, which check their arguments; see `llmrl.environments.loading.Loaded`.
    """

    def __init__(self, make: Callable[[], Environment], tools: Mapping[str, Callable[..., Any]]) -> None:
        self.make = make
        self.tools = tools
        self.loop = asyncio.Runner()
        """Where awaitables run: one event loop for the whole episode, so that what it keeps open stays usable."""
        self.environment: Environment | None = None

    def lines(self, request: Request) -> Iterator[str]:
        """Yields the lines that answer a request. A failure is the last one of the episode."""
        match request:
            case Open():
                yield self._line(START, lambda: self._start(request))
            case Respond(message):
                yield self._line(RESPOND, lambda: self._respond(message))
            case Call(calls):
                for call in calls:
                    yield self._line(call.name, partial(self._call, call))
            case Close():
                yield self._line(CLOSE, self._close)

    def _line(self, name: str, answer: Callable[[], Any]) -> str:
        """An answer, or why there is none, as a line."""
        code = self.tools.get(name) or (type(self.environment) if self.environment else self.make)
        try:
            value = answer()
        except BaseException as error:  # whatever it raises, SystemExit included, is its failure
            return self._failed(name, describe_exception(code, error))
        try:
            line = json.dumps(["answer", value], default=_plain)
        except Exception as error:  # what it returned is no data, or code of users in it fails
            return self._failed(name, f"returned what is no data, {shorten(value)}: {class_and_message(error)}")
        if len(line) > MAX_CHARACTERS:
            return self._failed(name, f"returned {len(line):,} characters, more than {MAX_CHARACTERS:,}")
        return line

    def _failed(self, name: str, what: str) -> str:
        with suppress(BaseException):  # the failure that there is comes first
            self._close()
        return json.dumps(["failure", name, what])

    def _start(self, request: Open) -> Any:
        environment = self.make()
        if not isinstance(environment, Environment):
            raise TypeError(f"it made {shorten(environment)}, which is no llmrl.Environment")
        self.environment = environment
        environment.random = generator = Random(request.opening_seed)
        opening = self._finished(environment.start(request.row))
        generator.seed(request.seed)
        return opening

    def _respond(self, message: Message) -> Any:
        assert self.environment is not None, "an episode is opened first"
        reply: Any = self._finished(self.environment.respond(message))
        match reply:
            case Turn():
                return [reply.observation, reply.done, reply.reward]
            case str() | list():
                return [reply, False, 0.0]
        return f"{shorten(reply)} ({name_of(type(self.environment))})"

    def _call(self, call: ToolCall) -> tuple[str, bool]:
        """``(text for the actor, whether the call was its mistake)``."""
        if call.problem is not None:
            return f"error: {call.problem}", True
        if call.name not in self.tools:
            near = nearest(call.name, self.tools) or f"; there are {', '.join(self.tools) or 'none'}"
            return f"error: there is no tool {call.name!r}{near}", True
        try:
            result = self._finished(self.tools[call.name](**call.arguments))
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
            return f"error: {'; '.join(problems)}", True
        except ValueError as error:
            return f"error: {in_one_line(error) or type(error).__name__}", True
        return _text(result), False

    def _close(self) -> Any:
        """The reward of the episode; None where there is nothing to close any more."""
        environment, self.environment = self.environment, None
        return None if environment is None else self._finished(environment.close())

    def _finished(self, result: Any) -> Any:
        return self.loop.run(_awaited(result)) if inspect.isawaitable(result) else result


async def _awaited(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


def _text(result: Any) -> str:
    """What a tool returned as the actor reads it: a text as it is, data as JSON, all else as Python prints it."""
    if isinstance(result, str):
        return result
    try:
        return json.dumps(result, ensure_ascii=False, default=_plain)
    except (TypeError, ValueError, RecursionError):
        return str(result)


def _plain(value: Any) -> Any:
    """Python's own numbers and lists for those of torch and numpy, which this process may not have imported."""
    if callable(getattr(value, "tolist", None)):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is neither text nor number, nor a list or dict of them")
