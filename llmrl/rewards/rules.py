"""Rules that check an answer: pure functions, used by name as in ``llmrl.rewards.rules:exact_answer``.

Each gives 1.0 to a right response and 0.0 to a wrong one, except `right_equations`, which scores places in it.
``answer`` is the data column of that name, of texts or numbers; a row without an answer gets None: not scored.

Digits are 0 to 9. Those of other scripts, and characters that look like digits, make no number. The time that a rule
takes grows with the length of the response, whatever stands in it: a second or two for a million characters.
"""

import re
from collections import deque
from collections.abc import Callable, Sequence
from decimal import Decimal
from fractions import Fraction

from llmrl.rewards.answers import after_thinking, answer_text, boxed, plain_digits, without_lookalikes

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_EXPONENT = r"(?:[eE][-+]?\d{1,3}(?!\w))?"
_NUMBER = rf"((?:(?<![\w)])-)?)\\?\$?((?:{_DIGITS}){_EXPONENT})(?:/({_DIGITS}))?"
_FRACTION = re.compile(r"\\[dtc]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}")
_MIXED = re.compile(r"(?<![\d.,/^}])(\d{1,4}) (\d{1,9})/(\d{1,9})(?![\d/])")
_POWER_OF_TEN = re.compile(r"(?<=\d)\s*(?:\\times|\\cdot|×|\*)\s*10\s*\^\s*\{?\s*(-?\d{1,3})(?!\d)\s*\}?")
_LAST_NUMBER = re.compile(_NUMBER)
_MARKED_NUMBER = re.compile(rf"####\s*{_NUMBER}")
_TERM = rf"\$?(?:{_DIGITS})"
_CALCULATION = rf"{_TERM}(?:\s*[-+*/x×]\s*{_TERM})+"
_NOTHING_BEFORE = r"(?<![\w.,)=+*/×-])(?<![)=+*/x×-]\s)"
_NOTHING_AFTER = r"(?![.,]?\d|\s*[-+*/x×=]\s*[\d$.(])"
_EQUATION = re.compile(rf"{_NOTHING_BEFORE}({_CALCULATION})(?:\s*=\s*({_TERM}){_NOTHING_AFTER})?")
"""A calculation, and its result where it has one: one without is matched too, so that it is passed over as a whole."""
_MAX_NUMBER = 20_000
"""Characters of the longest number or calculation that is read: the time for one grows with the square of them."""
_STEP = re.compile(rf"([-+*/x×]?)\s*\$?({_DIGITS})")


def exact_answer(responses: Sequence[str], answer: Sequence[object]) -> list[float | None]:
    """The whole response is the answer; runs of whitespace count as one blank, and none at the ends."""
    return _compared(responses, answer, read=lambda text: " ".join(text.split()))


def numeric_answer(responses: Sequence[str], answer: Sequence[object]) -> list[float | None]:
    r"""The last number of the response equals the last number of the answer; None where the answer has no number.

    Where there is a ``\boxed{...}`` it is the last number in the last one. ``-1,080.50``, ``10 000``, ``9{,}500``,
    ``.5``, ``$72.``, ``1.5e3`` and ``3/4`` are numbers, compared exactly: 0.75 equals 3/4. A percent sign is a unit as
    any other: 50% equals 50. A minus after a letter, a digit or a bracket is a hyphen or a subtraction.
    """
    return _compared(responses, answer, read=_last_number)


def gsm8k_answer(responses: Sequence[str], answer: Sequence[object]) -> list[float | None]:
    """The number of the response equals that of a GSM8K answer, ``... #### 72``; None where the answer has no number.

    It is the first number that stands right after ``####``, so that what a model rambles after its answer is not
    read, and where there is none the number of `numeric_answer`.
    """
    return _compared(responses, answer, read=_final_number)


def matches_pattern(responses: Sequence[str], pattern: re.Pattern[str]) -> list[float]:
    r"""The pattern is found in the response, as by Python's ``re.search``.

    In a recipe: ``arguments: {pattern: '####\s*-?\d+$'}``. ``(?s)`` in front lets the dot match line breaks.
    """
    return [float(pattern.search(response) is not None) for response in responses]


def right_equations(responses: Sequence[str]) -> list[list[tuple[int, float]]]:
    """1.0 at the last digit of every equation that holds exactly, such as ``48/2=24`` or ``$1,000 - 20 x 5 = $900``.

    On the left stand numbers joined by ``+ - * / x ×``, on the right stands one number. What has brackets, or is a part
    of a longer calculation, is not read. Meant for a small weight: ``1+1=2`` holds too, however often it is said.
    """
    return [_ends_of_right_equations(without_lookalikes(response)) for response in responses]


def _ends_of_right_equations(text: str) -> list[tuple[int, float]]:
    return [(match.end() - 1, 1.0) for match in _EQUATION.finditer(text) if _holds(*match.groups())]


def _compared(
    responses: Sequence[str], answer: Sequence[object], *, read: Callable[[str], object | None]
) -> list[float | None]:
    """1.0 where the same is read in a response and in its answer, None where nothing is read in the answer."""
    texts = map(answer_text, answer)
    golds = [None if text is None else read(text) for text in texts]
    return [
        None if gold is None else float(read(response) == gold) for response, gold in zip(responses, golds, strict=True)
    ]


def _last_number(text: str) -> Fraction | None:
    text = after_thinking(text)
    box = boxed(text)
    last = deque(_LAST_NUMBER.finditer(_plain(text if box is None else box)), maxlen=1)
    return _read_number(last[0]) if last else None


def _final_number(text: str) -> Fraction | None:
    marked = _MARKED_NUMBER.search(_plain(after_thinking(text)))
    return _read_number(marked) if marked else _last_number(text)


def _plain(text: str) -> str:
    """The text with numbers as `_NUMBER` reads them: (mixed) fractions with a slash, powers of ten with an e."""
    text = _FRACTION.sub(r" \1/\2", plain_digits(without_lookalikes(text)))
    text = _MIXED.sub(lambda match: f"{int(match[1]) * int(match[3]) + int(match[2])}/{match[3]}", text)
    return _POWER_OF_TEN.sub(r"e\1", text)


def _read_number(match: re.Match[str]) -> Fraction | None:
    """The number, read by `Decimal`, which unlike `int` takes any number of digits; None for one that is too long, and
    for a fraction over zero."""
    if len(match[0]) > _MAX_NUMBER:
        return None
    sign, numerator, denominator = match.groups(default="")
    divisor = _exact(denominator) if denominator else Fraction(1)
    if divisor == 0:
        return None
    return (-1 if sign else 1) * _exact(numerator) / divisor


def _exact(digits: str) -> Fraction:
    return Fraction(Decimal(digits.replace(",", "")))


def _holds(calculation: str, result: str | None) -> bool:
    if result is None or len(calculation) + len(result) > _MAX_NUMBER:
        return False
    try:
        return _calculate(calculation) == _calculate(result)
    except ZeroDivisionError:
        return False


def _calculate(calculation: str) -> Fraction:
    """Value of a sum of products and quotients, from left to right."""
    total = product = Fraction(0)
    for sign, digits in _STEP.findall(calculation):
        number = _exact(digits)
        match sign:
            case "" | "+" | "-":
                total, product = total + product, -number if sign == "-" else number
            case "/":
                product /= number
            case _:
                product *= number
    return total + product
