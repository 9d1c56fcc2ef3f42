"""Functions score a rollout: what they get, what they may return, and what is said when they fail."""

import asyncio
import gc
import json
import math
import re
import time
from functools import partial

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast

from llmrl.batches import Rollout, Sequences, StopReason
from llmrl.reports.progress import Silent
from llmrl.rewards.config import RewardConfig, RewardFunctionConfig
from llmrl.rewards.functions import FunctionReward, RewardError
from tests.rewards.said import Said

WORDS = ["<pad>", "<eos>", "one", "two", "three", "four", "bad"]
ROWS = (
    {"question": "1?", "answer": "one"},
    {"question": "2?", "answer": "two"},
    {"question": [{"role": "user", "content": "3?"}], "answer": "three"},
)


@pytest.fixture(scope="module")
def tokenizer():
    model = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture
def rollout():
    """Three responses: "one<eos>", "two three" cut by the limit, and an empty "<eos>"; "bad" where nothing counts."""
    ids = torch.tensor([[2, 1, 6], [3, 4, 6], [1, 6, 6]])
    lengths = torch.tensor([2, 2, 1])
    mask = torch.arange(3) < lengths[:, None]
    prompt = torch.zeros(3, 1, dtype=torch.long)
    sequences = Sequences.from_rows(
        prompt_ids=prompt,
        prompt_mask=prompt == 0,
        response_ids=ids,
        response_mask=mask,
        response_lengths=lengths,
    )
    return Rollout(
        sequences=sequences,
        rollout_logprobs=torch.zeros(3, 3),
        stop_reason=torch.where(torch.tensor([True, False, True]), StopReason.EOS, StopReason.LENGTH),
        group_ids=torch.arange(3),
        rows=ROWS,
    )


@pytest.fixture
def score(tokenizer, rollout):
    """Scores the rollout with functions, each named rule.py:<its place>, with the weights and settings given: no call
    is repeated unless they say so."""

    def score(*functions, weights=None, rollout=rollout, progress=None, **settings):
        weights, settings = weights or [1.0] * len(functions), {"retries": 0} | settings
        settings = [
            RewardFunctionConfig(name=f"rule.py:f{i}", weight=weight, **settings) for i, weight in enumerate(weights)
        ]
        config = RewardConfig(functions=tuple(settings))
        reward = FunctionReward(
            config,
            functions=functions,
            tokenizer=tokenizer,
            prompt_column="question",
            columns=["question", "answer"],
            progress=progress or Silent(),
        )
        return reward(rollout)

    return score


def giving(result):
    return lambda responses: result


def with_rows(rollout, rows):
    return Rollout(**{**vars(rollout), "rows": rows})


def test_a_function_gets_prompts_as_written_texts_and_columns(score):
    seen = {}

    def watch(**columns):
        seen.update(columns)
        return [0.0] * 3

    score(watch)
    prompts = ["1?", "2?", [{"role": "user", "content": "3?"}]]
    answers = ["one", "two", "three"]
    tokens = [["one", "<eos>"], ["two", "three"], ["<eos>"]]
    completions = ["one", "two three", [{"role": "assistant", "content": ""}]]
    rollout = {"prompts": prompts, "responses": ["one", "two three", ""], "completions": completions, "tokens": tokens}
    assert seen == {**rollout, "question": prompts, "answer": answers}


def test_completions_are_in_the_form_of_the_prompt(score, rollout):
    def texts(completions):
        return [float(len(text)) for text in completions]

    def messages(completions, **kwargs):
        return [float(len(messages[-1]["content"])) for messages in completions]

    chat = tuple({**row, "question": [{"role": "user", "content": "?"}]} for row in ROWS)
    assert_close(score(texts, rollout=with_rows(rollout, ROWS[:2] + ROWS[:1])).total, torch.tensor([3.0, 9.0, 0.0]))
    assert_close(score(messages, rollout=with_rows(rollout, chat)).total, torch.tensor([3.0, 9.0, 0.0]))


