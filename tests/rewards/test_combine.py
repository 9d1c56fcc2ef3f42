"""Several rewards as one: sums, parts side by side, and what cannot be scored."""

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from llmrl.batches import Rollout, Scores, Sequences, StopReason
from llmrl.rewards.combine import CombinedReward


@pytest.fixture
def rollout():
    ids = torch.ones(3, 2, dtype=torch.long)
    sequences = Sequences.from_rows(
        prompt_ids=ids,
        prompt_mask=ids == 1,
        response_ids=ids,
        response_mask=ids == 1,
        response_lengths=torch.tensor([2, 2, 2]),
    )
    return Rollout(
        sequences=sequences,
        rollout_logprobs=torch.zeros(3, 2),
        stop_reason=torch.where(torch.tensor([True, False, True]), StopReason.EOS, StopReason.LENGTH),
        group_ids=torch.arange(3),
        rows=({"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}),
    )


def giving(name, part, *, weight=1.0, per_token=0.0):
    """A reward of one part, which is handed on in its own weight."""

    def reward(rollout):
        scores = torch.tensor(part)
        return Scores(total=weight * scores, per_token=torch.full((3, 2), per_token), parts={name: scores})

    return reward


def test_totals_and_tokens_add_up_and_parts_stay_as_they_are(rollout):
    rule = giving("rule", [1.0, 0.0, -1.0], weight=2.0, per_token=0.5)
    model = giving("model", [0.25, 4.0, 8.0], weight=-0.5, per_token=0.25)
    scores = CombinedReward([rule, model])(rollout)
    assert_close(scores.total, torch.tensor([1.875, -2.0, -6.0]))
    assert_close(scores.per_token, torch.full((3, 2), 0.75))
    assert list(scores.parts) == ["rule", "model"]
    assert_close(scores.parts["rule"], torch.tensor([1.0, 0.0, -1.0]))
    assert_close(scores.parts["model"], torch.tensor([0.25, 4.0, 8.0]))


@pytest.mark.parametrize("silent_first", [True, False])
def test_one_that_has_nothing_to_say_is_left_out_of_the_sum(rollout, silent_first):
    rewards = [giving("rule", [1.0, math.nan, 0.0]), giving("model", [1.0, 2.0, 3.0])]
    scores = CombinedReward(rewards if silent_first else rewards[::-1])(rollout)
    assert_close(scores.total, torch.tensor([2.0, 2.0, 3.0]))
    assert_close(scores.parts["rule"], torch.tensor([1.0, math.nan, 0.0]), equal_nan=True)


def test_what_none_of_them_can_score_the_sum_cannot_either(rollout):
    rewards = [giving("rule", [1.0, math.nan, math.nan]), giving("other", [math.nan, math.nan, 0.0])]
    assert_close(CombinedReward(rewards)(rollout).total, torch.tensor([1.0, math.nan, 0.0]), equal_nan=True)


@pytest.mark.parametrize("first", [True, False])
def test_a_response_that_one_of_them_excludes_has_no_score_whatever_others_say(rollout, first):
    def fails(rollout):
        scores = giving("rule", [1.0, math.nan, math.nan])(rollout)
        return replace(scores, failed={"rule": torch.tensor([False, True, False])})

    rewards = [fails, giving("model", [1.0, 2.0, 3.0])]
    scores = CombinedReward(rewards if first else rewards[::-1])(rollout)
    assert_close(scores.total, torch.tensor([2.0, math.nan, 3.0]), equal_nan=True)
    assert scores.failed["rule"].tolist() == [False, True, False]


def test_every_reward_reads_the_same_rollout(rollout):
    seen = []

    def watch(rollout):
        seen.append(rollout)
        return giving("x", [0.0, 0.0, 0.0])(rollout)

    CombinedReward([watch, watch, watch])(rollout)
    assert len(seen) == 3
    assert all(each is rollout for each in seen)
