"""Microbatches hold their token budget, and every row is in one of them on one rank."""

import itertools

import pytest
import torch

from llmrl.batches import PreferencePairs, Sequences, TokenOutputs
from llmrl.microbatches import TokenBudget, halved, in_row_order, parts_of_rank


def rows_of(prompts: list[int], prompt_of_row: list[int], responses: list[int]) -> Sequences:
    """Rows by the lengths of prompts and responses."""
    lengths = torch.tensor(responses, dtype=torch.long)
    width = max(responses, default=0)
    mask = torch.arange(width) < lengths[:, None]
    prompt_mask = torch.arange(max(prompts, default=1)) >= max(prompts, default=1) - torch.tensor(prompts)[:, None]
    return Sequences(
        unique_prompt_ids=torch.zeros(prompt_mask.shape, dtype=torch.long),
        unique_prompt_mask=prompt_mask,
        prompt_of_row=torch.tensor(prompt_of_row, dtype=torch.long),
        response_ids=torch.zeros(mask.shape, dtype=torch.long),
        response_mask=mask,
        response_lengths=lengths,
    )


def rows(lengths: list[int]) -> Sequences:
    """Rows of these lengths, a prompt of one token in each."""
    return rows_of([1] * len(lengths), list(range(len(lengths))), [n - 1 for n in lengths])


def drawn(num_rows: int, num_prompts: int, *, seed: int = 0) -> Sequences:
    random = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, count: int) -> list[int]:
        return torch.randint(low, high, (count,), generator=random).tolist()

    return rows_of(draw(1, 12, num_prompts), draw(0, num_prompts, num_rows), draw(0, 30, num_rows))


def num_tokens(batch: Sequences, part: list[int], *, packed: bool) -> int:
    """Tokens of a forward pass over some rows, by definition."""
    prompts, responses = batch.prompt_lengths.tolist(), batch.response_lengths.tolist()
    if not packed:
        return len(part) * max(prompts[row] + responses[row] for row in part)
    of_prompt = {int(batch.prompt_of_row[row]): prompts[row] for row in part}
    return sum(of_prompt.values()) + sum(responses[row] for row in part)


def all_parts(batch, budget: TokenBudget, world_size: int = 1) -> list[tuple[list[list[int]], list[list[int]]]]:
    """``(parts, idle)`` of each rank."""
    ranks = [parts_of_rank(batch, budget, rank, world_size) for rank in range(world_size)]
    return [([part.tolist() for part in mine], [row.tolist() for row in idle]) for mine, idle in ranks]


def parts_of(batch, max_tokens: int, *, packed: bool) -> list[list[int]]:
    ((parts, idle),) = all_parts(batch, TokenBudget(max_tokens=max_tokens, packed=packed))
    assert idle == []
    return parts


# --- one rank ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "parts"),
    [
        ([3, 1, 2], 100, [[1, 2, 0]]),
        ([3, 1, 2], 4, [[1, 2], [0]]),  # 1 and 2 are 4 when padded
        ([2, 2, 2, 2], 4, [[0, 1], [2, 3]]),
        ([9, 1, 1], 4, [[1, 2], [0]]),  # longer than the budget: alone
        ([9, 8], 4, [[1], [0]]),
        ([5], 1, [[0]]),
        ([2, 1, 2, 1, 2], 4, [[1, 3], [0, 2], [4]]),  # rows of equal length keep their order
        ([], 4, []),
    ],
)
def test_padded_parts_by_hand(lengths, max_tokens, parts):
    assert parts_of(rows(lengths), max_tokens, packed=False) == parts


@pytest.mark.parametrize(
    ("max_tokens", "parts"),
    [
        (100, [[1, 3, 0, 2, 4]]),  # all 2 + 4 + 1 + 2 and 5 + 3 + 1 of them
        (18, [[1, 3, 0, 2, 4]]),
        (17, [[1, 3], [0, 2, 4]]),  # whole prompts of 8 and 10
        (10, [[1, 3], [0, 2, 4]]),
        (9, [[4], [1, 3], [0, 2]]),  # 5 + 1, 8, 5 + 4
        (8, [[4], [1, 3], [0], [2]][:0] or [[2, 4], [0], [1, 3]]),
        (1, [[3], [2], [4], [1], [0]]),
    ],
)
def test_packed_parts_by_hand(max_tokens, parts):
    """Prompts of 5 and 2 tokens; responses of 3, 4, 1, 2 and 1, to them in turn and the last to the first."""
    batch = rows_of([5, 2], [0, 1, 0, 1, 0], [3, 4, 1, 2, 1])
    assert parts_of(batch, max_tokens, packed=True) == parts


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("num_prompts", [1, 4, 60])
@pytest.mark.parametrize("max_tokens", [1, 50, 300, 10_000])
def test_every_row_is_in_one_part_that_holds_the_budget(max_tokens, num_prompts, packed):
    batch = drawn(60, num_prompts)
    parts = parts_of(batch, max_tokens, packed=packed)
    assert sorted(itertools.chain(*parts)) == list(range(60))
    assert all(num_tokens(batch, part, packed=packed) <= max_tokens for part in parts if len(part) > 1)


