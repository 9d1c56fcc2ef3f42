"""The rule that compares mathematics. A module of its own, so that a missing extra shows before a model loads."""

import logging
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

try:
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
except ImportError as error:
    raise ImportError('math-verify is not installed: pip install "llmrl[math]"') from error

from llmrl.limits import TooLong, can_limit_time, time_limit
from llmrl.rewards.answers import after_thinking, answer_text, boxed, plain_digits, without_lookalikes

_TIMEOUT_S = 3.0
_TAIL = 4000
"""Characters at the end of a text without a box, and in a box, that are read: math-verify takes seconds for much longer
ones."""
_PRECISION = 1e-5
"""Relative difference of numbers that count as the same, since decimals may be rounded. math-verify rounds to an
absolute 1e-6 and takes differences to 15 digits, where 1/2004! and 1/2006! are the same."""
_EXTRACTION = (
    LatexExtractionConfig(
        normalization_config=NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False
        )
    ),
    ExprExtractionConfig(),
)
"""Extraction without math-verify's units, among which are the c of 2c and the e of 1/e."""

_WRAPPED = re.compile(r"\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_CLAIM = re.compile(r"(?:answer|solution|result)\b[^.:\n]{0,40}?(?:\bis\b|:)[\s:*]*([^\n]+)", re.IGNORECASE)
_CONSTANT = re.compile(r"\\(?:text|mathrm|operatorname)\s*\{\s*([ei])\s*\}")
_FONT = re.compile(r"\\(?:text(?:bf|it|rm)?|math(?:rm|bf|it)|mbox)\s*\{([^{}]*)\}")
_UNICODE = str.maketrans(
    {"π": r"\pi ", "∞": r"\infty ", "∅": r"\emptyset ", "≤": r"\le ", "≥": r"\ge ", "×": r"\times ", "·": r"\cdot "}
    | {"²": "^2", "³": "^3", "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "°": r"^\circ "}
)
_ROOT = re.compile(r"√\s*(?:\(([^()]*)\)|(\w+))")
_ORDINAL = re.compile(r"(?<=\d)\s*(?:\^\s*\{?\s*)?(?:\\(?:text|mathrm)\s*\{\s*)?(?:st|nd|rd|th)\b[\s}]*$")
_CURRENCY = re.compile(r"\\?\$|\\(?:pounds|euro)\b|[€£¥₹]")
_SPACE = re.compile(r"\\[ ,;:!]|~|\\(?:left|right|displaystyle)(?![a-zA-Z])")
_LARGE = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_LARGE_WORD = re.compile(rf"(?<=\d)\s*(?:\\text\s*\{{\s*)?({'|'.join(_LARGE)})\b(?:\s*\}})?", re.IGNORECASE)
_UNIT = re.compile(r"(?<=[\w})])\s*\\(?:text|mathrm|mbox|pmod)\s*\{[^{}]*\}(?:\^\{?\d\}?)?$")
_SPELLED_UNIT = re.compile(r"(?<=\d)\s+(?:[a-zA-Z]{2,}|[msghlL])(?:[ /]+[a-zA-Z]+)*\.?(?:\^\{?\d\}?)?$")
_PARTED = re.compile(r"(?<=\d) (?=\d{3}(?:-(?!\d)|[^\W\d_]))")
"""Blank between two numbers that `plain_digits` keeps apart, and that math-verify would join."""
_MIXED = re.compile(r"(?<![\d/.,^])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d/])")
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+\.?\d*|\.\d+)(?:e[-+]?\d{1,3})?", re.IGNORECASE)
_WORDS = re.compile(r"[^\W\d_]+(?:[\s'.-]+[^\W\d_]+)*[.!]?")
_LETTER = re.compile(r"\(?\s*([A-J])\s*\)?[.:]?")
_LABELLED = re.compile(r"(?:\(([A-J])\)|([A-J])[.:)](?=\s))[.:]?\s*(.+)", re.DOTALL)
_TIME = re.compile(r"(\d{1,2}):(\d\d)(?::(\d\d))?\s*(?:([ap])\.?\s*m\.?)?", re.IGNORECASE)
_BASE = re.compile(r"(?<=\d)_\{?(\d+)\}?")

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it would warn that its own time limits are off


def math_equal(responses: Sequence[str], answer: Sequence[object]) -> list[float | None]:
    r"""The answer of the response is that of the data: 1/2, 0.5 and ``\frac{1}{2}`` are the same.

    The answer of a response stands in its last ``\boxed{...}``, or is the last mathematics of its text. The answer of
    the data is a number, LaTeX or plain text, or a text that holds it in ``$...$`` or ``\boxed{...}``; None where there
    is none. Units and currencies are left out, words are compared as words. Digits are 0 to 9. A response that
    cannot be read, has more than 4,000 characters in its box, or takes longer than 3 seconds to read and compare, is
    wrong.

    Raises:
        RuntimeError: Called outside the main thread, where what takes too long cannot be stopped.
    """
    if not can_limit_time():
        raise RuntimeError("math_equal must run in the main thread: only there can a runaway comparison be stopped")
    return [_equal(response, answer_text(gold)) for response, gold in zip(responses, answer, strict=True)]


def _equal(response: str, answer: str | None) -> float | None:
    gold = _gold(without_lookalikes(answer or "")).strip()
    if not gold:
        return None
    try:
        with time_limit(_TIMEOUT_S):
            return float(_answers(without_lookalikes(after_thinking(response)), gold))
    except (TooLong, RecursionError):
        return 0.0


def _gold(text: str) -> str:
    """The answer of an entry of the data, without what is around it."""
    if _NUMBER.fullmatch(text):
        return f"{_number(text):f}"
    box = boxed(text)
    if box is not None:
        return box
    marked = text.rpartition("####")[2]
    wrapped = _WRAPPED.findall(marked.replace(r"\$", ""))
    return "".join(wrapped[-1]) if wrapped else marked


def _answers(response: str, gold: str) -> bool:
    box = boxed(response)
    if box is not None:
        return _same(box, gold)
    tail = response[-_TAIL:].strip()
    if _words(gold) or _letter(gold) or _times(gold):
        claims = _CLAIM.findall(tail)
        return _same(claims[-1] if claims else tail.rpartition("\n")[2], gold)
    tail = _PARTED.sub(", ", plain_digits(tail.replace(r"\$", "")))
    return _same_mathematics(tail, f"${_plain(gold)}$")


def _same(said: str, gold: str) -> bool:
    """Whether two answers, without text around them, are the same."""
    if len(said) > _TAIL:
        return said == gold
    if label := _label(gold):
        return any(_same(said, reading) for reading in label)
    if letter := _letter(gold):
        return letter == (_label(said) or [_letter(said)])[0]
    if label := _label(said):
        said = label[1]
    if _words(gold) or _words(said):
        return _words(gold) == _words(said)
    times = _times(said), _times(gold)
    if all(times):
        return bool(times[0] & times[1])
    said, gold = _plain(said), _plain(gold)
    if _NUMBER.fullmatch(said) and _NUMBER.fullmatch(gold):
        return _number(said) == _number(gold)
    if ", " in gold:
        said = re.sub(r",\s*", ", ", said)  # a list, so these commas do not stand between thousands
    numbers = (re.sub(r"\s*\\?%", "", answer) for answer in (said, gold))  # 35% is 0.35, and 35 as well
    return said == gold or any(
        _same_mathematics(f"${x}$", f"${y}$") for x, y in dict.fromkeys([(said, gold), tuple(numbers)])
    )


def _letter(answer: str) -> str | None:
    """Letter of a choice: ``B``, ``(B)``, ``\text{(B)}``."""
    match = _LETTER.fullmatch(_bare(answer).upper())
    return match and match[1]


def _label(answer: str) -> list[str]:
    """Letter and text of a labelled choice, ``(B) 12``; empty if it is none."""
    match = _LABELLED.fullmatch(_bare(answer))
    return [match[1] or match[2], match[3]] if match else []


def _words(answer: str) -> str | None:
    """Plain words, in lower case; None for mathematics. Few letters without a font are a product, such as xyz."""
    bare = _bare(answer)
    is_long = len(bare) > 3 or bare.lower() in ("yes", "no") or "\\text" in answer
    return bare.casefold().rstrip(".!") if _WORDS.fullmatch(bare) and len(bare) > 1 and is_long else None


def _times(answer: str) -> set[tuple[int, int, int, str]]:
    """Readings of a time: without a.m. or p.m. it may be either."""
    match = _TIME.fullmatch(_bare(answer))
    if match is None:
        return set()
    halves = match[4].lower() if match[4] else "ap"
    return {(int(match[1]), int(match[2]), int(match[3] or 0), half) for half in halves}


def _bare(answer: str) -> str:
    """The answer without fonts, and with single blanks."""
    return " ".join(_SPACE.sub(" ", _FONT.sub(r"\1", answer)).strip("*` ").split())


def _plain(answer: str) -> str:
    """The answer as mathematics without currency, units and fonts."""
    answer = _ROOT.sub(r"\\sqrt{\1\2}", answer).translate(_UNICODE).replace(r"\varnothing", r"\emptyset")
    answer = plain_digits(_CONSTANT.sub(r"\1", _ORDINAL.sub("", answer))).replace("\\!", "")
    answer = _CURRENCY.sub("", _SPACE.sub(" ", answer)).strip("*` ").rstrip(".")
    answer = _LARGE_WORD.sub(lambda word: rf" \times 10^{{{_LARGE[word[1].lower()]}}}", answer)
    answer = _SPELLED_UNIT.sub("", _FONT.sub(r"\1", _UNIT.sub("", answer)))
    return _MIXED.sub(r"\1\\frac{\2}{\3}", answer).strip()


def _number(answer: str) -> Decimal:
    return Decimal(answer.replace(",", ""))


def _same_mathematics(said: str, gold: str) -> bool:
    bases = _BASE.findall(said), _BASE.findall(gold)
    if all(bases) and bases[0][-1] != bases[1][-1]:
        return False
    left, right = (parse(text, _EXTRACTION, parsing_timeout=0) for text in (said, gold))
    if not left or not right or not verify(right, left, timeout_seconds=0, allow_set_relation_comp=True):
        return False
    return _is_close(left[0], right[0])


def _is_close(left: Any, right: Any) -> bool:
    """Whether two numbers agree in size; anything else is math-verify's to judge."""
    if not (getattr(left, "is_number", False) and getattr(right, "is_number", False)):
        return True
    x, y = left.doit().evalf(), right.doit().evalf()
    if not (x.is_finite and y.is_finite):
        return x == y
    return bool(abs(x - y) <= _PRECISION * max(abs(x), abs(y)))
