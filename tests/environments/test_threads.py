"""Environments handed over as Python objects, in threads of this process."""

import asyncio
import threading
import time

import pytest

from llmrl.environments.calls import ToolCall
from llmrl.environments.environment import Environment, Message, Turn
from llmrl.environments.hosting import Failure, ToolResult
from llmrl.environments.loading import Code
from llmrl.environments.threads import Threads
from llmrl.user_code import handed_over

CONVERSATION = [{"role": "assistant", "content": "3"}]


class Guess(Environment):
    def __init__(self, low: int = 1) -> None:
        self.low = low

    def start(self, row):
        self.secret = row["secrets"].pop()
        return f"from {self.low}"

    async def respond(self, message):
        await asyncio.sleep(0.001)
        message.messages.clear()
        match message.text:
            case "hang":
                time.sleep(30)
            case "wait":
                await asyncio.sleep(30)
            case "exit":
                raise SystemExit(1)
        return Turn(done=int(message.text) == self.secret, observation="no", reward=0.5)

    def close(self):
        return float(threading.current_thread() is not threading.main_thread())


def add(a: int, b: int) -> int:
    return a + b


@pytest.fixture
def host():
    with handed_over({"guess": Guess, "add": add}):
        host = Threads(Code("given:guess", {"low": 0}, ["given:add"]), timeout_s=0.5)
        host.load()
        yield host
    host.end()


def wait(host, *numbers: int) -> list:
    answers = host.wait(numbers, lambda: None)
    return [answers[number] for number in numbers]


def say(host, number: int, text: str) -> None:
    host.respond(number, Message(text, 1, CONVERSATION))


def test_episodes_run_side_by_side_and_change_nothing_outside(host):
    row = {"secrets": [5]}
    for number in (1, 2):
        host.open(number, row, opening_seed=1, seed=2)
    assert wait(host, 1, 2) == ["from 0", "from 0"]
    assert row == {"secrets": [5]}
    say(host, 1, "3")
    say(host, 2, "5")
    assert wait(host, 1, 2) == [Turn("no", False, 0.5), Turn("no", True, 0.5)]
    assert CONVERSATION == [{"role": "assistant", "content": "3"}]
    host.call(1, [ToolCall("add", {"a": 1, "b": 2}), ToolCall("sub")])
    assert wait(host, 1)[0][0] == ToolResult("3", False)
    host.close(1)
    host.close(2)
    assert wait(host, 1, 2) == [1.0, 1.0]


def test_one_that_hangs_or_exits_fails_alone(host):
    for number in range(4):
        host.open(number, {"secrets": [5]}, opening_seed=1, seed=2)
    wait(host, 0, 1, 2, 3)
    began = time.monotonic()
    for number, text in enumerate(["hang", "wait", "exit", "5"]):
        say(host, number, text)
    late, waiting, left, right = wait(host, 0, 1, 2, 3)
    assert late == waiting == Failure("respond", "took longer than 0.5 s (environment.timeout_s)")
    assert left.what.startswith("raised SystemExit: 1 at ")
    assert right == Turn("no", True, 0.5)
    assert time.monotonic() - began < 10


def test_threads_end_with_their_episodes(host):
    before = set(threading.enumerate())
    host.open(1, {"secrets": [5]}, opening_seed=1, seed=2)
    host.open(2, {"secrets": [5]}, opening_seed=1, seed=2)
    begun = set(threading.enumerate()) - before
    assert len(begun) == 2
    wait(host, 1, 2)
    host.close(1)
    wait(host, 1)
    host.end()
    for thread in begun:
        thread.join(10)
    assert not any(thread.is_alive() for thread in begun)
