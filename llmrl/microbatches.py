"""Microbatches: units of rows assigned to ranks and split by a token budget."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from llmrl.batches import Batch

Answer = TypeVar("Answer", bound=Batch)
Cost = Callable[[Sequence[int]], int]
"""Tokens of one forward pass over rows of these lengths, padding included."""


def padded_tokens(lengths: Sequence[int]) -> int:
    """Cost of rows in one forward pass: their tokens when padded to the longest."""
    return len(lengths) * max(lengths)


def by_token_budget(
    num_tokens: Int[Tensor, " B"],
    max_tokens: int,
    *,
    cost: Cost = padded_tokens,
    units: Int[Tensor, " B"] | None = None,
) -> list[Int[Tensor, " part"]]:
    """Row indices of microbatches: units of rows, the cheapest first, split into parts that cost at most `max_tokens`.

    A unit that costs more is a part of its own. The parts change memory, never a result.

    Args:
        num_tokens: Tokens of each row, padding left out.
        max_tokens: Largest cost of a part, tokens.
        cost: Tokens that a forward pass over rows of these lengths takes.
        units: Rows with the same number stay in one part; None: each row is a unit.
    """
    lengths, parts = num_tokens.tolist(), []
    part: list[int] = []
    taken: list[int] = []
    for unit in sorted(_rows_of_units(num_tokens, units), key=lambda rows: _cost(rows, lengths, cost)):
        more = [lengths[row] for row in unit]
        if part and cost(taken + more) > max_tokens:
            parts.append(part)
            part, taken = [], []
        part, taken = part + unit, taken + more
    return [torch.tensor(rows, dtype=torch.long, device=num_tokens.device) for rows in [*parts, part] if rows]


def rows_of_ranks(
    num_tokens: Int[Tensor, " B"],
    world_size: int,
    *,
    cost: Cost = padded_tokens,
    units: Int[Tensor, " B"] | None = None,
) -> list[Int[Tensor, " part"]]:
    """Row indices of each rank: the most expensive unit first, each goes to the rank whose units cost least so far."""
    lengths = num_tokens.tolist()
    loads: list[int] = [0] * world_size
    rows: list[list[int]] = [[] for _ in range(world_size)]
    for unit in sorted(_rows_of_units(num_tokens, units), key=lambda rows: -_cost(rows, lengths, cost)):
        least = loads.index(min(loads))
        loads[least] += _cost(unit, lengths, cost)
        rows[least] += unit
    return [torch.tensor(mine, dtype=torch.long, device=num_tokens.device) for mine in rows]


def parts_of_rank(
    num_tokens: Int[Tensor, " B"],
    max_tokens: int,
    rank: int,
    world_size: int,
    *,
    cost: Cost = padded_tokens,
    units: Int[Tensor, " B"] | None = None,
) -> tuple[list[Int[Tensor, " part"]], list[Int[Tensor, " 1"]]]:
    """``(parts, idle)`` of one rank: its row indices, split by the token budget as `by_token_budget` does; and one
    filler row for each pass in which only other ranks still have work.

    Where weights are sharded, a forward pass is collective, so each rank makes as many as the busiest.
    """
    num_tokens = num_tokens.cpu()
    units = torch.arange(len(num_tokens), device="cpu") if units is None else units.cpu()
    parts = [
        [mine[part] for part in by_token_budget(num_tokens[mine], max_tokens, cost=cost, units=units[mine])]
        for mine in rows_of_ranks(num_tokens, world_size, cost=cost, units=units)
    ]
    idle = max(map(len, parts)) - len(parts[rank])
    return parts[rank], [num_tokens.argmin().view(1)] * idle


def in_row_order(answers: Sequence[Answer], parts: Sequence[Tensor]) -> Answer:
    """Outputs for the parts of a batch as one batch: row ``parts[i][j]`` of it is row j of ``answers[i]``."""
    return type(answers[0]).cat(answers).select(torch.cat(list(parts)).argsort())


def _rows_of_units(num_tokens: Int[Tensor, " B"], units: Int[Tensor, " B"] | None) -> list[list[int]]:
    """The rows of each unit, units in the order of their first row."""
    if units is None:
        return [[row] for row in range(len(num_tokens))]
    rows: dict[int, list[int]] = {}
    for row, unit in enumerate(units.tolist()):
        rows.setdefault(unit, []).append(row)
    return list(rows.values())


def _cost(rows: Sequence[int], lengths: Sequence[int], cost: Cost) -> int:
    return cost([lengths[row] for row in rows])
