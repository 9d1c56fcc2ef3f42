import copy

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
)

from llmrl.rollout.rope import pin_rope, switching_limit
from llmrl.rollout.support import RolloutError

from .tiny import SIZES, build, full_forward_logprobs, make_prompts, make_sampling, rows_of

LIMIT = 16
WITHOUT_HEAD_DIM = {name: value for name, value in SIZES.items() if name != "head_dim"}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [4.0, 8.0, 12.0, 16.0],
    "original_max_position_embeddings": LIMIT,
}


def phi3():
    settings = WITHOUT_HEAD_DIM | {"original_max_position_embeddings": LIMIT, "rope_parameters": dict(LONGROPE)}
    return Phi3ForCausalLM(Phi3Config(**settings))


def phimoe():
    rope = LONGROPE | {"short_mscale": 1.0, "long_mscale": 1.5, "factor": 4.0}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 2}
    return PhimoeForCausalLM(PhimoeConfig(**WITHOUT_HEAD_DIM, **experts, rope_parameters=rope))


def dynamic():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    return LlamaForCausalLM(LlamaConfig(**(SIZES | {"max_position_embeddings": LIMIT, "rope_parameters": rope})))


def gemma3():
    """Only its full attention switches."""
    rope = {
        "full_attention": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    settings = {"max_position_embeddings": LIMIT, "rope_parameters": rope, "layer_types": layers, "sliding_window": 4}
    return Gemma3ForCausalLM(Gemma3TextConfig(**(SIZES | settings), query_pre_attn_scalar=8))


SWITCHING = [phi3, phimoe, dynamic, gemma3]


@pytest.fixture(params=SWITCHING, ids=lambda make: make.__name__)
def make(request):
    return request.param


def seeded(make):
    torch.manual_seed(0)
    return make().eval()


def short_and_long(seed=1):
    torch.manual_seed(seed)
    return torch.randint(37, (1, 9)), torch.randint(37, (1, LIMIT + 9))


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids, use_cache=False).logits


def in_one_batch(short, long):
    return torch.cat([torch.nn.functional.pad(short, (0, long.shape[1] - short.shape[1])), long])


def test_these_models_do_switch(make):
    """Otherwise nothing here would say anything."""
    model, (short, long) = seeded(make), short_and_long()
    assert switching_limit(model.config) == LIMIT
    difference = logits(model, short) - logits(model, in_one_batch(short, long))[:1, : short.shape[1]]
    assert difference.abs().max() > 1e-3


def test_a_pinned_row_does_not_depend_on_its_neighbours(make):
    model, (short, long) = seeded(make), short_and_long()
    assert pin_rope(model, long.shape[1]) is not None
    together = logits(model, in_one_batch(short, long))
    assert_close(together[:1, : short.shape[1]], logits(model, short), rtol=1e-5, atol=1e-5)
    assert_close(together[1:], logits(model, long), rtol=1e-5, atol=1e-5)
    for length in range(1, long.shape[1]):
        prefix = logits(model, long[:, :length])
        assert_close(together[1:, :length], prefix, rtol=1e-5, atol=2e-5)


def test_the_frequencies_are_those_of_long_rows_by_the_models_own_code(make):
    """Rows as long as the model was extended to: transformers alone, with nothing pinned, is the oracle."""
    model, (_, long) = seeded(make), short_and_long()
    full = torch.randint(37, (1, 64 if make in (phi3, phimoe) else 2 * LIMIT))
    expected = logits(model, full)
    pin_rope(model, long.shape[1])
    assert_close(logits(model, full), expected, rtol=1e-5, atol=1e-5)


def test_below_the_limit_nothing_changes(make):
    model, (short, long) = seeded(make), short_and_long()
    expected = logits(model, short)
    assert pin_rope(model, LIMIT) is None
    assert_close(logits(model, short), expected, rtol=0, atol=0)
    assert_close(logits(model, long[:, :LIMIT]), logits(seeded(make), long[:, :LIMIT]), rtol=0, atol=0)
    with pytest.raises(RolloutError, match=rf"a row of {LIMIT + 9} tokens is longer than the {LIMIT}"):
        logits(model, long)


def test_a_pin_only_moves_up(make):
    model, (short, long) = seeded(make), short_and_long()
    pin_rope(model, long.shape[1])
    expected = logits(model, short)
    pin_rope(model, 3)
    assert torch.equal(logits(model, short), expected)


def test_a_copy_is_pinned_too(make):
    model, (short, long) = seeded(make), short_and_long()
    pin_rope(model, long.shape[1])
    assert torch.equal(logits(copy.deepcopy(model), short), logits(model, short))


def test_the_warning_says_from_where_on_and_what_to_do():
    sentence = pin_rope(seeded(phi3), 25)
    assert "phi3" in sentence
    assert "exceeds 16 tokens, and sequences here may have 25" in sentence
    assert "keep sequences to 16" in sentence


def test_other_models_are_left_alone(any_model):
    assert switching_limit(any_model.config) is None
    assert pin_rope(any_model, 10**6) is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in any_model.modules())


def test_an_engine_decodes_across_the_limit(make, any_engine):
    """Log-probabilities of every token are those of one plain forward, and of a forward over each prefix."""
    model = seeded(make)
    prompts = make_prompts([7, 8, 9], [20], list(range(3, 15)))
    rollout = any_engine(model).generate(prompts, make_sampling(max_response_tokens=12))
    assert int(rollout.sequences.num_tokens.max()) > LIMIT > int(rollout.sequences.num_tokens.min())
    for prompt, response, logprobs, _ in rows_of(rollout):
        assert_close(logprobs, full_forward_logprobs(model, prompt, response), atol=1e-5, rtol=0)
        prefixes = [full_forward_logprobs(model, prompt, response[: t + 1])[-1] for t in range(len(response))]
        assert_close(logprobs, torch.stack(prefixes), atol=1e-5, rtol=0)


def test_a_family_without_rope_may_be_asked():
    assert pin_rope(build("gpt2"), 10**6) is None
