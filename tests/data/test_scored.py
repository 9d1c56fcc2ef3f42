"""Rows with scores, and how they are dealt."""

import json

import pytest
import torch

from llmrl.data.config import ScoredDataConfig
from llmrl.data.files import DataError
from llmrl.data.scored import ScoredSource, read_scored_rows
from tests.models.tiny import make_tokenizer

ROWS = [{"prompt": f"t{n} t4", "response": "t5 " * (n % 3 + 1), "score": n / 2} for n in range(3, 9)]


def source(rows=ROWS, *, tokenizer=None, **settings) -> ScoredSource:
    config = ScoredDataConfig(path="rows.jsonl", template="none", **settings)
    return ScoredSource(rows, tokenizer or make_tokenizer(), config, seed=0)


def written(tmp_path, *rows) -> ScoredDataConfig:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ScoredDataConfig(path=str(tmp_path / "rows.jsonl"))


def test_each_response_keeps_its_score():
    """In shuffled order, and where longer rows were dropped."""
    dealt = source(max_tokens=5)
    assert dealt.dropped == ["row 3", "row 6"]
    batch = dealt.next(dealt.num_rows)
    first = batch.sequences.prompt_ids[batch.sequences.prompt_mask].view(-1, 2)[:, 0]
    assert sorted(first.tolist()) == [3, 4, 6, 7]
    assert torch.equal(batch.scores, first / 2)


def test_a_part_of_a_batch_is_its_rows():
    batch = source().next(6)
    part = batch.select(torch.tensor([4, 1]))
    assert torch.equal(part.scores, batch.scores[[4, 1]])
    assert torch.equal(part.sequences.response_ids, batch.sequences.response_ids[[4, 1]])
    assert torch.equal(part.num_tokens, batch.num_tokens[[4, 1]])


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({}, "'score'"),
        ({"score": "good"}, "'score' must be a number, not"),
        ({"score": True}, "'score' must be a number, not"),
        ({"score": None}, "'score' must be a number, not"),
        ({"score": float("nan")}, r"'score' \(nan\) must be finite"),
    ],
)
def test_a_row_without_a_usable_score_is_refused(tmp_path, row, problem):
    good = {"prompt": "a", "response": "b", "score": 1}
    assert [row["score"] for row in read_scored_rows(written(tmp_path, good))] == [1]
    with pytest.raises(DataError, match=problem):
        read_scored_rows(written(tmp_path, good, {"prompt": "a", "response": "b", **row}))


def test_every_missing_column_is_named_at_once(tmp_path):
    with pytest.raises(DataError) as error:
        read_scored_rows(written(tmp_path, {"query": "a"}))
    line = str(error.value).splitlines()[1]
    assert [name in line for name in ("'prompt'", "'response'", "'score'")] == [True, True, True]
