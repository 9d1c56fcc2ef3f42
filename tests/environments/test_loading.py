"""An environment and tools by name, and what is refused before anything begins."""

from pathlib import Path

import pytest

from llmrl.environments.environment import Environment
from llmrl.environments.loading import Code, load_code
from llmrl.user_code import UserCodeError, handed_over

CODE = """
import llmrl

class Guess(llmrl.Environment):
    def __init__(self, top: int, low: int = 1):
        self.top, self.low = top, low
    def respond(self, message):
        return "higher"

class Fussy(llmrl.Environment):
    def __init__(self, place: str):
        {"lake": 1}[place]
    def respond(self, message):
        return "higher"

class Mute(llmrl.Environment):
    def respnd(self, message):
        return "higher"

class Stranger:
    def respond(self, message):
        return "higher"

class Early(llmrl.Environment):
    def __init__(self):
        self.secret = self.random.randint(1, 9)
    def respond(self, message):
        return "higher"

def make():
    return Mute()

def add(a: int, b: int) -> int:
    return a + b

def odd(a: "nothing"):
    return a

table = {}
"""


@pytest.fixture
def code(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(CODE)
    return lambda name, *tools, **arguments: load_code(
        Code(name and f"mine.py:{name}", arguments, [f"mine.py:{tool}" for tool in tools])
    )


def test_arguments_are_filled_in_as_annotated_and_files_have_digests(code, tmp_path):
    loaded = code("Guess", "add", top="8")
    environment = loaded.make()
    assert (environment.top, environment.low) == (8, 1)
    assert loaded.tools["add"](a="1", b=2) == 3
    assert {name: list(files) for name, files in loaded.digests.items()} == {
        "mine.py:add": [tmp_path / "mine.py"],
        "mine.py:Guess": [tmp_path / "mine.py"],
    }


def test_without_a_name_it_is_the_base_class(code):
    assert code(None, "add").make is Environment


@pytest.mark.parametrize(
    ("name", "tools", "arguments", "why"),
    [
        ("Gess", [], {}, r"environment mine\.py:Gess: mine\.py has no 'Gess'; did you mean 'Guess'"),
        ("Mute", [], {}, r"environment mine\.py:Mute has no method respond\(self, message\)"),
        ("Stranger", [], {}, r"mine\.py:Stranger does not derive from llmrl\.Environment; write class Stranger\(llmrl"),
        ("make", [], {}, r"environment mine\.py:make is no class but function"),
        ("Guess", [], {}, r"mine\.py:Guess: missing a required argument: 'top'; set it in environment\.arguments"),
        (
            "Guess",
            [],
            {"top": 1, "lo": 1},
            r"mine\.py:Guess has no parameter 'lo' .*; did you mean 'low'",
        ),
        ("Guess", [], {"top": "many"}, r"environment .*mine\.py:Guess: argument top \('many'\): Input should be"),
        (
            "Fussy",
            [],
            {"place": "sea"},
            r"environment mine\.py:Fussy: making one raised KeyError: 'sea' at ",
        ),
        ("Early", [], {}, r"environment mine\.py:Early reads self\.random in __init__, .*; draw in start"),
        (None, ["table"], {}, r"tool mine\.py:table is no function but dict"),
        (None, ["subtract"], {}, r"tool mine\.py:subtract: mine\.py has no 'subtract'"),
        (None, ["odd"], {}, r"tool mine\.py:odd: its parameters cannot be read"),
    ],
)
def test_what_cannot_be_used_is_refused(code, name, tools, arguments, why):
    with pytest.raises(UserCodeError, match=why):
        code(name, *tools, **arguments)


def test_two_tools_of_one_name_are_refused(code, tmp_path):
    (tmp_path / "other.py").write_text("def add(a): return a")
    with pytest.raises(UserCodeError, match=r"tool other\.py:add: two tools are called 'add'"):
        load_code(Code(None, {}, ["mine.py:add", "other.py:add"]))


def test_a_program_may_hand_over_a_function_that_makes_it():
    class Mine(Environment):
        def respond(self, message):
            return "x"

    with handed_over({"mine": Mine, "make": lambda: Mine(), "three": 3}):
        assert isinstance(load_code(Code("given:mine", {}, ())).make(), Mine)
        assert isinstance(load_code(Code("given:make", {}, ())).make(), Mine)
        with pytest.raises(UserCodeError, match="given:three is no class but int"):
            load_code(Code("given:three", {}, ()))
