"""Rewards that are functions: of the user, in a file or a module, or the rules that come with llmrl.

A function is called with keyword arguments, limited to those that its signature names:

    prompts       list, each row's prompt as the user wrote it: text or chat messages
    responses     list[str], decoded, without special tokens
    completions   the same in the form of the prompt: text, or [{"role": "assistant", "content": text}]
    tokens        list[list[str]], each response's tokens, each decoded by itself, special ones by their names
    <column>      list, for every data column by its name, None for a row that lacks it; a column named as one of the
                  above is not handed over, and every row must have the columns whose parameters have no default

All lists have one entry for each response, in the same order, and are the function's own, however it changes them. All
responses of a group are in the same call. What a function returns has an entry for each response too, one of these:

    0.5                         a number: the score of the response
    None                        the function does not score this response: it is left out of the response's sum; a
                                response that no function with a weight scores counts as unscored
    [0.0, 0.5, 1.0]             a number for each token of the response, its EOS included
    [(7, 0.5), (19, 1.0)]       pairs of a character offset into the response and a number, for the token that completes
                                the character there; the offset after the last character means the last token

Awaitables, such as the results of ``async def`` functions, are awaited together, in one event loop for all calls of a
run: a connection that is kept open stays usable.
"""

import asyncio
import inspect
import math
import time
from collections.abc import Awaitable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmrl.batches import Rollout, Row, Scores, Sequences
from llmrl.rewards.combine import sum_of_known
from llmrl.rewards.config import RewardConfig
from llmrl.rewards.event_loop import run_in_loop
from llmrl.rewards.loading import Function, select_columns, takes
from llmrl.rewards.per_token import Spelling, is_number, spell_responses, token_texts
from llmrl.user_code import describe_exception

QUICK_S = 0.1
"""A function that failed within this time is called again row by row, to find the row on which it fails, unless the
failure is that of a connection or a file."""
SEARCH_S = 1.0
"""Time limit of that search."""


class RewardError(RuntimeError):
    """A reward function that failed; the message says which one, on which row, and what was expected of it."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """Arguments of the reward functions for one rollout."""

    number: int
    """Number of the call: 1 for the first rollout."""
    rows: Sequence[Row]
    """The data row of each response."""
    columns: Mapping[str, list[Any]]
    """Columns that functions can take, by name."""
    spellings: Sequence[Spelling]
    """The tokens of each response."""

    @property
    def num_responses(self) -> int:
        return len(self.rows)

    @property
    def expected(self) -> str:
        """What a function must return, for messages."""
        return f"expected a list of {self.num_responses} numbers or None, one for each response"

    def only(self, row: int) -> "Call":
        """The same call for a single row."""
        columns = {name: [column[row]] for name, column in self.columns.items()}
        return Call(number=self.number, rows=[self.rows[row]], columns=columns, spellings=[self.spellings[row]])

    def describe(self, row: int) -> str:
        """A row and the response to it, for messages."""
        columns = ", ".join(f"{name}={_shorten(value)}" for name, value in self.rows[row].items())
        return f"The row: {columns}. The response: {_shorten(self.columns['responses'][row])}"


@dataclass(frozen=True, kw_only=True)
class GivenScores:
    """Scores that one function gave."""

    whole: list[float]
    """Score of each response as a whole: NaN where it cannot be scored, 0 where its tokens got numbers."""
    tokens: list[list[float]]
    """Scores of each response's tokens; empty where the response got a score as a whole."""

    @property
    def in_all(self) -> list[float]:
        return [score + sum(numbers) for score, numbers in zip(self.whole, self.tokens, strict=True)]


