"""The lines in which an environment and its tools answer, in this process."""

import asyncio
import json
from pathlib import Path

import pytest
import torch

from llmrl.environments.calls import ToolCall
from llmrl.environments.environment import Environment, Message, Turn
from llmrl.environments.episode import MAX_CHARACTERS, Call, Close, Episode, Open, Respond
from llmrl.environments.loading import Code, load_code

MESSAGE = Message("x", 1, [{"role": "assistant", "content": "x"}])
TOOLS = """
import asyncio

def add(a: int, b: int = 1) -> int:
    return a + b

def upper(text):
    return text.upper()

def fact(n: int) -> str:
    if n < 0:
        raise ValueError("n must not be negative")
    return {"n": n, "naïve": [1.5, None]}

def breaks():
    raise KeyError("gone")

def opaque():
    return {1, }.__iter__

async def later(text: str) -> str:
    await asyncio.sleep(0)
    return text
"""


def turn(**fields) -> Turn:
    """A turn of any values: the tests check types, and a program does not."""
    made = Turn()
    for name, value in fields.items():
        object.__setattr__(made, name, value)
    return made


@pytest.fixture(autouse=True)
def _loops(monkeypatch: pytest.MonkeyPatch):
    """Closes the loops of episodes, as who runs them does."""
    made: list[asyncio.Runner] = []
    runner = asyncio.Runner

    def make() -> asyncio.Runner:
        made.append(runner())
        return made[-1]

    monkeypatch.setattr(asyncio, "Runner", make)
    yield
    for each in made:
        each.close()


@pytest.fixture
def tools(tmp_path: Path):
    (tmp_path / "tools.py").write_text(TOOLS)
    names = [f"{tmp_path}/tools.py:{name}" for name in ("add", "upper", "fact", "breaks", "opaque", "later")]
    return load_code(Code(None, {}, names)).tools


def answers(respond, close=lambda self: None, start=lambda self, row: None) -> Episode:
    """An episode that has begun, of an environment with these methods."""
    episode = Episode(type("Mine", (Environment,), {"respond": respond, "close": close, "start": start}), {})
    assert one(episode, Open({}, 1, 2)) == ["answer", None]
    return episode


def one(episode: Episode, request) -> list:
    (line,) = episode.lines(request)
    return json.loads(line)


def called(tools, *calls: ToolCall) -> list:
    return [json.loads(line) for line in Episode(Environment, tools).lines(Call(calls))]


@pytest.mark.parametrize(
    ("reply", "line"),
    [
        (Turn("lower", reward=-0.5), ["lower", False, -0.5]),
        (turn(done=True, reward=torch.tensor(1.0)), [None, True, 1.0]),
        ("lower", ["lower", False, 0.0]),
        ([{"role": "user", "content": "lower"}], [[{"role": "user", "content": "lower"}], False, 0.0]),
        (Turn("well done", done=True), ["well done", True, 0.0]),
    ],
)
def test_a_reply_is_a_turn_in_a_line(reply, line):
    assert one(answers(lambda self, message: reply), Respond(MESSAGE)) == ["answer", line]


@pytest.mark.parametrize("reply", [None, ("lower", True), 3])
def test_what_is_no_reply_is_named_with_its_class(reply):
    kind, text = one(answers(lambda self, message: reply), Respond(MESSAGE))
    assert kind == "answer"
    assert text.startswith(f"{reply!r} (")
    assert "test_episode" in text


def test_methods_may_be_async_and_share_a_loop():
    loops = []

    async def start(self, row):
        loops.append(asyncio.get_running_loop())

    async def respond(self, message):
        loops.append(asyncio.get_running_loop())
        return message.text

    assert one(answers(respond, start=start), Respond(MESSAGE)) == ["answer", ["x", False, 0.0]]
    assert loops[0] is loops[1]


