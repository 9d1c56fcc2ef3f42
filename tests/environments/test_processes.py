"""A process for each episode: each is ended whatever it does, and no other one notices."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmrl.environments.calls import ToolCall
from llmrl.environments.environment import Message, Turn
from llmrl.environments.hosting import Failure, ToolResult
from llmrl.environments.loading import Code
from llmrl.environments.processes import Processes
from llmrl.user_code import UserCodeError, UserCodeFailure

ENVIRONMENT = """
import asyncio, ctypes, math, os, random, re, signal, subprocess, sys, time
import llmrl

LOADED_IN = os.getpid()
count = 0

class Mine(llmrl.Environment):
    def __init__(self, step: int = 1):
        self.step = step

    def start(self, row):
        self.row, self.total = row, row.get("n", 0)
        self.drawn = self.random.random()
        return f"{self.drawn}"

    async def respond(self, message):
        global count
        count += 1
        self.total += self.step
        match message.text:
            case "lie":
                turn = llmrl.Turn("x", reward=math.nan)
                return turn
            case "huge":
                return "x" * 20_000_000
            case "raise":
                raise KeyError("gold")
            case "exit":
                os._exit(3)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "crash":
                ctypes.string_at(0)
            case "hang":
                time.sleep(3600)
            case "await":
                await asyncio.sleep(3600)
            case "busy":
                re.match("(a|aa)+$", "a" * 60 + "b")  # in C, without a signal or the lock
            case "deaf":
                for number in range(1, 65):
                    if number not in (signal.SIGKILL, signal.SIGSTOP, 32, 33):
                        signal.signal(number, signal.SIG_IGN)
                time.sleep(3600)
            case "garbage":
                for number in range(3, 50):
                    try:
                        os.write(number, b"[garbage]\\n")
                    except OSError:
                        pass
                time.sleep(3600)
            case "family":
                for _ in range(10):
                    if not os.fork():
                        os.fork()
                        subprocess.Popen(["sleep", "3600"])
                        time.sleep(3600)
                time.sleep(0.5)
                with open(self.row["file"], "w") as file:
                    file.write(str(os.getpid()))
                time.sleep(3600)
            case "orphans":
                subprocess.Popen(["sleep", "3600"])
                os._exit(0)
            case "fork":
                os.fork()
            case "modules":
                return str([name in sys.modules for name in ("torch", "transformers", "numpy")])
            case "place":
                return f"{os.getpid() != LOADED_IN} {os.getpgrp() == os.getpid()} {os.getcwd()} {sys.stdin.read()!r}"
            case "draw":
                return f"{self.random.random()} {random.random()}"
        return llmrl.Turn(f"{self.total} {count}", reward=self.total)

    def close(self):
        return self.total

def add(a: int, b: int) -> int:
    return a + b

def seen() -> int:
    return count

async def sleeps(seconds: float) -> str:
    await asyncio.sleep(seconds)
    return "awake"
"""
TOOLS = ("add", "seen", "sleeps")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("environments")
    (folder / "mine.py").write_text(ENVIRONMENT)
    return folder


def made(folder: Path, name: str = "Mine", tools=TOOLS, timeout_s: float = 60.0, **arguments) -> Processes:
    code = Code(f"{folder}/mine.py:{name}", arguments, [f"{folder}/mine.py:{tool}" for tool in tools])
    host = Processes(code, timeout_s=timeout_s, tell=print)
    host.load()
    return host


@pytest.fixture(scope="module")
def loaded(folder):
    return made(folder)


@pytest.fixture
def host(loaded):
    yield loaded
    loaded.end()


def begin(host, *numbers: int, **row) -> list:
    for number in numbers:
        host.open(number, row, opening_seed=1, seed=100 + number)
    return wait(host, *numbers)


def wait(host, *numbers: int) -> list:
    answers = host.wait(numbers, lambda: None)
    return [answers[number] for number in numbers]


def say(host, number: int, text: str) -> None:
    host.respond(number, Message(text, 1, [{"role": "assistant", "content": text}]))


def said(host, number: int, text: str):
    say(host, number, text)
    return wait(host, number)[0]


def processes_of_group(group: int) -> list[int]:
    """Living processes of a group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(its_group) == group and state != "Z":
            found.append(int(stat.parent.name))
    return found


def children_of(process: int) -> set[int]:
    return set(map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split()))


def ends(*groups: int) -> bool:
    """Whether these groups end within half a minute."""
    for _ in range(300):
        if not any(map(processes_of_group, groups)):
            return True
        time.sleep(0.1)
    return False