class FunctionReward:
    """Scores responses by the weighted sum of what functions return.

    Args:
        config: Names and weights.
        functions: Those of the config, from `load_functions`.
        tokenizer: Decodes the responses.
        prompt_column: The data column that holds the prompt.
        columns: Every data column. A function that takes one gets it in every call, though a row may lack it.
    """

    def __init__(
        self,
        config: RewardConfig,
        *,
        functions: Sequence[Function],
        tokenizer: PreTrainedTokenizerBase,
        prompt_column: str,
        columns: Sequence[str],
    ) -> None:
        self.config = config
        self.functions = {setting.name: f for setting, f in zip(config.functions, functions, strict=True)}
        self.tokenizer = tokenizer
        self.prompt_column = prompt_column
        self.columns = columns
        self.num_calls = 0

    def __call__(self, rollout: Rollout) -> Scores:
        """`total`: weighted sums of scores, without functions that return None; NaN where all with a weight do.
        `per_token`: weighted sums of numbers for tokens. `parts`: score plus numbers of each function, unweighted."""
        call = self._next_call(rollout)
        results = call_functions(self.functions, call)
        given = [read_scores(name, results[name], call) for name in self.functions]
        per_token = torch.zeros_like(rollout.sequences.response_ids, dtype=torch.float32)
        totals = [per_token.new_full((call.num_responses,), math.nan)]
        for setting, scores in zip(self.config.functions, given, strict=True):
            if setting.weight:
                totals.append(setting.weight * totals[0].new_tensor(scores.whole))
                per_token = per_token + setting.weight * _padded(scores.tokens, like=per_token)
        parts = [totals[0].new_tensor(scores.in_all) for scores in given]
        return Scores(
            total=sum_of_known(totals),
            per_token=per_token,
            parts=dict(zip(self.config.function_labels, parts, strict=True)),
        )

    def _next_call(self, rollout: Rollout) -> Call:
        self.num_calls += 1
        spellings = spell_responses(rollout.sequences, self.tokenizer)
        columns = {name: [row.get(name) for row in rollout.rows] for name in self.columns}
        columns["prompts"] = [row[self.prompt_column] for row in rollout.rows]
        columns["responses"] = [spelling.text for spelling in spellings]
        columns["completions"] = [
            spelling.text if isinstance(prompt, str) else [{"role": "assistant", "content": spelling.text}]
            for prompt, spelling in zip(columns["prompts"], spellings, strict=True)
        ]
        if any(takes(function, "tokens") for function in self.functions.values()):
            columns["tokens"] = token_texts([spelling.ids for spelling in spellings], self.tokenizer)
        return Call(number=self.num_calls, rows=rollout.rows, columns=columns, spellings=spellings)