def test_a_column_that_a_row_lacks_is_none_and_a_parameter_gets_it_in_every_call(score, rollout):
    seen = []

    def optional(responses, answer=None):
        seen.append(answer)
        return [0.0] * len(responses)

    def everything(**columns):
        return optional(columns["responses"], columns["answer"])

    some = Rollout(**{**vars(rollout), "rows": (ROWS[0], {"question": "2?", "other": 3}, ROWS[2])})
    none = Rollout(**{**vars(rollout), "rows": ({"question": "x"},) * 3})
    for function in (optional, everything):
        score(function, rollout=some)
        score(function, rollout=none)
    assert seen == [["one", None, "three"], [None] * 3] * 2


def test_scores_are_weighted_and_parts_are_not(score):
    scores = score(giving([1.0, 2.0, 3.0]), giving([1.0, 0.0, -1.0]), weights=[0.5, -2.0])
    assert_close(scores.total, torch.tensor([-1.5, 1.0, 3.5]))
    assert_close(scores.parts, {"f0": torch.tensor([1.0, 2.0, 3.0]), "f1": torch.tensor([1.0, 0.0, -1.0])})
    assert_close(scores.per_token, torch.zeros(3, 3))


def test_none_leaves_a_function_out_of_the_sum_of_a_response(score):
    scores = score(giving([1.0, None, None]), giving([1.0, 4.0, None]), weights=[1.0, -2.0])
    assert_close(scores.total, torch.tensor([-1.0, -8.0, math.nan]), equal_nan=True)
    assert_close(scores.parts["f0"], torch.tensor([1.0, math.nan, math.nan]), equal_nan=True)
    assert_close(scores.parts["f1"], torch.tensor([1.0, 4.0, math.nan]), equal_nan=True)


def test_rules_of_two_tasks_share_a_run(score):
    def of_task(task, value):
        return lambda responses, answer: [value if gold in task else None for gold in answer]

    scores = score(of_task(("one", "two"), 1.0), of_task(("three",), 3.0))
    assert_close(scores.total, torch.tensor([1.0, 1.0, 3.0]))


def test_none_beside_numbers_for_tokens_leaves_those(score):
    scores = score(giving([None, None, None]), giving([[1.0, 2.0], None, [4.0]]))
    assert_close(scores.total, torch.tensor([0.0, math.nan, 0.0]), equal_nan=True)
    assert_close(scores.per_token, torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 0.0], [4.0, 0.0, 0.0]]))


def test_a_function_without_weight_is_only_watched(score):
    scores = score(giving([1.0, 2.0, None]), giving([None, 5.0, 3.0]), weights=[2.0, 0.0])
    assert_close(scores.total, torch.tensor([2.0, 4.0, math.nan]), equal_nan=True)
    assert_close(scores.parts["f1"], torch.tensor([math.nan, 5.0, 3.0]), equal_nan=True)


@pytest.mark.parametrize(
    "result",
    [
        [1, 0, 1],
        [True, False, True],
        (1.0, 0.0, 1.0),
        torch.tensor([1.0, 0.0, 1.0], requires_grad=True),
        torch.tensor([1, 0, 1], dtype=torch.int8),
        torch.tensor([1, 0, 1], dtype=torch.bfloat16),
        torch.tensor([True, False, True]),
        np.array([1, 0, 1]),
        np.array([True, False, True]),
        [np.float32(1), np.int64(0), np.bool_(True)],
        [torch.tensor(1), torch.tensor(0.0), np.array(1.0)],
    ],
)
def test_numbers_of_every_kind_count(score, result):
    assert_close(score(giving(result)).total, torch.tensor([1.0, 0.0, 1.0]))


