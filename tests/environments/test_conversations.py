"""Conversations of a rollout, over a host without processes: every character is a token, and 2 ends a turn."""

from functools import partial

import pytest
import torch

from llmrl.batches import Rollout, Sequences, StopReason
from llmrl.data.files import DataError
from llmrl.environments.config import EnvironmentConfig
from llmrl.environments.conversations import Conversations
from llmrl.environments.environment import Turn
from llmrl.environments.hosting import Failure
from tests.contexts import sampling_of
from tests.environments.fakes import ScriptedHost, Spelled, read_turn

EOS = 2


def begin(host, rows, *, group=2, limit=40, rendering=None, max_prompt_tokens=9, **settings):
    return Conversations(
        rows,
        sampling_of(group, seed=3, max_response_tokens=limit),
        host=host,
        rendering=rendering or Spelled(),
        read=read_turn,
        config=EnvironmentConfig(name="mine.py:Mine", **settings),
        prompt_column="prompt",
        max_prompt_tokens=max_prompt_tokens,
        look=lambda: None,
    )


def turn(text):
    return [*map(ord, text), EOS]


def rollout_of(responses, stops):
    """A rollout of one group from ``[(ids, chosen), ...]``."""
    width = max(len(ids) for ids, _ in responses)
    ids = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids, _ in responses])
    mask = torch.tensor([[*chosen, *[False] * (width - len(chosen))] for _, chosen in responses])
    return Rollout(
        sequences=Sequences(
            unique_prompt_ids=torch.tensor([[1]]),
            unique_prompt_mask=torch.tensor([[True]]),
            prompt_of_row=torch.zeros(len(responses), dtype=torch.long),
            response_ids=ids,
            response_mask=mask,
            response_lengths=torch.tensor([len(ids) for ids, _ in responses]),
        ),
        rollout_logprobs=torch.zeros(ids.shape),
        stop_reason=torch.tensor(stops),
        group_ids=torch.zeros(len(responses), dtype=torch.long),
        rows=({},) * len(responses),
    )


def test_an_environment_opens_or_the_prompt_of_the_row_does():
    host = ScriptedHost(start=lambda row: row.get("own"))
    conversations = begin(host, [{"own": "hi", "prompt": "x"}, {"own": None, "prompt": "yo"}])
    assert conversations.open() == [[104, 105], [121, 111]]


def test_a_group_opens_by_one_seed_and_goes_on_by_others():
    host = ScriptedHost(start=lambda row: "a")
    begin(host, [{}, {}]).open()
    opening, later = zip(*(host.seeds[number] for number in range(4)), strict=True)
    assert opening[0] == opening[1] != opening[2] == opening[3]
    assert len({*opening, *later}) == 6
    again = ScriptedHost(start=lambda row: "a")
    begin(again, [{}, {}]).open()
    assert again.seeds == host.seeds


def test_turns_are_answered_until_the_environment_is_done():
    def respond(number, message):
        return Turn("go", reward=0.5) if message.turn == 1 else Turn("never read", done=True, reward=2.0)

    host = ScriptedHost(start=lambda row: "a", respond=respond, close=lambda number: 10.0 + number)
    conversations = begin(host, [{}])
    conversations.open()
    conversations.ask({1: turn("xy"), 0: turn("u")})
    assert conversations.take([0, 1]) == {0: [103, 111], 1: [103, 111]}
    conversations.ask({1: turn("z")})
    assert conversations.take([1]) == {1: []}
    first = ([*turn("u"), 103, 111, 7, 7], [True, True, False, False, True, True])
    second = ([*turn("xy"), 103, 111, *turn("z")], [True, True, True, False, False, True, True])
    rollout = conversations.close(rollout_of([first, second], [StopReason.LENGTH, StopReason.EOS]))
    assert rollout.stop_reason.tolist() == [StopReason.LENGTH, StopReason.EOS]
    episodes = rollout.episodes
    assert episodes.turn_ends.tolist() == [[2, 6], [3, 7]]
    assert episodes.turn_rewards.tolist() == [[0.5, 0.0], [0.5, 2.0]]
    assert episodes.end_reward.tolist() == [10.0, 11.0]
    assert episodes.messages[1] == (
        {"role": "assistant", "content": "xy"},
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": "z"},
    )
    assert [message.text for number, message in host.asked if number == 1] == ["xy", "z"]
    assert host.asked[-1][1].messages == [{"role": "user", "content": "a"}, *episodes.messages[1]]


