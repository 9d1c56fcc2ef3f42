"""Layers of 4-bit weights: what they compute, its gradient, and what is merged from them."""

import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from llmrl.models.adapters import as_reference, base_of, load_adapted
from llmrl.models.config import LoraSettings, ModelConfig
from llmrl.models.loading import load_model, load_tokenizer
from llmrl.models.reward_loading import adapt, load_reward_model
from llmrl.models.saving import save_policy

from .quantized import FAMILIES, save_base, save_dequantized

pytest.importorskip("bitsandbytes", reason="the extra quantized is not installed")

from llmrl.models.nf4 import NF4Linear, dequantized, merged

IDS = torch.tensor([[7, 8, 9, 20, 21], [3, 4, 90, 60, 2]])
NF4 = (
    *(-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0),
    *(0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0),
)
"""The 16 numbers of appendix E of the paper."""


def nf4(path, **settings):
    return ModelConfig(path=path, quantization="nf4", **({"lora": LoraSettings(rank=2)} | settings))


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def disturb(adapted):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))


@pytest.fixture(params=FAMILIES, scope="module")
def base(request, tmp_path_factory):
    return save_base(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def read(base, tmp_path_factory):
    """The folder with the weights that the 4 bits stand for."""
    return save_dequantized(base, tmp_path_factory.mktemp("read"))


def layers(model) -> dict[str, NF4Linear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, NF4Linear)}


def test_weights_are_stored_as_the_paper_says(base):
    """The nearest of 16 numbers times the largest of 64 weights, which itself is rounded to 8 bits."""
    original = load_model(ModelConfig(path=base))
    stored = layers(load_model(nf4(base)))
    assert len(stored) == {"llama": 2 * 7, "gpt2": 2 * 4}[original.config.model_type]
    for name, layer in stored.items():
        weight = original.get_submodule(name).weight
        weight = weight if original.config.model_type == "llama" else weight.T
        blocks = weight.detach().reshape(-1, 64)
        largest = blocks.abs().amax(dim=1, keepdim=True)
        numbers = torch.tensor(NF4)
        nearest = numbers[((blocks / largest)[..., None] - numbers).abs().argmin(dim=-1)] * largest
        read = dequantized(layer).weight.detach().reshape(-1, 64)
        assert ((read - nearest).abs() <= 0.01 * largest).all()
        assert (nearest != 0).float().mean() > 0.8
        assert layer.weight.numel() == weight.numel() // 2
        assert layer.weight.dtype == torch.uint8


def test_all_else_stays_in_float32(base):
    model = load_model(nf4(base))
    names = {f"{name}.weight" for name in layers(model)}
    kept = {name: p for name, p in model.named_parameters() if name not in names}
    theirs = dict(load_model(ModelConfig(path=base)).named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in kept.items())
    assert theirs.keys() == kept.keys() | names


def test_outputs_are_those_of_the_weights_that_the_bits_stand_for(base, read):
    model, plain = load_model(nf4(base)), load_model(ModelConfig(path=read))
    assert_close(logits(model), logits(plain), rtol=0.0, atol=2e-5)
    assert (logits(model) - logits(load_model(ModelConfig(path=base)))).abs().max() > 0.01


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_gradients_of_adapters_are_those_over_plain_weights(base, read, dora):
    gradients = []
    for config in (
        nf4(base, lora=LoraSettings(rank=2, use_dora=dora)),
        ModelConfig(path=read, lora=LoraSettings(rank=2, use_dora=dora)),
    ):
        torch.manual_seed(3)
        model, adapted = load_adapted(config)
        disturb(adapted)
        model(input_ids=IDS, use_cache=False).logits.log_softmax(-1)[..., 5].sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    ours, theirs = gradients
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        assert x.abs().max() > 0
        assert_close(ours[name], x, rtol=1e-3, atol=1e-4 * float(x.abs().max()))


