"""Tools of an actor: what its chat template shows of them, and how their calls are read from its messages."""

import ast
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from inspect import signature
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import (
    DocstringParsingException,
    TypeHintParsingException,
    get_json_schema,
)

from llmrl.data.chat import templates_of
from llmrl.environments.calls import ToolCall
from llmrl.messages import in_one_line

Schema = Mapping[str, Any]

END_OF_REASONING = "</think>"
MAX_CALLS_CHARACTERS = 100_000
"""Characters of a message that are read as calls."""
MISTRAL_ID = re.compile(r"[A-Za-z0-9]{9}")
LLAMA3_START = re.compile(r'\{\s*"(type|name|function)"\s*:')
PYTHON_START = re.compile(r"\[\s*[A-Za-z_][\w.]*\s*\(")
TOOL_CODE = re.compile(r"```tool_code\s*\n(.*?)(?:```|\Z)", re.DOTALL)
DECODER = json.JSONDecoder(parse_constant=lambda name: _refuse(f"{name} is no JSON"))


def schema_of(function: Callable[..., Any]) -> dict[str, Any]:
    """JSON schema of a typed function, as chat templates list tools: from its docstring and type hints.

    Raises:
        ValueError: It lacks a docstring, a type hint or the description of an argument.
    """
    try:
        return get_json_schema(function)
    except (DocstringParsingException, TypeHintParsingException, ValueError, NameError) as error:
        name = getattr(function, "__name__", type(function).__name__)
        raise ValueError(
            f"environment.tools: {name} cannot be shown to the actor: {in_one_line(error)}; give it a docstring, a "
            'type hint for each argument, and a section "Args:" with a line "argument: what it means" for each'
        ) from error


def call_format(tokenizer: PreTrainedTokenizerBase) -> str:
    """Name of the format in which a model calls tools: a key of `FORMATS`, or "response_template" where the tokenizer
    brings one.

    Raises:
        ValueError: The chat template shows none that is known.
    """
    if has_response_template(tokenizer):
        return "response_template"
    text = "".join(templates_of(tokenizer))
    for name, shows in SIGNS.items():
        if shows(text):
            return name
    raise ValueError(
        "environment.tools: the tokenizer's chat template does not show how this model calls tools; set "
        f"environment.tool_format to one of {', '.join(FORMATS)}, and describe the tools in a system message if the "
        "template does not list them"
    )


def has_response_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer says how to read its model's messages, and transformers (from 5.15) reads calls by it."""
    return (
        bool(getattr(tokenizer, "response_template", None))
        and "tools" in signature(tokenizer.parse_response).parameters
    )


