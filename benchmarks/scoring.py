"""The reward of the benchmarks: a pure function of the tokens, which costs nothing."""

from collections.abc import Sequence


def score(tokens: Sequence[Sequence[str]]) -> list[float]:
    """The last digit of the number of characters of each response, in tenths."""
    return [sum(len(token) for token in response) % 10 / 10 for response in tokens]
