"""Episodes of a tiny model, whose turns end at every third id."""

from functools import partial

import pytest
import torch

from llmrl.batches import StopReason
from llmrl.data.rendering import Rendering
from llmrl.distributed.stop import STOP
from llmrl.environments.config import EnvironmentConfig
from llmrl.environments.conversations import Conversations
from llmrl.environments.engine import EnvironmentEngine
from llmrl.environments.environment import Turn
from llmrl.environments.hosting import Failure
from llmrl.rollout.native import NativeEngine
from llmrl.trainers.rl import describe_episodes
from tests.environments.fakes import ScriptedHost
from tests.rollout.tiny import VOCAB, Counter, build, make_prompts, make_sampling

ENDS = tuple(range(0, VOCAB, 3))


class Numbers(Rendering):
    """Texts of numbers."""

    def __init__(self):
        pass

    def opening(self, prompt):
        return [int(word) for word in prompt.split()]

    def between(self, messages, observation, *, last_id):
        return self.opening(observation)


class Told(Counter):
    def __init__(self):
        super().__init__()
        self.messages = []

    def message(self, text):
        self.messages.append(text)


def make_engine(host, *, model=None, progress=None, max_rows=64, **settings):
    progress = progress or Told()
    native = NativeEngine(
        model or build("llama"), eos_ids=ENDS, vocab_size=VOCAB, dtype=torch.float32, max_rows=max_rows,
        progress=progress,
    )  # fmt: skip
    config = EnvironmentConfig(name="mine.py:Mine", **settings)
    begin = partial(
        Conversations,
        rendering=Numbers(),
        read=lambda ids: (" ".join(map(str, ids)), " ".join(map(str, ids)), []),
        config=config,
        prompt_column="prompt",
        max_prompt_tokens=9,
    )
    return EnvironmentEngine(native, host=host, begin=begin, max_turn_tokens=config.max_turn_tokens, progress=progress)


def respond(number, message):
    """Goes on while the turn is longer than two tokens, and at least once."""
    words = message.text.split()
    done = message.turn > 1 and len(words) <= 2
    return Turn("4 5", done=done, reward=float(len(words)))


ROWS = make_prompts([1], [1], [1])
"""Their ids are not read."""


def start(row):
    return "7 8 9" if row["row"] else "20"


def test_episodes_are_what_the_environment_says():
    host = ScriptedHost(start=start, respond=respond, close=lambda number: 100.0)
    rollout = make_engine(host, max_turn_tokens=7, max_turns=4).generate(ROWS, make_sampling(max_response_tokens=30))
    sequences, episodes = rollout.sequences, rollout.episodes
    assert sequences.prompt_ids[sequences.prompt_mask].tolist() == [20, 20, *[7, 8, 9] * 4]
    assert episodes.end_reward.tolist() == [100.0] * 6
    for row in range(6):
        ids, mask = sequences.response_ids[row].tolist(), sequences.response_mask[row].tolist()
        begin = 0
        num_turns = int(episodes.num_turns[row])
        for number, end in enumerate(episodes.turn_ends[row, :num_turns].tolist()):
            assert all(mask[begin:end])
            assert not any(i in ENDS for i in ids[begin : end - 1])
            asked = ids[end - 1] in ENDS
            assert episodes.turn_rewards[row, number] == (end - begin if asked else 0)
            begin = end
            if number < num_turns - 1:
                assert (ids[end : end + 2], mask[end : end + 2]) == ([4, 5], [False, False])
                begin += 2
        assert begin == int(sequences.response_lengths[row])
    assert episodes.num_turns.max() > 2
    assert {StopReason(x) for x in rollout.stop_reason.tolist()} <= {
        StopReason.EOS,
        StopReason.LENGTH,
        StopReason.TURNS,
    }
    assert host.num_ends == 2  # what another rollout may have left, and what this one has


def test_what_interrupts_the_opening_ends_all_episodes():
    """Their processes would otherwise live until the next rollout."""
    host = ScriptedHost(start=start, respond=respond)

    def interrupted(*_):
        raise KeyboardInterrupt

    host.wait = interrupted
    with pytest.raises(KeyboardInterrupt):
        make_engine(host).generate(ROWS, make_sampling())
    assert host.num_ends == 2  # before the first, and after


