"""Parts of the sentences that users read."""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from llmrl.secrets import without_secrets

MAX_MESSAGE = 500
"""Characters of an error's message that are shown: code of a user may put a whole response into one."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that move the cursor, change a terminal or turn the order of a line around; lone surrogates, which no
terminal can take. Line breaks and tabs are none of them."""


def shown(text: str) -> str:
    r"""A text as a terminal or a log may have it: control characters escaped, as in ``\x1b[2J``, and secrets masked.

    Whatever comes from a model, from data or from code of a user goes through this before it is printed.
    """
    return visible(without_secrets(text))


def visible(text: str) -> str:
    r"""A text whose control characters are escaped: ``\x1b`` for the one that begins commands of a terminal, ``\u202e``
    for the one that turns the rest of a line around."""
    return _CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


def in_one_line(error: BaseException) -> str:
    """The message of an error, its line breaks and runs of blanks as single blanks, `MAX_MESSAGE` characters of it and
    ``...`` where it is longer; empty where it cannot be had."""
    try:
        message = " ".join(str(error).split())
    except Exception:  # `__str__` of a class that a user wrote
        return ""
    if len(message) <= MAX_MESSAGE:
        return message
    return f"{without_secrets(message)[:MAX_MESSAGE]}..."  # masked first: the beginning of a secret looks like none


def class_and_message(error: BaseException) -> str:
    """The class of an error, and its message in one line where it has one."""
    return f"{type(error).__name__}: {in_one_line(error)}".removesuffix(": ")


def nearest(word: str, known: Iterable[str]) -> str:
    """``; did you mean 'correct'?``: the known word that is most like a mistyped one; empty where none is like it."""
    return "".join(f"; did you mean {near!r}?" for near in difflib.get_close_matches(word, known, n=1))


def counted(number: int, noun: str) -> str:
    """``1 epoch``, ``12,000 epochs``: a number of things whose plural ends in s."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def in_units(num_bytes: int) -> str:
    """Bytes as text: three digits, in the unit that suits."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes} B"


def in_spans(numbers: Iterable[int]) -> str:
    """``3, 5 to 8``: whole numbers in rising order, those in a row by their ends."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(f"{first}" if first == last else f"{first} to {last}" for first, last in spans)


def without_ends(values: Mapping[str, Any]) -> list[str]:
    """Names of measured numbers, without the ends of intervals, which stand after the number that they are of."""
    return [name for name in values if not name.endswith(("_low", "_high"))]


def with_interval(name: str, values: Mapping[str, Any], *, gap: str = " ") -> str:
    """``0.44 [0.347, 0.538]``: a measured number, and its interval where it has one."""
    ends = ", ".join(f"{values[end]:.4g}" for end in (f"{name}_low", f"{name}_high") if end in values)
    return f"{values[name]:.4g}" + (f"{gap}[{ends}]" if ends else "")


def format_evaluation(values: Mapping[str, float]) -> str:
    """``accuracy 0.44 [0.347, 0.538]  score 0.44``: the numbers of an evaluation."""
    return "  ".join(f"{name.removeprefix('eval/')} {with_interval(name, values)}" for name in without_ends(values))