@pytest.mark.parametrize(
    ("result", "said"),
    [
        ([1.0, 0.0], r"returned 2 scores; expected a list of 3 numbers or None, one for each response"),
        (torch.zeros(4), r"returned 4 scores; expected a list of 3"),
        (1.0, r"returned 1\.0 \(float\); expected a list of 3"),
        (torch.tensor(1.0), r"returned tensor\(1\.\) \(Tensor\); expected a list of 3"),
        ("101", r"returned '101' \(str\); expected a list of 3"),
        (None, r"returned None \(NoneType\); expected a list of 3"),
        ({0: 1.0, 1: 1.0, 2: 1.0}, r"returned \{0: 1\.0, .*\} \(dict\); expected a list of 3"),
        ([0.0, "1", 0.0], r"returned '1' \(str\) for row 1; expected a finite number, or None where"),
        ([0.0, [1.0], 0.0], r"returned a list of length 1 for row 1; expected a finite number, or None where"),
        (torch.zeros(3, 1), r"returned a list of length 1 for row 0"),
        ([0.0, (1.0,), 0.0], r"returned \(1\.0,\) \(tuple\) for row 1"),
        ([0.0, math.nan, 0.0], r"returned nan \(float\) for row 1"),
        (torch.tensor([0.0, 0.0, math.nan]), r"returned nan \(float\) for row 2"),
        ([0.0, -math.inf, 0.0], r"returned -inf \(float\) for row 1"),
        ([0.0, 1e39, 0.0], r"returned 1e\+39 \(float\) for row 1"),  # infinity in float32
        ([0.0, 10**400, 0.0], r"returned 10+\.\.\. \(int\) for row 1"),
        ([0.0, 1j, 0.0], r"returned 1j \(complex\) for row 1"),
    ],
)
def test_anything_else_is_refused(score, result, said):
    with pytest.raises(RewardError, match=r"^reward function rule\.py:f1 " + said):
        score(giving([0.0] * 3), giving(result))


def test_a_bad_score_shows_the_row_and_the_response(score):
    with pytest.raises(RewardError) as error:
        score(giving([0.0, math.nan, 0.0]))
    assert str(error.value).endswith("The row: question='2?', answer='two'. The response: 'two three'")


def test_a_long_row_is_shortened(score, rollout):
    rows = ({"question": "q" * 500, "answer": "a"}, *ROWS[1:])
    long = Rollout(**{**vars(rollout), "rows": rows})
    with pytest.raises(RewardError) as error:
        score(giving([math.nan, 0.0, 0.0]), rollout=long)
    assert f"question='{'q' * 79}..., answer='a'" in str(error.value)


def test_an_exception_is_named_and_chained(score):
    def fails(responses):
        raise KeyError("gold")

    with pytest.raises(RewardError, match=r"^reward function rule\.py:f1 raised KeyError: 'gold' at ") as error:
        score(giving([0.0] * 3), fails)
    assert isinstance(error.value.__cause__, KeyError)


def line_of(function, offset):
    """Where a line of a function stands, in the form of messages."""
    return f"{__file__}:{function.__code__.co_firstlineno + offset}"


def test_an_exception_shows_the_line_the_row_and_what_was_expected(score):
    def read(text):
        return json.loads(text) if text == "two" else 1.0

    def fails(responses, answer):
        responses.clear()
        return [read(text) for text in answer]

    with pytest.raises(RewardError) as error:
        score(fails)
    assert str(error.value) == (
        "reward function rule.py:f0 raised JSONDecodeError: Expecting value: line 1 column 1 (char 0) at "
        f"{line_of(read, 1)} for row 1; expected a list of 3 numbers or None, one for each response. "
        "The row: question='2?', answer='two'. The response: 'two three'"
    )


def test_an_exception_that_no_row_raises_alone_is_that_of_the_batch(score):
    def fails(responses):
        if len(responses) > 1:
            raise ValueError("too many")
        raise KeyError("another one")

    with pytest.raises(RewardError) as error:
        score(partial(fails))
    assert str(error.value) == (
        f"reward function rule.py:f0 raised ValueError: too many at {line_of(fails, 2)} on the whole batch of call 1, "
        "and on no row that was tried alone; expected a list of 3 numbers or None, one for each response"
    )


@pytest.mark.parametrize("kind", [SystemExit, GeneratorExit, StopIteration, RecursionError, asyncio.CancelledError])
def test_whatever_a_function_raises_is_its_failure(score, kind):
    def fails(responses):
        raise kind("no more")

    async def fails_later(responses):
        raise kind("no more")

    with pytest.raises(
        RewardError, match=rf"^reward function rule\.py:f0 raised {kind.__name__}: no more at .* for row 0"
    ):
        score(fails)
    with pytest.raises(RewardError, match="StopIteration" if kind is StopIteration else "no more"):
        score(fails_later)  # Python makes a RuntimeError of a StopIteration there
    assert_close(score(Judge()).total, torch.ones(3))  # the event loop has outlived it


