"""Microbatches hold their token budget, and every row is in one of them on one rank."""

import itertools

import pytest
import torch

from llmrl.batches import TokenOutputs
from llmrl.microbatches import by_token_budget, in_row_order, padded_tokens, parts_of_rank


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


# --- units and costs --------------------------------------------------------------------------------------------------


def packed_tokens(lengths):
    """Of rows without padding."""
    return sum(lengths)


def units_by_definition(units: list[int]) -> list[list[int]]:
    """The rows of each unit, in the order of its first."""
    return [[row for row, other in enumerate(units) if other == unit] for unit in dict.fromkeys(units)]


def parts_by_definition(lengths: list[int], max_tokens: int, cost, units: list[list[int]]) -> list[list[int]]:
    """As many of the cheapest units as fit, at least one; then of the others."""
    left = sorted(units, key=lambda rows: (cost([lengths[row] for row in rows]), units.index(rows)))
    parts = []
    while left:
        cuts = [list(itertools.chain(*left[:n])) for n in range(1, len(left) + 1)]
        num = max([n for n, rows in enumerate(cuts, 1) if cost([lengths[row] for row in rows]) <= max_tokens] or [1])
        parts.append(cuts[num - 1])
        left = left[num:]
    return parts


def dealt_by_definition(lengths: list[int], world_size: int, cost, units: list[list[int]]) -> list[list[list[int]]]:
    """The units of each rank: the dearest first, each to the first of the ranks with the least to do."""

    def of_unit(rows: list[int]) -> int:
        return cost([lengths[row] for row in rows])

    ranks: list[list[list[int]]] = [[] for _ in range(world_size)]
    for unit in sorted(units, key=lambda rows: (-of_unit(rows), units.index(rows))):
        min(ranks, key=lambda mine: sum(map(of_unit, mine))).append(unit)
    return ranks


def test_costs_by_hand():
    assert padded_tokens([3, 1, 2]) == 9
    assert padded_tokens([4]) == 4


@pytest.mark.parametrize(
    ("units", "max_tokens", "parts"),
    [
        ([7, 7, 5, 5], 8, [[2, 3], [0, 1]]),  # 2 rows of 1, 2 rows of 4
        ([7, 7, 5, 5], 16, [[2, 3, 0, 1]]),
        ([7, 5, 7, 5], 1, [[0, 2], [1, 3]]),  # longer than the budget: alone, and never torn apart
        ([0, 0, 0, 0], 1, [[0, 1, 2, 3]]),
    ],
)
def test_whole_units_by_hand(units, max_tokens, parts):
    found = by_token_budget(torch.tensor([4, 4, 1, 1]), max_tokens, units=torch.tensor(units))
    assert [part.tolist() for part in found] == parts


@pytest.mark.parametrize("cost", [padded_tokens, packed_tokens])
@pytest.mark.parametrize("num_units", [1, 4, 60])
@pytest.mark.parametrize("max_tokens", [1, 50, 300, 10_000])
def test_whole_units_by_definition(num_units, max_tokens, cost):
    random = torch.Generator().manual_seed(num_units)
    lengths, units = torch.randint(1, 12, (40,), generator=random), torch.randint(num_units, (40,), generator=random)
    found = by_token_budget(lengths, max_tokens, cost=cost, units=units)
    expected = parts_by_definition(lengths.tolist(), max_tokens, cost, units_by_definition(units.tolist()))
    assert [part.tolist() for part in found] == expected


@pytest.mark.parametrize("cost", [padded_tokens, packed_tokens])
@pytest.mark.parametrize("num_units", [1, 4, 60])
@pytest.mark.parametrize("world_size", [1, 3, 50])
def test_whole_units_of_ranks_by_definition(num_units, world_size, cost):
    random = torch.Generator().manual_seed(num_units)
    lengths, units = torch.randint(1, 12, (40,), generator=random), torch.randint(num_units, (40,), generator=random)
    dealt = dealt_by_definition(lengths.tolist(), world_size, cost, units_by_definition(units.tolist()))
    expected = [parts_by_definition(lengths.tolist(), 60, cost, mine) for mine in dealt]
    most = max(map(len, expected))
    for rank in range(world_size):
        parts, idle = parts_of_rank(lengths, 60, rank, world_size, cost=cost, units=units)
        assert [part.tolist() for part in parts] == expected[rank]
        assert len(parts) + len(idle) == most


def test_a_row_is_a_unit_unless_told_otherwise():
    lengths = torch.randint(1, 40, (50,), generator=torch.Generator().manual_seed(1))
    rows, of_rank = by_token_budget(lengths, 100), parts_of_rank(lengths, 100, 1, 3)[0]
    own = torch.arange(50)
    assert [part.tolist() for part in by_token_budget(lengths, 100, units=own)] == [part.tolist() for part in rows]
    again, _ = parts_of_rank(lengths, 100, 1, 3, units=own)
    assert [part.tolist() for part in again] == [part.tolist() for part in of_rank]


def test_rows_of_equal_length_keep_their_order():
    parts = by_token_budget(torch.tensor([2, 1, 2, 1, 2]), 4)
    assert [part.tolist() for part in parts] == [[1, 3], [0, 2], [4]]


# --- answers ----------------------------------------------------------------------------------------------------------


def test_row_order_by_hand():
    """Answers of unequal width are padded."""
    answers = [
        TokenOutputs(named={"values": torch.tensor([[2.0, 2.5], [0.0, 0.5]])}),
        TokenOutputs(named={"values": torch.tensor([[1.0]])}),
    ]
    outputs = in_row_order(answers, [torch.tensor([2, 0]), torch.tensor([1])])
    assert outputs.values.tolist() == [[0, 0.5], [1, 0], [2, 2.5]]