@pytest.mark.parametrize("max_tokens", [42, 100, 10_000])
def test_a_prompt_that_fits_is_read_once(max_tokens):
    batch = drawn(60, 20)
    prompts = batch.prompt_of_row.tolist()
    parts = parts_of(batch, max_tokens, packed=True)
    for prompt in set(prompts):
        whole = [row for row, other in enumerate(prompts) if other == prompt]
        passes = [part for part in parts if set(part) & set(whole)]
        least = -(-(num_tokens(batch, whole, packed=True)) // max_tokens)
        assert len(passes) == 1 if least == 1 else len(passes) >= least


@pytest.mark.parametrize("packed", [False, True])
def test_parts_are_filled(packed):
    """The first row of the next part would not have fitted, where each row is a unit."""
    batch = rows_of([3] * 200, list(range(200)), drawn(200, 1).response_lengths.tolist())
    parts = parts_of(batch, 100, packed=packed)
    assert len(parts) > 10
    for part, after in itertools.pairwise(parts):
        assert num_tokens(batch, [*part, after[0]], packed=packed) > 100


@pytest.mark.parametrize(
    ("packed", "max_tokens", "parts"),
    [
        (False, 1, [[1], [0]]),
        (False, 31, [[1], [0]]),
        (False, 32, [[1, 0]]),  # four rows of 2 + 6 tokens
        (True, 18, [[1], [0]]),
        (True, 19, [[1, 0]]),  # 2 + 6 + 1 and 3 + 2 + 5
    ],
)
def test_pairs_by_hand(packed, max_tokens, parts):
    """A prompt of 2 with responses of 6 and 1, one of 3 with responses of 2 and 5: rows of 8 and 3, of 5 and 8."""
    chosen, rejected = rows_of([2, 3], [0, 1], [6, 2]), rows_of([2, 3], [0, 1], [1, 5])
    pairs = PreferencePairs(chosen=chosen, rejected=rejected, margin=torch.zeros(2))
    found = parts_of(pairs, max_tokens, packed=packed)
    assert sorted(map(sorted, found)) == sorted(map(sorted, parts))


# --- several ranks ----------------------------------------------------------------------------------------------------


def test_padded_parts_of_ranks_by_hand():
    """Dealt: 9 and 2 and 1 to rank 0, 8 and 3 to rank 1, 7 and 5 to rank 2; each cut at 10 tokens, padded."""
    ranks = all_parts(rows([5, 1, 9, 3, 7, 2, 8]), TokenBudget(max_tokens=10), 3)
    assert [parts for parts, _ in ranks] == [[[1, 5], [2]], [[3], [6]], [[0], [4]]]
    assert [idle for _, idle in ranks] == [[], [], []]


def test_packed_parts_of_ranks_by_hand():
    """Prompts of 4, 2 and 1 with two responses each: 4 + 3 + 3 = 10 to rank 0, 2 + 2 + 2 and 1 + 1 + 1 to rank 1."""
    batch = rows_of([4, 2, 1], [0, 0, 1, 1, 2, 2], [3, 3, 2, 2, 1, 1])
    ranks = all_parts(batch, TokenBudget(max_tokens=100, packed=True), 2)
    assert ranks == [([[0, 1]], []), ([[4, 5, 2, 3]], [])]
    ranks = all_parts(batch, TokenBudget(max_tokens=8, packed=True), 2)
    assert sorted(itertools.chain(*(itertools.chain(*parts) for parts, _ in ranks))) == list(range(6))


def test_the_rows_of_a_prompt_are_split_where_they_exceed_the_share_of_a_rank():
    """One prompt of 2 tokens with four responses of 4: 18 tokens, so 9 a rank; each reads the prompt again."""
    batch = rows_of([2], [0] * 4, [4] * 4)
    ranks = all_parts(batch, TokenBudget(max_tokens=1000, packed=True), 2)
    assert sorted(row for parts, _ in ranks for part in parts for row in part) == list(range(4))
    assert all(parts for parts, _ in ranks)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("num_prompts", [1, 5, 30])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 40])
