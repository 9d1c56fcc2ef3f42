"""Supervised examples: prompts with the responses to imitate, encoded once and dealt in shuffled epochs.

A conversation of which every turn of the assistant is learned (`data.train_on: all`) is one response: its turns, each
as a model would sample it, and between them what the chat template writes there, which is read only.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from llmrl.batches import Row, Sequences
from llmrl.data.chat import as_sequences, eos_of, prompt_ids, prompt_problem, response_ids
from llmrl.data.config import ConversationsConfig, ExamplesConfig
from llmrl.data.files import DataError, Rows, kind
from llmrl.data.mixture import by_set, weights_of
from llmrl.data.rendering import Rendering, Rewritten
from llmrl.data.rows import keep_usable, missing_column, places_of, read_rows
from llmrl.data.seam import keep_in_template, notes_on_seams
from llmrl.data.source import MixedSource

EncodedExample = tuple[list[int], list[int]]
ChosenExample = tuple[list[int], list[int], list[bool]]
Encoded = TypeVar("Encoded", EncodedExample, ChosenExample)


def read_supervised_rows(config: ExamplesConfig) -> Rows:
    """The rows that a config names, checked."""
    return keep_usable_examples(read_rows(config), config)


def keep_usable_examples(rows: Sequence[Row], config: ExamplesConfig) -> Rows:
    """The rows with a usable prompt and response; see `keep_usable` for the others."""
    return keep_usable(rows, config, lambda row: _row_problem(row, config))


def keep_examples_in_template(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, config: ExamplesConfig) -> Rows:
    """The rows whose prompt the chat template takes, with notes on where prompts and responses meet."""
    eos_of(tokenizer)  # refused here, before the model loads
    kept = keep_in_template(rows, [_split(row, config)[0] for row in rows], tokenizer, config)
    if learns_every_turn(config):
        rendering = Rendering(tokenizer, config)
        kept = Rows(
            keep_usable(kept, config, lambda row: _turns_problem(row, rendering, tokenizer, config)), kept.notes
        )
    kept.notes += notes_on_seams([_split(row, config) for row in kept], tokenizer, config)
    return kept


def encode_examples(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, config: ExamplesConfig
) -> list[EncodedExample]:
    """``(prompt ids, response ids)`` of each row, however long."""
    prompts, responses = zip(*(_split(row, config) for row in rows), strict=True)
    encoded_prompts = prompt_ids(prompts, tokenizer, config, places=places_of(rows))
    return list(zip(encoded_prompts, response_ids(responses, tokenizer, config), strict=True))


def encode_turns(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, config: ExamplesConfig
) -> list[ChosenExample]:
    """``(prompt ids, response ids, which of them are learned)`` of each row, however long."""
    if not learns_every_turn(config):
        return [(prompt, ids, [True] * len(ids)) for prompt, ids in encode_examples(rows, tokenizer, config)]
    rendering = Rendering(tokenizer, config)
    return [_encode_conversation(row, rendering, tokenizer, config) for row in rows]


def keep_fitting(examples: Sequence[Encoded], config: ExamplesConfig) -> list[tuple[int, Encoded]]:
    """``(number of the row, example)`` of each row that is not too long.

    Raises:
        DataError: All of them are.
    """
    kept = [
        (number, example)
        for number, example in enumerate(examples)
        if len(example[0]) + len(example[1]) <= config.max_tokens
    ]
    if not kept:
        raise DataError(
            f"{config.path}: every one of the {len(examples)} examples is longer than data.max_tokens "
            f"({config.max_tokens}); raise it"
        )
    return kept


class SupervisedSource(MixedSource[ChosenExample]):
    """Deals supervised examples in shuffled epochs."""

    def __init__(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, config: ExamplesConfig, *, seed: int
    ) -> None:
        sets = [
            [example for _, example in keep_fitting(encode_turns(part, tokenizer, each), each)]
            for each, part in by_set(rows, config)
        ]
        super().__init__(sets, seed=seed, rows=rows, weights=weights_of(config))

    def next(self, num_examples: int) -> Sequences:
        """The next examples as one batch."""
        return as_sequences(*zip(*self.take(num_examples), strict=True))


def _row_problem(row: Row, config: ExamplesConfig) -> str | None:
    if config.prompt_column not in row:
        return missing_column(row, config.prompt_column, "prompt_column")
    if _brings_response(row, config) and config.response_column in row:
        return f"two responses: {config.prompt_column!r} ends with one and {config.response_column!r} is another"
    if not _brings_response(row, config) and config.response_column not in row:
        return missing_column(row, config.response_column, "response_column")
    prompt, response = _split(row, config)
    if problem := prompt_problem(prompt):
        return f"{config.prompt_column!r} {problem}"
    if not isinstance(response, str):
        return f"its response must be a text, not {kind(response)}"
    return None if response.strip() else "its response is an empty text"


def learns_every_turn(config: ExamplesConfig) -> bool:
    """Whether all turns of the assistant in a conversation are learned."""
    return isinstance(config, ConversationsConfig) and config.train_on == "all"


def _encode_conversation(
    row: Row, rendering: Rendering, tokenizer: PreTrainedTokenizerBase, config: ExamplesConfig
) -> ChosenExample:
    messages = _conversation(row, config)
    if messages is None:
        ((prompt, ids),) = encode_examples([row], tokenizer, config)
        return prompt, ids, [True] * len(ids)
    prompt, *between = rendering.before_each_turn(messages, last_id=eos_of(tokenizer))
    turns = response_ids([each["content"] for each in messages if each["role"] == "assistant"], tokenizer, config)
    ids, chosen = list(turns[0]), [True] * len(turns[0])
    for read, turn in zip(between, turns[1:], strict=True):
        ids += read + turn
        chosen += [False] * len(read) + [True] * len(turn)
    return prompt, ids, chosen


def _turns_problem(
    row: Row, rendering: Rendering, tokenizer: PreTrainedTokenizerBase, config: ExamplesConfig
) -> str | None:
    """Why the turns of a conversation cannot all be learned; None if they can."""
    messages = _conversation(row, config)
    if messages is None:
        return None
    turns = [message for message in messages if message["role"] == "assistant"]
    if messages[0]["role"] == "assistant":
        return f"{config.prompt_column!r} begins with the assistant's message, to which there is no prompt"
    if not all(turn["content"].strip() for turn in turns):
        return f"{config.prompt_column!r} has an empty message of the assistant"
    if any(turn.get("tool_calls") for turn in turns):
        return f"{config.prompt_column!r} has tool_calls; write them into the content, as the model is to write them"
    try:
        rendering.before_each_turn(messages, last_id=eos_of(tokenizer))
    except Rewritten as problem:
        return (
            f"the chat template {problem.what}, so a model that wrote all of its turns would not have read this; "
            'set data.train_on to "last", or take a template that leaves earlier turns as they are'
        )
    except DataError as problem:
        return str(problem)
    return None


def _conversation(row: Row, config: ExamplesConfig) -> list[Any] | None:
    """The messages of a row, its response included; None where its prompt is a text."""
    prompt = row[config.prompt_column]
    if isinstance(prompt, str):
        return None
    if not _brings_response(row, config):
        return [*prompt, {"role": "assistant", "content": row[config.response_column]}]
    return prompt


def _brings_response(row: Row, config: ExamplesConfig) -> bool:
    match row[config.prompt_column]:
        case [*_, {"role": "assistant", "content": _}]:
            return True
    return False


def _split(row: Row, config: ExamplesConfig) -> tuple[Any, Any]:
    """``(prompt, response)`` of a row, unchecked: see `_row_problem`."""
    prompt = row[config.prompt_column]
    if _brings_response(row, config):
        return prompt[:-1], prompt[-1]["content"]
    return prompt, row[config.response_column]
