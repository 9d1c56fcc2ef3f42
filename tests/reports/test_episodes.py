"""An episode as it is printed."""

import torch

from llmrl.batches import Episodes, Rollout, Sequences, StopReason
from llmrl.reports.episodes import episode_text

CALL = {"type": "function", "id": "x", "function": {"name": "add", "arguments": {"a": 1}}}


def rollout(*messages, opening="sum?", rewards=(-0.5, 1.0), end_reward=0.25, stop=StopReason.EOS, failure=None):
    """A rollout of one response of two turns."""
    episodes = Episodes(
        turn_ends=torch.tensor([[1, 3]]),
        turn_rewards=torch.tensor([rewards]),
        end_reward=torch.tensor([end_reward]),
        num_calls=torch.tensor([0]),
        num_bad_calls=torch.tensor([0]),
        failures=(failure,),
        reasons=(failure and "raised KeyError: 'x'",),
        openings=(opening,),
        messages=(messages,),
    )
    sequences = Sequences(
        unique_prompt_ids=torch.tensor([[1]]),
        unique_prompt_mask=torch.tensor([[True]]),
        prompt_of_row=torch.tensor([0]),
        response_ids=torch.tensor([[1, 2, 3]]),
        response_mask=torch.tensor([[True, False, True]]),
        response_lengths=torch.tensor([3]),
    )
    return Rollout(
        sequences=sequences,
        rollout_logprobs=torch.zeros(1, 3),
        stop_reason=torch.tensor([stop]),
        group_ids=torch.tensor([0]),
        rows=({},),
        episodes=episodes,
    )


def said(role, content, **more):
    return {"role": role, "content": content, **more}


def test_what_is_read_is_marked_and_the_rewards_are_added():
    text = episode_text(rollout(said("assistant", "5"), said("user", "higher"), said("assistant", "7")), 0)
    assert text == "> sum?\n5\n> higher\n7\n(2 turns; done, reward 0.75)"


def test_calls_results_and_other_roles_are_named():
    opening = [said("system", "be brief"), said("user", "sum?")]
    messages = [said("assistant", "", tool_calls=[CALL]), said("tool", "2"), said("assistant", "so\n2")]
    text = episode_text(rollout(*messages, opening=opening, stop=StopReason.TURNS), 0)
    expected = '> system: be brief\n> sum?\nadd({"a": 1})\n> tool: 2\nso\n2\n'
    assert text == expected + "(2 turns; truncated by environment.max_turns, reward 0.75)"


def test_a_call_that_cannot_be_read_is_told():
    unread = {"type": "function", "id": "x", "function": {"name": "", "arguments": {}}}
    text = episode_text(rollout(said("assistant", "", tool_calls=[unread]), said("tool", "error: no JSON")), 0)
    assert text.splitlines()[1:3] == ["(a call that cannot be read)", "> tool: error: no JSON"]


def test_rewards_that_cancel_are_zero():
    text = episode_text(rollout(rewards=(0.55, -0.3), end_reward=-0.25), 0)
    assert text.endswith("reward 0)")


def test_a_failure_has_no_reward():
    assert episode_text(rollout(opening="", failure="start", stop=StopReason.FAILED), 0) == (
        "(start raised KeyError: 'x': no reward)"
    )
    text = episode_text(rollout(said("assistant", "5"), failure="respond", stop=StopReason.FAILED), 0)
    assert text == "> sum?\n5\n(2 turns; respond raised KeyError: 'x': no reward)"
