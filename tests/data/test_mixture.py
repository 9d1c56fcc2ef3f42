"""Mixtures: shares of every stretch, sets dealt in epochs of their own, exact resume."""

import json
from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from llmrl.data.config import (
    MixedRowsConfig,
    PreferenceDataConfig,
    PromptDataConfig,
    PromptsConfig,
    SupervisedDataConfig,
)
from llmrl.data.files import DataError, FileRow, Rows
from llmrl.data.mixture import by_set, dealt_after, keep_in_each, mix, next_set, sets_of, weights_of, whole_weights
from llmrl.data.preferences import PairSource
from llmrl.data.prompts import ShuffledPrompts
from llmrl.data.rows import keep_usable
from llmrl.data.source import ShuffledSource
from llmrl.data.supervised import SupervisedSource


def stream(weights, length):
    dealt = [0] * len(weights)
    numbers = []
    for _ in range(length):
        numbers.append(next_set(dealt, weights))
        dealt[numbers[-1]] += 1
    return numbers


@pytest.mark.parametrize(
    ("weights", "whole"),
    [
        ((1.0,), [1]),
        ((1.0, 0.5), [2, 1]),
        ((1.0, 0.1, 0.3), [10, 1, 3]),
        ((1.0, 2.0, 4.0), [1, 2, 4]),
        ((3.0, 3.0), [1, 1]),
        ((1.0, 1 / 3), [3, 1]),
        ((1.0, 2 / 3, 1 / 7), [21, 14, 3]),
        ((1.0, 0.123457), [10**6, 123457]),
        ((1.0, 1e-8), [10**8, 1]),
    ],
)
def test_weights_in_whole_numbers(weights, whole):
    assert whole_weights(weights) == whole


def test_the_order_of_sets_by_hand():
    assert stream([2, 1], 6) == [0, 0, 1, 0, 0, 1]  # after the first, 2 / 2 and 1 / 1: the earlier set
    assert stream([1, 1], 4) == [0, 1, 0, 1]
    assert stream([1], 3) == [0, 0, 0]
    assert stream([5, 1], 6) == [0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("weights", [[1], [2, 1], [10, 1, 3], [1, 1, 1, 1], [97, 1, 1, 1], [7, 5, 3, 2, 1, 1], [1, 50]])
def test_each_beginning_has_each_set_in_its_share_to_less_than_a_row(weights):
    numbers = stream(weights, 3 * sum(weights))
    for t in range(len(numbers) + 1):
        counts = [numbers[:t].count(i) for i in range(len(weights))]
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - Fraction(t * weight, sum(weights))) < 1
        assert dealt_after(t, weights) == counts


def shuffled(sizes=(3, 2), weights=(1.0, 0.5), seed=3):
    examples = [(number, n) for number, size in enumerate(sizes) for n in range(size)]
    return ShuffledSource(examples, seed=seed, sizes=sizes, weights=weights)


