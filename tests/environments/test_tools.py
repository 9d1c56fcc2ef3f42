import json
import warnings
from copy import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version

from llmrl.environments.calls import ToolCall
from llmrl.environments.tools import (
    FORMATS,
    call_format,
    has_response_template,
    parse_calls,
    result_of_call,
    schema_of,
    turn_of_assistant,
)
from tests.environments.families import family
from tests.mixtures import VERSION


def add(a: int, b: int = 0) -> int:
    """Adds two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a + b


def undocumented(a: int) -> int:
    return a


def untyped(a):
    """Does it.

    Args:
        a: What.
    """


def undescribed(a: int, b: int):
    """Does it.

    Args:
        a: What.
    """


def odd(a: ToolCall):
    """Does it.

    Args:
        a: What.
    """


ADD = schema_of(add)


def call(name: str, /, **arguments: Any) -> ToolCall:
    return ToolCall(name, arguments, id="call00001")


def second(name: str, /, **arguments: Any) -> ToolCall:
    return ToolCall(name, arguments, id="call00002")


def problems(text: str, format: str) -> list[str | None]:
    return [each.problem for each in parse_calls(text, format, tools=[ADD])[0]]


# --- schemas ----------------------------------------------------------------------------------------------------------


def test_the_schema_of_a_function():
    assert ADD == {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds two numbers.",
            "parameters": {
                "type": "object",
                "properties": {
                    "a": {"type": "integer", "description": "The first."},
                    "b": {"type": "integer", "description": "The second."},
                },
                "required": ["a"],
            },
            "return": {"type": "integer"},
        },
    }


@pytest.mark.parametrize(
    ("function", "what"),
    [
        (undocumented, "it has no docstring"),
        (untyped, "Argument a is missing a type hint"),
        (undescribed, "no description for the argument 'b'"),
        pytest.param(
            odd,
            "custom class",
            marks=pytest.mark.skipif(Version("5.21") > VERSION, reason="before transformers 5.21 it is an object"),
        ),
        (lambda a: a, "<lambda> cannot be shown"),
    ],
)
def test_what_a_function_lacks(function, what: str):
    with pytest.raises(ValueError, match=r"^environment\.tools: .* cannot be shown to the actor: .*; give it") as error:
        schema_of(function)
    assert what in str(error.value)
    assert function.__name__ in str(error.value)


# --- formats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("qwen2_5", "hermes"),
        ("qwen3", "hermes"),
        ("llama3_1", "llama3"),
        ("llama3_2", "llama3"),
        ("mistral", "mistral"),
    ],
)
def test_the_format_that_a_template_shows(name: str, format: str):
    assert call_format(family(name)) == format


@pytest.mark.parametrize("name", ["gemma", "gemma3", "llama3", "smollm2"])
def test_a_template_that_shows_none(name: str):
    with pytest.raises(ValueError, match=r"set environment\.tool_format to one of hermes, llama3, mistral, python"):
        call_format(family(name))


def test_a_tokenizer_without_a_template():
    tokenizer = copy(family("gemma"))
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"environment\.tool_format"):
        call_format(tokenizer)


@pytest.mark.parametrize(
    ("format", "text", "calls", "rest"),
    [
        ("hermes", '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>', [call("f", x=1)], ""),
        ("hermes", 'Hm. <tool_call>{"name": "f", "arguments": {}}</tool_call>!', [call("f")], "Hm. !"),
        ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"x\\": [2]}"}</tool_call>', [call("f", x=[2])], ""),
        ("hermes", '<tool_call>{"name": "f"}', [call("f")], ""),
        (
            "hermes",
            '<tool_call>{"name": "f", "arguments": {"x": "</tool_call>"}}</tool_call>',
            [call("f", x="</tool_call>")],
            "",
        ),
        (
            "hermes",
            '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call> and '
            '<tool_call>{"name": "g", "arguments": {"x": 2}}</tool_call>.',
            [call("f", x=1), second("g", x=2)],
            " and .",
        ),
        ("hermes", "the answer is 3", [], "the answer is 3"),
        (
            "hermes",
            '<think>\nI may <tool_call>{"name": "f"}</tool_call>\n</think>\n\n3',
            [],
            '<think>\nI may <tool_call>{"name": "f"}</tool_call>\n</think>\n\n3',
        ),
        ("llama3", '{"name": "f", "parameters": {"x": "a; b"}}', [call("f", x="a; b")], ""),
        ("llama3", ' <|python_tag|>{"name": "f", "parameters": {}}\n', [call("f")], ""),
        ("llama3", '{"type": "function", "name": "f", "parameters": {"x": null}}', [call("f", x=None)], ""),
        (
            "llama3",
            '{"name": "f", "parameters": {"x": 1}}; {"name": "g", "parameters": {}} so',
            [call("f", x=1), second("g")],
            "so",
        ),
        ("llama3", 'It is {"name": "f", "parameters": {}}', [], 'It is {"name": "f", "parameters": {}}'),
        ("llama3", '{"answer": 3}', [], '{"answer": 3}'),
        (
            "mistral",
            'So: [TOOL_CALLS][{"name": "f", "arguments": {"x": 1}, "id": "Abc123xyz"}]',
            [ToolCall("f", {"x": 1}, id="Abc123xyz")],
            "So: ",
        ),
        ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {}, "id": "short"}]', [call("f")], ""),
        ("mistral", "[1, 2]", [], "[1, 2]"),
        ("python", '[f(x=1, y=[None, True, {"a": -2.5}])]', [call("f", x=1, y=[None, True, {"a": -2.5}])], ""),
        ("python", '[add(1, b=2), f(x="a(b)")]', [call("add", a=1, b=2), second("f", x="a(b)")], ""),
        ("python", "Look:\n```tool_code\nadd(1, 2)\nf()\n```\n", [call("add", a=1, b=2), second("f")], "Look:\n\n"),
        ("python", "[1, 2, 3]", [], "[1, 2, 3]"),
        ("python", "the list [f(x=1)]", [], "the list [f(x=1)]"),
    ],
)
def test_calls(format: str, text: str, calls: list[ToolCall], rest: str):
    assert parse_calls(text, format, tools=[ADD]) == (calls, rest)


@pytest.mark.parametrize(
    ("format", "text", "problem"),
    [
        ("hermes", '<tool_call>{"name": "f", "arguments": {"x": 1}</tool_call>', "it is no JSON: Expecting"),
        ("hermes", "<tool_call></tool_call>", "it is no JSON: Expecting value"),
        ("hermes", '<tool_call>{"arguments": {}}</tool_call>', 'a call must be an object with "name"'),
        ("hermes", '<tool_call>{"name": 3}</tool_call>', 'a call must be an object with "name"'),
        ("hermes", '<tool_call>["f"]</tool_call>', 'a call must be an object with "name"'),
        ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "its arguments must be an object"),
        ("hermes", '<tool_call>{"name": "f", "arguments": "{"}</tool_call>', "it is no JSON"),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>', "NaN is no JSON"),
        ("hermes", '<tool_call>{"name": "f"}{}</tool_call>', "something follows its JSON"),
        ("hermes", "<tool_call>" + "[" * 100_000, "it is no JSON"),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"x": ' + "1" * 5000 + "}}", "it is no JSON"),
        ("llama3", '{"name": "f", "parameters": {', "it is no JSON"),
        ("llama3", "<|python_tag|>f.call(x=1)", "a call must be JSON"),
        ("mistral", '[TOOL_CALLS]{"name": "f"}', "must be followed by a list"),
        ("mistral", "[TOOL_CALLS]", "it is no JSON"),
        ("mistral", '[TOOL_CALLS][{"name": ""}]', "a call must be an object"),
        ("python", "[f(x=1]", "the calls are no Python"),
        ("python", "[f(x=g())]", "its arguments must be literals"),
        ("python", "[f(x=__import__('os').getcwd())]", "its arguments must be literals"),
        ("python", "[add(1, 2, 3)]", "more arguments by position"),
        ("python", "[f(1)]", "more arguments by position"),
        ("python", "[add(1, a=2)]", "an argument twice"),
        ("python", "[f(**{'x': 1})]", "or with **"),
        ("python", "[f(x=1), 3]", "a call must be written as"),
        ("python", "```tool_code\nimport os\n```", "a call must be written as"),
        ("python", "[f(x=" + "-" * 90_000 + "1)]", "the calls are no Python"),
        ("python", "[f(x=" + "(" * 90_000 + ")]", "the calls are no Python"),
        ("python", "[f(x=" + "1+" * 45_000 + "1)]", "the calls are no Python"),
        ("python", "[f(x='" + "a" * 100_000 + "')]", "more than 100,000 characters"),
    ],
)
def test_calls_that_cannot_be_read(format: str, text: str, problem: str):
    found = [each for each in problems(text, format) if each]
    assert len(found) == 1
    assert problem in found[0]


def test_a_backslash_that_python_does_not_know_is_no_warning():
    with warnings.catch_warnings(action="error"):
        assert parse_calls(r'[f(x="\d")]', "python") == ([call("f", x=r"\d")], "")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)


@settings(max_examples=100, deadline=None)
@given(asked=st.lists(st.dictionaries(st.sampled_from("xyz"), values, max_size=2), min_size=1, max_size=3))
def test_what_is_written_is_read(asked: list[dict]):
    written = [{"name": "f", "arguments": each} for each in asked]
    texts = {
        "hermes": "\n".join(f"<tool_call>\n{json.dumps(each)}\n</tool_call>" for each in written),
        "llama3": "; ".join(json.dumps({"name": "f", "parameters": each}) for each in asked),
        "mistral": f"[TOOL_CALLS]{json.dumps(written)}",
        "python": f"[{', '.join('f(' + ', '.join(f'{k}={v!r}' for k, v in each.items()) + ')' for each in asked)}]",
    }
    for format, text in texts.items():
        calls, rest = parse_calls(text, format)
        assert [(each.name, each.arguments, each.problem) for each in calls] == [("f", each, None) for each in asked]
        assert rest.strip() == ""


PIECES = [
    "<tool_call>",
    "</tool_call>",
    '{"name": "f"',
    "}",
    "[TOOL_CALLS]",
    "[f(",
    ")]",
    "x=",
    "```tool_code\n",
    "```",
]
PIECES += ["<|python_tag|>", ";", "'", "\\", "\0", "\n", "é", "1", "</think>", '"']


@settings(max_examples=200, deadline=None)
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=9))
def test_no_text_of_a_model_raises(pieces: list[str]):
    for format in FORMATS:
        calls, _ = parse_calls("".join(pieces), format, tools=[ADD])
        assert all(each.problem or each.name for each in calls)


# --- the tokenizer's own format ---------------------------------------------------------------------------------------

RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "tool_calls": {
            "open": "<tool_call>",
            "close_pattern": r"</tool_call>\s*",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"<\|im_end\|>\s*", "content": "text"},
    },
}


def test_calls_by_the_response_template_of_the_tokenizer():
    tokenizer = copy(family("qwen2_5"))
    tokenizer.response_template = RESPONSE_TEMPLATE
    if not has_response_template(tokenizer):
        pytest.skip("transformers reads no calls by it yet")
    assert call_format(tokenizer) == "response_template"

    def parse(text: str):
        return parse_calls(text, "response_template", tools=[ADD], tokenizer=tokenizer)

    assert parse('Hm.<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>') == ([call("add", a=1)], "Hm.")
    assert parse("three") == ([], "three")
    calls, _ = parse("<tool_call>{</tool_call>")
    assert [bool(each.problem) for each in calls] == [True]


# --- messages ---------------------------------------------------------------------------------------------------------


def test_messages_with_calls_as_templates_read_them():
    calls = [call("add", a=1)]
    assert turn_of_assistant("text", calls) == {
        "role": "assistant",
        "content": "text",
        "tool_calls": [{"type": "function", "id": "call00001", "function": {"name": "add", "arguments": {"a": 1}}}],
    }
    assert turn_of_assistant("text", []) == {"role": "assistant", "content": "text"}
    result = result_of_call(calls[0], "1")
    assert result == {"role": "tool", "name": "add", "tool_call_id": "call00001", "content": "1"}
    messages = [{"role": "user", "content": "hi"}, turn_of_assistant("text", calls), result]
    text = family("mistral").apply_chat_template(messages, tokenize=False)
    assert text.endswith('"id": "call00001"}]</s>[TOOL_RESULTS]{"content": 1, "call_id": "call00001"}[/TOOL_RESULTS]')