@pytest.mark.parametrize(
    ("settings", "stop"),
    [({"max_turns": 1}, StopReason.TURNS), ({"limit": 5}, StopReason.LENGTH), ({}, None)],
)
def test_limits_end_an_episode_before_anything_is_fed(settings, stop):
    """Of five tokens two are written and two fed: one is left. Of five with three fed none would be."""
    observation = "goo" if "limit" in settings else "go"
    host = ScriptedHost(start=lambda row: "a", respond=lambda *_: Turn(observation, reward=1.0))
    conversations = begin(host, [{}], group=1, **settings)
    conversations.open()
    conversations.ask({0: turn("u")})
    fed = conversations.take([0])[0]
    assert (fed == []) == (stop is not None)
    assert conversations.all[0].stop_reason == stop
    assert conversations.all[0].rewards == [1.0]


def test_tools_are_called_in_place_of_the_environment():
    host = ScriptedHost(start=lambda row: "a")
    conversations = begin(host, [{}], group=1)
    conversations.open()
    conversations.ask({0: turn("[add] [bad]")})
    assert bytes(conversations.take([0])[0]) == b"add!bad!"
    conversations.ask({0: turn("four")})
    assert conversations.take([0]) == {0: []}
    assert next(type(what) for _, what in host.asked) is list
    assert (conversations.all[0].num_calls, conversations.all[0].num_bad_calls) == (2, 1)
    assert [message["role"] for message in conversations.all[0].messages] == ["assistant", "tool", "tool", "assistant"]


class Refusing(Spelled):
    def between(self, messages, observation, *, last_id):
        raise DataError("the chat template rewrites earlier turns")


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"start": lambda row: Failure("start", "raised KeyError: 'x'")}, "start"),
        ({"start": lambda row: None}, "start"),
        ({"start": lambda row: "much too long"}, "start"),
        ({"respond": lambda *_: Failure("respond", "took longer than 60 s")}, "respond"),
        ({"respond": lambda *_: Turn("go"), "rendering": Refusing()}, "rendering"),
        ({"respond": lambda *_: Turn("")}, "rendering"),
        ({"close": lambda number: Failure("close", "returned nan")}, "close"),
        ({"text": "[breaks]"}, "breaks"),
    ],
)
def test_what_fails_is_named_and_ends_the_episode(changes, name):
    changes = dict(changes)
    text, rendering = changes.pop("text", "u"), changes.pop("rendering", None)
    host = ScriptedHost(**{"start": lambda row: "a"} | changes)
    conversations = begin(host, [{}], group=1, rendering=rendering)
    conversations.open()
    conversations.ask({0: turn(text)})
    assert conversations.take([0]) == {0: []}
    ids = turn(text)
    rollout = conversations.close(rollout_of([(ids, [True] * len(ids))], [StopReason.EOS]))
    assert rollout.episodes.failures == (name,)
    assert rollout.episodes.failed.tolist() == [True]
    assert rollout.episodes.reasons == (conversations.all[0].failure.what,)
    assert rollout.episodes.failure(0) == f"{name} {rollout.episodes.reasons[0]}"
    assert rollout.stop_reason.tolist() == [StopReason.FAILED]
    assert not rollout.finished.any()


def test_a_group_that_opens_in_two_ways_fails_as_a_whole():
    """Those that open alike would be compared with the mean of unlike things, or with too few."""
    texts = iter("abaccc")
    host = ScriptedHost(start=lambda row: next(texts))
    conversations = begin(host, [{}, {}], group=3)
    assert conversations.open() == [[ord("a")], [ord("c")]]
    assert [each.failure is not None for each in conversations.all] == [True] * 3 + [False] * 3
    assert all("self.random" in each.failure.what for each in conversations.all[:3])


def test_calls_that_fail_are_calls():
    """Otherwise an actor whose tool hangs reads as one that has given up calling it."""
    conversations = begin(ScriptedHost(start=lambda row: "a"), [{}], group=1)
    conversations.open()
    conversations.ask({0: turn("[add] [breaks]")})
    conversations.take([0])
    assert (conversations.all[0].num_calls, conversations.all[0].num_bad_calls) == (2, 0)


def test_a_group_that_fails_as_a_whole_has_a_prompt_all_the_same():
    host = ScriptedHost(start=lambda row: Failure("start", "raised"))
    assert begin(host, [{}]).open() == [[0]]


def test_a_failed_episode_leaves_its_neighbour_as_it_was():
    def respond(number, message, *, breaks):
        return Failure("respond", "raised") if breaks and number == 0 else Turn("go", reward=0.25)

    fed = []
    for breaks in (False, True):
        conversations = begin(ScriptedHost(start=lambda row: "a", respond=partial(respond, breaks=breaks)), [{}])
        conversations.open()
        conversations.ask({0: turn("u"), 1: turn("v")})
        fed.append(conversations.take([0, 1])[1])
    assert fed[0] == fed[1] != []