def test_each_set_is_dealt_in_epochs_of_its_own():
    dealt = shuffled().take(60)
    assert [number for number, _ in dealt] == stream([2, 1], 60)
    for number, size in ((0, 3), (1, 2)):
        own = [n for its_number, n in dealt if its_number == number]
        epochs = [own[first : first + size] for first in range(0, len(own) - size + 1, size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 1


def test_sets_of_one_size_have_orders_of_their_own():
    dealt = shuffled(sizes=(50, 50), weights=(1.0, 1.0)).take(100)
    first, second = ([n for number, n in dealt if number == which] for which in (0, 1))
    assert first != second


def test_the_first_set_is_dealt_as_if_it_were_alone():
    mixed = [n for number, n in shuffled(sizes=(7, 4)).take(90) if number == 0]
    alone = [n for _, n in shuffled(sizes=(7,), weights=(1.0,)).take(len(mixed))]
    assert mixed == alone == ShuffledSource(range(7), seed=3).take(len(mixed))


def test_the_order_does_not_depend_on_the_batch():
    one, many = shuffled(), shuffled()
    assert [row for _ in range(30) for row in one.take(1)] == many.take(11) + many.take(17) + many.take(2)


@pytest.mark.parametrize("done", [0, 1, 5, 16, 100])
def test_resume_goes_on_where_it_was(done):
    ours, resumed = shuffled(), shuffled()
    ours.take(done)
    resumed.take(2)
    resumed.load_state_dict(json.loads(json.dumps(ours.state_dict())))
    assert [resumed.take(5) for _ in range(4)] == [ours.take(5) for _ in range(4)]


# --- rows -------------------------------------------------------------------------------------------------------------

CODE = MixedRowsConfig(path="code.jsonl", weight=0.5, rename_columns={"task": "prompt"}, num_rows=9)


def config(**settings):
    return PromptDataConfig(path="math.jsonl", mixed_with=(CODE,), **settings)


def test_a_set_has_rows_of_its_own_and_all_else_from_the_section():
    first, second = sets_of(config(system_prompt="s", num_rows=4, subset="main"))
    assert first == PromptDataConfig(path="math.jsonl", system_prompt="s", num_rows=4, subset="main")
    assert second == PromptDataConfig(
        path="code.jsonl", system_prompt="s", num_rows=9, rename_columns={"task": "prompt"}, subset=None
    )
    assert weights_of(config()) == (1.0, 0.5)


@pytest.mark.parametrize("alone", [PromptDataConfig(path="d.jsonl"), PromptsConfig(path="d.jsonl")])
def test_one_set_is_as_it_was(alone):
    assert (sets_of(alone), weights_of(alone)) == ((alone,), (1.0,))
    rows = Rows([FileRow({"prompt": "a"}, "line 1")], ["note"])
    assert mix([rows], alone) is rows
    assert rows[0] == {"prompt": "a"}
    assert by_set(rows, alone) == [(alone, rows)]


def mixed(**settings):
    first = Rows([FileRow({"prompt": text}, f"line {n}") for n, text in enumerate("abc", 1)], ["first"])
    second = Rows([FileRow({"prompt": "de", "dataset": "own"}, "line 1"), FileRow({"prompt": "fg"}, "line 2")])
    return mix([first, second], config(**settings))


def test_rows_are_told_apart_by_their_set_unless_they_say_it_themselves():
    rows = mixed()
    assert [row["dataset"] for row in rows] == ["math.jsonl"] * 3 + ["own", "code.jsonl"]
    assert rows.notes == [
        "a mixture, in shares: 0.667 of math.jsonl (3 rows), 0.333 of code.jsonl (2 rows)",
        "math.jsonl: first",
    ]


def test_what_is_wrong_with_a_row_names_its_file():
    def keep(rows, each):
        return keep_usable(rows, each, lambda row: "bad" if row["prompt"] == "fg" else None)

    with pytest.raises(DataError, match=r"^code\.jsonl: 1 bad row\n  line 2: bad"):
        keep_in_each(mixed(), config(), keep)
    dropping = config(skip_bad_rows=True)
    kept = keep_in_each(mixed(), dropping, keep)
    assert [row["prompt"] for row in kept] == ["a", "b", "c", "de"]
    assert kept.notes[-1] == "code.jsonl: dropped 1 of 2 rows: line 2: bad"
    assert [len(rows) for _, rows in by_set(kept, dropping)] == [3, 1]


def test_prompts_of_a_mixture(plain):
    source = ShuffledPrompts(mixed(), plain, config(max_prompt_tokens=2), seed=0)
    numbers = [row["dataset"] != "math.jsonl" for row in source.next(30).rows]
    assert numbers == [bool(number) for number in stream([2, 1], 30)]
    assert [row["prompt"] for row in source.all().rows] == ["a", "b", "c", "de", "fg"]
    with pytest.raises(DataError, match=r"code\.jsonl: every one of the 2 prompts is longer"):
        ShuffledPrompts(mixed(), plain, config(max_prompt_tokens=1), seed=0)


def test_examples_of_a_mixture(plain):
    data = SupervisedDataConfig(path="math.jsonl", mixed_with=(CODE,))
    rows = mixed()
    for row in rows:
        row["response"] = "x"
    source = SupervisedSource(rows, plain, data, seed=0)
    lengths = source.next(6).prompt_mask.sum(dim=1).tolist()
    assert lengths == [1 + number for number in stream([2, 1], 6)]


def test_pairs_of_a_mixture(plain):
    """Pairs that contradict one another within a set are dropped, those of two sets are not; counts are of all sets."""
    data = PreferenceDataConfig(path="math.jsonl", mixed_with=(CODE,))
    rows = mixed()
    contradicting = FileRow(rows[-1], "line 3")
    contradicting.set_number = 1
    rows.append(contradicting)
    for row, better, worse in zip(rows, "yxxxxy", "xyyyyx", strict=True):
        row |= {"chosen": better, "rejected": worse}
    rows[0]["prompt"] = "de"
    source = PairSource(rows, plain, data, seed=0)
    assert (source.counts.rows, source.counts.kept, source.counts.numbers()["contradictions"]) == (6, 4, 2)
    assert source.num_rows == 4
    resumed = PairSource(rows, plain, data, seed=0)
    batch = source.next(6).chosen
    dealt = list(zip(batch.prompt_mask.sum(dim=1).tolist(), plain.batch_decode(batch.response_ids[:, :1]), strict=True))
    sets = stream([2, 1], 6)
    assert [pair for pair, number in zip(dealt, sets, strict=True) if number == 1] == [(2, "x")] * 2
    assert sorted([pair for pair, number in zip(dealt, sets, strict=True) if number == 0][:3]) == [
        (1, "x"), (1, "x"), (2, "y"),
    ]  # fmt: skip
    resumed.load_state_dict(source.state_dict())
    assert torch.equal(resumed.next(5).chosen.prompt_ids, source.next(5).chosen.prompt_ids)
    with pytest.raises(DataError, match=r"^code\.jsonl: no pair is left: .* 1 of 3 pairs: they are longer .*; raise"):
        PairSource(rows, plain, replace(data, max_tokens=3), seed=0)


def test_the_path_of_a_set_must_not_be_empty():
    with pytest.raises(ValueError, match=r'^data\.mixed_with\.<n>\.path \(""\) must name a file'):
        replace(CODE, path="")
    with pytest.raises(ValueError, match=r"^data\.mixed_with\.<n>\.weight \(0\.0\) must be greater than 0"):
        replace(CODE, weight=0.0)