def test_an_interrupt_of_the_user_is_no_failure_of_a_function(score):
    def interrupted(responses):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(interrupted)


@pytest.mark.parametrize("kind", [ConnectionError, TimeoutError, OSError])
def test_a_service_that_does_not_answer_is_not_asked_row_by_row(score, kind):
    calls = []

    def fails(responses):
        calls.append(len(responses))
        raise kind("refused")

    with pytest.raises(RewardError, match=rf"raised {kind.__name__}: refused at .* in call 1; expected"):
        score(fails)
    assert calls == [3]


def test_a_slow_function_that_failed_is_not_asked_again(score):
    calls = []

    def fails_once(responses):
        calls.append(len(responses))
        time.sleep(0.15)
        raise ConnectionError("429\n  too many requests")

    with pytest.raises(RewardError, match=r"429 too many requests at .* in call 1; expected a list of 3 numbers"):
        score(fails_once)
    assert calls == [3]


def test_the_search_for_a_row_ends_in_time(score, monkeypatch):
    calls = []

    def fails_together(responses):
        calls.append(len(responses))
        if len(responses) > 1:
            raise ValueError("too many")
        time.sleep(0.03)
        return [0.0]

    monkeypatch.setattr("llmrl.rewards.asking.SEARCH_S", 0.02)
    with pytest.raises(RewardError, match="in call 1; "):
        score(fails_together)
    assert calls == [3, 1]


def fails_on_two(responses):
    if "two three" in responses:
        raise KeyError("gold")
    return [1.0] * len(responses)


def test_an_excluded_response_has_no_score_whatever_other_functions_say(score):
    scores = score(fails_on_two, giving([[1.0, 1.0], 5.0, 5.0]), on_error="exclude")
    assert_close(scores.total, torch.tensor([1.0, math.nan, 6.0]), equal_nan=True)
    assert_close(scores.per_token, torch.tensor([[1.0, 1.0, 0.0], [0.0] * 3, [0.0] * 3]))
    assert_close(scores.parts["f0"], torch.tensor([1.0, math.nan, 1.0]), equal_nan=True)
    assert_close(scores.parts["f1"], torch.tensor([2.0, 5.0, 5.0]))
    assert {name: failed.tolist() for name, failed in scores.failed.items()} == {
        "f0": [False, True, False],
        "f1": [False] * 3,
    }


def test_a_function_without_weight_excludes_nothing(score):
    scores = score(giving([1.0, 2.0, 3.0]), fails_on_two, weights=[1.0, 0.0], on_error="exclude")
    assert_close(scores.total, torch.tensor([1.0, 2.0, 3.0]))
    assert_close(scores.parts["f1"], torch.tensor([1.0, math.nan, 1.0]), equal_nan=True)
    assert scores.failed["f1"].tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("weight", "limit", "told"),
    [
        (1.0, 1, []),
        (1.0, 0, ["left out as unscored, and so are further ones"]),
        (0.0, 0, ["get no score from it, nor"]),
    ],
)
def test_what_is_said_of_failures_is_what_becomes_of_the_responses(weight, limit, told, tokenizer, rollout):
    """A function that fails on more than `limit` responses at once."""

    def judge(responses):
        assert len(responses) <= limit, "too many"
        return [1.0] * len(responses)

    said = Said()
    settings = RewardFunctionConfig(name="r.py:judge", weight=weight, on_error="exclude")
    config = RewardConfig(functions=(settings, RewardFunctionConfig(name="r.py:ones")))
    FunctionReward(
        config,
        functions=[judge, giving([1.0] * 3)],
        tokenizer=tokenizer,
        prompt_column="question",
        columns=["question"],
        progress=said,
    )(rollout)
    assert [text in message for text, message in zip(told, said.messages, strict=True)] == [True] * len(told)


