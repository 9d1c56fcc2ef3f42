"""Which layers are stored in 4 bits, and what is refused before any weights load."""

import importlib.metadata
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    LlamaConfig,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from llmrl.models.checking import check_model, check_reward_model
from llmrl.models.config import LoraSettings, ModelConfig
from llmrl.models.folders import ModelError
from llmrl.models.quantization import quantized_layers, unquantized_layers

from .quantized import WIDE, gpt2, llama, save_base

pytest.importorskip("bitsandbytes", reason="the extra quantized is not installed")

LORA = LoraSettings(rank=2)
NF4 = {"quantization": "nf4", "lora": LORA}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"), "llama")


def ends(names) -> set[str]:
    return {name.rpartition(".")[2] for name in names}


def test_linear_layers_below_the_head_are_quantized():
    assert ends(quantized_layers(llama())) == {
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    }
    assert unquantized_layers(llama()) == ["lm_head"]
    assert ends(quantized_layers(gpt2())) == {"c_attn", "c_proj", "c_fc"}
    with torch.device("meta"):
        scores = AutoModelForSequenceClassification.from_config(LlamaConfig(**WIDE, num_labels=1))
    assert unquantized_layers(scores) == ["score"]


def test_a_row_that_ends_within_a_block_stays_as_it_is():
    """Of 96 inputs."""
    assert ends(unquantized_layers(llama(intermediate_size=96))) == {"down_proj", "lm_head"}


@pytest.mark.parametrize(
    ("kind", "settings", "more"),
    [
        (GraniteMoeForCausalLM, GraniteMoeConfig, {"num_local_experts": 2}),
        (Qwen2MoeForCausalLM, Qwen2MoeConfig, {"num_experts": 2, "moe_intermediate_size": 64}),
    ],
)
def test_routers_stay_as_they_are(kind, settings, more):
    model = kind(settings(**WIDE, **more))
    names = quantized_layers(model)
    assert names
    assert not any("router" in name or name.endswith(".gate") or "expert_gate" in name for name in names)


def refusal(check=check_model, **config) -> str:
    with pytest.raises(ModelError) as error:
        check(ModelConfig(**config), **({} if check is check_model else {"needs_head": False}))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_it_passes_with_adapters(base):
    assert check_model(ModelConfig(path=base, **NF4)) == []
    assert check_reward_model(ModelConfig(path=base, **NF4), needs_head=False) == []


@pytest.mark.parametrize("check", [check_model, check_reward_model])
def test_what_it_lacks_is_named(base, check, monkeypatch):
    assert refusal(check, path=base, quantization="nf4") == (
        "model.quantization (nf4) stores weights in 4 bits, in which they cannot be trained, and there is no "
        "model.lora; set model.lora.rank=16, or leave model.quantization out"
    )
    assert refusal(check, path="some/name", quantization="nf4").startswith("model.quantization (nf4) stores weights")
    assert refusal(check, path=base, from_scratch=True, **NF4) == (
        "model.quantization (nf4) is for weights that are read, and model.from_scratch draws random ones; leave one of "
        "them out"
    )

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("llmrl.models.quantization.version", missing)
    assert refusal(check, path=base, **NF4) == (
        "model.quantization (nf4) needs bitsandbytes, which is not installed: pip install "
        '"llmrl[quantized]", or leave it out'
    )
    assert check_model(ModelConfig(path=base, lora=LORA)) == []


def test_a_quantized_layer_cannot_be_trained_whole(base):
    assert (
        check_model(ModelConfig(path=base, quantization="nf4", lora=LoraSettings(modules_to_save=("lm_head",)))) == []
    )
    whole = LoraSettings(targets=("q_proj",), modules_to_save=("layers.0.mlp.up_proj", "norm"))
    assert refusal(path=base, quantization="nf4", lora=whole) == (
        "model.lora.modules_to_save (model.layers.0.mlp.up_proj) cannot be trained whole where model.quantization "
        "(nf4) stores them in 4 bits; leave them out, so that they get adapters, or leave model.quantization out"
    )


@pytest.mark.parametrize(
    ("whole", "named"), [("o_proj", "self_attn.o_proj"), ("mlp", "mlp.down_proj"), ("lm_head", None)]
)
def test_nor_can_one_that_an_adapter_trains_whole(base, tmp_path, whole, named):
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=[whole], task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora).save_pretrained(str(tmp_path))
    if named is None:
        assert check_model(ModelConfig(path=str(tmp_path), quantization="nf4")) == []
        return
    assert check_model(ModelConfig(path=str(tmp_path))) == []
    said = refusal(path=str(tmp_path), quantization="nf4")
    assert said.startswith(f"model.path ({tmp_path}) is an adapter whose modules_to_save (model.layers.0.{named}, ")
    assert said.endswith(" stores them in 4 bits; leave model.quantization out")


@pytest.mark.parametrize("check", [check_model, check_reward_model])
def test_what_a_run_on_4_bits_has_merged_is_not_rounded_again(check, tmp_path):
    """Its weights are those of the bits and a small step beside: the nearest of the bits is mostly the old one."""
    final = save_base(tmp_path / "run" / "final", "llama")
    for settings in ({}, {"model": {"quantization": None}}, {"model": "a"}):
        (tmp_path / "run" / "config.json").write_text(json.dumps({"settings": settings}))
        assert (check(ModelConfig(path=final, **NF4), **({} if check is check_model else {"needs_head": False}))) == []
    (tmp_path / "run" / "config.json").write_text(json.dumps({"settings": {"model": {"quantization": "nf4"}}}))
    assert refusal(check, path=final, **NF4) == (
        f"model.quantization (nf4) would round away what model.path ({final}) has learned: a run on 4 bits has merged "
        "its adapter into these weights; set model.quantization=null, or, of a language model, name its adapter, "
        f"{final}/adapter, with model.lora=null"
    )
    assert check_model(ModelConfig(path=final, lora=LORA)) == []


def test_a_model_without_such_layers_is_refused(tmp_path):
    path = save_base(tmp_path, "llama", hidden_size=48, head_dim=12, intermediate_size=96)
    assert refusal(path=path, **NF4) == (
        f"model.quantization (nf4) finds nothing to quantize in model.path ({path}): no linear layer below the head "
        "with a multiple of 64 inputs; leave it out"
    )
