"""The rule that compares mathematics. A module of its own, so that a missing extra shows before a model loads."""

import threading
from collections.abc import Sequence

try:
    from math_verify import parse, verify
except ImportError as error:
    raise ImportError('math-verify is not installed: pip install "llmrl[math]"') from error

_TIMEOUT_S = 3


def math_equal(responses: Sequence[str], answer: Sequence[object]) -> list[float | None]:
    r"""The last mathematics in the response equals the answer: 1/2, 0.5 and ``\frac{1}{2}`` are the same.

    The answer is LaTeX or plain, ``\frac{1}{2}``, or a text that holds it in ``$...$`` or ``\boxed{...}``. None where
    it cannot be read. A response that cannot be read, or takes longer than 3 seconds to read or compare, is wrong.

    Raises:
        RuntimeError: Called outside the main thread, where math-verify cannot stop what takes too long.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("math_equal must run in the main thread: only there can a runaway comparison be stopped")
    return [_equal(response, str(gold)) for response, gold in zip(responses, answer, strict=True)]


def _equal(response: str, gold: str) -> float | None:
    delimited = gold if "$" in gold or r"\boxed" in gold else f"${gold}$"
    parsed = parse(delimited, parsing_timeout=_TIMEOUT_S)
    if not parsed:
        return None
    return float(verify(parsed, parse(response, parsing_timeout=_TIMEOUT_S), timeout_seconds=_TIMEOUT_S))