def test_episodes_have_their_state_each(host):
    begin(host, 1, 2, n=10)
    say(host, 1, "go")
    say(host, 2, "go")
    assert wait(host, 1, 2) == [Turn("11 1", False, 11.0)] * 2
    assert said(host, 1, "go") == Turn("12 2", False, 12.0)
    host.call(
        1, [ToolCall("seen"), ToolCall("add", {"a": 1, "b": "2"}), ToolCall("ad"), ToolCall("sleeps", {"seconds": 0})]
    )
    near = "error: there is no tool 'ad'; did you mean 'add'?"
    results = [ToolResult("2", False), ToolResult("3", False), ToolResult(near, True), ToolResult("awake", False)]
    assert wait(host, 1) == [results]
    host.close(1)
    host.close(2)
    assert wait(host, 1, 2) == [12.0, 11.0]
    assert host.exchanges == {}


def test_the_processes_are_light_and_in_the_folder_of_the_run(host, folder):
    begin(host, 1)
    assert said(host, 1, "modules").observation == "[False, False, False]"
    assert said(host, 1, "place").observation == f"True True {os.getcwd()} ''"


def test_random_numbers_are_those_of_the_seeds(host):
    openings = begin(host, 1, 2)
    assert openings == [str(random.Random(1).random())] * 2
    drawn = [said(host, number, "draw").observation for number in (1, 2)]
    assert drawn == [" ".join([str(random.Random(seed).random())] * 2) for seed in (101, 102)]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("raise", "raised KeyError: 'gold' at {folder}/mine.py:28"),
        ("lie", "returned the reward nan; it must be a finite number"),
        ("huge", "returned 20,000,028 characters, more than 10,000,000"),
        ("exit", "ended the process that it runs in with exit status 3"),
        ("orphans", "ended the process that it runs in with exit status 0"),
        ("crash", "ended the process that it runs in by SIGSEGV"),
        ("kill", "ended the process that it runs in by SIGKILL (which the system sends where memory runs out)"),
        ("garbage", "wrote to the connection of the process that it runs in"),
    ],
)
def test_each_failure_has_its_words_and_hurts_no_other(host, folder, text, what):
    begin(host, 1, 2)
    say(host, 1, text)
    say(host, 2, "go")
    failed, right = wait(host, 1, 2)
    assert failed == Failure("respond", what.format(folder=folder))
    assert right == Turn("1 1", False, 1.0)
    assert said(host, 1, "go") == failed
    assert said(host, 2, "go") == Turn("2 2", False, 2.0)


def test_a_child_that_code_of_users_forks_answers_nothing(host):
    begin(host, 1)
    assert said(host, 1, "fork") == Turn("1 1", False, 1.0)
    assert said(host, 1, "go") == Turn("2 2", False, 2.0)


@pytest.mark.parametrize("text", ["hang", "await", "busy", "deaf"])
def test_a_call_that_hangs_is_ended_at_its_limit(host, text, monkeypatch):
    begin(host, 1, 2)
    monkeypatch.setattr(host.exchanges[1], "timeout_s", 1.0)
    began = time.monotonic()
    say(host, 1, text)
    say(host, 2, "go")
    late, right = wait(host, 1, 2)
    assert late == Failure("respond", "took longer than 1 s (environment.timeout_s)")
    assert right == Turn("1 1", False, 1.0)
    assert time.monotonic() - began < 30


def test_a_tool_that_hangs_is_named(host, monkeypatch):
    begin(host, 1)
    monkeypatch.setattr(host.exchanges[1], "timeout_s", 1.0)
    host.call(1, [ToolCall("add", {"a": 1, "b": 2}), ToolCall("sleeps", {"seconds": 3600})])
    assert wait(host, 1) == [Failure("sleeps", "took longer than 1 s (environment.timeout_s)")]


def test_whatever_an_episode_has_started_ends_with_it(host, tmp_path):
    begin(host, 1, file=str(tmp_path / "started"))
    say(host, 1, "family")
    for _ in range(300):
        if (tmp_path / "started").exists() and (text := (tmp_path / "started").read_text()):
            break
        time.sleep(0.1)
    group = int(text)
    assert len(processes_of_group(group)) == 41
    host.end()
    assert ends(group)
    assert begin(host, 1) == [str(random.Random(1).random())]


