"""Rewards that are functions: of the user, in a file or a module, or the rules that come with llmrl.

A function is called with keyword arguments, limited to those that its signature names:

    prompts       list, each row's prompt as the user wrote it: text or chat messages
    responses     list[str], decoded, without special tokens
    completions   the same in the form of the prompt: text, or [{"role": "assistant", "content": text}]
    tokens        list[list[str]], each response's tokens, each decoded by itself, special ones by their names
    <column>      list, for every data column by its name, None for a row that lacks it; a column named as one of the
                  above is not handed over, and every row must have the columns whose parameters have no default

All lists have one entry for each response, in the same order, and are the function's own, however it changes them. All
responses of a group are in the same call, except those that are excluded because the function fails on them. What a
function returns has an entry for each response too, one of these:

    0.5                         a number: the score of the response
    None                        the function does not score this response: it is left out of the response's sum; a
                                response that no function with a weight scores counts as unscored
    [0.0, 0.5, 1.0]             a number for each token of the response, its EOS included
    [(7, 0.5), (19, 1.0)]       pairs of a character offset into the response and a number, for the token that completes
                                the character there; the offset after the last character means the last token

Awaitables, such as the results of ``async def`` functions, are awaited together, in one event loop for all calls of a
run: a connection that is kept open stays usable.

Functions that a recipe names run in a process of their own, `llmrl.rewards.worker`, in which a call can be stopped
whatever it does; those that are handed over as Python objects run in the caller's process, without a limit.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmrl.batches import Rollout, Row, Scores, Sequences
from llmrl.messages import counted
from llmrl.rewards.asking import Asker
from llmrl.rewards.calls import Answer, Caller, Calls, Failure, Odd, Pending, RewardError, odd, shorten
from llmrl.rewards.combine import sum_of_known
from llmrl.rewards.config import RewardConfig
from llmrl.rewards.loading import Function, takes
from llmrl.rewards.per_token import Spelling, is_number, spell_responses, token_texts
from llmrl.rewards.worker import RemoteFunction
from llmrl.roles import Progress


class _Excluded:
    """In place of the result for a response on which a function failed."""


EXCLUDED = _Excluded()


@dataclass(frozen=True, kw_only=True)
class Call:
    """Arguments of the reward functions for one rollout."""

    number: int
    """Number of the call: 1 for the first rollout."""
    rows: Sequence[Row]
    """The data row of each response."""
    groups: Sequence[Sequence[int]]
    """The responses to each prompt."""
    columns: Mapping[str, list[Any]]
    """Columns that functions can take, by name."""
    spellings: Sequence[Spelling]
    """The tokens of each response; of one of several turns those of the last turn."""
    starts: Sequence[int]
    """Index of the first of them among all tokens of each response."""

    @property
    def num_responses(self) -> int:
        return len(self.rows)

    @property
    def expected(self) -> str:
        """What a function must return, for messages."""
        return expected(self.num_responses)

    def describe(self, row: int) -> str:
        """A row and the response to it, for messages."""
        columns = ", ".join(f"{name}={shorten(value)}" for name, value in self.rows[row].items())
        return f"The row: {columns}. The response: {shorten(self.columns['responses'][row])}"


@dataclass(frozen=True, kw_only=True)
class GivenScores:
    """Scores that one function gave."""

    whole: list[float]
    """Score of each response as a whole: NaN where it cannot be scored, 0 where its tokens got numbers."""
    tokens: list[list[float]]
    """Scores of each response's tokens; empty where the response got a score as a whole."""
    excluded: list[bool]
    """Whether the function failed on each response."""

    @property
    def in_all(self) -> list[float]:
        return [score + sum(numbers) for score, numbers in zip(self.whole, self.tokens, strict=True)]


