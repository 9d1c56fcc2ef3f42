"""Answers as people and models write them: where a text has its answer, and how it is written plainly."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

_BOX = re.compile(r"\\(?:boxed|fbox)\s*")
_UNBRACED = re.compile(r"[^\s$]{1,100}")
_BRACE = re.compile(r"(?<!\\)[{}]")
_BETWEEN_BOXES = re.compile(r"[\s$]*(?:[,;]|[,;]?\s*(?:\\text\{\s*(?:and|or)\s*\}|and|or))[\s$]*")
_THOUSANDS = r"(?:,?\s?\\[,;:! ]\s?|\{,\}|[ ~'\u2019\u00a0\u2007\u2009\u202f])"
_SEPARATOR = re.compile(_THOUSANDS)
_COUNTED = r"(?<=\d \d{3})(?:-(?!\d)|[^\W\d_])"
"""After a blank between two numbers, a second one that belongs to a word: "5 100-dollar bills" or "2 500g bags"."""
_GROUPED = re.compile(rf"(?<![\d.])\d{{1,3}}(?:{_THOUSANDS}\d{{3}}){{1,20}}(?!{_THOUSANDS}?\d|{_COUNTED})")
_DIGITS = re.compile(r"\d(?: ?[\d.,/^_])*")
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
    boxes = _read_boxes(text)
    closed = [box for box in boxes if box is not None]
    if not closed:
        return "" if boxes else None
    last = closed.pop()
    first, contents = last.start, [last.content(text)]
    while closed and _BETWEEN_BOXES.fullmatch(text, closed[-1].end, first):
        box = closed.pop()
        first = box.start
        contents.append(box.content(text))
    return ", ".join(reversed(contents))


def without_lookalikes(text: str) -> str:
    """The text with a question mark for every character of a number in which a digit is none of 0 to 9, as in ``١٢``:
    what looks like a digit, or is one in another script, is no number. The length stays."""
    return text if text.isascii() else _DIGITS.sub(lambda match: _if_ascii(match[0]), text)


def _if_ascii(number: str) -> str:
    return number if number.isascii() else "?" * len(number)


def plain_digits(text: str) -> str:
    r"""The text with plain numbers: an ASCII minus, and no separator of thousands except commas. ``10\,000``,
    ``10 000`` and ``9{,}500`` are joined."""
    return _GROUPED.sub(lambda match: _SEPARATOR.sub("", match[0]), _MINUS.sub("-", text))


class _Box(NamedTuple):
    """A closed box: where it begins and ends, and where its content does."""

    start: int
    end: int
    inner: slice

    def content(self, text: str) -> str:
        return text[self.inner].strip()


def _read_boxes(text: str) -> list[_Box | None]:
    """Every box in order; None for one that is not closed. Linear in the text, however boxes are nested."""
    openings = list(_BOX.finditer(text))
    ends = _closing_braces(text) if openings else {}
    return [_read_box(text, opening, ends) for opening in openings]


def _read_box(text: str, opening: re.Match[str], ends: Mapping[int, int]) -> _Box | None:
    begins = opening.end()
    if text.startswith("{", begins):
        end = ends.get(begins)
        return None if end is None else _Box(opening.start(), end + 1, slice(begins + 1, end))
    word = _UNBRACED.match(text, begins)
    return word and _Box(opening.start(), word.end(), slice(begins, begins + len(word[0].rstrip(".,"))))


def _closing_braces(text: str) -> dict[int, int]:
    """Place of the brace that closes each opening one."""
    ends: dict[int, int] = {}
    open_braces: list[int] = []
    for brace in _BRACE.finditer(text):
        if brace[0] == "{":
            open_braces.append(brace.start())
        elif open_braces:
            ends[open_braces.pop()] = brace.start()
    return ends
