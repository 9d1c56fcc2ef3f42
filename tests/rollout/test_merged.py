import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch.testing import assert_close

from llmrl.rollout.weights import SamplingWeights

from .test_weights import Trained
from .tiny import build

IDS = torch.tensor([[7, 8, 9, 2, 11]])


def adapted(family="llama", **changes):
    model = build(family)
    targets = ["c_attn", "c_fc"] if family == "gpt2" else ["q_proj", "v_proj", "down_proj"]
    settings = {"r": 3, "lora_alpha": 5, "target_modules": targets, "init_lora_weights": False} | changes
    inject_adapter_in_model(LoraConfig(**settings), model)
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def names(model):
    return {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_a_copy_without_adapters_says_what_the_adapted_model_says(family):
    model = adapted(family)
    weights = SamplingWeights(model, torch.float64, None)
    assert names(weights.fresh()) == names(build(family))
    assert_close(logits(weights.fresh()).float(), logits(model), atol=1e-5, rtol=0)


def test_the_copy_follows_the_adapter_in_place():
    model = adapted()
    weights = SamplingWeights(model, torch.float64, None)
    addresses = [p.data_ptr() for p in weights.fresh().parameters()]
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.mul_(-2.0)
    weights.load(Trained(model))
    assert [p.data_ptr() for p in weights.fresh().parameters()] == addresses
    assert_close(logits(weights.fresh()).float(), logits(model), atol=1e-5, rtol=0)


def test_the_sum_is_rounded_once():
    """A change of less than half a step of bfloat16 beside a base between two steps, which rounding it first would
    lose."""
    model = adapted()
    layer = model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.base_layer.weight.fill_(1.0 + 2.0**-8 - 2.0**-12)  # rounds down to 1
        layer.lora_A["default"].weight.fill_(1.0)
        layer.lora_B["default"].weight.fill_(2.0**-11 / 5)  # 3 products, scale 5 / 3
    weights = SamplingWeights(model, torch.bfloat16, None)
    merged = weights.fresh().model.layers[0].self_attn.q_proj.weight
    assert bool((merged == 1.0 + 2.0**-7).all())


def test_a_copy_that_is_whole_in_the_dtype_of_training_is_merged_too():
    model = adapted()
    weights = SamplingWeights(model, torch.float32, torch.device("cpu"))
    assert names(weights.fresh()) == names(build("llama"))
    trained = Trained(model)
    order = list(model.named_parameters())[::-1]  # parts come in any order
    trained.whole = lambda part: iter([(name, p.detach()) for name, p in order])
    weights.load(trained)
    assert_close(logits(weights.fresh()), logits(model), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("changes", [{"use_dora": True}, {"use_rslora": True}, {"use_dora": True, "use_rslora": True}])
def test_variants_of_low_rank_are_merged(family, changes, dtype):
    """A length that DoRA has learned is far from that of the row."""
    model = adapted(family, **changes)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "magnitude" in name:
                p.mul_(torch.linspace(0.5, 1.5, len(p)))
    weights = SamplingWeights(model, dtype, torch.device("cpu"))
    assert names(weights.fresh()) == names(build(family))
    assert_close(logits(weights.fresh()).float(), logits(model), atol=1e-4, rtol=0)


def test_other_adapters_stay_beside_their_layers():
    model = adapted(lora_bias=True, bias="none")
    weights = SamplingWeights(model, torch.float64, None)
    assert names(weights.fresh()) == names(model)
    assert_close(logits(weights.fresh()).float(), logits(model), atol=1e-4, rtol=0)


def test_the_active_adapter_is_merged():
    model = build("llama")
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    peft.add_adapter("reference", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    weights = SamplingWeights(model, torch.float64, None)
    assert_close(logits(weights.fresh()).float(), logits(model), atol=1e-5, rtol=0)


def test_the_trained_model_keeps_its_adapters():
    model = adapted()
    before = logits(model), names(model)
    SamplingWeights(model, torch.bfloat16, None).load(Trained(model))
    assert names(model) == before[1]
    assert logits(model).equal(before[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layers_that_are_trained_whole_stand_alone_in_the_copy(dtype):
    """Neither the originals nor those of a frozen reference are in memory once more."""
    model = build("llama")
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"])
    get_peft_model(model, lora).add_adapter("reference", lora)
    weights = SamplingWeights(model, dtype, torch.device("cpu"))
    assert names(weights.fresh()) == names(build("llama"))
    assert not {p.data_ptr() for p in weights.fresh().parameters()} & {p.data_ptr() for p in model.parameters()}
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p))
    weights.load(Trained(model))
    assert_close(logits(weights.fresh()).float(), logits(model), atol=1e-4, rtol=0)


def test_without_a_copy_the_trained_layers_stay_in_their_place():
    model = build("llama")
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    before = names(model)
    assert SamplingWeights(model, torch.float32, None).fresh() is model
    assert names(model) == before