def test_what_a_process_leaves_behind_ends_too(host):
    before = children_of(host.template.popen.pid)
    begin(host, 1)
    (group,) = children_of(host.template.popen.pid) - before
    assert isinstance(said(host, 1, "orphans"), Failure)
    assert ends(group)


def test_a_template_that_ends_fails_what_is_open_and_is_started_again(folder):
    host = made(folder)
    begin(host, 1, 2)
    first = host.template.popen.pid
    say(host, 1, "hang")
    os.kill(first, signal.SIGKILL)
    ended = "ended the process that it runs in by SIGKILL (which the system sends where memory runs out)"
    failure = Failure("process", f"the process that starts all episodes {ended}")
    assert wait(host, 1) == [failure]
    assert said(host, 2, "go") == failure
    begin(host, 3)
    assert host.template.popen.pid != first
    assert said(host, 3, "go") == Turn("1 1", False, 1.0)


def test_code_that_has_changed_is_not_loaded_again(tmp_path):
    (tmp_path / "mine.py").write_text(ENVIRONMENT)
    host = made(tmp_path)
    assert [list(files) for files in host.code.values()] == [[tmp_path / "mine.py"]] * 4
    os.kill(host.template.popen.pid, signal.SIGKILL)
    host.template.popen.wait()
    (tmp_path / "mine.py").write_text(f"{ENVIRONMENT}\n")
    with pytest.raises(UserCodeFailure, match=r"mine\.py has changed during the run"):
        begin(host, 1)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("import os; os._exit(4)", r"while it was loaded, its code ended the process .* with exit status 4"),
        ("1 / 0", r"mine\.py does not load: ZeroDivisionError"),
        ("import os; os.chdir('/')\nclass Mine: pass", r"mine\.py:Mine does not derive from llmrl\.Environment"),
    ],
)
def test_code_that_does_not_load_is_refused(tmp_path, text, why):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserCodeError, match=why):
        made(tmp_path, tools=())


PROGRAM = """
import sys, time
from llmrl.environments.environment import Message
from llmrl.environments.loading import Code
from llmrl.environments.processes import Processes

host = Processes(Code(f"{sys.argv[1]}/mine.py:Mine", {}, ()), timeout_s=60.0, tell=print)
host.load()
for number, text in enumerate(("deaf", "busy", "hang", None)):
    host.open(number, {}, opening_seed=1, seed=2)
    host.wait([number], lambda: None)
    if text:
        host.respond(number, Message(text, 1, []))
print(host.template.popen.pid, flush=True)
time.sleep(3600)
"""


@pytest.mark.parametrize("kills_template", [False, True])
def test_nothing_is_left_when_the_run_is_killed(folder, kills_template):
    run = subprocess.Popen([sys.executable, "-c", PROGRAM, folder], stdout=subprocess.PIPE, text=True)
    template = int(run.stdout.readline())
    children = children_of(template)
    assert len(children) == 4
    time.sleep(0.5)
    if kills_template:
        os.kill(template, signal.SIGKILL)
    run.kill()
    run.wait()
    assert ends(template, *children)


def test_a_thousand_episodes_of_all_kinds_go_as_they_would_alone(folder):
    """One in ten fails in some way; all others answer exactly what they would, and it takes no longer for that."""
    host = made(folder, timeout_s=20.0, step=2)
    kinds = ["raise", "lie", "exit", "kill", "crash", "hang", "await", "orphans", "deaf", "garbage"]
    bad = {number: kinds[number // 10 % len(kinds)] for number in range(0, 1000, 10)}
    began = time.monotonic()
    numbers = range(1000)
    for number in numbers:
        host.open(number, {"n": number}, opening_seed=number // 4, seed=number)
    openings = host.wait(numbers, lambda: None)
    assert openings == {number: str(random.Random(number // 4).random()) for number in numbers}
    for turn in (1, 2):
        for number in numbers:
            say(host, number, bad.get(number, "go"))
        turns = host.wait(numbers, lambda: None)
        right = {number: Turn(f"{number + 2 * turn} {turn}", False, number + 2.0 * turn) for number in numbers}
        assert all(turns[number] == right[number] for number in numbers if number not in bad)
        assert all(isinstance(turns[number], Failure) and turns[number].name == "respond" for number in bad)
    for number in numbers:
        host.close(number)
    rewards = host.wait(numbers, lambda: None)
    assert all(rewards[number] == number + 4.0 for number in numbers if number not in bad)
    assert all(isinstance(rewards[number], Failure) for number in bad)
    assert host.exchanges == {}
    assert time.monotonic() - began < 240