class FunctionReward:
    """Scores responses by the weighted sum of what functions return.

    Args:
        config: Names, weights, limits.
        functions: Those of the config, from `Worker.load`; or Python functions, which are called in this process.
        tokenizer: Decodes the responses.
        prompt_column: The data column that holds the prompt.
        columns: Every data column. A function that takes one gets it in every call, though a row may lack it.
        progress: Receives what is waited for, repeated and excluded.
    """

    def __init__(
        self,
        config: RewardConfig,
        *,
        functions: Sequence[Function],
        tokenizer: PreTrainedTokenizerBase,
        prompt_column: str,
        columns: Sequence[str],
        progress: Progress,
    ) -> None:
        self.config = config
        self.functions = {setting.name: f for setting, f in zip(config.functions, functions, strict=True)}
        self.tokenizer = tokenizer
        self.prompt_column = prompt_column
        self.columns = columns
        self.progress = progress
        self.num_calls = 0
        self.caller = _caller_of(self.functions)
        self.askers = {
            setting.name: Asker(self.caller, setting, place=f"reward.functions.{number}", progress=progress)
            for number, setting in enumerate(config.functions)
        }
        self.has_told: set[str] = set()
        """Functions whose first excluded responses have been reported."""

    def __call__(self, rollout: Rollout) -> Scores:
        """`total`: weighted sums of scores, without functions that return None; NaN where all with a weight do, or one
        of them failed. `per_token`: weighted sums of numbers for tokens. `parts`: score plus numbers of each function,
        unweighted."""
        call = self._next_call(rollout)
        given = self._given(call)
        per_token = torch.zeros_like(rollout.sequences.response_ids, dtype=torch.float32)
        totals = [per_token.new_full((call.num_responses,), math.nan)]
        excluded = torch.zeros_like(totals[0], dtype=torch.bool)
        for setting in self.config.functions:
            scores = given[setting.name]
            if setting.weight:
                totals.append(setting.weight * totals[0].new_tensor(scores.whole))
                per_token = per_token + setting.weight * _padded(scores.tokens, call.starts, like=per_token)
                excluded |= excluded.new_tensor(scores.excluded)
        labelled = list(zip(self.config.function_labels, self.config.functions, strict=True))
        return Scores(
            total=sum_of_known(totals).masked_fill(excluded, math.nan),
            per_token=per_token.masked_fill(excluded[:, None], 0.0),
            parts={label: totals[0].new_tensor(given[setting.name].in_all) for label, setting in labelled},
            failed={
                label: excluded.new_tensor(given[setting.name].excluded)
                for label, setting in labelled
                if setting.on_error == "exclude"
            },
        )

    def _next_call(self, rollout: Rollout) -> Call:
        self.num_calls += 1
        starts = rollout.last_turn_starts.tolist()
        spellings = spell_responses(rollout.sequences, self.tokenizer, starts)
        columns = {name: [row.get(name) for row in rollout.rows] for name in self.columns}
        columns["prompts"] = self._prompts(rollout)
        columns["responses"] = [spelling.text for spelling in spellings]
        columns["completions"] = [
            spelling.text if isinstance(prompt, str) else [{"role": "assistant", "content": spelling.text}]
            for prompt, spelling in zip(columns["prompts"], spellings, strict=True)
        ]
        if rollout.episodes is not None:
            columns["completions"] = [[dict(message) for message in each] for each in rollout.episodes.messages]
        if any(takes(function, "tokens") for function in self.functions.values()):
            columns["tokens"] = token_texts([spelling.ids for spelling in spellings], self.tokenizer)
        groups: dict[int, list[int]] = {}
        for row, group in enumerate(rollout.group_ids.tolist()):
            groups.setdefault(group, []).append(row)
        return Call(
            number=self.num_calls,
            rows=rollout.rows,
            groups=list(groups.values()),
            columns=columns,
            spellings=spellings,
            starts=starts,
        )

    def _prompts(self, rollout: Rollout) -> list[Any]:
        """What each actor read first: the prompt of its row, or what its environment opened with."""
        if rollout.episodes is None:
            return [row[self.prompt_column] for row in rollout.rows]
        return list(rollout.episodes.openings)

    def _given(self, call: Call) -> dict[str, GivenScores]:
        """Scores by each function: called one after another, then what has to be awaited is awaited together.

        Raises:
            RewardError: A function failed; an exception of this process is its cause.
        """
        given, waiting = {}, {}
        try:
            for name, asker in self.askers.items():
                answer = asker.begin(call.columns)
                if answer is Pending.PENDING:
                    waiting[name] = asker.waiting(call.num_responses)
                else:
                    given[name] = self._settle(name, answer, call)
            for name, answer in self._awaited(waiting).items():
                given[name] = self._settle(name, answer, call)
        finally:
            self.caller.drop()
        return given

    def _awaited(self, waiting: Mapping[str, Any]) -> dict[str, Answer]:
        """Answers of the functions that are waited for, up to the first that ends the run; at last those for which
        nothing came."""
        answers = {}
        with closing(self.caller.gather(waiting)) as coming:
            for name, answer in coming:
                answers[name] = answer
                if self.askers[name].is_final(answer):
                    break
        return answers | {name: Pending.PENDING for name in waiting if name not in answers}

    def _settle(self, name: str, answer: Answer, call: Call) -> GivenScores:
        """Scores from an answer; of further calls where this one failed, or was lost."""
        asker = self.askers[name]
        answer = asker.repeat(asker.ask(call.columns) if answer is Pending.PENDING else answer, call.columns)
        excludes = asker.config.on_error == "exclude"
        if isinstance(answer, Failure):
            if not excludes:
                raise RewardError(f"reward function {name} {answer.what} {self._place(asker, answer, call)}") from (
                    answer.cause
                )
            results = asker.spare(answer, call.columns, call.groups, lambda part, num: _listed(name, part, num))
            self._tell_excluded(name, answer, call.num_responses - len(results))
            answer = [results.get(row, EXCLUDED) for row in range(call.num_responses)]
        return read_scores(name, answer, call, excludes=excludes)

    def _place(self, asker: Asker, failure: Failure, call: Call) -> str:
        """Where a function failed: the row, if it can be found."""
        if failure.is_stuck:
            return f"in call {call.number}, for {counted(call.num_responses, 'response')}; raise the limit, or mend it"
        if failure.is_unloaded:
            return f"in call {call.number}; mend its file"
        in_call = f"in call {call.number}; {call.expected}"
        if failure.is_transient:
            return in_call  # which a service has, whatever the row
        try:
            row = asker.failing_row(failure, call.columns)
        except (TimeoutError, RewardError):
            return in_call
        if row is not None:
            return f"for row {row}; {call.expected}. {call.describe(row)}"
        return f"on the whole batch of call {call.number}, and on no row that was tried alone; {call.expected}"

    def _tell_excluded(self, name: str, failure: Failure, num: int) -> None:
        if num == 0 or name in self.has_told:
            return
        self.has_told.add(name)
        if self.askers[name].config.weight:
            outcome = f"{counted(num, 'response')} of this call left out as unscored, and so are further ones"
        else:
            outcome = f"{counted(num, 'response')} of this call get no score from it, nor do further ones"
        self.progress.message(
            f"warning: reward function {name} {failure.what}; {outcome}, counted in the metrics as failed"
        )


