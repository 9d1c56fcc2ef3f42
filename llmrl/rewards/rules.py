"""Rules that check an answer: pure functions, used by name as in ``llmrl.rewards.rules:exact_answer``.

Each gives 1.0 to a right response and 0.0 to a wrong one, but `right_equations` to places in it. ``answer`` is the data
column of that name.
"""

import re
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = rf"((?:(?<![\w)])[-\u2212])?)\$?({_DIGITS})(?:/({_DIGITS}))?"
_LAST_NUMBER = re.compile(_NUMBER)
_MARKED_NUMBER = re.compile(rf"####\s*{_NUMBER}")
_TERM = rf"\$?(?:{_DIGITS})"
_CALCULATION = rf"{_TERM}(?:\s*[-+*/x×]\s*{_TERM})+"
_NOTHING_BEFORE = r"(?<![\w.,)=+*/×-])(?<![)=+*/x×-]\s)"
_NOTHING_AFTER = r"(?![.,]?\d|\s*[-+*/x×=]\s*[\d$.(])"
_EQUATION = re.compile(rf"{_NOTHING_BEFORE}({_CALCULATION})\s*=\s*({_TERM}){_NOTHING_AFTER}")
_STEP = re.compile(rf"([-+*/x×]?)\s*\$?({_DIGITS})")


def exact_answer(responses: Sequence[str], answer: Sequence[object]) -> list[float]:
    """The whole response is the answer; runs of whitespace count as one blank, and none at the ends."""
    return [float(_words(response) == _words(str(gold))) for response, gold in zip(responses, answer, strict=True)]


def numeric_answer(responses: Sequence[str], answer: Sequence[object]) -> list[float | None]:
    """The last number of the response equals the last number of the answer; None where the answer has no number.

    ``-1,080.50``, ``$72.``, ``.5`` and ``3/4`` are numbers, compared exactly: 0.75 equals 3/4. A percent sign is a unit
    as any other: 50% equals 50. A minus after a letter, a digit or a bracket is a hyphen or a subtraction.
    """
    return [
        _equal(_last_number(response), _last_number(str(gold)))
        for response, gold in zip(responses, answer, strict=True)
    ]


def gsm8k_answer(responses: Sequence[str], answer: Sequence[str]) -> list[float | None]:
    """The number of the response equals that of a GSM8K answer, ``... #### 72``; None where the answer has no number.

    It is the first number that stands right after ``####``, so that what a model rambles after its answer is not
    read, and the last number of the text where there is none. Numbers are those of `numeric_answer`.
    """
    return [
        _equal(_final_number(response), _final_number(gold)) for response, gold in zip(responses, answer, strict=True)
    ]


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
    return [
        [(match.end() - 1, 1.0) for match in _EQUATION.finditer(response) if _holds(*match.groups())]
        for response in responses
    ]


def _words(text: str) -> str:
    return " ".join(text.split())


def _equal(number: Fraction | None, gold: Fraction | None) -> float | None:
    return None if gold is None else float(number == gold)


def _last_number(text: str) -> Fraction | None:
    matches = list(_LAST_NUMBER.finditer(text))
    return _read_number(matches[-1]) if matches else None


def _final_number(text: str) -> Fraction | None:
    marked = _MARKED_NUMBER.search(text)
    return _read_number(marked) if marked else _last_number(text)


def _read_number(match: re.Match[str]) -> Fraction | None:
    """Through `Decimal`, which unlike `int` reads any number of digits. A fraction over zero is no number."""
    sign, numerator, denominator = match.groups(default="")
    divisor = _exact(denominator) if denominator else Fraction(1)
    if divisor == 0:
        return None
    return (-1 if sign else 1) * _exact(numerator) / divisor


def _exact(digits: str) -> Fraction:
    return Fraction(Decimal(digits.replace(",", "")))


def _holds(calculation: str, result: str) -> bool:
    try:
        return _calculate(calculation) == _calculate(result)
    except ZeroDivisionError:
        return False


def _calculate(calculation: str) -> Fraction:
    """A sum of products and quotients, from left to right."""
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