def test_a_layer_computes_in_the_dtype_of_a_plain_one(base, read):
    """In float32, in bfloat16, and under autocast."""
    name = "model.layers.0.mlp.up_proj" if "llama" in base else "transformer.h.0.mlp.c_fc"
    layer = load_model(nf4(base)).get_submodule(name)
    plain = load_model(ModelConfig(path=read)).get_submodule(name)
    x = torch.linspace(-1, 1, 3 * 64).view(3, 64)
    assert_close(layer(x), plain(x), rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = layer(x), plain(x)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert_close(ours, theirs, rtol=0.05, atol=0.02)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert layer.bias is None or layer.bias.dtype == torch.float32


def test_eval_mode_leaves_the_weights_as_they_are(base):
    """bitsandbytes packs them anew on some CPUs, and has no backward pass from there."""
    model, _ = load_adapted(nf4(base))
    before = {name: layer.weight.clone() for name, layer in layers(model).items()}
    logits(model.eval())
    assert all(torch.equal(layer.weight, before[name]) for name, layer in layers(model).items())
    assert not any(layer.weight.requires_grad for layer in layers(model).values())


def test_the_reference_is_the_model_as_it_was_loaded(base):
    model, adapted = load_adapted(nf4(base))
    before = logits(model)
    disturb(adapted)
    assert not torch.allclose(logits(model), before)
    with as_reference(adapted):
        assert torch.equal(logits(model), before)


def test_a_view_of_the_base_shares_its_bits(base):
    _, adapted = load_adapted(nf4(base))
    view = base_of(adapted)
    ours = {layer.weight.data_ptr() for layer in layers(adapted).values()}
    assert {layer.weight.data_ptr() for layer in layers(view).values()} == ours


@pytest.mark.parametrize(
    "lora",
    [
        LoraSettings(rank=2),
        LoraSettings(rank=2, use_dora=True),
        LoraSettings(rank=2, use_rslora=True, targets=("down_proj", "lm_head", "c_attn")),
        LoraSettings(rank=2, modules_to_save=("lm_head",)),
    ],
    ids=["lora", "dora", "rslora and the head", "a whole head"],
)
def test_what_is_saved_is_what_was_trained(base, lora, tmp_path):
    """To rounding, in the folder's own classes. Merged into the original weights it would be another function."""
    is_gpt2 = "gpt2" in base
    if is_gpt2 and (lora.targets or lora.modules_to_save):
        pytest.skip("its head is tied")
    if lora.targets:
        lora = LoraSettings(rank=2, use_rslora=True, targets=("down_proj", "lm_head"))
    model, adapted = load_adapted(nf4(base, lora=lora))
    disturb(adapted)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = logits(model)
    final = tmp_path / "final"
    tokenizer = load_tokenizer(ModelConfig(path=base))
    save_policy(final, model=model, adapted=adapted, tokenizer=tokenizer, dtype=torch.float32)
    saved = AutoModelForCausalLM.from_pretrained(final)
    assert not hasattr(saved.config, "quantization_config")
    assert_close(logits(saved), trained, rtol=1e-5, atol=1e-4)
    on_original = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(final / "adapter"))
    error = (logits(on_original) - trained).abs().max()
    assert error > 100 * (logits(saved) - trained).abs().max()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())

    again, _ = load_adapted(ModelConfig(path=str(final / "adapter"), quantization="nf4"))
    assert_close(logits(again), trained, rtol=0.0, atol=1e-5)


def test_weights_are_merged_in_float32_and_rounded_once(base):
    _, adapted = load_adapted(nf4(base))
    disturb(adapted)
    exact, rounded = merged(adapted, torch.float32), merged(adapted, torch.bfloat16)
    for (name, x), y in zip(exact.named_parameters(), rounded.parameters(), strict=True):
        assert torch.equal(x.bfloat16(), y), name


def test_a_reward_model_keeps_its_score_head(base, tmp_path):
    torch.manual_seed(0)
    config = nf4(base)
    model = load_reward_model(config, head_init="normal")
    adapted = adapt(model, config)
    score = model.get_submodule("score").original_module  # type: ignore[union-attr]
    assert score.weight.dtype == torch.float32
    assert len(layers(model)) == {"llama": 14, "gpt2": 8}[model.config.model_type]
    disturb(adapted)
    trained = logits(model, IDS[:1])
    tokenizer = load_tokenizer(ModelConfig(path=base))
    save_policy(tmp_path / "final", model=model, adapted=adapted, tokenizer=tokenizer, dtype=torch.float32)
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "final")
    assert_close(logits(saved, IDS[:1]), trained, rtol=0.0, atol=1e-4)
