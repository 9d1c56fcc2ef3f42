"""Tiny random models of the families whose layers carry a state along the row: of a convolution, a recurrence or both.

`HYBRIDS` builds a config by the name of the model type, and skips the test where transformers has no caches for them.
"""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, cache_utils

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,  # far from uniform, so that a wrong state shows
    "pad_token_id": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
MLP = {"intermediate_size": 48}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SHARED_EXPERT = {**EXPERTS, "shared_expert_intermediate_size": 16}
LATENT = {"kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "num_local_experts": 4}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
NO_TIME_STEP = 1e-8
"""Of nemotron_h and zamba2, which keep time steps above their least one in a forward, but not in a step of decoding."""
ALTERNATING = ["linear_attention", "full_attention", "linear_attention"]
PURE = {name: SIZES[name] for name in SIZES if name != "max_position_embeddings"} | {
    "state_size": 8,
    "num_hidden_layers": 2,
}


def _sized(config: str, *settings, **more):
    """A config of transformers by its name, of these sizes."""
    merged = dict(SIZES)
    for part in settings:
        merged |= part

    def build():
        if not hasattr(cache_utils, "LinearAttentionLayer"):
            pytest.skip("this version of transformers has no layers of states in its caches")
        return getattr(transformers, config)(**(merged | more))

    return build


HYBRIDS = {
    "qwen3_5_text": _sized("Qwen3_5TextConfig", ATTENTION, MLP, DELTA, layer_types=ALTERNATING),
    "qwen3_5_moe_text": _sized("Qwen3_5MoeTextConfig", ATTENTION, SHARED_EXPERT, DELTA, layer_types=ALTERNATING),
    "qwen3_next": _sized("Qwen3NextConfig", ATTENTION, MLP, SHARED_EXPERT, DELTA, layer_types=ALTERNATING),
    "olmo_hybrid": _sized("OlmoHybridConfig", MLP, DELTA, num_attention_heads=4, layer_types=ALTERNATING),
    "lfm2": _sized("Lfm2Config", MLP, num_attention_heads=4, num_key_value_heads=2, full_attn_idxs=[1]),
    "lfm2_moe": _sized(
        "Lfm2MoeConfig",
        MLP,
        EXPERTS,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention", "conv"],
    ),
    "lfm3": _sized(
        "Lfm3Config",
        ATTENTION,
        MLP,
        sliding_window=4,
        layer_types=["conv", "sliding_attention", "full_attention"],
    ),
    "bamba": _sized("BambaConfig", MLP, MAMBA2, num_attention_heads=4, num_key_value_heads=2, attn_layer_indices=[1]),
    "granitemoehybrid": _sized(
        "GraniteMoeHybridConfig",
        MLP,
        MAMBA2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        shared_intermediate_size=16,
        layer_types=ALTERNATING,
    ),
    "falcon_h1": _sized("FalconH1Config", ATTENTION, MLP, MAMBA2, mamba_d_ssm=64, num_hidden_layers=2),
    "nemotron_h": _sized(
        "NemotronHConfig",
        ATTENTION,
        MLP,
        layers_block_type=["linear_attention", "moe", "full_attention"],
        time_step_min=NO_TIME_STEP,
        ssm_state_size=8,
        mamba_num_heads=8,
        mamba_head_dim=8,
        n_groups=2,
        chunk_size=8,
        n_routed_experts=4,
        moe_intermediate_size=16,
        moe_shared_expert_intermediate_size=16,
    ),
    "jamba": _sized(
        "JambaConfig",
        MLP,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=8,
    ),
    "zamba": _sized(
        "ZambaConfig",
        MLP,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_mamba_heads=2,
        mamba_d_state=8,
        layers_block_type=["linear_attention", "hybrid", "hybrid"],
    ),
    "zamba2": _sized(
        "Zamba2Config",
        MLP,
        num_attention_heads=4,
        n_mamba_heads=8,
        mamba_d_state=8,
        chunk_size=8,
        time_step_min=NO_TIME_STEP,
        layers_block_type=["linear_attention", "hybrid", "hybrid"],
    ),
    "minimax": _sized("MiniMaxConfig", ATTENTION, MLP, num_local_experts=4, block_size=4, layer_types=ALTERNATING),
    "kimi_linear": _sized(
        "KimiLinearConfig",
        MLP,
        LATENT,
        num_attention_heads=4,
        num_key_value_heads=4,
        moe_intermediate_size=16,
        num_experts_per_tok=2,
        linear_head_dim=8,
        linear_num_heads=4,
        layer_types=ALTERNATING,
    ),
    "bailing_hybrid": _sized(
        "BailingHybridConfig",
        MLP,
        LATENT,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        moe_intermediate_size=16,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        layer_types=ALTERNATING,
    ),
    "zaya": _sized(
        "ZayaConfig",
        ATTENTION,
        num_experts=4,
        moe_intermediate_size=16,
        router_hidden_size=16,
        sliding_window=4,
        layer_types=["hybrid", "hybrid_sliding", "hybrid"],
    ),
    "inkling_text": _sized(
        "InklingTextConfig",
        ATTENTION,
        MLP,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=2,
        swa_head_dim=8,
        sliding_window_size=4,
        d_rel=4,
        rel_extent=16,
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        logits_mup_width_multiplier=1.0,
    ),
    "mamba": lambda: transformers.MambaConfig(**PURE),
    "falcon_mamba": lambda: transformers.FalconMambaConfig(**PURE),
    "mamba2": lambda: transformers.Mamba2Config(**PURE, num_heads=8, head_dim=8, n_groups=2, chunk_size=8),
    "recurrent_gemma": _sized(
        "RecurrentGemmaConfig", MLP, num_attention_heads=4, lru_width=32, attention_window_size=8
    ),
    "rwkv": lambda: transformers.RwkvConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, context_length=64),
}


ONE_OF_EACH_KIND = ("qwen3_5_text", "lfm2", "falcon_h1", "mamba2")
"""Layers of attention beside layers of a recurrence, or of a convolution; both in one layer; no attention."""
OUTSIDE_THE_CACHE = ("minimax", "recurrent_gemma", "rwkv")
"""They keep their states in a cache of their own, in their modules, or in an argument of their own."""


def build_hybrid(name: str):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(HYBRIDS[name]()).eval()