def test_all_ranks_make_equally_many_passes_over_every_row_once(world_size, num_prompts, packed):
    batch = drawn(30, num_prompts)
    ranks = all_parts(batch, TokenBudget(max_tokens=100, packed=packed), world_size)
    assert len({len(parts) + len(idle) for parts, idle in ranks}) == 1
    assert any(not idle for _, idle in ranks)
    parts = [part for mine, _ in ranks for part in mine]
    assert sorted(itertools.chain(*parts)) == list(range(30))
    assert all(num_tokens(batch, part, packed=packed) <= 100 for part in parts)
    idle = [row for _, mine in ranks for row in mine]
    assert all(len(row) == 1 for row in idle)
    assert len(idle) >= max(0, world_size - 30)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_no_rank_has_more_than_its_share_and_one_unit(world_size, packed):
    """The rule of the largest first: a unit is at most a share, or one row."""
    batch = drawn(60, 6)
    loads = [
        sum(num_tokens(batch, part, packed=True) if packed else sum(batch.num_tokens[part].tolist()) for part in parts)
        for parts, _ in all_parts(batch, TokenBudget(max_tokens=10**6, packed=packed), world_size)
    ]
    share, longest = sum(loads) / world_size, int(batch.num_tokens.max())
    assert max(loads) <= share + (max(share, longest) if packed else longest)


def test_a_filler_is_the_shortest_row():
    """9 and 2 to rank 0, in two passes; 9 to rank 1, which has nothing for the second."""
    ranks = all_parts(rows([9, 2, 9]), TokenBudget(max_tokens=9), 2)
    assert ranks == [([[1], [0]], []), ([[2]], [[1]])]


def test_rows_are_dealt_on_the_cpu_wherever_tensors_are_made_by_default():
    batch = rows([3, 1, 2])
    with torch.device("meta"):  # which holds no numbers
        parts, _ = parts_of_rank(batch, TokenBudget(max_tokens=100), rank=0, world_size=2)
    assert [part.tolist() for part in parts] == [[0]]


def test_no_rows_make_no_passes():
    for packed in (False, True):
        none = drawn(5, 2).select(torch.tensor([], dtype=torch.long))
        assert all_parts(none, TokenBudget(max_tokens=10, packed=packed), 2) == [([], []), ([], [])]


# --- answers ----------------------------------------------------------------------------------------------------------


def test_row_order_by_hand():
    """Answers of unequal width are padded."""
    answers = [
        TokenOutputs(named={"values": torch.tensor([[2.0, 2.5], [0.0, 0.5]])}),
        TokenOutputs(named={"values": torch.tensor([[1.0]])}),
    ]
    outputs = in_row_order(answers, [torch.tensor([2, 0]), torch.tensor([1])])
    assert outputs.values.tolist() == [[0, 0.5], [1, 0], [2, 2.5]]


# --- less memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "smaller"),
    [
        ([3, 1, 2], 9, 4),
        ([3, 1, 2], 10**6, 7),  # 15 would hold them all
        ([9, 9], 20, 10),
        ([9, 1, 1], 9, 1),  # the long row is alone already
        ([9, 8], 10, None),
        ([1], 8192, None),
        ([], 8192, None),
    ],
)
def test_a_budget_is_halved_until_it_splits_a_batch_further(lengths, max_tokens, smaller):
    batch = rows(lengths)
    found = halved(batch, TokenBudget(max_tokens=max_tokens, setting="here"))
    assert found == (smaller and TokenBudget(max_tokens=smaller, setting="here"))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_halving_ends_with_one_row_in_each_pass(packed, seed):
    batch = drawn(30, 6, seed=seed)
    budget = TokenBudget(max_tokens=10_000, packed=packed)
    while (smaller := halved(batch, budget)) is not None:
        assert len(parts_of(batch, smaller.max_tokens, packed=packed)) > len(
            parts_of(batch, budget.max_tokens, packed=packed)
        )
        budget = smaller
    assert all(len(part) == 1 for part in parts_of(batch, budget.max_tokens, packed=packed))
