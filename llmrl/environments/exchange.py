"""What every host does: requests to many episodes, their answers, and the limits on both."""

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from llmrl.child_process import end_in_words
from llmrl.environments.answers import NoAnswer, read_answer
from llmrl.environments.calls import ToolCall
from llmrl.environments.environment import Message
from llmrl.environments.episode import Call, Close, Open, Request, Respond
from llmrl.environments.hosting import CLOSE, RESPOND, START, Answer, Failure, ToolResult

LOOK_S = 0.2
"""Seconds between two looks at the clock, while answers are waited for."""


@runtime_checkable
class Link(Protocol):
    """Connection to an episode."""

    def send(self, request: Request) -> None:
        """Sends a request, and returns at once."""
        ...

    def lines(self) -> Sequence[str | bytes]:
        """The lines that have come since the last time; see `llmrl.environments.episode`."""
        ...

    def drop(self) -> None:
        """Ends the episode at once."""
        ...


class Exchange:
    """One episode as its host sees it: the last request, and what has come of it."""

    def __init__(self, link: Link, timeout_s: float) -> None:
        self.link = link
        self.timeout_s = timeout_s
        self.request: Request | None = None
        self.sent = 0.0
        """When the time limit of the call that is waited for began."""
        self.results: list[ToolResult] = []
        """Results of the tools that the request has called."""
        self.answer: Answer = None
        self.is_answered = True
        self.failure: Failure | None = None

    def ask(self, request: Request) -> None:
        """Sends a request; nothing where the episode has failed."""
        assert self.is_answered, "the last request is answered before the next"
        self.request = request
        if self.failure is not None:
            return
        self.sent, self.is_answered, self.results = time.monotonic(), False, []
        self.link.send(request)

    def read(self) -> None:
        """Takes what has come."""
        for line in self.link.lines():
            if not self.is_answered:
                self._take(line)

    def check_time(self, now: float, stopped_s: float) -> None:
        """Fails the episode where a call has exceeded its limit; the last `stopped_s` seconds do not count."""
        self.sent += stopped_s
        if not self.is_answered and now - self.sent > self.timeout_s:
            self.fail(Failure(self.name, f"took longer than {self.timeout_s:g} s (environment.timeout_s)"))

    def fail(self, failure: Failure) -> None:
        """The answer to this request and to every further one."""
        self.answer = self.failure = failure
        self.is_answered = True
        self.link.drop()

    @property
    def name(self) -> str:
        """What is waited for, as failures are counted."""
        match self.request:
            case Call(calls):
                return calls[len(self.results)].name
            case Respond():
                return RESPOND
            case Close():
                return CLOSE
        return START

    def _take(self, line: str | bytes) -> None:
        match _parse(line):
            case ["answer", value]:
                self._take_value(value)
            case ["failure", str(name), str(what)]:
                self.fail(Failure(name, what))
            case ["ended", int(status)]:
                self.fail(Failure(self.name, end_in_words(status)))
            case ["closed"]:
                self.fail(Failure(self.name, "closed the connection of the process that it runs in"))
            case _:
                self.fail(Failure(self.name, "wrote to the connection of the process that it runs in"))

    def _take_value(self, value: Any) -> None:
        assert self.request is not None, "an answer is waited for"
        try:
            answer = read_answer(self.request, value)
        except NoAnswer as problem:
            return self.fail(Failure(self.name, str(problem)))
        if not isinstance(answer, ToolResult):
            self.answer, self.is_answered = answer, True
            return None
        assert isinstance(self.request, Call), "a result is that of a call"
        self.results.append(answer)
        self.sent = time.monotonic()
        if len(self.results) == len(self.request.calls):
            self.answer, self.is_answered = self.results, True
        return None


class Exchanges(ABC):
    """`Host` by links, whatever these lead to."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.exchanges: dict[int, Exchange] = {}
        """Open episodes, by number."""
        self.code: Mapping[str, Mapping[Path, str | None]] = {}
        """See `Host`."""

    @abstractmethod
    def make_link(self) -> Link:
        """Connection to a new episode."""

    @abstractmethod
    def ready(self, waiting: Collection[Exchange]) -> Collection[Exchange]:
        """Those of some episodes that may have lines; waits for `LOOK_S` at most until there are some."""

    def open(self, number: int, row: Mapping[str, Any], *, opening_seed: int, seed: int) -> None:
        """See `Host`."""
        assert number not in self.exchanges, f"episode {number} is open"
        self.exchanges[number] = exchange = Exchange(self.make_link(), self.timeout_s)
        exchange.ask(Open(dict(row), opening_seed, seed))

    def respond(self, number: int, message: Message) -> None:
        """See `Host`."""
        self.exchanges[number].ask(Respond(message))

    def call(self, number: int, calls: Sequence[ToolCall]) -> None:
        """See `Host`."""
        assert calls, "there is something to call"
        self.exchanges[number].ask(Call(tuple(calls)))

    def close(self, number: int) -> None:
        """See `Host`."""
        self.exchanges[number].ask(Close())

    def wait(self, numbers: Collection[int], look: Callable[[], None]) -> dict[int, Answer]:
        """See `Host`."""
        asked = {number: self.exchanges[number] for number in numbers}
        last = time.monotonic()
        while waiting := [exchange for exchange in asked.values() if not exchange.is_answered]:
            look()
            for exchange in self.ready(waiting):
                exchange.read()
            now = time.monotonic()
            stopped_s = max(now - last - 2 * LOOK_S, 0.0)  # this process was suspended, and maybe the episodes too
            last = now
            for exchange in waiting:
                exchange.check_time(now, stopped_s)
        for number, exchange in asked.items():
            if isinstance(exchange.request, Close):
                self.exchanges.pop(number).link.drop()
        return {number: exchange.answer for number, exchange in asked.items()}

    def end(self) -> None:
        """See `Host`."""
        for exchange in self.exchanges.values():
            exchange.link.drop()
        self.exchanges.clear()


def _parse(line: str | bytes) -> Any:
    """What a line holds; None where it is no JSON, which code of users has written past its answers."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
