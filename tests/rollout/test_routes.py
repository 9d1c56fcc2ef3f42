"""Experts that are chosen as engines sample, against each response alone: its routers' inputs, multiplied out."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from llmrl.rollout import native as native_module
from llmrl.rollout.graphs import GraphDecoder, check_graphs
from llmrl.routing import route_of
from llmrl.wiring.engines import recorded_routers
from tests.mixtures import FAMILIES, config_of

from . import test_turns
from .tiny import EOS, VOCAB, make_sampling

BIAS = "e_score_correction_bias"


def mixture(family):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(family, vocab_size=40, initializer_range=0.3))
    for name, p in model.named_parameters():
        if "gate.weight" in name:
            nn.init.normal_(p, std=1.0)  # routers that choose
    return model


@pytest.fixture(params=["native", "few_rows", "graphs", "generate"])
def make_engine(request, native, generating):
    """An engine of each kind over a model, whose choices are recorded."""

    def make(model, **settings):
        engine = generating(model, **settings) if request.param == "generate" else native(model, **settings)
        engine.routers = recorded_routers(engine.weights.fresh())
        if request.param == "few_rows":
            engine.max_rows = engine.rows_that_fit = 4
        if request.param == "graphs":
            check_graphs(engine.weights.fresh(), VOCAB, engine.routers)
            engine.graphs = GraphDecoder(eos_ids=EOS, vocab_size=VOCAB, routers=engine.routers)
        return engine

    return make


def by_hand(model, context, routers):
    """(tokens, L): the routes of each token of a context that is read alone."""
    inputs = []
    hooks = [router.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for router in routers]
    with torch.no_grad():
        model(input_ids=torch.tensor([context]), use_cache=False)
    for hook in hooks:
        hook.remove()
    layers = []
    for router, x in zip(routers, inputs, strict=True):
        scores = (x.reshape(-1, x.shape[-1]) @ router.weight.T).detach()
        scores = scores.sigmoid() + router.get_buffer(BIAS) if hasattr(router, BIAS) else scores
        layers.append(route_of(scores.argsort(dim=1, descending=True)[:, :2]))
    return torch.stack(layers, dim=1)


def assert_by_hand(model, rollout):
    """The route of a token is that of the token before it, from which it was predicted."""
    routers, sequences = recorded_routers(model), rollout.sequences
    for row, length in enumerate(sequences.response_lengths.tolist()):
        context, expected = sequences.prompt_ids[row][sequences.prompt_mask[row]].tolist(), []
        for token, chosen in zip(sequences.response_ids[row, :length].tolist(), range(length), strict=True):
            if sequences.restarts is not None and sequences.restarts[row, chosen]:
                context = []
            if sequences.response_mask[row, chosen]:
                expected.append((chosen, by_hand(model, context, routers)[-1]))
            context = [*context, token]
        for column, route in expected:
            assert torch.equal(rollout.routes[row, column], route)
    assert not rollout.routes[~sequences.response_mask].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_routes_are_those_of_the_token_that_each_was_predicted_from(family, make_engine, prompts):
    model = mixture(family)
    sampling = make_sampling(max_response_tokens=14)
    rollout = make_engine(model).generate(prompts, sampling)
    assert rollout.routes.shape == (*rollout.sequences.response_ids.shape, len(recorded_routers(model)))
    assert len(set(rollout.sequences.response_lengths.tolist())) > 1
    assert_by_hand(model, rollout)
    again = make_engine(model).generate(prompts, sampling)
    assert torch.equal(again.routes, rollout.routes)


def test_watching_changes_nothing(make_engine, prompts):
    model = mixture("qwen3_moe")
    watched, alone = make_engine(model), make_engine(model)
    alone.routers = ()
    if getattr(alone, "graphs", None) is not None:
        alone.graphs = GraphDecoder(eos_ids=EOS, vocab_size=VOCAB)
    ours, theirs = (engine.generate(prompts, make_sampling(max_response_tokens=8)) for engine in (watched, alone))
    assert theirs.routes is None
    assert torch.equal(ours.sequences.response_ids, theirs.sequences.response_ids)
    assert torch.equal(ours.rollout_logprobs, theirs.rollout_logprobs)


def test_a_model_without_experts_has_none(model, make_engine, prompts):
    engine = make_engine(model)
    assert not engine.routers
    assert engine.generate(prompts, make_sampling()).routes is None


def test_the_choices_are_those_of_the_copy_that_samples(make_engine, prompts):
    model = mixture("qwen3_moe")
    engine = make_engine(model, dtype=torch.bfloat16)
    before = engine.generate(prompts, make_sampling(max_response_tokens=8))
    with torch.no_grad():
        for router in recorded_routers(model):
            router.weight.zero_()
    after = engine.generate(prompts, make_sampling(max_response_tokens=8))
    assert len(before.routes[before.sequences.response_mask].unique()) > 3
    assert torch.equal(after.routes, before.routes)


@pytest.mark.parametrize("max_rows", [2, 10])
@pytest.mark.parametrize("steps_aside", [0, 3])
def test_responses_of_several_turns_and_contexts(native, monkeypatch, max_rows, steps_aside):
    monkeypatch.setattr(native_module, "STEPS_ASIDE", steps_aside)
    model = mixture("qwen3_moe")
    prompts = test_turns.make_prompts([7, 8, 9, 2, 11], [20], [3, 4, 30])
    sampling = make_sampling(max_response_tokens=24, max_turn_tokens=9)
    replies = test_turns.Scripted(test_turns.branching(test_turns.make_script(6)))
    engine = native(model, max_rows=max_rows, eos_ids=test_turns.ENDS)
    engine.routers = recorded_routers(model)
    rollout = engine.generate(prompts, sampling, replies)
    assert rollout.sequences.restarts.any()
    assert (~rollout.sequences.response_mask).any()
    assert_by_hand(model, rollout)
