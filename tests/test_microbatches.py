"""Microbatches hold their token budget, and every row is in one of them on one rank."""

import itertools

import pytest
import torch

from llmrl.microbatches import by_token_budget, parts_of_rank


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "parts"),
    [
        ([3, 1, 2], 100, [[1, 2, 0]]),
        ([3, 1, 2], 4, [[1, 2], [0]]),  # 1 and 2 are 4 when padded
        ([2, 2, 2, 2], 4, [[0, 1], [2, 3]]),
        ([9, 1, 1], 4, [[1, 2], [0]]),  # longer than the budget: alone
        ([9, 8], 4, [[1], [0]]),
        ([5], 1, [[0]]),
        ([], 4, []),
    ],
)
def test_parts_by_hand(lengths, max_tokens, parts):
    found = by_token_budget(torch.tensor(lengths, dtype=torch.long), max_tokens)
    assert [part.tolist() for part in found] == parts


def test_every_row_is_in_one_part_that_holds_the_budget():
    lengths = torch.randint(1, 40, (200,), generator=torch.Generator().manual_seed(0))
    parts = by_token_budget(lengths, 100)
    assert sorted(torch.cat(parts).tolist()) == list(range(200))
    assert all(len(part) * lengths[part].max() <= 100 for part in parts)
    following = itertools.pairwise(parts)  # the first row of the next part would not have fitted
    assert all((len(part) + 1) * lengths[after[0]] > 100 for part, after in following)


def test_parts_of_ranks_by_hand():
    """Dealt: 9 and 2 and 1 to rank 0, 8 and 3 to rank 1, 7 and 5 to rank 2; each cut at 10 tokens, padded."""
    parts = [parts_of_rank(torch.tensor([5, 1, 9, 3, 7, 2, 8]), 10, rank, 3) for rank in range(3)]
    assert [[part.tolist() for part in mine] for mine, _ in parts] == [[[1, 5], [2]], [[3], [6]], [[0], [4]]]
    assert [idle for _, idle in parts] == [[], [], []]


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 40])
def test_all_ranks_make_equally_many_passes_over_every_row_once(world_size):
    lengths = torch.randint(1, 60, (30,), generator=torch.Generator().manual_seed(0))
    ranks = [parts_of_rank(lengths, 100, rank, world_size) for rank in range(world_size)]
    assert len({len(mine) + len(idle) for mine, idle in ranks}) == 1
    assert any(not idle for _, idle in ranks)
    assert sorted(row for mine, _ in ranks for part in mine for row in part.tolist()) == list(range(30))
    assert all(len(part) * lengths[part].max() <= 100 for mine, _ in ranks for part in mine)
    idle = [row for _, idle in ranks for row in idle]
    assert all(lengths[row].tolist() == [int(lengths.min())] for row in idle)
    assert len(idle) >= max(0, world_size - 30)


def test_rows_are_dealt_on_the_cpu_wherever_tensors_are_made_by_default():
    lengths = torch.tensor([3, 1, 2])
    with torch.device("meta"):  # which holds no numbers
        parts, _ = parts_of_rank(lengths, 100, rank=0, world_size=2)
    assert [part.tolist() for part in parts] == [[0]]
