"""Heads of multi-token prediction against one forward a row, nothing padded."""

import copy
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from llmrl.models.critic import SharedTrunk
from llmrl.models.mtp import MTPHeads, MTPModule, TargetHeads
from llmrl.roles import ActorCritic, MovingTargets

from .tiny import ROWS, TEMPERATURE, VOCAB, build, dense, in_microbatches, make_sequences, module_of

HIDDEN, K = 32, 2
GARBAGE: dict[str, Any] = {"prompt_padding": (36, 0, 7), "response_padding": (35, 36, 1)}


def drawn(heads, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in heads.parameters():
        torch.nn.init.normal_(p, std=0.2, generator=generator)
    return heads


def module(family: str) -> MTPModule:
    made = MTPModule(module_of(build(family)), drawn(MTPHeads(HIDDEN, K), 1))
    drawn(made.targets, 2)
    return made


def alone(family, heads):
    """``(values, last values, predictions)`` by their definition, token by token; a value per head, then zeros."""
    model = build(family)
    length = 1 + max(len(response) for _, response, _ in ROWS)
    values, predicted = torch.zeros(1 + K, len(ROWS), length), torch.zeros(1 + K, len(ROWS), length)
    last_values = torch.zeros(len(ROWS))
    for row, (prompt, response, chosen) in enumerate(ROWS):
        hidden = model.base_model(input_ids=torch.tensor([prompt + response]), use_cache=False).last_hidden_state[0]
        last_values[row] = heads.values[0].weight[0] @ hidden[-1]
        mine = [t for t in range(len(response)) if chosen[t]]
        for i, t in enumerate(mine):
            state = hidden[len(prompt) + t - 1]
            for k in range(1 + K):
                own = state
                if k:
                    pre = heads.blocks[k - 1].weight @ state
                    own = state + pre * torch.sigmoid(pre)
                values[k, row, t] = heads.values[k].weight[0] @ own
                if k and i + k < len(mine):
                    logits = model.get_output_embeddings()(own)[:VOCAB] / TEMPERATURE
                    predicted[k, row, t] = logits.log_softmax(0)[response[mine[i + k]]]
    return values, last_values, predicted


@pytest.mark.parametrize("padding", [{}, GARBAGE], ids=["eos", "garbage"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_each_head_is_that_of_its_definition(family, padding):
    """Tokens that the actor did not choose are stepped over, and padding is never read."""
    made = module(family)
    outputs = made(make_sequences(**padding))
    for prefix, heads in (("", made.heads), ("target_", made.targets)):
        values, last_values, predicted = alone(family, heads)
        for k in range(1 + K):
            assert_close(outputs[f"{prefix}values/{k}"], values[k], rtol=1e-4, atol=1e-4)
            if k and not prefix:
                assert_close(outputs[f"predicted/{k}"], predicted[k], rtol=1e-4, atol=1e-4)
        assert_close(outputs[f"{prefix}last_values"], last_values, rtol=1e-4, atol=1e-4)
    assert torch.equal(outputs["values"], outputs["values/0"])
    assert_close(outputs["logprobs"], dense(build(family))[0], rtol=1e-4, atol=1e-4)


def test_microbatches_change_nothing_and_predictions_wait_for_a_gradient():
    both = SharedTrunk(module("llama"))
    assert isinstance(both, ActorCritic)
    whole = both.both(make_sequences()).named
    with torch.no_grad():
        parts = in_microbatches(both.both, make_sequences(), 20).named
    assert whole.keys() - parts.keys() == {"predicted/1", "predicted/2"}
    for name, x in parts.items():
        assert_close(x, whole[name].detach(), rtol=1e-4, atol=1e-4)


def test_a_fresh_head_predicts_what_the_actor_does_and_values_nothing():
    """So that the loss of a head that is asked for the very next token is the actor's own."""
    made = MTPModule(module_of(build("llama")), MTPHeads(HIDDEN, K))
    outputs = made(make_sequences())
    assert all(not outputs[f"values/{k}"].any() for k in range(1 + K))
    hidden = torch.randn(3, HIDDEN)
    assert all(torch.equal(state, hidden) for state in made.heads.states(hidden))


def test_gradients_reach_trunk_and_heads_and_never_the_targets():
    made = module("llama")
    outputs = made(make_sequences())
    sum(x.sum() for name, x in outputs.items() if name.startswith(("values/", "predicted/"))).backward()
    assert all(p.grad is not None and p.grad.any() for p in made.heads.parameters())
    assert all(p.grad is None for p in made.targets.parameters())
    assert any(p.grad is not None and p.grad.any() for p in made.model.base_model.parameters())


def test_heads_compute_in_float32():
    heads, hidden = drawn(MTPHeads(HIDDEN, 1), 1), torch.randn(3, HIDDEN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = heads.read(hidden)
    assert all(torch.equal(x, y) for x, y in zip(inside, heads.read(hidden), strict=True))


def test_target_heads_are_the_average_by_hand():
    made = module("llama")
    before = copy.deepcopy(made.targets.state_dict())
    targets = TargetHeads(made.heads, made.targets)
    assert isinstance(targets, MovingTargets)
    targets.move(0.3)
    for name, p in made.heads.named_parameters():
        assert_close(targets.state_dict()[name], 0.7 * before[name] + 0.3 * p.detach())
    targets.load_state_dict(before)
    assert all(torch.equal(p, before[name]) for name, p in made.targets.named_parameters())
    targets.move(1.0)
    assert all(torch.equal(p, made.heads.get_parameter(name)) for name, p in made.targets.named_parameters())
