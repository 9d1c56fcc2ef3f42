"""Prompts for the rollout: rows that hold a text or messages, encoded once and dealt in shuffled epochs."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from llmrl.batches import Prompts, Row
from llmrl.data.chat import padded, prompt_ids, prompt_problem
from llmrl.data.config import PromptsConfig
from llmrl.data.files import DataError, Rows
from llmrl.data.mixture import by_set, weights_of
from llmrl.data.rows import keep_usable, missing_columns, places_of, read_rows
from llmrl.data.seam import keep_in_template
from llmrl.data.source import MixedSource

EncodedPrompt = tuple[Row, list[int]]


def read_prompt_rows(config: PromptsConfig) -> Rows:
    """The rows that a config names, checked."""
    return keep_usable_prompts(read_rows(config), config)


def keep_usable_prompts(rows: Sequence[Row], config: PromptsConfig) -> Rows:
    """The rows with a usable prompt; see `keep_usable` for the others."""
    return keep_usable(rows, config, lambda row: _row_problem(row, config))


def keep_prompts_in_template(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, config: PromptsConfig) -> Rows:
    """The rows whose prompt the chat template takes."""
    return keep_in_template(rows, [row[config.prompt_column] for row in rows], tokenizer, config)


def encode_prompts(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, config: PromptsConfig
) -> tuple[Prompts, list[str]]:
    """``(prompts, dropped)``: the rows in order as one batch, and the places of those longer than `max_prompt_tokens`,
    which are not in it."""
    kept, dropped = _encode(rows, tokenizer, config)
    return _batch(kept), dropped


class ShuffledPrompts(MixedSource[EncodedPrompt]):
    """`PromptSource` of encoded rows, in shuffled epochs."""

    def __init__(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, config: PromptsConfig, *, seed: int
    ) -> None:
        sets = [_encode(part, tokenizer, each) for each, part in by_set(rows, config)]
        super().__init__(sets, seed=seed, rows=rows, weights=weights_of(config))

    def next(self, num_prompts: int) -> Prompts:
        """The next prompts as one batch."""
        return _batch(self.take(num_prompts))

    def all(self) -> Prompts:
        """Every prompt once, in data order; what `next` deals is not changed by it."""
        return _batch(self.examples)


class ShuffledRows(MixedSource[Row]):
    """`PromptSource` of rows whose prompts an environment makes, in shuffled epochs."""

    def __init__(self, rows: Sequence[Row], config: PromptsConfig, *, seed: int) -> None:
        sets = [(part, ()) for _, part in by_set(rows, config)]
        super().__init__(sets, seed=seed, rows=rows, weights=weights_of(config))

    def next(self, num_prompts: int) -> Prompts:
        """The next rows as one batch."""
        return unopened(self.take(num_prompts))


def unopened(rows: Sequence[Row]) -> Prompts:
    """Rows as prompts of a single token, which is not read: an environment makes them."""
    return _batch([(row, [0]) for row in rows])


def _row_problem(row: Row, config: PromptsConfig) -> str | None:
    if missing := missing_columns(row, config, "prompt_column"):
        return missing
    if problem := prompt_problem(row[config.prompt_column]):
        return f"{config.prompt_column!r} {problem}"
    return None


def _encode(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, config: PromptsConfig
) -> tuple[list[EncodedPrompt], list[str]]:
    """Each row with its prompt's ids, and the places of those that are too long."""
    places = places_of(rows)
    ids = prompt_ids([row[config.prompt_column] for row in rows], tokenizer, config, places=places)
    kept = [(row, each) for row, each in zip(rows, ids, strict=True) if len(each) <= config.max_prompt_tokens]
    dropped = [place for place, each in zip(places, ids, strict=True) if len(each) > config.max_prompt_tokens]
    if not kept:
        raise DataError(
            f"{config.path}: every one of the {len(rows)} prompts is longer than data.max_prompt_tokens "
            f"({config.max_prompt_tokens}); raise it"
        )
    return kept, dropped


def _batch(prompts: Sequence[EncodedPrompt]) -> Prompts:
    ids, mask = padded([ids for _, ids in prompts], left=True)
    return Prompts(ids=ids, mask=mask, rows=tuple(row for row, _ in prompts))
