"""Routers of mixtures of experts, and what automatic targets of LoRA leave out."""

import json

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from llmrl.models.adapters import load_adapted
from llmrl.models.config import LoraSettings, ModelConfig
from llmrl.models.routers import routers_of
from llmrl.sizing.shape import shape_of

from .tiny import logits, move, save_folder

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "head_dim": 16,
}
QWEN = {
    "num_experts": 4,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "decoder_sparse_step": 1,
    "num_experts_per_tok": 2,
}


def mixture(family="qwen2_moe", **settings):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES | settings))


@pytest.mark.parametrize(
    ("family", "settings", "routers"),
    [
        ("llama", {}, []),
        ("mixtral", {"num_local_experts": 4}, []),  # of a class of its own
        ("qwen2_moe", QWEN, ["mlp.shared_expert_gate"]),
        (
            "jetmoe",
            {"num_local_experts": 4, "kv_channels": 16},
            ["mlp.router.layer", "self_attention.experts.router.layer"],
        ),
    ],
)
def test_routers_are_found(family, settings, routers):
    model = mixture(family, **settings)
    expected = {f"model.layers.{layer}.{name}" for layer in range(2) for name in routers}
    assert set(routers_of(model)) == expected


class Block(nn.Module):
    def __init__(self, **layers):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


def test_a_gate_is_a_router_only_beside_experts():
    """As older transformers have it: a linear `gate` beside a list of experts. Another gate is an ordinary layer."""
    experts = nn.ModuleList([nn.Linear(2, 2)])
    model = Block(
        sparse=Block(gate=nn.Linear(2, 1), experts=experts), dense=Block(gate=nn.Linear(2, 2), up=nn.Linear(2, 2))
    )
    assert routers_of(model) == ["sparse.gate"]


def adapted_names(model):
    return {name.partition(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name}


def test_automatic_targets_leave_routers_out_and_named_ones_take_them(tmp_path):
    folder = save_folder(tmp_path, mixture(**QWEN))
    found, adapted = load_adapted(ModelConfig(path=folder, lora=LoraSettings(rank=2)))
    names = adapted_names(found)
    assert "model.layers.0.mlp.shared_expert.up_proj" in names
    assert not any("gate" in name and "gate_proj" not in name for name in names)
    named, _ = load_adapted(
        ModelConfig(path=folder, lora=LoraSettings(rank=2, targets=("q_proj", "shared_expert_gate")))
    )
    assert "model.layers.0.mlp.shared_expert_gate" in adapted_names(named)

    move(adapted)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())  # which holds the names
    continued, _ = load_adapted(ModelConfig(path=str(tmp_path / "adapter")))
    assert adapted_names(continued) == names
    assert torch.equal(logits(continued), logits(found))


def test_what_an_adapter_takes_is_counted_without_routers(tmp_path):
    model = mixture(**QWEN)
    folder = save_folder(tmp_path, model)
    for lora in (LoraSettings(rank=2), LoraSettings(rank=2, use_dora=True), LoraSettings(rank=2, targets=("q_proj",))):
        _, adapted = load_adapted(ModelConfig(path=folder, lora=lora))
        num_learning = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        shape = shape_of(model.config)
        assert shape.num_adapter(lora.rank, lora.targets, has_lengths=lora.use_dora) == num_learning
