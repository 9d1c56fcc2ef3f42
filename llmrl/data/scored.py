"""Scored responses: what a critic is trained on before PPO, encoded once and dealt in shuffled epochs."""

import math
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from llmrl.batches import Row, ScoredResponses
from llmrl.data.chat import as_sequences
from llmrl.data.config import ScoredDataConfig
from llmrl.data.files import Rows, kind
from llmrl.data.rows import keep_usable, missing_columns, places_of, read_rows
from llmrl.data.source import ShuffledSource
from llmrl.data.supervised import EncodedExample, encode_examples, example_problem, keep_fitting


def read_scored_rows(config: ScoredDataConfig) -> Rows:
    """The rows that a config names, checked."""
    return keep_usable(read_rows(config), config, lambda row: _row_problem(row, config))


class ScoredSource(ShuffledSource[tuple[EncodedExample, float]]):
    """Deals scored responses in shuffled epochs."""

    def __init__(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, config: ScoredDataConfig, *, seed: int
    ) -> None:
        encoded, dropped = keep_fitting(encode_examples(rows, tokenizer, config), places_of(rows), config)
        kept = [(example, float(rows[number][config.score_column])) for number, example in encoded]
        super().__init__(kept, dropped=dropped, seed=seed, rows=rows)

    def next(self, num_responses: int) -> ScoredResponses:
        """The next responses as one batch."""
        examples, scores = zip(*self.take(num_responses), strict=True)
        return ScoredResponses(sequences=as_sequences(*zip(*examples, strict=True)), scores=torch.tensor(scores))


def _row_problem(row: Row, config: ScoredDataConfig) -> str | None:
    return "; ".join(filter(None, (example_problem(row, config), _score_problem(row, config)))) or None


def _score_problem(row: Row, config: ScoredDataConfig) -> str | None:
    if config.score_column not in row:
        return missing_columns(row, config, "score_column")
    score = row[config.score_column]
    if isinstance(score, bool) or not isinstance(score, int | float):
        return f"{config.score_column!r} must be a number, not {kind(score)}"
    return None if math.isfinite(score) else f"{config.score_column!r} ({score}) must be finite"
