"""Rewards that are functions: of the user, in a file or a module, or the rules that come with llmrl.

A function is called with keyword arguments, limited to those that its signature names:

    prompts     list, each row's prompt as the user wrote it: text or chat messages
    responses   list[str], decoded, without special tokens
    <column>    list, for every data column by its name; columns named as the two above are hidden by them

All lists have one entry for each response, in the same order. It returns one number for each response, or None where
a response cannot be scored. ``async def`` functions wait for each other's answers together.
"""

import asyncio
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmrl.experience import Rollout, Row, Scores, Sequences
from llmrl.rewards.config import RewardConfig
from llmrl.rewards.loading import Function, select_columns

_LARGEST_SCORE = torch.finfo(torch.float32).max


class RewardError(RuntimeError):
    """A reward function that failed; the message says which one, on which row, and what was expected of it."""


class FunctionReward:
    """Scores responses by the weighted sum of what functions return.

    Args:
        config: Names and weights.
        functions: What `load_functions` made of it.
        tokenizer: Decodes the responses.
        prompt_column: The data column that holds the prompt.
    """

    def __init__(
        self,
        config: RewardConfig,
        *,
        functions: Sequence[Function],
        tokenizer: PreTrainedTokenizerBase,
        prompt_column: str,
    ) -> None:
        self.config = config
        self.functions = {setting.name: f for setting, f in zip(config.functions, functions, strict=True)}
        self.tokenizer = tokenizer
        self.prompt_column = prompt_column

    def __call__(self, rollout: Rollout) -> Scores:
        """The weighted sum as `total`, NaN where any function says None; unweighted scores as `parts`."""
        responses = decode_responses(rollout.sequences, self.tokenizer)
        columns = {name: [row[name] for row in rollout.rows] for name in rollout.rows[0]}
        columns |= {"prompts": columns[self.prompt_column], "responses": responses}
        results = call_functions({name: partial(f, **select_columns(f, columns)) for name, f in self.functions.items()})
        per_token = torch.zeros_like(rollout.sequences.response_ids, dtype=torch.float32)
        scores = [read_scores(name, results[name], rollout.rows, responses) for name in self.functions]
        parts = [per_token.new_tensor(score) for score in scores]
        weights = [setting.weight for setting in self.config.functions]
        return Scores(
            total=torch.stack([weight * part for weight, part in zip(weights, parts, strict=True)]).sum(dim=0),
            per_token=per_token,
            parts=dict(zip(self.config.labels, parts, strict=True)),
        )


def decode_responses(sequences: Sequences, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each response up to its length, without special tokens and otherwise just as the tokens spell it."""
    lengths = sequences.response_lengths.tolist()
    ids = [row[:length] for row, length in zip(sequences.response_ids.tolist(), lengths, strict=True)]
    return tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def call_functions(calls: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """What each call returns, by name: plain functions run one after the other, then all coroutine functions together.

    Raises:
        RewardError: A function raised, and the exception is its cause.
    """
    waiting = {name: call for name, call in calls.items() if inspect.iscoroutinefunction(call)}
    results = {name: _call(name, call) for name, call in calls.items() if name not in waiting}
    return results | asyncio.run(_gather(waiting)) if waiting else results


def read_scores(name: str, result: Any, rows: Sequence[Row], responses: Sequence[str]) -> list[float]:
    """What a function returned as one float for each response, NaN for None.

    Raises:
        RewardError: It is anything but one finite number or None for each response.
    """
    values = result.tolist() if isinstance(result, Tensor | np.ndarray) else result
    expected = f"expected a list of {len(responses)} numbers or None, one for each response"
    if not isinstance(values, list | tuple):
        raise RewardError(f"reward function {name} returned {_shorten(result)} ({type(result).__name__}); {expected}")
    if len(values) != len(responses):
        raise RewardError(f"reward function {name} returned {len(values)} scores; {expected}")
    values = [_plain(value) for value in values]
    for i, value in enumerate(values):
        if not _is_score(value):
            raise RewardError(
                f"reward function {name} returned {_shorten(value)} ({type(value).__name__}) for row {i}; expected a "
                "finite number, or None where the response cannot be scored. "
                f"The row: {_describe(rows[i])}. The response: {_shorten(responses[i])}"
            )
    return [math.nan if value is None else float(value) for value in values]


def _call(name: str, call: Callable[[], Any]) -> Any:
    with _blame(name):
        return call()


async def _await(name: str, call: Callable[[], Any]) -> Any:
    with _blame(name):
        return await call()


async def _gather(calls: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    results = await asyncio.gather(*(_await(name, call) for name, call in calls.items()))
    return dict(zip(calls, results, strict=True))


@contextmanager
def _blame(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise RewardError(f"reward function {name} raised {type(error).__name__}: {error}") from error


def _plain(value: Any) -> Any:
    """Python's own number for a tensor or array without axes and for a number of numpy's."""
    return value.item() if isinstance(value, Tensor | np.ndarray | np.generic) and value.ndim == 0 else value


def _is_score(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and abs(value) <= _LARGEST_SCORE)


def _describe(row: Row) -> str:
    return ", ".join(f"{name}={_shorten(value)}" for name, value in row.items())


def _shorten(value: Any, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."
