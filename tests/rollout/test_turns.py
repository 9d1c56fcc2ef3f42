"""Responses of several turns in the native engine, by definition: a forward over the whole row for each token."""

import pytest
import torch
from torch.testing import assert_close

from llmrl.batches import NewContext, StopReason
from llmrl.functional.streams import uniforms
from llmrl.rollout import native as native_module
from tests import oracles
from tests.hybrids import ONE_OF_EACH_KIND, build_hybrid

from .tiny import FAMILIES, VOCAB, build, make_prompts, make_sampling, rows_of

ENDS = tuple(range(0, VOCAB, 3))
"""Every third id ends a turn."""


class Scripted:
    """`Replies` that follow a table: what is fed after turn k of a response. No entry: the response is complete."""

    def __init__(self, script):
        self.script = script
        self.turns = {}
        self.asked, self.taken = [], []

    def __call__(self, responses):
        self.turns.clear()
        return self

    def ask(self, turns):
        for index, ids in turns.items():
            self.turns.setdefault(index, []).append(list(ids))
        self.asked.append(list(turns))

    def take(self, indices):
        self.taken.append(list(indices))
        return {index: self.script.get(index, {}).get(len(self.turns[index]), []) for index in indices}


def by_definition(model, prompt, number, sampling, answers):
    """``(ids, chosen, log-probabilities of the chosen, turns, stop reason)``."""
    ids, chosen, logprobs, turns = [], [], [], [[]]
    context = prompt
    while True:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([context]), use_cache=False).logits[0, -1, :VOCAB].double()
        u = uniforms(sampling.seed, sampling.purpose, torch.tensor([number]), torch.tensor([sum(chosen)])).item()
        drawn = oracles.inverse_cdf(logits.softmax(dim=0).tolist(), u)
        ids.append(drawn)
        context = [*context, drawn]
        chosen.append(True)
        turns[-1].append(drawn)
        logprobs.append(logits.log_softmax(dim=0)[drawn].item())
        if drawn in ENDS:
            answer = answers.get(len(turns), [])
            if not answer:
                return ids, chosen, torch.tensor(logprobs), turns, StopReason.EOS
            ids += answer
            context = [*answer] if isinstance(answer, NewContext) else context + answer
            chosen += [False] * len(answer)
            turns.append([])
        elif len(ids) == sampling.max_response_tokens or len(turns[-1]) == sampling.max_turn_tokens:
            return ids, chosen, torch.tensor(logprobs), turns[:-1], StopReason.LENGTH


def assert_by_definition(model, rollout, sampling, replies):
    sequences = rollout.sequences
    for index, (prompt, _, logprobs, _) in enumerate(rows_of(rollout)):
        answers = replies.script.get(index, {})
        ids, chosen, expected, turns, stop = by_definition(
            model, prompt, sampling.first_response + index, sampling, answers
        )
        length = int(sequences.response_lengths[index])
        assert sequences.response_ids[index, :length].tolist() == ids
        assert sequences.response_mask[index, :length].tolist() == chosen
        assert_close(logprobs, expected, atol=3e-5, rtol=0)
        assert replies.turns.get(index, []) == turns
        assert rollout.stop_reason[index] == stop


