"""Shapes of tiny mixtures of experts, and of a model without."""

import pytest
import transformers
from packaging.version import Version
from transformers import AutoConfig, PretrainedConfig

VERSION = Version(transformers.__version__)

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "head_dim": 16,
}
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 16}
LATENT = {
    "n_routed_experts": 4,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "head_dim": 8,
}
FAMILIES = {"qwen3_moe": EXPERTS, "mixtral": {"num_local_experts": 4}, "deepseek_v3": LATENT}


def config_of(family: str, **settings: object) -> PretrainedConfig:
    """The shape of a tiny model of a family, with these settings of its own."""
    if family == "deepseek_v3" and Version("5.16") > VERSION:
        pytest.skip("before transformers 5.16 the routers of DeepSeek-V3 don't return which experts they choose")
    return AutoConfig.for_model(family, **SIZES | FAMILIES.get(family, {}) | settings)
