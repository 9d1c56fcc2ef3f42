from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from llmrl.models.policy import TransformersPolicy
from tests.hybrids import HYBRIDS, build_hybrid
from tests.rollout.tiny import VOCAB

from .tiny import assert_same_gradients, build, dense, gradients, in_microbatches, make_sequences, module_of


def policy_of(family, **settings):
    return TransformersPolicy(module_of(build(family), **settings))


def test_each_row_is_the_models_own_log_softmax(family):
    logprobs, entropy = policy_of(family).logprobs(make_sequences()).named.values()
    with torch.no_grad():
        expected_logprobs, expected_entropy = dense(build(family))
    assert_close(logprobs, expected_logprobs, rtol=1e-4, atol=1e-4)
    assert_close(entropy, expected_entropy, rtol=1e-4, atol=1e-4)


def test_gradients_are_those_of_the_dense_computation(family):
    policy, plain = policy_of(family), build(family)
    ours = gradients(policy.module.model, *policy.logprobs(make_sequences()).named.values())
    assert_same_gradients(ours, gradients(plain, *dense(plain)))


@pytest.mark.parametrize("hybrid", HYBRIDS)
def test_a_state_that_is_carried_along_the_row_sees_no_padding(hybrid):
    """Log-probabilities and gradients of ragged rows side by side are those of each row alone."""
    module, plain = module_of(build_hybrid(hybrid).train()), build_hybrid(hybrid).train()
    outputs = TransformersPolicy(module).logprobs(make_sequences())
    expected = dense(plain)
    for ours, theirs in zip(outputs.named.values(), expected, strict=True):
        assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert_same_gradients(gradients(module.model, *outputs.named.values()), gradients(plain, *expected))


def test_padding_never_leaks(family):
    policy = policy_of(family)
    garbage = make_sequences(prompt_padding=(36, 0, 7), response_padding=(12, -1, 10**6))
    clean = policy.logprobs(make_sequences())
    assert_close(policy.logprobs(garbage).named, clean.named, rtol=0, atol=0)


@pytest.mark.parametrize("microbatch_tokens", [1, 12, 10_000])
def test_chunks_without_gradient_give_what_one_pass_with_gradient_gives(family, microbatch_tokens):
    policy = policy_of(family)
    whole = policy.logprobs(make_sequences())
    with torch.no_grad():
        parts = in_microbatches(policy.logprobs, make_sequences(), microbatch_tokens)
    assert whole.logprobs.requires_grad
    assert not parts.logprobs.requires_grad
    assert_close(parts.named, {name: x.detach() for name, x in whole.named.items()}, rtol=1e-5, atol=1e-5)


def test_microbatches_hold_their_budget():
    policy = policy_of("llama")
    shapes = []
    policy.module.model.base_model.register_forward_pre_hook(
        lambda _, __, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    with torch.no_grad():
        in_microbatches(policy.logprobs, make_sequences(), 12)
    # lengths 9, 3, 9, 3, 6 in order of length: {3, 3}, {6}, {9}, {9}
    assert shapes == [(2, 3), (1, 6), (1, 9), (1, 9)]


@pytest.mark.parametrize("head", ["llama", "gemma2"])
def test_a_batch_in_which_nothing_counts(head):
    policy = policy_of(head)
    sequences = make_sequences()
    nothing = replace(sequences, response_mask=torch.zeros_like(sequences.response_mask))
    logprobs, entropy = policy.logprobs(nothing).named.values()
    assert not logprobs.any()
    assert not entropy.any()
    (logprobs.sum() + entropy.sum()).backward()
    assert all(p.grad is None or not p.grad.any() for p in policy.module.parameters())
    with torch.no_grad():
        assert not policy.logprobs(nothing).logprobs.any()


def test_no_rows_without_gradient():
    with torch.no_grad():
        outputs = policy_of("llama").logprobs(make_sequences().select(torch.tensor([], dtype=torch.long)))
    assert outputs.logprobs.shape == outputs.entropy.shape == (0, 7)


@pytest.mark.parametrize("head", ["llama", "gemma2"])
def test_ids_beyond_the_tokenizer_have_no_probability(head):
    every_id = make_sequences([([7, 8], [n], [1]) for n in range(VOCAB)])
    logprobs = policy_of(head).logprobs(every_id).logprobs
    assert_close(logprobs[:, 0].exp().sum(), torch.tensor(1.0))


@pytest.mark.parametrize("head", ["llama", "gemma2"])
def test_temperature_divides_the_logits(head):
    """So it divides the log-odds of any two tokens."""
    two = make_sequences([([7, 8], [20], [1]), ([7, 8], [21], [1])])

    def log_odds(temperature):
        logprobs = policy_of(head, temperature=temperature).logprobs(two).logprobs
        return logprobs[0, 0] - logprobs[1, 0]

    assert_close(log_odds(0.5), 2 * log_odds(1.0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("head", ["llama", "gemma2"])
def test_bfloat16_is_the_arithmetic_and_not_the_result(head):
    exact = policy_of(head).logprobs(make_sequences()).logprobs
    policy = policy_of(head, dtype=torch.bfloat16)
    rough, entropy = policy.logprobs(make_sequences()).named.values()
    assert rough.dtype == entropy.dtype == torch.float32
    assert not torch.equal(rough, exact)
    assert_close(rough, exact, rtol=0.05, atol=0.15)
    rough.sum().backward()
    assert {p.grad.dtype for p in policy.module.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.parametrize(("dtype", "product"), [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_the_head_multiplies_in_the_arithmetic_of_the_rest(dtype, product):
    module, seen = module_of(build("llama"), dtype=dtype), []
    head = module.head

    def watched(model, hidden, ids, temperature):
        seen.append((hidden @ model.get_output_embeddings().weight.T).dtype)
        return head(model, hidden, ids, temperature)

    module.head = watched
    module(make_sequences())
    assert seen == [product]
