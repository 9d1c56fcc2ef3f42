"""Requests and answers by a scripted link: limits, failures that stay, and what is no line."""

import json
import signal
from collections.abc import Collection

import pytest

from llmrl.environments import exchange
from llmrl.environments.calls import ToolCall
from llmrl.environments.environment import Message, Turn
from llmrl.environments.exchange import Exchange, Exchanges
from llmrl.environments.hosting import Failure, ToolResult

MESSAGE = Message("x", 1, [{"role": "assistant", "content": "x"}])


class Scripted:
    """A link whose lines the test puts in."""

    def __init__(self) -> None:
        self.sent: list = []
        self.coming: list[str] = []
        self.is_dropped = False

    def send(self, request) -> None:
        self.sent.append(request)

    def lines(self) -> list[str]:
        coming, self.coming = self.coming, []
        return coming

    def drop(self) -> None:
        self.is_dropped = True


class ScriptedHost(Exchanges):
    def make_link(self) -> Scripted:
        return Scripted()

    def ready(self, waiting: Collection[Exchange]) -> Collection[Exchange]:
        return waiting


class Clock:
    """In place of `time` in the module: each look takes a while."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(exchange, "time", clock)
    return clock


@pytest.fixture
def host() -> ScriptedHost:
    host = ScriptedHost(60.0)
    host.open(7, {"secret": 3}, opening_seed=1, seed=2)
    link(host).coming.append('["answer", "begin"]')
    assert host.wait([7], lambda: None) == {7: "begin"}
    return host


def link(host, number: int = 7) -> Scripted:
    return host.exchanges[number].link


def answer(host, *lines: str):
    link(host).coming.extend(lines)
    return host.wait([7], lambda: None)[7]


def test_requests_carry_what_they_are_given(host):
    (opened,) = link(host).sent
    assert (opened.row, opened.opening_seed, opened.seed) == ({"secret": 3}, 1, 2)
    host.respond(7, MESSAGE)
    assert answer(host, '["answer", ["lower", false, 0.5]]') == Turn("lower", False, 0.5)
    host.call(7, [ToolCall("f"), ToolCall("g")])
    assert answer(host, '["answer", ["1", false]]', '["answer", ["2", true]]') == [
        ToolResult("1", False),
        ToolResult("2", True),
    ]
    assert [type(request).__name__ for request in link(host).sent] == ["Open", "Respond", "Call"]


def test_a_number_is_free_once_it_is_closed(host):
    last = link(host)
    host.close(7)
    assert answer(host, '["answer", null]') == 0.0
    assert last.is_dropped
    host.open(7, {}, opening_seed=1, seed=2)


@pytest.mark.parametrize(
    ("line", "name", "what"),
    [
        ('["failure", "respond", "raised KeyError"]', "respond", "raised KeyError"),
        ('["ended", 3]', "respond", "ended the process that it runs in with exit status 3"),
        ('["ended", -11]', "respond", "ended the process that it runs in by SIGSEGV"),
        ('["closed"]', "respond", "closed the connection of the process that it runs in"),
        ('["answer", ["x", false, NaN]]', "respond", "returned the reward nan; it must be a finite number"),
        ("printed past us", "respond", "wrote to the connection of the process that it runs in"),
        ("[" * 100_000, "respond", "wrote to the connection of the process that it runs in"),
        ('{"answer": 1}', "respond", "wrote to the connection of the process that it runs in"),
        ("9" * 5000, "respond", "wrote to the connection of the process that it runs in"),
    ],
)
def test_a_failure_stays_and_ends_the_episode(host, line, name, what):
    host.respond(7, MESSAGE)
    failure = Failure(name, what)
    assert answer(host, line) == failure
    assert link(host).is_dropped
    num_sent = len(link(host).sent)
    host.call(7, [ToolCall("f")])
    assert answer(host) == failure
    host.close(7)
    assert answer(host) == failure
    assert num_sent == 2
    assert 7 not in host.exchanges


def test_a_failure_of_a_tool_has_the_name_of_the_one_that_was_called(host):
    host.call(7, [ToolCall("f"), ToolCall("g")])
    assert answer(host, '["answer", ["1", false]]', '["ended", -9]') == Failure(
        "g", "ended the process that it runs in by SIGKILL (which the system sends where memory runs out)"
    )


def test_what_comes_after_an_answer_is_nothing_to_it(host):
    host.close(7)
    assert answer(host, '["answer", 0.5]', '["ended", 1]') == 0.5


def test_a_call_has_its_time_and_no_more(host, clock):
    host.respond(7, MESSAGE)
    looks = []

    def look() -> None:
        looks.append(clock.now)
        clock.now += 0.2

    took = host.wait([7], look)[7]
    assert took == Failure("respond", "took longer than 60 s (environment.timeout_s)")
    assert len(looks) == pytest.approx(300, abs=2)


def test_time_before_the_wait_counts_but_an_answer_that_is_there_is_taken(host, clock):
    host.respond(7, MESSAGE)
    clock.now += 1000
    assert answer(host, '["answer", ["lower", false, 0]]') == Turn("lower")
    host.respond(7, MESSAGE)
    clock.now += 1000
    assert isinstance(answer(host), Failure)


def test_time_in_which_the_process_was_stopped_does_not_count(host, clock):
    host.respond(7, MESSAGE)
    num_looks = 0

    def look() -> None:
        nonlocal num_looks
        num_looks += 1
        clock.now += 3600.0 if num_looks == 2 else 0.2
        if num_looks == 5:
            link(host).coming.append('["answer", ["lower", false, 0]]')

    assert host.wait([7], look) == {7: Turn("lower")}


def test_each_tool_has_a_limit_of_its_own(host, clock):
    host.call(7, [ToolCall("f"), ToolCall("g"), ToolCall("h")])
    num_looks = 0

    def look() -> None:
        nonlocal num_looks
        num_looks += 1
        clock.now += 0.4
        if num_looks in (100, 200):  # 40 s each
            link(host).coming.append('["answer", ["1", false]]')

    assert host.wait([7], look) == {7: Failure("h", "took longer than 60 s (environment.timeout_s)")}


def test_what_a_look_raises_ends_the_wait_and_nothing_is_left(host):
    def look() -> None:
        raise InterruptedError(signal.SIGTERM)

    host.respond(7, MESSAGE)
    last = link(host)
    with pytest.raises(InterruptedError):
        host.wait([7], look)
    host.end()
    assert last.is_dropped
    assert host.exchanges == {}


def test_only_those_that_are_asked_for_are_waited_for(host):
    host.open(8, {}, opening_seed=1, seed=3)
    host.respond(7, MESSAGE)
    assert answer(host, json.dumps(["answer", ["lower", False, 0]])) == Turn("lower")
    link(host, 8).coming.append('["answer", null]')
    assert host.wait([7, 8], lambda: None) == {7: Turn("lower"), 8: None}


def test_one_request_at_a_time(host):
    host.respond(7, MESSAGE)
    with pytest.raises(AssertionError):
        host.close(7)