def test_random_numbers_are_those_of_the_opening_and_then_those_of_the_response():
    def drawn(opening_seed: int, seed: int) -> tuple[float, float]:
        class Draws(Environment):
            def start(self, row):
                return str(self.random.random())

            def close(self):
                return self.random.random()

        episode = Episode(Draws, {})
        return one(episode, Open({}, opening_seed, seed))[1], one(episode, Close())[1]

    first, same_group, again = drawn(1, 5), drawn(1, 6), drawn(1, 5)
    assert first[0] == same_group[0] != drawn(2, 5)[0]
    assert first[1] == drawn(2, 5)[1] != same_group[1]
    assert first == again


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (KeyError("x"), "raised KeyError: 'x'"),
        (SystemExit(3), "raised SystemExit: 3"),
        (KeyboardInterrupt(), "raised KeyboardInterrupt"),
    ],
)
def test_whatever_it_raises_is_a_failure_and_it_is_closed_once(error, what):
    closed = []

    def respond(self, message):
        raise error

    episode = answers(respond, close=lambda self: closed.append(1))
    kind, name, text = one(episode, Respond(MESSAGE))
    assert (kind, name) == ("failure", "respond")
    assert text.startswith(what)
    assert one(episode, Close()) == ["answer", None]
    assert closed == [1]


def test_a_failure_has_its_line_of_the_file(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import llmrl\nclass Mine(llmrl.Environment):\n    def respond(self, message):\n        return 1 / 0\n"
    )
    loaded = load_code(Code(f"{tmp_path}/mine.py:Mine", {}, ()))
    episode = Episode(loaded.make, {})
    one(episode, Open({}, 0, 0))
    what = f"raised ZeroDivisionError: division by zero at {tmp_path}/mine.py:4"
    assert one(episode, Respond(MESSAGE)) == ["failure", "respond", what]


def test_what_is_no_data_is_a_failure():
    _, name, what = one(answers(lambda self, message: turn(observation=b"bytes")), Respond(MESSAGE))
    assert name == "respond"
    assert "returned what is no data" in what
    circle: list = []
    circle.append(circle)
    for reply in (circle, turn(reward=object())):
        assert one(answers(lambda self, message, reply=reply: reply), Respond(MESSAGE))[0] == "failure"


def test_what_is_too_long_is_a_failure():
    long = "x" * (MAX_CHARACTERS + 1)
    _, _, what = one(answers(lambda self, message: long), Respond(MESSAGE))
    assert what.endswith("characters, more than 10,000,000")


def test_what_a_factory_makes_is_an_environment():
    _, name, what = one(Episode(lambda: 3, {}), Open({}, 0, 0))  # type: ignore[arg-type]
    assert (name, what) == ("start", "raised TypeError: it made 3, which is no llmrl.Environment")


def test_tools_are_called_in_order_with_their_arguments_as_annotated(tools):
    calls = [ToolCall("add", {"a": 2, "b": "3"}), ToolCall("add", {"a": 2}), ToolCall("upper", {"text": "a"})]
    calls += [ToolCall("fact", {"n": 3}), ToolCall("later", {"text": "so"})]
    texts = ["5", "3", "A", '{"n": 3, "naïve": [1.5, null]}', "so"]
    assert called(tools, *calls) == [["answer", [text, False]] for text in texts]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (ToolCall("ad", {"a": 1}), "error: there is no tool 'ad'; did you mean 'add'?"),
        (ToolCall("zzz"), "error: there is no tool 'zzz'; there are add, upper, fact, breaks, opaque, later"),
        (ToolCall("add", problem="its JSON is broken"), "error: its JSON is broken"),
        (ToolCall("add", {"b": 1}), "error: a: Missing required argument"),
        (ToolCall("add", {"a": 1, "c": 1}), "error: c: Unexpected keyword argument"),
        (ToolCall("fact", {"n": -1}), "error: n must not be negative"),
    ],
)
def test_a_bad_call_is_answered_with_the_mistake(tools, call, text):
    assert called(tools, call) == [["answer", [text, True]]]


def test_an_argument_of_a_wrong_type_is_a_bad_call(tools):
    ((_, (text, is_bad)),) = called(tools, ToolCall("add", {"a": "three"}))
    assert is_bad
    assert text.startswith("error: a: Input should be a valid integer")


def test_a_tool_that_raises_is_a_failure_by_its_name(tools, tmp_path):
    (line,) = called(tools, ToolCall("breaks"))
    assert line == ["failure", "breaks", f"raised KeyError: 'gone' at {tmp_path}/tools.py:16"]


def test_a_result_that_is_no_data_is_read_as_python_prints_it(tools):
    ((_, (text, _)),) = called(tools, ToolCall("opaque"))
    assert text.startswith("<method-wrapper '__iter__'")