def parse_calls(
    text: str, format: str, *, tools: Sequence[Schema] = (), tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[list[ToolCall], str]:
    """``(calls, the rest of the text)`` of a message. A call that cannot be read has a `problem`; each has an id.

    Reasoning, up to ``</think>``, holds no calls.

    Args:
        text: The message, decoded with special tokens, its EOS removed.
        format: As `call_format` returns it.
        tools: Schemas of the tools, which name arguments that are given by position.
        tokenizer: Needed for the format "response_template".
    """
    reasoning, end, message = text.rpartition(END_OF_REASONING)
    if format == "response_template":
        assert tokenizer is not None, "its template is the tokenizer's"
        calls, rest = _by_template(message, tokenizer, tools)
    else:
        calls, rest = FORMATS[format](message, tools)
    numbered = [replace(call, id=call.id or f"call{number:05d}") for number, call in enumerate(calls, start=1)]
    return numbered, f"{reasoning}{end}{rest}"


def turn_of_assistant(text: str, calls: Sequence[ToolCall]) -> dict[str, Any]:
    """A message of the assistant with its calls as chat templates read them."""
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if calls:
        message["tool_calls"] = [
            {"type": "function", "id": call.id, "function": {"name": call.name, "arguments": call.arguments}}
            for call in calls
        ]
    return message


def result_of_call(call: ToolCall, text: str) -> dict[str, Any]:
    """The message that gives the actor the result of a call."""
    return {"role": "tool", "name": call.name, "tool_call_id": call.id, "content": text}


# --- formats: each reads `(calls, rest)` from a message --------------------------------------------------------------

Parsed = tuple[list[ToolCall], str]


def _hermes(text: str, tools: Sequence[Schema]) -> Parsed:
    """``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, any number of them in a text."""
    calls, rest, place = [], "", 0
    while (start := text.find("<tool_call>", place)) >= 0:
        rest += text[place:start]
        call, place = _json_call(text, start + len("<tool_call>"))
        end = text.find("</tool_call>", place)
        if call.problem is None and text[place : end if end >= 0 else None].strip():
            call = ToolCall(call.name, problem="something follows its JSON before </tool_call>")
        place = end + len("</tool_call>") if end >= 0 else len(text)
        calls.append(call)
    return calls, rest + text[place:]


def _llama3(text: str, tools: Sequence[Schema]) -> Parsed:
    """``{"name": ..., "parameters": {...}}`` at the start of a message; more of them follow after semicolons."""
    body = text.strip().removeprefix("<|python_tag|>").lstrip()
    if not LLAMA3_START.match(body):
        tagged = body != text.strip()
        return (
            ([ToolCall("", problem='a call must be JSON with "name" and "parameters"')], "") if tagged else ([], text)
        )
    calls, place = [], 0
    while place < len(body) and body[place] == "{":
        call, place = _json_call(body, place)
        calls.append(call)
        if call.problem is not None:
            return calls, ""
        place += len(body[place:]) - len(body[place:].lstrip("; \n"))
    return calls, body[place:]


def _mistral(text: str, tools: Sequence[Schema]) -> Parsed:
    """``[TOOL_CALLS][{"name": ..., "arguments": {...}, "id": ...}, ...]`` after any text."""
    rest, start, body = text.partition("[TOOL_CALLS]")
    if not start:
        return [], text
    try:
        values, end = DECODER.raw_decode(body.lstrip())
    except (ValueError, RecursionError) as error:
        return [ToolCall("", problem=_bad_json(error))], rest
    if not isinstance(values, list):
        return [ToolCall("", problem="[TOOL_CALLS] must be followed by a list of calls")], rest
    return [_call_of(value) for value in values], rest + body.lstrip()[end:]


def _python(text: str, tools: Sequence[Schema]) -> Parsed:
    """``[f(x=1), g("a")]`` as the whole message, or such calls in a block of ```` ```tool_code ````."""
    if block := TOOL_CODE.search(text):
        return _python_calls(block[1].strip(), tools), text[: block.start()] + text[block.end() :]
    if PYTHON_START.match(text.strip()):
        return _python_calls(text.strip(), tools), ""
    return [], text


FORMATS: dict[str, Callable[[str, Sequence[Schema]], Parsed]] = {
    "hermes": _hermes,
    "llama3": _llama3,
    "mistral": _mistral,
    "python": _python,
}
"""Formats in which models call tools, by the name of the model's family."""

SIGNS: dict[str, Callable[[str], bool]] = {
    "hermes": lambda template: (
        "<tool_call>" in template and not any(tag in template for tag in ("<function=", "<arg_key>"))
    ),
    "mistral": lambda template: "[TOOL_CALLS]" in template and "[ARGS]" not in template,
    "llama3": lambda template: "<|python_tag|>" in template or '"parameters": dictionary of argument' in template,
    "python": lambda template: "tool_code" in template or "[func_name1(" in template,
}
"""Whether a chat template shows a format, tried in this order."""


def _by_template(text: str, tokenizer: PreTrainedTokenizerBase, tools: Sequence[Schema]) -> Parsed:
    """Calls as the tokenizer's response template finds them; it ends a message by EOS."""
    ended = text + str(tokenizer.eos_token or "")
    known: list[Any] = list(tools)
    try:
        message: Any = tokenizer.parse_response(ended, prefix="", tools=known)
    except Exception as error:  # the template came with the model, and the text is the model's
        return [ToolCall("", problem=f"the message cannot be read: {in_one_line(error)}")], text
    calls = [_call_of(call.get("function", call)) for call in message.get("tool_calls") or []]
    return calls, str(message.get("content") or "") if calls else text


# --- one call ---------------------------------------------------------------------------------------------------------


def _json_call(text: str, place: int) -> tuple[ToolCall, int]:
    """The call whose JSON begins at a place, after blanks, and where it ends."""
    start = len(text) - len(text[place:].lstrip())
    try:
        value, end = DECODER.raw_decode(text, start)
    except (ValueError, RecursionError) as error:
        return ToolCall("", problem=_bad_json(error)), start
    return _call_of(value), end


def _call_of(value: Any) -> ToolCall:
    """A call from its JSON value; arguments may be JSON in a text, as OpenAI has them."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        return ToolCall("", problem='a call must be an object with "name" and "arguments"')
    name, arguments = value["name"], value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = DECODER.decode(arguments)
        except (ValueError, RecursionError) as error:
            return ToolCall(name, problem=_bad_json(error))
    if not isinstance(arguments, dict):
        return ToolCall(name, problem="its arguments must be an object of names and values")
    given = value.get("id")
    return ToolCall(name, arguments, id=given if isinstance(given, str) and MISTRAL_ID.fullmatch(given) else None)


def _python_calls(text: str, tools: Sequence[Schema]) -> list[ToolCall]:
    """Calls in Python's syntax: one, several in a list, or one a line. Nothing is run; arguments are literals."""
    try:
        if len(text) > MAX_CALLS_CHARACTERS:
            _refuse(f"more than {MAX_CALLS_CHARACTERS:,} characters")
        with warnings.catch_warnings(action="ignore"):  # a backslash that Python does not know
            body = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return [ToolCall("", problem=f"the calls are no Python: {in_one_line(error)}")]
    values = [statement.value if isinstance(statement, ast.Expr) else None for statement in body]
    if len(values) == 1 and isinstance(values[0], ast.List):
        values = list(values[0].elts)
    return [_python_call(value, tools) for value in values]


def _python_call(value: ast.expr | None, tools: Sequence[Schema]) -> ToolCall:
    if not isinstance(value, ast.Call) or not isinstance(value.func, ast.Name):
        return ToolCall("", problem="a call must be written as name(argument=value)")
    name = value.func.id
    names = next((list(each["parameters"]["properties"]) for each in _functions(tools) if each["name"] == name), [])
    if len(value.args) > len(names):
        return ToolCall(name, problem="it gives more arguments by position than there are; name them")
    given = [*zip(names, value.args, strict=False), *((keyword.arg, keyword.value) for keyword in value.keywords)]
    try:
        arguments = {key: ast.literal_eval(each) for key, each in given if key is not None}
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return ToolCall(name, problem="its arguments must be literals: texts, numbers, True, False, None, lists, dicts")
    if len(arguments) < len(given):
        return ToolCall(name, problem="it gives an argument twice, or with **")
    return ToolCall(name, arguments)


def _functions(tools: Sequence[Schema]) -> list[Schema]:
    return [tool.get("function", tool) for tool in tools]


def _bad_json(error: BaseException) -> str:
    return f"it is no JSON: {in_one_line(error)}"


def _refuse(why: str) -> Any:
    raise ValueError(why)