def decode_responses(sequences: Sequences, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each response up to its length, without special tokens and otherwise just as the tokens spell it."""
    return [spelling.text for spelling in spell_responses(sequences, tokenizer)]


def read_scores(name: str, result: Answer, call: Call, *, excludes: bool = False) -> GivenScores:
    """Scores in floats from what a function returned.

    Args:
        excludes: Whether a response for which the result cannot be used is excluded.

    Raises:
        RewardError: For some response it is not a finite number, None, or a list for its tokens.
    """
    values = list(_listed(name, result, call.num_responses))
    for row, (value, spelling) in enumerate(zip(values, call.spellings, strict=True)):
        if misfit := _misfit(value, spelling):
            if not excludes:
                raise RewardError(
                    f"reward function {name} returned {misfit} for row {row}; expected a finite number, or None where "
                    f"the response cannot be scored, or a list: {spelling.expected}. {call.describe(row)}"
                )
            values[row] = EXCLUDED
    return GivenScores(
        whole=[_score_of_whole(value) for value in values],
        tokens=[
            spelling.land(value) if isinstance(value, list) else []
            for value, spelling in zip(values, call.spellings, strict=True)
        ],
        excluded=[value is EXCLUDED for value in values],
    )


def expected(num_responses: int) -> str:
    """What a function must return, for messages."""
    return f"expected a list of {num_responses} numbers or None, one for each response"


def _caller_of(functions: Mapping[str, Function]) -> Caller:
    """The worker of the functions, or this process."""
    for function in functions.values():
        if isinstance(function, RemoteFunction):
            return function.worker
    return Calls(functions)


def _listed(name: str, result: Answer, num_responses: int) -> Sequence[Any]:
    """The result, if it is a list with an entry for each response.

    Raises:
        RewardError: It is none, which is the fault of the function and of no response.
    """
    returned = f"reward function {name} returned"
    if not isinstance(result, list | tuple):
        raise RewardError(f"{returned} {result}; {expected(num_responses)}")
    if len(result) != num_responses:
        raise RewardError(f"{returned} {len(result)} scores; {expected(num_responses)}")
    return result


def _misfit(value: Any, spelling: Spelling) -> str | None:
    """Why a function's result for a response cannot be used; None if it can."""
    if isinstance(value, list):
        return spelling.misfit(value)
    if value is None or value is EXCLUDED or is_number(value):
        return None
    return str(value if isinstance(value, Odd) else odd(value))


def _score_of_whole(value: Any) -> float:
    if value is None or value is EXCLUDED:
        return math.nan
    return 0.0 if isinstance(value, list) else float(value)


def _padded(rows: Sequence[list[float]], starts: Sequence[int], *, like: Tensor) -> Tensor:
    """Rows of numbers, each from a column on, padded with zeros to the shape of another tensor."""
    padded = torch.zeros_like(like)
    for row, (numbers, start) in enumerate(zip(rows, starts, strict=True)):
        if numbers:
            padded[row, start : start + len(numbers)] = padded.new_tensor(numbers)
    return padded