def test_the_first_excluded_responses_are_reported_once(tokenizer, rollout):
    said = Said()
    config = RewardConfig(functions=(RewardFunctionConfig(name="rule.py:f0", on_error="exclude"),))
    reward = FunctionReward(
        config, functions=[fails_on_two], tokenizer=tokenizer, prompt_column="question", columns=[], progress=said
    )
    reward(rollout)
    reward(rollout)
    assert said.messages == [
        f"warning: reward function rule.py:f0 raised KeyError: 'gold' at {line_of(fails_on_two, 2)}; 1 response of "
        "this call left out as unscored, and so are further ones, counted in the metrics as failed"
    ]


def test_a_judge_that_fails_is_asked_again_where_that_may_help(score, monkeypatch):
    monkeypatch.setattr("llmrl.rewards.asking.Asker._pause", lambda self, seconds: None)
    calls = []

    async def fails_twice(responses):
        calls.append(len(responses))
        if len(calls) < 3:
            raise ConnectionError("refused")
        return [1.0] * len(responses)

    assert_close(score(fails_twice, Judge(), retries=2).total, torch.full((3,), 2.0))
    assert calls == [3, 3, 3]


def test_an_exception_of_an_object_shows_its_line(score):
    with pytest.raises(RewardError, match=re.escape(f"down at {line_of(Judge.__call__, 2)} for row 0; ")):
        score(Judge(fails=True))


def test_an_exception_of_a_coroutine_is_named_and_chained(score):
    async def fails(responses):
        await asyncio.sleep(0)
        raise ValueError("judge is down")

    with pytest.raises(RewardError) as error:
        score(fails)
    assert isinstance(error.value.__cause__, ValueError)
    assert str(error.value) == (
        f"reward function rule.py:f0 raised ValueError: judge is down at {line_of(fails, 2)} for row 0; "
        "expected a list of 3 numbers or None, one for each response. "
        "The row: question='1?', answer='one'. The response: 'one'"
    )


def test_calls_are_counted(tokenizer, rollout):
    async def fails_at_last(responses):
        if reward.num_calls == 3:
            raise ConnectionError("judge is down")
        return [0.0] * 3

    config = RewardConfig(functions=(RewardFunctionConfig(name="rule.py:f0", retries=0),))
    reward = FunctionReward(
        config,
        functions=[fails_at_last],
        tokenizer=tokenizer,
        prompt_column="question",
        columns=["question"],
        progress=Silent(),
    )
    reward(rollout)
    reward(rollout)
    with pytest.raises(RewardError, match="in call 3;"):
        reward(rollout)


class Judge:
    """An object that is called as an async function is."""

    def __init__(self, *, fails=False):
        self.fails = fails

    async def __call__(self, responses):
        if self.fails:
            raise ValueError("judge is down")
        await asyncio.sleep(0)
        return [1.0] * len(responses)


JUDGES = {
    "object": Judge(),
    "partial": partial(Judge().__call__),
    "plain function": lambda responses: Judge()(responses),
}


@pytest.mark.parametrize("kind", JUDGES)
def test_whatever_can_be_awaited_is(score, kind):
    assert_close(score(JUDGES[kind], giving([1.0] * 3)).total, torch.full((3,), 2.0))


def test_a_loop_that_runs_already_is_no_obstacle(score):
    async def notebook():
        return score(Judge(), Judge())

    assert_close(asyncio.run(notebook()).total, torch.full((3,), 2.0))


@pytest.mark.filterwarnings("error")
def test_a_function_that_raises_leaves_nothing_unawaited(score):
    def fails(responses):
        raise KeyError("gold")

    with pytest.raises(RewardError, match="KeyError"):
        score(Judge(), fails)
    gc.collect()  # where a coroutine that was never awaited would warn


def test_coroutines_keep_their_places_whichever_ends_first(score):
    def judge(value):
        async def judge(responses):
            await asyncio.sleep(0.02 if value == 1.0 else 0.01)
            return [value] * 3

        return judge

    scores = score(judge(1.0), giving([10.0] * 3), judge(100.0))
    assert [part[0].item() for part in scores.parts.values()] == [1.0, 10.0, 100.0]