def make_script(num_responses, longest=6):
    generator = torch.Generator().manual_seed(3)

    def integer(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    return {
        index: {turn: [integer(0, VOCAB) for _ in range(integer(1, longest))] for turn in range(1, integer(2, 7))}
        for index in range(num_responses)
    }


@pytest.fixture(params=[0, 3, 16])
def steps_aside(request, monkeypatch):
    monkeypatch.setattr(native_module, "STEPS_ASIDE", request.param)
    return request.param


@pytest.mark.parametrize("max_rows", [2, 4, 10])
@pytest.mark.parametrize("family", FAMILIES)
def test_turns_go_on_as_by_definition(family, native, progress, max_rows, steps_aside):
    model = build(family)
    prompts = make_prompts([7, 8, 9, 2, 11], [20], [3, 4, 30], [5, 5], [8, 9, 10, 11, 12, 13])
    sampling = make_sampling(max_response_tokens=40, first_response=6, max_turn_tokens=9)
    replies = Scripted(make_script(10))
    rollout = native(model, max_rows=max_rows, eos_ids=ENDS).generate(prompts, sampling, replies)
    assert_by_definition(model, rollout, sampling, replies)
    assert sum(len(turns) > 2 for turns in replies.turns.values()) > 3
    assert progress.advanced == 10


def branching(script):
    """The same up to the third turn, where every second answer begins a new context."""
    return {
        index: {turn: NewContext(ids) if (index + turn) % 2 else ids for turn, ids in answers.items() if turn < 3}
        for index, answers in script.items()
    }


@pytest.mark.parametrize("max_rows", [2, 10])
@pytest.mark.parametrize("family", FAMILIES)
def test_new_contexts_are_read_by_themselves(family, native, progress, max_rows, steps_aside):
    model = build(family)
    prompts = make_prompts([7, 8, 9, 2, 11], [20], [3, 4, 30], [5, 5], [8, 9, 10, 11, 12, 13])
    sampling = make_sampling(max_response_tokens=45, first_response=6, max_turn_tokens=9)
    replies = Scripted(branching(make_script(10, longest=9)))
    rollout = native(model, max_rows=max_rows, eos_ids=ENDS).generate(prompts, sampling, replies)
    assert_by_definition(model, rollout, sampling, replies)
    restarts = rollout.sequences.restarts
    for index, answers in replies.script.items():
        begins, at = [], 0
        for number, turn in enumerate(replies.turns.get(index, []), start=1):
            at += len(turn)
            begins += [at] if isinstance(answers.get(number), NewContext) else []
            at += len(answers.get(number, []))
        assert restarts[index].nonzero().flatten().tolist() == begins
    assert restarts.sum() > 5
    assert progress.advanced == 10


@pytest.mark.parametrize("hybrid", ONE_OF_EACH_KIND)
def test_states_of_fixed_size_begin_anew_in_a_new_context(hybrid, native):
    model, prompts = build_hybrid(hybrid), make_prompts([7, 8, 9, 2, 11], [20], [3, 4])
    sampling = make_sampling(max_response_tokens=32, max_turn_tokens=8)
    replies = Scripted(branching(make_script(6, longest=4)))
    rollout = native(model, max_rows=4, eos_ids=ENDS).generate(prompts, sampling, replies)
    assert_by_definition(model, rollout, sampling, replies)
    assert rollout.sequences.restarts.any()


@pytest.mark.parametrize("hybrid", ONE_OF_EACH_KIND)
def test_states_of_fixed_size_are_set_aside_too(hybrid, native):
    model, prompts = build_hybrid(hybrid), make_prompts([7, 8, 9, 2, 11], [20], [3, 4])
    sampling = make_sampling(max_response_tokens=16)
    replies = Scripted(make_script(6, longest=4))
    rollout = native(model, max_rows=4, eos_ids=ENDS).generate(prompts, sampling, replies)
    assert_by_definition(model, rollout, sampling, replies)


def test_others_grow_while_a_row_waits(native):
    """The reply to the first turn is taken after sixteen steps, or when no other row is growing."""
    model = build("llama")
    replies = Scripted({0: {1: [9]}})
    sampling = make_sampling(max_response_tokens=40, num_responses=4)
    native(model, eos_ids=ENDS).generate(make_prompts([7, 8, 9]), sampling, replies)
    assert len(replies.asked) > 1
    assert replies.taken[0] == [index for asked in replies.asked[: len(replies.taken[0])] for index in asked]


def test_a_reply_longer_than_the_window_moves_it_to_the_back(native, steps_aside):
    model = build("gpt2")
    replies = Scripted({0: {1: [9] * 20}, 1: {1: [10], 2: [11] * 3}, 2: {1: [4] * 9, 2: [8] * 9}})
    sampling = make_sampling(max_response_tokens=34, num_responses=2)
    rollout = native(model, max_rows=2, eos_ids=ENDS).generate(make_prompts([7] * 9, [8]), sampling, replies)
    assert_by_definition(model, rollout, sampling, replies)


@pytest.mark.parametrize("first_response", range(4))
def test_a_long_prompt_moves_in_beside_a_short_row_that_has_come_back(native, first_response):
    model = build("llama")
    prompts = make_prompts([7], [8], [9, 10] * 8)
    sampling = make_sampling(max_response_tokens=40, num_responses=1, first_response=first_response)
    replies = Scripted({0: {1: [4], 2: [5], 3: [6]}})
    rollout = native(model, max_rows=2, eos_ids=ENDS).generate(prompts, sampling, replies)
    assert_by_definition(model, rollout, sampling, replies)