def decode_responses(sequences: Sequences, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each response up to its length, without special tokens and otherwise just as the tokens spell it."""
    return [spelling.text for spelling in spell_responses(sequences, tokenizer)]


def call_functions(functions: Mapping[str, Function], call: Call) -> dict[str, Any]:
    """Results of the functions, by name: called one after another, then awaitables are awaited together.

    Raises:
        RewardError: A function raised, and the exception is its cause.
    """
    with ExitStack() as stack:
        results = {}
        for name, function in functions.items():
            results[name] = _ask(name, function, call)
            if inspect.iscoroutine(results[name]):
                stack.callback(results[name].close)  # where another function raises, it is never awaited
        stack.pop_all()
    waiting = {name: result for name, result in results.items() if inspect.isawaitable(result)}
    answers = [_await(name, functions[name], result, call) for name, result in waiting.items()]
    return results | dict(zip(waiting, _run_together(answers, list(waiting)), strict=True))


def read_scores(name: str, result: Any, call: Call) -> GivenScores:
    """Scores in floats from what a function returned.

    Raises:
        RewardError: For some response it is not a finite number, None, or a list for its tokens.
    """
    values = _plain(result)
    returned = f"reward function {name} returned"
    if not isinstance(values, list | tuple):
        raise RewardError(f"{returned} {_shorten(result)} ({type(result).__name__}); {call.expected}")
    if len(values) != call.num_responses:
        raise RewardError(f"{returned} {len(values)} scores; {call.expected}")
    for row, (value, spelling) in enumerate(zip(values, call.spellings, strict=True)):
        if misfit := _misfit(value, spelling):
            raise RewardError(
                f"{returned} {misfit} for row {row}; expected a finite number, or None where the response cannot be "
                f"scored, or a list: {spelling.expected}. {call.describe(row)}"
            )
    return GivenScores(
        whole=[_score_of_whole(value) for value in values],
        tokens=[
            spelling.land(value) if isinstance(value, list) else []
            for value, spelling in zip(values, call.spellings, strict=True)
        ],
    )


def _ask(name: str, function: Function, call: Call) -> Any:
    started = time.monotonic()
    try:
        return function(**select_columns(function, call.columns))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever it raises, SystemExit included, is the function's failure
        is_quick = time.monotonic() - started < QUICK_S
        is_of_row = not isinstance(error, OSError)  # which a connection or a disk has, whatever the row
        place = _failing_row(function, call, error) if is_quick and is_of_row else _in_call(call)
        raise RewardError(f"reward function {name} {describe_exception(function, error)} {place}") from error


async def _await(name: str, function: Function, answer: Awaitable[Any], call: Call) -> Any:
    try:
        return await answer
    except BaseException as error:
        raise RewardError(f"reward function {name} {describe_exception(function, error)} {_in_call(call)}") from error


def _run_together(answers: Sequence[Awaitable[Any]], names: Sequence[str]) -> list[Any]:
    if not answers:
        return []
    try:
        return run_in_loop(_gather(answers))
    except (RewardError, KeyboardInterrupt):
        raise
    except BaseException as error:
        cause = f"{type(error).__name__}: {error}"
        raise RewardError(f"{cause} while reward function {' and '.join(names)} was awaited") from error


async def _gather(answers: Sequence[Awaitable[Any]]) -> list[Any]:
    tasks = [asyncio.ensure_future(answer) for answer in answers]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()  # where another one raises


def _in_call(call: Call) -> str:
    return f"in call {call.number}; {call.expected}"


def _failing_row(function: Function, call: Call, error: BaseException) -> str:
    """Names the first row that by itself raises an error of this kind: found by calling again, a row at a time."""
    ends = time.monotonic() + SEARCH_S
    for row in range(call.num_responses):
        if time.monotonic() > ends:
            return _in_call(call)
        if _raises(type(error), function, call.only(row)):
            return f"for row {row}; {call.expected}. {call.describe(row)}"
    return f"on the whole batch of call {call.number}, and on no row of it alone; {call.expected}"


def _raises(kind: type[BaseException], function: Function, call: Call) -> bool:
    try:
        function(**select_columns(function, call.columns))
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return isinstance(error, kind)
    return False


def _plain(value: Any) -> Any:
    """Python's own numbers and lists in place of those of torch and numpy, at every depth."""
    value = value.tolist() if isinstance(value, Tensor | np.ndarray | np.generic) else value
    if not isinstance(value, list | tuple):
        return value
    items = [_plain(item) for item in value]
    return tuple(items) if isinstance(value, tuple) else items


def _misfit(value: Any, spelling: Spelling) -> str | None:
    """Why a function's result for a response cannot be used; None if it can."""
    if isinstance(value, list):
        return spelling.misfit(value)
    return None if value is None or is_number(value) else f"{_shorten(value)} ({type(value).__name__})"


def _score_of_whole(value: Any) -> float:
    if value is None:
        return math.nan
    return 0.0 if isinstance(value, list) else float(value)


def _padded(rows: Sequence[list[float]], *, like: Tensor) -> Tensor:
    """Rows of numbers, padded with zeros to the shape of another tensor."""
    padded = torch.zeros_like(like)
    for row, numbers in enumerate(rows):
        if numbers:
            padded[row, : len(numbers)] = padded.new_tensor(numbers)
    return padded


def _shorten(value: Any, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."
