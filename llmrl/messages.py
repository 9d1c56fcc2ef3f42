"""Parts of the sentences that users read."""

from collections.abc import Mapping


def in_one_line(error: BaseException) -> str:
    """The message of an error, its line breaks and runs of blanks as single blanks; empty where it cannot be had."""
    try:
        return " ".join(str(error).split())
    except Exception:  # `__str__` of a class that a user wrote
        return ""


def counted(number: int, noun: str) -> str:
    """``1 epoch``, ``12,000 epochs``: a number of things whose plural ends in s."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def format_evaluation(values: Mapping[str, float]) -> str:
    """``accuracy 0.44 [0.347, 0.538]  score 0.44``: what an evaluation measured, each interval after its value."""
    told = []
    for name, value in values.items():
        if not name.endswith(("_low", "_high")):
            ends = [f"{values[end]:.4g}" for end in (f"{name}_low", f"{name}_high") if end in values]
            told.append(f"{name.removeprefix('eval/')} {value:.4g}" + (f" [{', '.join(ends)}]" if ends else ""))
    return "  ".join(told)
