"""Supervised examples: prompts with the responses to imitate, encoded once and dealt in shuffled epochs."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from llmrl.batches import Row, Sequences
from llmrl.data.chat import as_sequences, eos_of, prompt_ids, prompt_problem, response_ids
from llmrl.data.config import ExamplesConfig
from llmrl.data.files import DataError, Rows, kind
from llmrl.data.mixture import by_set, weights_of
from llmrl.data.rows import keep_usable, missing_columns, places_of, read_rows
from llmrl.data.seam import keep_in_template, notes_on_seams
from llmrl.data.source import MixedSource

EncodedExample = tuple[list[int], list[int]]


def read_supervised_rows(config: ExamplesConfig) -> Rows:
    """The rows that a config names, checked."""
    return keep_usable_examples(read_rows(config), config)


def keep_usable_examples(rows: Sequence[Row], config: ExamplesConfig) -> Rows:
    """The rows with a usable prompt and response; see `keep_usable` for the others."""
    return keep_usable(rows, config, lambda row: example_problem(row, config))


def keep_examples_in_template(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, config: ExamplesConfig) -> Rows:
    """The rows whose prompt the chat template takes, with notes on where prompts and responses meet."""
    eos_of(tokenizer)  # refused here, before the model loads
    kept = keep_in_template(rows, [_split(row, config)[0] for row in rows], tokenizer, config)
    kept.notes += notes_on_seams([_split(row, config) for row in kept], tokenizer, config)
    return kept


def encode_examples(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, config: ExamplesConfig
) -> list[EncodedExample]:
    """``(prompt ids, response ids)`` of each row, however long."""
    prompts, responses = zip(*(_split(row, config) for row in rows), strict=True)
    encoded_prompts = prompt_ids(prompts, tokenizer, config, places=places_of(rows))
    return list(zip(encoded_prompts, response_ids(responses, tokenizer, config), strict=True))


def encode_fitting(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, config: ExamplesConfig
) -> tuple[list[tuple[int, EncodedExample]], list[str]]:
    """``(number of the row, (prompt ids, response ids))`` of each row that is not too long, and the places of the
    others.

    Raises:
        DataError: All of them are.
    """
    encoded = list(enumerate(encode_examples(rows, tokenizer, config)))
    kept = [(n, example) for n, example in encoded if sum(map(len, example)) <= config.max_tokens]
    places = places_of(rows)
    dropped = [places[n] for n, example in encoded if sum(map(len, example)) > config.max_tokens]
    if not kept:
        raise DataError(
            f"{config.path}: every one of the {len(rows)} examples is longer than data.max_tokens "
            f"({config.max_tokens}); raise it"
        )
    return kept, dropped


class SupervisedSource(MixedSource[EncodedExample]):
    """Deals supervised examples in shuffled epochs."""

    def __init__(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, config: ExamplesConfig, *, seed: int
    ) -> None:
        fitting = [encode_fitting(part, tokenizer, each) for each, part in by_set(rows, config)]
        sets = [([example for _, example in kept], dropped) for kept, dropped in fitting]
        super().__init__(sets, seed=seed, rows=rows, weights=weights_of(config))

    def next(self, num_examples: int) -> Sequences:
        """The next examples as one batch."""
        return as_sequences(*zip(*self.take(num_examples), strict=True))


def example_problem(row: Row, config: ExamplesConfig) -> str | None:
    """Why a row is no prompt with a response; None if it is one."""
    if config.prompt_column not in row:
        has_messages = any(isinstance(value, list) for value in row.values())  # which may end with a response
        return missing_columns(row, config, "prompt_column", *(() if has_messages else ("response_column",)))
    if _brings_response(row, config) and config.response_column in row:
        return f"two responses: {config.prompt_column!r} ends with one and {config.response_column!r} is another"
    if not _brings_response(row, config) and config.response_column not in row:
        return missing_columns(row, config, "response_column")
    prompt, response = _split(row, config)
    if problem := prompt_problem(prompt):
        return f"{config.prompt_column!r} {problem}"
    if not isinstance(response, str):
        return f"its response must be a text, not {kind(response)}"
    return None if response.strip() else "its response is an empty text"


def _brings_response(row: Row, config: ExamplesConfig) -> bool:
    match row[config.prompt_column]:
        case [*_, {"role": "assistant", "content": _}]:
            return True
    return False


def _split(row: Row, config: ExamplesConfig) -> tuple[Any, Any]:
    """``(prompt, response)`` of a row, unchecked: see `example_problem`."""
    prompt = row[config.prompt_column]
    if _brings_response(row, config):
        return prompt[:-1], prompt[-1]["content"]
    return prompt, row[config.response_column]
