"""Scored responses: what a critic is trained on before PPO, encoded once and dealt in shuffled epochs."""

import math
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from llmrl.batches import Row, ScoredResponses
from llmrl.data.chat import as_sequences
from llmrl.data.config import ScoredDataConfig
from llmrl.data.files import Rows, kind
from llmrl.data.rows import keep_usable, missing_column
from llmrl.data.source import ShuffledSource
from llmrl.data.supervised import EncodedExample, encode_examples, keep_fitting, read_supervised_rows


def read_scored_rows(config: ScoredDataConfig) -> Rows:
    """The rows that a config names, checked."""
    return keep_usable(read_supervised_rows(config), config, lambda row: _score_problem(row, config))


class ScoredSource(ShuffledSource[tuple[EncodedExample, float]]):
    """Deals scored responses in shuffled epochs."""

    def __init__(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, config: ScoredDataConfig, *, seed: int
    ) -> None:
        encoded = keep_fitting(encode_examples(rows, tokenizer, config), config)
        kept = [(example, float(rows[number][config.score_column])) for number, example in encoded]
        super().__init__(kept, num_dropped=len(rows) - len(kept), seed=seed, rows=rows)

    def next(self, num_responses: int) -> ScoredResponses:
        """The next responses as one batch."""
        examples, scores = zip(*self.take(num_responses), strict=True)
        return ScoredResponses(sequences=as_sequences(*zip(*examples, strict=True)), scores=torch.tensor(scores))


def _score_problem(row: Row, config: ScoredDataConfig) -> str | None:
    if config.score_column not in row:
        return missing_column(row, config.score_column, "score_column")
    score = row[config.score_column]
    if isinstance(score, bool) or not isinstance(score, int | float):
        return f"{config.score_column!r} must be a number, not {kind(score)}"
    return None if math.isfinite(score) else f"{config.score_column!r} ({score}) must be finite"
