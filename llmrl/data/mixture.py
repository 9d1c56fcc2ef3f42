"""Mixtures: rows of several sets, dealt so that every stretch of the stream has each set in its share."""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from fractions import Fraction
from itertools import chain
from math import gcd, lcm
from typing import TypeVar

from llmrl.batches import Row
from llmrl.data.config import DataConfig, MixtureConfig, RowsConfig
from llmrl.data.files import FileRow, Rows
from llmrl.messages import counted

C = TypeVar("C", bound=DataConfig)

DATASET = "dataset"
"""Column that each row of a mixture gets, unless it has one: the path of its set."""

MAX_DENOMINATOR = 10**6


def sets_of(config: C) -> tuple[C, ...]:
    """Settings of each set of rows of a section: those of `path`, and of each item of `mixed_with`."""
    if not isinstance(config, MixtureConfig) or not config.mixed_with:
        return (config,)
    alone = replace(config, mixed_with=())
    others = [{x.name: getattr(mixed, x.name) for x in fields(RowsConfig)} for mixed in config.mixed_with]
    return (alone, *(replace(alone, **other) for other in others))  # type: ignore[return-value]


def weights_of(config: DataConfig) -> tuple[float, ...]:
    """Weight of each set of rows of a section."""
    mixed_with = config.mixed_with if isinstance(config, MixtureConfig) else ()
    return (1.0, *(mixed.weight for mixed in mixed_with))


def whole_weights(weights: Sequence[float]) -> list[int]:
    """The least whole numbers in the proportions of the weights. A weight is read as a decimal, and as the nearest
    fraction with a denominator of at most `MAX_DENOMINATOR`, unless that is 0: 1/3 of Python is a third."""
    decimals = [Fraction(str(weight)) for weight in weights]
    exact = [weight.limit_denominator(MAX_DENOMINATOR) or weight for weight in decimals]
    scale = lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    return [weight // gcd(*whole) for weight in whole]


def next_set(dealt: Sequence[int], weights: Sequence[int]) -> int:
    """Number of the set that the next row comes from, by the quota method.

        argmax w_i / (n_i + 1) over the sets with n_i W < w_i (t + 1)

    So after any t rows, each set has dealt floor(t w_i / W) or ceil(t w_i / W) of them.

    Args:
        dealt: n_i, the rows dealt so far of each set; t is their sum.
        weights: w_i, whole numbers; W is their sum.

    Reference: Balinski and Young 1975, "The quota method of apportionment", American Mathematical Monthly 82(7).
    """
    total, number = sum(weights), sum(dealt) + 1
    open_sets = [i for i, weight in enumerate(weights) if dealt[i] * total < weight * number]
    return max(open_sets, key=lambda i: (Fraction(weights[i], dealt[i] + 1), -i))


def dealt_after(num_rows: int, weights: Sequence[int]) -> list[int]:
    """Rows of each set among the first ones of the stream, which repeats its order of sets every sum(weights) rows."""
    num_rounds, rest = divmod(num_rows, sum(weights))
    dealt = [0] * len(weights)
    for _ in range(rest):
        dealt[next_set(dealt, weights)] += 1
    return [num_rounds * weight + count for weight, count in zip(weights, dealt, strict=True)]


def mix(sets: Sequence[Rows], config: DataConfig) -> Rows:
    """The rows of all sets of a section in one list, each with the number of its set and the column `DATASET`."""
    if len(sets) == 1:
        return sets[0]
    for number, (each, rows) in enumerate(zip(sets_of(config), sets, strict=True)):
        for row in rows:
            row.set_number = number
            row.setdefault(DATASET, each.path)
    shares = [weight / sum(weights_of(config)) for weight in weights_of(config)]
    parts = zip(shares, sets_of(config), sets, strict=True)
    mixture = ", ".join(f"{share:.3g} of {each.path} ({counted(len(rows), 'row')})" for share, each, rows in parts)
    return _joined(sets, config, [f"a mixture, in shares: {mixture}"])


def by_set(rows: Sequence[Row], config: C) -> list[tuple[C, Sequence[Row]]]:
    """The settings of each set of a section, with its rows."""
    if len(sets_of(config)) == 1:
        return [(config, rows)]
    numbers = [row.set_number for row in rows if isinstance(row, FileRow)]
    return [
        (each, [row for row, its_number in zip(rows, numbers, strict=True) if its_number == number])
        for number, each in enumerate(sets_of(config))
    ]


def keep_in_each(rows: Rows, config: C, keep: Callable[[Sequence[Row], C], Rows]) -> Rows:
    """The rows that `keep` keeps of each set, by the settings of the set."""
    if len(sets_of(config)) == 1:
        return keep(rows, config)
    return _joined([keep(part, each) for each, part in by_set(rows, config)], config, rows.notes)


def _joined(sets: Sequence[Rows], config: DataConfig, notes: Sequence[str]) -> Rows:
    """The rows of all sets, with these notes and those of each set, which then name it."""
    own = [f"{each.path}: {note}" for each, rows in zip(sets_of(config), sets, strict=True) for note in rows.notes]
    return Rows(chain.from_iterable(sets), [*notes, *own])
