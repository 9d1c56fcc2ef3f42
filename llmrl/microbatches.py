"""Who forms a microbatch: rows dealt to ranks and cut by a token budget."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from llmrl.batches import Batch

Part = TypeVar("Part", bound=Batch)
Answer = TypeVar("Answer", bound=Batch)


def by_token_budget(num_tokens: Int[Tensor, " B"], max_tokens: int) -> list[Int[Tensor, " part"]]:
    """Rows sorted by length and cut into parts that hold at most `max_tokens` tokens when padded to their longest.

    A row longer than the budget is a part of its own. The parts change memory, never a result.
    """
    lengths, order = num_tokens.sort(stable=True)
    parts, first = [], 0
    for last, length in enumerate(lengths.tolist()):
        if last > first and (last + 1 - first) * length > max_tokens:
            parts.append(order[first:last])
            first = last
    return [*parts, order[first:]] if len(order) else []


def rows_of_rank(num_tokens: Int[Tensor, " B"], rank: int, world_size: int) -> Int[Tensor, " part"]:
    """The rows of one rank: the longest first, each goes to the rank that has the fewest tokens so far."""
    lengths, order = num_tokens.sort(descending=True, stable=True)
    loads, mine = [0] * world_size, []
    for row, length in zip(order.tolist(), lengths.tolist(), strict=True):
        least = loads.index(min(loads))
        loads[least] += length
        if least == rank:
            mine.append(row)
    return torch.tensor(mine, dtype=torch.long, device=num_tokens.device)


def parts_of_rank(
    num_tokens: Int[Tensor, " B"], max_tokens: int, rank: int, world_size: int
) -> tuple[list[Int[Tensor, " part"]], list[Int[Tensor, " 1"]]]:
    """``(parts, idle)`` of one rank: the rows dealt to it, cut by the token budget; and one row for each pass that it
    has nothing for while another rank is still at work.

    Where weights are sharded, a pass is something that all ranks do together, so each makes as many as the busiest.
    """
    num_tokens = num_tokens.cpu()
    rows = [rows_of_rank(num_tokens, each, world_size) for each in range(world_size)]
    parts = [[mine[part] for part in by_token_budget(num_tokens[mine], max_tokens)] for mine in rows]
    idle = max(map(len, parts)) - len(parts[rank])
    return parts[rank], [num_tokens.argmin().view(1)] * idle


def in_microbatches(
    ask: Callable[[Part], Answer], batch: Part, num_tokens: Int[Tensor, " B"], max_tokens: int
) -> Answer:
    """Answers about every row, in row order, asked in microbatches of at most `max_tokens` tokens."""
    parts = by_token_budget(num_tokens, max_tokens) or [torch.arange(0)]
    return in_row_order([ask(batch.select(part)) for part in parts], parts)


def in_row_order(answers: Sequence[Answer], parts: Sequence[Tensor]) -> Answer:
    """One batch of the answers about parts of a batch: row ``parts[i][j]`` of it is row j of ``answers[i]``."""
    return type(answers[0]).cat(answers).select(torch.cat(list(parts)).argsort())
