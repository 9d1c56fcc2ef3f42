"""Microbatches: rows assigned to ranks, and split into forward passes that hold a token budget."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from llmrl.batches import Batch, ReadBatch

Answer = TypeVar("Answer", bound=Batch)


@dataclass(frozen=True, kw_only=True)
class TokenBudget:
    """Largest number of tokens in one forward pass on one device. It changes memory, never a result."""

    max_tokens: int
    packed: bool = False
    """Whether passes pack their rows: no padding, and the prompt of several rows once. Otherwise each row takes as many
    tokens as the longest."""
    setting: str = "microbatch_tokens"
    """Setting that it is of, for messages."""


@dataclass(frozen=True)
class Unit:
    """Rows that stay together: in a packed pass those of one prompt, otherwise a single row."""

    rows: list[int]
    longest: int
    """Tokens of its longest row, counted once for each row of a padded pass."""
    num_tokens: int
    """Tokens of a packed pass over it."""
    num_rows: int = 1
    """Rows of a padded pass over it: one for each context."""


def parts_of_rank(
    batch: ReadBatch, budget: TokenBudget, rank: int, world_size: int
) -> tuple[list[Int[Tensor, " part"]], list[Int[Tensor, " 1"]]]:
    """``(parts, idle)`` of one rank: row indices of its forward passes; and one filler row for each pass in which only
    other ranks still have work.

    Where weights are sharded, a forward pass is collective, so each rank makes as many as the busiest.
    """
    units = _units(batch, budget, world_size)
    parts = [_parts(mine, budget) for mine in _units_of_ranks(units, world_size)]
    idle = max(map(len, parts)) - len(parts[rank])
    shortest = min(units, key=lambda unit: unit.longest, default=None)
    filler = [torch.tensor(shortest.rows[:1], device="cpu")] if shortest is not None else []
    return [torch.tensor(rows, device="cpu") for rows in parts[rank]], filler * idle


def halved(batch: ReadBatch, budget: TokenBudget) -> TokenBudget | None:
    """Half of a budget, or half of that and so on, until it splits a batch further; None where each pass has one
    row. For a single process."""
    parts = _parts(_units(batch, budget, 1), budget)
    while budget.max_tokens > 1:
        budget = replace(budget, max_tokens=budget.max_tokens // 2)
        if _parts(_units(batch, budget, 1), budget) != parts:
            return budget
    return None


def in_row_order(answers: Sequence[Answer], parts: Sequence[Tensor]) -> Answer:
    """Outputs for the parts of a batch as one batch: row ``parts[i][j]`` of it is row j of ``answers[i]``."""
    return type(answers[0]).cat(answers).select(torch.cat(list(parts)).argsort())


def _units(batch: ReadBatch, budget: TokenBudget, world_size: int) -> list[Unit]:
    """Every row in a unit. The rows of a prompt are several units where they would exceed the budget, or the share of
    a rank."""
    tokens = batch.pass_tokens(packed=budget.packed)
    own = tokens.own.tolist()
    if tokens.prompt_of_row is None or tokens.of_prompt is None:
        counts = [1] * len(own) if tokens.num_contexts is None else tokens.num_contexts.tolist()
        return [Unit([row], n, n * count, count) for row, (n, count) in enumerate(zip(own, counts, strict=True))]
    prompts, of_prompt = tokens.prompt_of_row.tolist(), tokens.of_prompt.tolist()
    total = sum(own) + sum(of_prompt[prompt] for prompt in set(prompts))
    most = min(budget.max_tokens, -(-total // world_size))
    units = []
    for prompt, group in groupby(sorted(range(len(own)), key=prompts.__getitem__), key=prompts.__getitem__):
        units += _units_of_prompt(list(group), own, of_prompt[prompt], most)
    return units


def _units_of_prompt(rows: list[int], own: Sequence[int], prompt: int, most: int) -> Iterator[Unit]:
    """The responses to one prompt in units of at most this many tokens, or of one row."""
    unit, num_tokens = [rows[0]], prompt + own[rows[0]]
    for row in rows[1:]:
        if num_tokens + own[row] > most:
            yield Unit(unit, prompt + max(own[row] for row in unit), num_tokens)
            unit, num_tokens = [], prompt
        unit.append(row)
        num_tokens += own[row]
    yield Unit(unit, prompt + max(own[row] for row in unit), num_tokens)


def _units_of_ranks(units: Sequence[Unit], world_size: int) -> list[list[Unit]]:
    """The units of each rank: the largest first, each goes to the rank that has the fewest tokens so far."""
    loads = [0] * world_size
    of_ranks: list[list[Unit]] = [[] for _ in range(world_size)]
    for unit in sorted(units, key=lambda unit: -unit.num_tokens):
        least = loads.index(min(loads))
        loads[least] += unit.num_tokens
        of_ranks[least].append(unit)
    return of_ranks


def _parts(units: Sequence[Unit], budget: TokenBudget) -> list[list[int]]:
    """Rows of passes that hold the budget: units, the smallest first, as many in each as fit, at least one."""
    parts: list[list[int]] = []
    rows: list[int] = []
    num_tokens = num_padded = longest = 0
    for unit in sorted(units, key=lambda unit: unit.num_tokens):
        longest = max(longest, unit.longest)
        more = num_tokens + unit.num_tokens if budget.packed else (num_padded + unit.num_rows) * longest
        if rows and more > budget.max_tokens:
            parts.append(rows)
            rows, num_tokens, num_padded, longest = [], 0, 0, unit.longest
        rows, num_tokens, num_padded = rows + unit.rows, num_tokens + unit.num_tokens, num_padded + unit.num_rows
    return [*parts, rows] if rows else parts