@pytest.mark.parametrize("all_fail", [False, True])
def test_an_episode_that_has_not_begun_has_no_turn(all_fail):
    def fails(row):
        return Failure("start", "raised ValueError: x") if row["row"] == 1 or all_fail else start(row)

    host = ScriptedHost(start=fails, respond=respond)
    rollout = make_engine(host, max_turn_tokens=7, max_turns=4).generate(ROWS, make_sampling(max_response_tokens=30))
    num_turns = rollout.episodes.num_turns
    assert rollout.sequences.response_lengths[2:4].tolist() == [1, 1]
    begun = num_turns[[0, 1, 4, 5]]
    assert num_turns[2:4].tolist() == [0, 0]
    assert rollout.episodes.messages[2] == ()
    statistics = describe_episodes(rollout, rollout.episodes)
    assert (begun == 0).all() if all_fail else (begun > 0).all()
    count = statistics["turn/count"]
    assert (float(count.total), float(count.num)) == (float(begun.sum()), 0.0 if all_fail else 4.0)
    length = statistics["turn/length"]
    assert (float(length.total), float(length.num)) == (
        (0.0, 0.0) if all_fail else (float(rollout.num_chosen[[0, 1, 4, 5]].sum()), float(begun.sum()))
    )
    assert float(statistics["turn/limit_fraction"].total) == float((rollout.stop_reason == StopReason.TURNS).sum())
    assert rollout.last_turn_starts.tolist()[2:4] == [0, 0]


@pytest.mark.parametrize("max_rows", [2, 64])
def test_a_failed_episode_changes_no_bit_of_the_others(max_rows):
    def breaks(number, message):
        return Failure("respond", "raised ValueError: x at mine.py:3") if number == 1 else respond(number, message)

    rollouts, told = [], Told()
    for each in (respond, breaks):
        engine = make_engine(ScriptedHost(start=start, respond=each), progress=told, max_rows=max_rows)
        rollouts.append(engine.generate(ROWS, make_sampling(max_response_tokens=30)))
    others = torch.tensor([0, 2, 3, 4, 5])
    whole, broken = (rollout.select(others) for rollout in rollouts)
    length = min(whole.sequences.response_ids.shape[1], broken.sequences.response_ids.shape[1])
    assert torch.equal(whole.sequences.response_ids[:, :length], broken.sequences.response_ids[:, :length])
    assert torch.equal(whole.sequences.response_lengths, broken.sequences.response_lengths)
    assert rollouts[1].episodes.failures == (None, "respond", None, None, None, None)
    assert rollouts[1].stop_reason[1] == StopReason.FAILED
    assert told.messages == [
        "warning: environment: respond raised ValueError: x at mine.py:3; the response is left out as unscored, and so "
        "are further ones, counted in the metrics as environment/failed"
    ]


def test_a_group_that_does_not_open_takes_a_token_each_and_changes_no_bit_of_the_others():
    def fails(row):
        return Failure("start", "raised ValueError: x") if row["row"] == 1 else start(row)

    whole, broken = (
        make_engine(ScriptedHost(start=each, respond=respond)).generate(ROWS, make_sampling(max_response_tokens=30))
        for each in (start, fails)
    )
    assert broken.num_chosen.tolist()[2:4] == [1, 1]
    assert broken.stop_reason.tolist()[2:4] == [StopReason.FAILED] * 2
    for row in (0, 1, 4, 5):
        length = int(whole.sequences.response_lengths[row])
        assert int(broken.sequences.response_lengths[row]) == length
        assert torch.equal(broken.sequences.response_ids[row, :length], whole.sequences.response_ids[row, :length])


def test_each_kind_of_failure_of_a_part_is_told_once():
    """A hang is told although something else has failed in the same part before."""
    whats = ["raised KeyError: 'x' at mine.py:3", "raised KeyError: 'y' at mine.py:4", "took longer than 3 s",
             "raised ValueError at mine.py:5", "took longer than 3 s", "returned 3.5; it must be a text"]  # fmt: skip
    told = Told()
    host = ScriptedHost(start=start, respond=lambda number, message: Failure("respond", whats[number]))
    rollout = make_engine(host, progress=told).generate(ROWS, make_sampling(max_response_tokens=30))
    assert [line.split(";")[0] for line in told.messages] == [
        f"warning: environment: respond {whats[number].split(';')[0]}" for number in (0, 2, 3, 5)
    ]
    assert rollout.episodes.reasons == tuple(whats)


def test_a_signal_ends_the_wait_for_an_environment(monkeypatch):
    class Stopped(Exception):
        pass

    def look():
        raise Stopped

    host = ScriptedHost(start=start)
    engine = make_engine(host)
    monkeypatch.setattr(STOP, "look", look)
    with pytest.raises(Stopped):
        engine.generate(ROWS, make_sampling())


def test_where_memory_runs_out_all_episodes_begin_again():
    model, calls = build("llama"), []
    host = ScriptedHost(start=start, respond=respond)

    def full(*_):
        calls.append(None)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    sampling = make_sampling(max_response_tokens=30)
    expected = make_engine(ScriptedHost(start=start, respond=respond), model=model, max_rows=2).generate(ROWS, sampling)
    model.model.layers[0].register_forward_pre_hook(full)
    told = Told()
    rollout = make_engine(host, model=model, max_rows=4, progress=told).generate(ROWS, sampling)
    assert told.messages[0].startswith("out of memory in ")
    assert torch.equal(rollout.sequences.response_ids, expected.sequences.response_ids)
    assert torch.equal(rollout.episodes.turn_rewards, expected.episodes.turn_rewards)
    assert torch.equal(rollout.rollout_logprobs, expected.rollout_logprobs)
