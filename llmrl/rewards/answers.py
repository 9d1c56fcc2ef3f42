"""Answers as people and models write them: where a text has its answer, and how it is written plainly."""

import math
import re
from collections.abc import Sequence

_BOX = re.compile(r"\\(?:boxed|fbox)\s*")
_UNBRACED = re.compile(r"[^\s$]+")
_BETWEEN_BOXES = re.compile(r"[\s$]*(?:[,;]|[,;]?\s*(?:\\text\{\s*(?:and|or)\s*\}|and|or))[\s$]*")
_THOUSANDS = r"(?:,?\s?\\[,;:! ]\s?|\{,\}|[ ~'\u2019\u00a0\u2007\u2009\u202f])"
_SEPARATOR = re.compile(_THOUSANDS)
_COUNTED = r"(?<=\d \d{3})(?:-(?!\d)|[^\W\d_])"
"""After a blank between two numbers, a second one that belongs to a word: "5 100-dollar bills" or "2 500g bags"."""
_GROUPED = re.compile(rf"(?<![\d.])\d{{1,3}}(?:{_THOUSANDS}\d{{3}})+(?!{_THOUSANDS}?\d|{_COUNTED})")
_MINUS = re.compile("[\u2010\u2011\u2212\ufe63\uff0d]|(?<![\\w)])\u2013(?=[\\d$.])")


def answer_text(answer: object) -> str | None:
    """The text of an entry of the answer column, which may hold numbers or lists; None where there is none, or NaN."""
    if answer is None or (isinstance(answer, float) and math.isnan(answer)):
        return None
    if isinstance(answer, Sequence) and not isinstance(answer, str):
        return ", ".join(map(str, answer))
    return str(answer)


def after_thinking(response: str) -> str:
    """The response after ``</think>``; all of it where that is missing or nothing follows it."""
    said = response.rpartition("</think>")[2]
    return said if said.strip() else response


def boxed(text: str) -> str | None:
    r"""The content of the last ``\boxed{...}`` that is closed; None where there is no box at all.

    Boxes joined by nothing but a comma, "and" or "or" are one answer, as in ``\boxed{2} or \boxed{3}``. Empty where no
    box is closed: the response was truncated within its answer.
    """
    boxes = [_read_box(text, match) for match in _BOX.finditer(text)]
    closed = [box for box in boxes if box is not None]
    if not closed:
        return "" if boxes else None
    first, _, content = closed.pop()
    while closed and _BETWEEN_BOXES.fullmatch(text, closed[-1][1], first):
        first, _, earlier = closed.pop()
        content = f"{earlier}, {content}"
    return content


def plain_digits(text: str) -> str:
    r"""The text with plain numbers: an ASCII minus, and no separator of thousands except commas. ``10\,000``,
    ``10 000`` and ``9{,}500`` are joined."""
    return _GROUPED.sub(lambda match: _SEPARATOR.sub("", match[0]), _MINUS.sub("-", text))


def _read_box(text: str, opening: re.Match[str]) -> tuple[int, int, str] | None:
    """Begin, end and content of a box; None where it is not closed."""
    begins, depth = opening.end(), 0
    if not text.startswith("{", begins):
        word = _UNBRACED.match(text, begins)
        return (opening.start(), word.end(), word[0].rstrip(".,")) if word else None
    for place in range(begins, len(text)):
        if text[place] in "{}" and text[place - 1] != "\\":
            depth += 1 if text[place] == "{" else -1
            if depth == 0:
                return opening.start(), place + 1, text[begins + 1 : place].strip()
    return None
