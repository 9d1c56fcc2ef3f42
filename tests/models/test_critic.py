"""Critics against one forward a row, nothing padded; a shared trunk against a policy and a critic apart."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from llmrl.batches import Sequences, TokenOutputs
from llmrl.models.critic import (
    SharedModule,
    SharedTrunk,
    TransformersValueFunction,
    ValueHead,
    ValueModule,
)
from llmrl.models.networks import SeparateNetworks
from llmrl.models.policy import TransformersPolicy
from llmrl.models.training import turn_dropout_off
from llmrl.roles import ActorCritic, ValueFunction

from .tiny import (
    ROWS,
    DrawnHead,
    assert_same_gradients,
    build,
    dense,
    gradients,
    in_microbatches,
    make_sequences,
    module_of,
)

HIDDEN = 32
PAD = 36  # in none of the rows
GARBAGE: dict[str, Any] = {"prompt_padding": (PAD, 0, 7), "response_padding": (-1, PAD, 10**6)}


def head_of(seed: int = 5) -> ValueHead:
    torch.manual_seed(seed)
    return DrawnHead(HIDDEN)


def critic_of(family: str, *, dtype=torch.float32) -> Any:
    """In train mode without dropout, as a run has it; the same weights each time."""
    trunk = build(family).base_model
    turn_dropout_off(trunk)
    return TransformersValueFunction(ValueModule(trunk.train(), head_of(), dtype=dtype))


def shared_of(family: str) -> Any:
    return SharedTrunk(SharedModule(module_of(build(family)), head_of()))


def answers(outputs: TokenOutputs) -> tuple[Tensor, ...]:
    """Outputs in the order: logprobs, entropy, values, last_values."""
    return tuple(outputs.named.values())


def alone(trunk: Any, weight: Tensor, rows: Any = ROWS) -> tuple[Tensor, Tensor]:
    """``(values, last_values)``: the hidden state before each chosen token, and the last one, times the head."""
    length = 1 + max(len(response) for _, response, _ in rows)
    values, last_values = [], []
    for prompt, response, chosen in rows:
        hidden = trunk(input_ids=torch.tensor([prompt + response]), use_cache=False).last_hidden_state[0]
        before = hidden[len(prompt) - 1 : -1] @ weight[0]
        values.append(torch.nn.functional.pad(before * torch.tensor(chosen), (0, length - len(response))))
        last_values.append(hidden[-1] @ weight[0])
    return torch.stack(values), torch.stack(last_values)


def expected_of(family: str, rows: Any = ROWS) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return alone(build(family).base_model, head_of().weight, rows)


def value_gradients(trunk: Any, head: Any, values: Tensor, last_values: Tensor) -> dict[str, Tensor]:
    """Of a sum in which each value has a weight of its own."""
    weights = torch.linspace(-1.0, 2.0, values.numel()).view_as(values)
    loss = (weights * values).sum() + (torch.linspace(0.5, 1.0, len(last_values)) * last_values).sum()
    named = [*trunk.named_parameters(), ("value head", head.weight)]
    return dict(zip((name for name, _ in named), torch.autograd.grad(loss, [p for _, p in named]), strict=True))


# --- which state is read ----------------------------------------------------------------------------------------------


def test_each_value_is_that_of_the_state_before_its_token(family):
    """Tool output has none; the last value is behind the last token, whoever wrote it."""
    assert_close(answers(critic_of(family).values(make_sequences())), expected_of(family), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_each_row_has_the_values_that_it_has_alone(family, training):
    critic, whole = critic_of(family), make_sequences()
    critic.module.train(training)
    together = answers(critic.values(whole))
    for row in range(len(ROWS)):
        one = torch.tensor([row])
        assert_close(answers(critic.values(whole.select(one))), tuple(x[one] for x in together), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_token_changes_the_values_behind_it_alone(family):
    """A value is read before its token is chosen."""
    critic, response = critic_of(family), [10, 11, 12, 13, 14]
    before, last_before = answers(critic.values(make_sequences([([7, 8, 9], response, [1] * 5)])))
    for t in range(5):
        changed = [*response[:t], 30, *response[t + 1 :]]
        after, last_after = answers(critic.values(make_sequences([([7, 8, 9], changed, [1] * 5)])))
        assert torch.equal(after[:, : t + 1], before[:, : t + 1])
        assert (after[:, t + 1 : 5] != before[:, t + 1 : 5]).all()
        assert (last_after != last_before).all()


def test_padding_never_leaks(family):
    """Neither ids that no embedding has nor one whose embedding is NaN."""
    critic = critic_of(family)
    with torch.no_grad():
        critic.module.trunk.get_input_embeddings().weight[PAD] = torch.nan
    clean = answers(critic.values(make_sequences()))
    assert all(torch.equal(x, y) for x, y in zip(answers(critic.values(make_sequences(**GARBAGE))), clean, strict=True))
    assert_close(clean, expected_of(family), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("microbatch_tokens", [1, 12, 10_000])
def test_chunks_without_gradient_give_what_one_pass_with_gradient_gives(family, microbatch_tokens):
    critic = critic_of(family)
    whole = answers(critic.values(make_sequences()))
    with torch.no_grad():
        parts = answers(in_microbatches(critic.values, make_sequences(), microbatch_tokens))
    assert whole[0].requires_grad
    assert not parts[0].requires_grad
    assert_close(parts, tuple(x.detach() for x in whole), rtol=1e-5, atol=1e-5)


def test_microbatches_hold_their_budget():
    critic, shapes = critic_of("llama"), []
    critic.module.trunk.register_forward_pre_hook(
        lambda _, __, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    with torch.no_grad():
        answers(in_microbatches(critic.values, make_sequences(), 12))
    assert shapes == [(2, 3), (1, 6), (1, 9), (1, 9)]  # lengths 9, 3, 9, 3, 6


def test_a_batch_in_which_nothing_counts():
    critic, sequences = critic_of("llama"), make_sequences()
    nothing = replace(sequences, response_mask=torch.zeros_like(sequences.response_mask))
    values, last_values = answers(critic.values(nothing))
    assert not values.any()
    assert_close(last_values, expected_of("llama")[1], rtol=1e-4, atol=1e-4)
    values.sum().backward()
    assert not any(p.grad.any() for p in critic.module.parameters() if p.grad is not None)


# --- what learns ------------------------------------------------------------------------------------------------------


def test_gradients_are_those_of_the_dense_computation_and_reach_every_weight(family):
    critic, trunk, head = critic_of(family), build(family).base_model, head_of()
    ours = value_gradients(critic.module.trunk, critic.module.head, *answers(critic.values(make_sequences())))
    assert_same_gradients(ours, value_gradients(trunk, head, *alone(trunk, head.weight)))
    assert [name for name, grad in ours.items() if not grad.any()] == []
    assert len(ours) == len(list(critic.module.parameters()))


def test_a_head_of_zeros_gives_zeros_and_learns_before_the_trunk():
    critic = critic_of("llama")
    critic.module.head = ValueHead(HIDDEN)
    values, last_values = answers(critic.values(make_sequences()))
    assert not values.any()
    assert not last_values.any()
    ours = value_gradients(critic.module.trunk, critic.module.head, values, last_values)
    assert [name for name, grad in ours.items() if grad.any()] == ["value head"]


# --- arithmetic -------------------------------------------------------------------------------------------------------


def test_bfloat16_is_the_arithmetic_and_not_the_result():
    exact, _ = answers(critic_of("llama").values(make_sequences()))
    critic = critic_of("llama", dtype=torch.bfloat16)
    rough, last = answers(critic.values(make_sequences()))
    assert rough.dtype == last.dtype == torch.float32
    assert not torch.equal(rough, exact)
    assert_close(rough, exact, rtol=0.0, atol=0.1 * exact.detach().abs().max().item())
    rough.sum().backward()
    assert {p.grad.dtype for p in critic.module.parameters() if p.grad is not None} == {torch.float32}


def test_the_head_computes_in_float32():
    critic, seen = critic_of("llama", dtype=torch.bfloat16), []
    critic.module.head.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    with torch.autocast("cpu", dtype=torch.bfloat16):  # whatever stands around it
        critic.module(make_sequences())
    assert len(seen) == 2
    for hidden, values in seen:
        assert values.dtype == torch.float32
        exact = hidden.double() @ critic.module.head.weight[0].double()
        assert_close(values.double(), exact, rtol=1e-5, atol=1e-5)


# --- a shared trunk ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [True, False])
def test_a_shared_trunk_is_the_policy_and_the_critic_at_once(family, grad):
    """Bit for bit."""
    apart = SeparateNetworks(TransformersPolicy(module_of(build(family))), critic_of(family))
    shared = shared_of(family)
    with torch.set_grad_enabled(grad):
        theirs, ours = answers(apart.both(make_sequences())), answers(shared.both(make_sequences()))
        assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))
        for again in (shared.logprobs(make_sequences()), shared.values(make_sequences())):
            assert all(torch.equal(x, y) for x, y in zip(answers(again), theirs, strict=True))
        assert theirs[2].any()
    with torch.no_grad():
        assert_close(ours[0].detach(), dense(build(family))[0], rtol=1e-4, atol=1e-4)
    assert (ours[0].requires_grad, ours[2].requires_grad) == (grad, grad)


def test_a_shared_trunk_is_run_once():
    shared, passes = shared_of("llama"), []
    shared.module.model.base_model.register_forward_pre_hook(lambda *_: passes.append(1))
    answers(shared.both(make_sequences()))
    assert len(passes) == 1


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_the_gradient_of_a_shared_trunk_is_the_sum_of_both(family):
    shared = shared_of(family)
    logprobs, entropy, values, last_values = answers(shared.both(make_sequences()))
    weights = torch.linspace(-1.0, 2.0, values.numel()).view_as(values)
    policy_loss = (weights * logprobs).sum() + 0.3 * (weights.flip(1) * entropy).sum()
    value_loss = (weights * values).sum() + (torch.linspace(0.5, 1.0, len(last_values)) * last_values).sum()
    (policy_loss + value_loss).backward()
    ours = {name: p.grad for name, p in shared.module.model.named_parameters()}

    model, head = build(family), head_of()
    expected = gradients(model, *dense(model))
    of_values = value_gradients(model.base_model, head, *alone(model.base_model, head.weight))
    prefix = model.base_model_prefix
    for name, grad in of_values.items():
        if name != "value head":
            expected[f"{prefix}.{name}"] = expected[f"{prefix}.{name}"] + grad
    assert_same_gradients(ours, expected)
    assert_same_gradients({"head": shared.module.head.weight.grad}, {"head": of_values["value head"]})


def test_the_engine_finds_the_actor_in_a_shared_module():
    shared = shared_of("llama")
    assert shared.module.model is shared.module.policy.model
    assert [name for name, _ in shared.module.named_parameters() if not name.startswith("policy.model.")] == [
        "head.weight"
    ]


def test_both_kinds_play_both_parts():
    critic = critic_of("llama")
    separate = SeparateNetworks(TransformersPolicy(module_of(build("llama"))), critic)
    assert isinstance(critic, ValueFunction)
    assert isinstance(separate, ActorCritic)
    assert isinstance(shared_of("llama"), ActorCritic)
    assert (separate.share_trunk, SharedTrunk.share_trunk) == (False, True)


def test_no_rows_without_gradient():
    nothing: Sequences = make_sequences().select(torch.tensor([], dtype=torch.long))
    with torch.no_grad():
        shapes = [tuple(x.shape) for x in answers(shared_of("llama").both(nothing))]
    assert shapes == [(0, 7), (0, 7), (0, 7), (0,)]
