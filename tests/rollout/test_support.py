import pytest
import torch
from transformers import AutoModelForCausalLM, Llama4TextConfig, Mamba2Config, Qwen3NextConfig

from llmrl.rollout.support import RolloutError

from .tiny import build, make_prompts, make_sampling

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
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
REFUSED = [
    Mamba2Config(vocab_size=40, hidden_size=32, num_heads=8, head_dim=8, num_hidden_layers=1, state_size=8),
    Qwen3NextConfig(
        **SMALL,
        **EXPERTS,
        shared_expert_intermediate_size=16,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
    Llama4TextConfig(**SMALL, intermediate_size_mlp=32, num_local_experts=2, attention_chunk_size=8),
]


@pytest.mark.parametrize("config", REFUSED, ids=lambda config: config.model_type)
def test_models_with_more_state_than_plain_attention_are_refused(config, native):
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(RolloutError, match=rf"models of type {config.model_type}: .*set rollout\.engine=transformers"):
        native(model)


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
