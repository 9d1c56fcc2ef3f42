"""Prompts for the rollout: rows that hold a text or messages, encoded once and dealt in shuffled epochs."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from llmrl.batches import Prompts, Row
from llmrl.data.chat import padded, prompt_ids, prompt_problem
from llmrl.data.config import PromptDataConfig
from llmrl.data.files import Rows
from llmrl.data.rows import DataError, load_config_rows, missing_column, places_of, usable_rows
from llmrl.data.seam import rows_in_template
from llmrl.data.source import ShuffledSource

EncodedPrompt = tuple[Row, list[int]]


def load_prompt_rows(config: PromptDataConfig) -> Rows:
    """The rows that a config names, checked."""
    return check_prompt_rows(load_config_rows(config), config)


def check_prompt_rows(rows: Sequence[Row], config: PromptDataConfig) -> Rows:
    """The rows with a usable prompt; see `usable_rows` for the others."""
    return usable_rows(rows, config, lambda row: _row_problem(row, config.prompt_column))


def fit_prompt_rows(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, config: PromptDataConfig) -> Rows:
    """The rows whose prompt the chat template takes."""
    return rows_in_template(rows, [row[config.prompt_column] for row in rows], tokenizer, config)


def encode_prompts(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, config: PromptDataConfig
) -> tuple[Prompts, int]:
    """``(prompts, num_dropped)``: the rows in order as one batch, less those longer than `max_prompt_tokens`."""
    kept = _encode(rows, tokenizer, config)
    return _batch(kept), len(rows) - len(kept)


class PromptSource(ShuffledSource[EncodedPrompt]):
    """Deals prompts in shuffled epochs."""

    def __init__(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, config: PromptDataConfig, *, seed: int
    ) -> None:
        kept = _encode(rows, tokenizer, config)
        super().__init__(kept, num_dropped=len(rows) - len(kept), seed=seed, rows=rows)

    def next(self, num_prompts: int) -> Prompts:
        """The next prompts as one batch."""
        return _batch(self.take(num_prompts))


def _row_problem(row: Row, column: str) -> str | None:
    if column not in row:
        return missing_column(row, column, "prompt_column")
    if problem := prompt_problem(row[column]):
        return f"{column!r} {problem}"
    return None


def _encode(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, config: PromptDataConfig) -> list[EncodedPrompt]:
    """Each row with its prompt's ids, less those that are too long."""
    prompts = [row[config.prompt_column] for row in rows]
    encoded = zip(rows, prompt_ids(prompts, tokenizer, config, places=places_of(rows)), strict=True)
    kept = [(row, ids) for row, ids in encoded if len(ids) <= config.max_prompt_tokens]
    if not kept:
        raise DataError(
            f"{config.path}: every one of the {len(rows)} prompts is longer than data.max_prompt_tokens "
            f"({config.max_prompt_tokens}); raise it"
        )
    return kept


def _batch(prompts: Sequence[EncodedPrompt]) -> Prompts:
    ids, mask = padded([ids for _, ids in prompts], left=True)
    return Prompts(ids=ids, mask=mask, rows=tuple(row for row, _ in prompts))