def test_coroutines_run_together(score):
    """Each waits for the other: one after the other they would never end."""
    events = {}

    def judge(mine, other):
        async def judge(responses):
            events.setdefault(mine, asyncio.Event()).set()
            await asyncio.wait_for(events.setdefault(other, asyncio.Event()).wait(), timeout=5)
            return [1.0] * 3

        return judge

    assert_close(score(judge("a", "b"), judge("b", "a")).total, torch.full((3,), 2.0))


def test_what_is_kept_open_between_calls_stays_usable(score):
    """A future, as a connection, belongs to the loop that runs when it is made."""
    kept = []

    async def judge(responses):
        if not kept:
            kept.append(asyncio.get_running_loop().create_future())
            return [0.0] * 3
        asyncio.get_running_loop().call_soon(kept[0].set_result, 1.0)
        return [await asyncio.wait_for(kept[0], timeout=5)] * 3

    async def notebook():
        return score(judge)

    score(judge)
    assert_close(asyncio.run(notebook()).total, torch.ones(3))


def test_a_judge_whose_neighbour_fails_is_cancelled(score):
    ended = []

    async def waits(responses):
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    async def fails(responses):
        await asyncio.sleep(0.01)
        raise ValueError("down")

    with pytest.raises(RewardError, match="down"):
        score(waits, fails)
    score(Judge())  # the loop has gone on
    assert ended == [True]


def test_a_plain_function_may_run_a_loop_of_its_own(score):
    async def judge(responses):
        return [1.0] * 3

    assert_close(score(lambda responses: asyncio.run(judge(responses)), judge).total, torch.full((3,), 2.0))


def test_columns_stay_with_their_responses_in_any_order(score, rollout):
    def first_word_is_the_answer(responses, answer):
        return [float(r.split()[:1] == [a]) + 2 * ("three" in r) for r, a in zip(responses, answer, strict=True)]

    order = torch.tensor([2, 0, 1])
    assert_close(score(first_word_is_the_answer).total, torch.tensor([1.0, 3.0, 0.0]))
    assert_close(score(first_word_is_the_answer, rollout=rollout.select(order)).total, torch.tensor([0.0, 1.0, 3.0]))


def test_a_function_that_spoils_its_lists_spoils_no_other(score):
    def spoils(responses, answer):
        responses.clear()
        answer.reverse()
        return [0.0] * 3

    def reads(responses, answer):
        return [float(r == "one" and a == "one") for r, a in zip(responses, answer, strict=True)]

    assert_close(score(spoils, reads).total, torch.tensor([1.0, 0.0, 0.0]))


def test_a_function_that_changes_a_row_changes_it_for_nobody(score, rollout):
    """The responses to a prompt share its row; so do the calls of all epochs."""
    row = {"question": [{"role": "user", "content": "?"}], "answer": {"tests": ["a"]}}
    shared, seen = with_rows(rollout, (row,) * 3), []

    def spoils(prompts, question, answer, completions):
        for conversation, same, gold, said in zip(prompts, question, answer, completions, strict=True):
            seen.append((len(conversation), len(same), len(gold["tests"]), len(said)))
            conversation.append({"role": "assistant", "content": "!"})
            same.clear()
            gold["tests"].append("b")
            said.append("c")
        return [0.0] * 3

    score(spoils, spoils, rollout=shared)
    score(spoils, rollout=shared)
    assert seen == [(1, 1, 1, 1)] * 9
    assert row == {"question": [{"role": "user", "content": "?"}], "answer": {"tests": ["a"]}}


def test_labels_name_the_parts(tokenizer, rollout):
    names = ("a.py:score", "b.py:score", "b.py:length")
    config = RewardConfig(functions=tuple(RewardFunctionConfig(name=name) for name in names))
    functions = [giving([float(i)] * 3) for i in range(3)]
    parts = FunctionReward(
        config,
        functions=functions,
        tokenizer=tokenizer,
        prompt_column="question",
        columns=["question", "answer"],
        progress=Silent(),
    )(rollout).parts
    assert {name: part[0].item() for name, part in parts.items()} == {"a.py:score": 0, "b.py:score": 1, "length": 2}
