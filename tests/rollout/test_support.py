import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, Gemma4TextConfig, Llama4TextConfig, LlamaForCausalLM

from llmrl.rollout.support import RolloutError, cache_argument
from tests.hybrids import HYBRIDS, NO_TIME_STEP, OUTSIDE_THE_CACHE, build_hybrid

from .tiny import build, full_forward_logprobs, make_prompts, make_sampling, rows_of

SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
REASONS = {
    "minimax": "MiniMax uses cache of its own",
    "recurrent_gemma": "it keeps states outside its cache",
    "rwkv": r"its forward takes no cache \(cache or past_key_values or cache_params\)",
}


@pytest.mark.parametrize("family", sorted(HYBRIDS.keys() - OUTSIDE_THE_CACHE))
def test_a_model_that_carries_a_state_is_decoded_as_by_one_plain_forward(family, native, generating, prompts):
    """Ragged prompts, rows that leave, and prompts that move in."""
    model = build_hybrid(family)
    rollout = native(model, max_rows=4).generate(prompts, make_sampling())
    for prompt, response, logprobs, _ in rows_of(rollout):
        assert_close(logprobs, full_forward_logprobs(model, prompt, response), atol=1e-5, rtol=0)
    reference = generating(model).generate(prompts, make_sampling())
    assert reference.sequences.response_ids.equal(rollout.sequences.response_ids)
    assert_close(reference.rollout_logprobs, rollout.rollout_logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", OUTSIDE_THE_CACHE)
def test_states_outside_the_cache_are_refused(family, native):
    with pytest.raises(RolloutError, match=rf"type {family}: .*{REASONS[family]}.*set rollout\.engine=transformers"):
        native(build_hybrid(family))


class Remade(LlamaForCausalLM):
    """Llama whose forward takes its cache as versions of transformers before 5.24 name it."""

    def forward(self, input_ids, attention_mask, position_ids, past_key_values, use_cache, logits_to_keep):
        context = {"attention_mask": attention_mask, "position_ids": position_ids, "use_cache": use_cache}
        context[cache_argument(LlamaForCausalLM)] = past_key_values
        return super().forward(input_ids, **context, logits_to_keep=logits_to_keep)


class RemadeAnew(Remade):
    """As versions from 5.24 on name it."""

    def forward(self, input_ids, attention_mask, position_ids, cache, use_cache, logits_to_keep):
        return super().forward(input_ids, attention_mask, position_ids, cache, use_cache, logits_to_keep)


@pytest.mark.parametrize(("kind", "name"), [(Remade, "past_key_values"), (RemadeAnew, "cache")])
def test_a_cache_is_handed_over_by_the_name_that_the_forward_has(kind, name, native, model, prompts):
    assert cache_argument(kind) == name
    remade = kind(model.config).eval()
    remade.load_state_dict(model.state_dict())
    ours, plain = (native(each, max_rows=4).generate(prompts, make_sampling()) for each in (remade, model))
    assert ours.sequences.response_ids.equal(plain.sequences.response_ids)
    assert ours.rollout_logprobs.equal(plain.rollout_logprobs)


@pytest.mark.parametrize("family", ["nemotron_h", "zamba2"])
def test_transformers_keeps_time_steps_large_in_a_forward_only(family, native, generating, prompts):
    """Of transformers, in both engines: once it is mended there, `NO_TIME_STEP` and a line of docs/models.md can go."""
    assert NO_TIME_STEP < 0.1
    config = HYBRIDS[family]()
    config.time_step_min = 0.1
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for engine in (native(model), generating(model)):
        rollout = engine.generate(prompts, make_sampling())
        gaps = [
            (logprobs - full_forward_logprobs(model, prompt, response)).abs().max()
            for prompt, response, logprobs, _ in rows_of(rollout)
        ]
        assert max(gaps) > 1e-4


def gemma4(num_shared):
    """Gemma 4, of which so many layers read the keys and values of earlier ones."""
    kinds = ["sliding_attention", "full_attention"] * 2
    of_layer = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 40}
    config = Gemma4TextConfig(**SMALL, **of_layer, layer_types=kinds, num_kv_shared_layers=num_shared)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def test_layers_that_share_keys_and_values_are_refused(native):
    with pytest.raises(RolloutError, match="its layers share keys and values"):
        native(gemma4(2))


def test_a_family_that_may_share_keys_is_decoded_where_it_does_not(native, prompts):
    model = gemma4(0)
    for prompt, response, logprobs, _ in rows_of(native(model, max_rows=4).generate(prompts, make_sampling())):
        assert_close(logprobs, full_forward_logprobs(model, prompt, response), atol=1e-5, rtol=0)


def test_attention_in_chunks_is_refused(native):
    config = Llama4TextConfig(**SMALL, intermediate_size_mlp=32, num_local_experts=2, attention_chunk_size=8)
    match = r"type llama4_text: it attends in chunks .*set rollout\.engine=transformers"
    with pytest.raises(RolloutError, match=match):
        native(AutoModelForCausalLM.from_config(config))


def test_no_sequence_outgrows_a_table_of_positions(native):
    engine = native(build("gpt2"))
    prompts = make_prompts([7] * 60, [8])
    with pytest.raises(RolloutError, match=r"rollout\.max_response_tokens \(5\) with a prompt of 60 .* try at most 4"):
        engine.generate(prompts, make_sampling(max_response_tokens=5))
    engine.generate(prompts, make_sampling(max_response_tokens=4))


def test_rotary_models_may_extrapolate(model, native):
    rollout = native(model, eos_ids=()).generate(make_prompts([7] * 60), make_sampling(max_response_tokens=8))
    assert rollout.sequences.response_lengths.tolist() == [8, 8]
    assert rollout.sequences.response_lengths.dtype == torch.int64
