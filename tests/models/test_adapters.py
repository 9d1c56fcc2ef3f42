"""Adapters: fresh ones, those that a folder brings, and the model as it was loaded."""

import json

import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from llmrl.models.adapters import as_reference, base_of, load_adapted, reference_names
from llmrl.models.checking import check_model
from llmrl.models.config import LoraSettings, ModelConfig
from llmrl.models.folders import ModelError
from llmrl.models.loading import load_model, load_tokenizer
from llmrl.models.saving import save_policy
from tests.models.tiny import IDS, logits, move

from .tiny import llama_tied, save_folder


def trainable(adapted):
    return {name: p.requires_grad for name, p in adapted.named_parameters()}


def test_dropout_of_an_adapter_is_off(adapter, folder):
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter).train()
    assert not torch.equal(logits(plain), logits(plain))  # it was on
    model, _ = load_adapted(ModelConfig(path=adapter))
    assert torch.equal(logits(model.train()), logits(model))


def test_without_adapters_every_weight_learns(folder):
    model, adapted = load_adapted(ModelConfig(path=folder))
    assert adapted is None
    assert all(p.requires_grad for p in model.parameters())


def test_a_fresh_adapter_changes_nothing_and_alone_learns(folder):
    model, adapted = load_adapted(ModelConfig(path=folder, lora=LoraSettings(rank=2, alpha=6)))
    assert torch.equal(logits(model), logits(load_model(ModelConfig(path=folder))))
    assert all(learns == ("lora_" in name) for name, learns in trainable(adapted).items())
    adapters = {name for name, _ in adapted.named_parameters() if "lora_A" in name}
    assert len(adapters) == 3 * 7  # layers; q, k, v, o, gate, up, down
    assert not any("lm_head" in name for name in adapters)
    q_proj = model.model.layers[0].self_attn.q_proj
    assert q_proj.scaling["default"] == 6 / 2
    assert q_proj.lora_A["default"].weight.shape == (2, 32)


def test_targets_are_the_layers_named(folder):
    _, adapted = load_adapted(ModelConfig(path=folder, lora=LoraSettings(rank=2, targets=("q_proj",))))
    assert {name.split(".")[-4] for name, learns in trainable(adapted).items() if learns} == {"q_proj"}


@pytest.mark.parametrize("target", ["query", "mlp", "_proj"])
def test_targets_that_the_model_lacks_are_refused_by_those_it_has(folder, target):
    with pytest.raises(ModelError, match=rf"targets \({target}\) .* a LlamaForCausalLM .* gate_proj, k_proj, lm_head"):
        load_adapted(ModelConfig(path=folder, lora=LoraSettings(rank=2, targets=("q_proj", target))))


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_on_a_tied_embedding_is_refused(tmp_path, target):
    path = save_folder(tmp_path, llama_tied())
    with pytest.raises(ModelError, match=r"LlamaForCausalLM.*model\.lora\.targets"):
        load_adapted(ModelConfig(path=path, lora=LoraSettings(rank=2, targets=(target, "q_proj"))))


@pytest.mark.parametrize("brought", [False, True], ids=["fresh", "brought"])
def test_the_reference_is_the_model_as_loaded(folder, adapter, brought):
    config = ModelConfig(path=adapter) if brought else ModelConfig(path=folder, lora=LoraSettings(rank=2))
    model, adapted = load_adapted(config)
    as_it_came = logits(model)
    flags = trainable(adapted)
    move(adapted)
    moved = logits(model)
    assert not torch.allclose(moved, as_it_came, atol=0.1)

    with as_reference(adapted):
        assert torch.equal(logits(model), as_it_came)
    assert torch.equal(logits(model), moved)
    assert trainable(adapted) == flags

    with pytest.raises(KeyError), as_reference(adapted):
        raise KeyError
    assert torch.equal(logits(model), moved)
    assert trainable(adapted) == flags


def test_a_reference_that_will_move_is_a_frozen_copy(folder):
    config = ModelConfig(path=folder, lora=LoraSettings(rank=2, alpha=6))
    (plain, theirs), (model, adapted) = load_both(config)
    assert torch.equal(logits(model), logits(plain))
    for name, learns in trainable(adapted).items():
        assert learns == (".default." in name and "lora_" in name), name
    names = reference_names(adapted)
    weights = dict(adapted.named_parameters())
    assert len(names) == sum(trainable(theirs).values()) == sum(trainable(adapted).values())
    for name, source in names.items():
        assert torch.equal(weights[name], weights[source])
        assert torch.equal(weights[source], theirs.get_parameter(source))
        assert weights[name] is not weights[source]
    assert reference_names(theirs) == {}

    start, flags = logits(model), trainable(adapted)
    move(adapted)
    with as_reference(adapted):
        assert torch.equal(logits(model), start)
    with torch.no_grad():
        for name, source in names.items():
            weights[name].copy_(weights[source])
    moved = logits(model)
    with as_reference(adapted):
        assert torch.equal(logits(model), moved)
    assert not torch.allclose(moved, start, atol=0.1)
    assert trainable(adapted) == flags


def load_both(config):
    """The model with a reference that stays, and with one that will move; both from one seed."""
    loaded = []
    for moving_reference in (False, True):
        torch.manual_seed(0)
        loaded.append(load_adapted(config, moving_reference=moving_reference))
    return loaded


def test_a_brought_adapter_is_continued(adapter, folder):
    model, adapted = load_adapted(ModelConfig(path=adapter))
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter)
    assert_close(logits(model), logits(plain))
    for name, learns in trainable(adapted).items():
        assert learns == (".default." in name), name


def test_the_base_of_an_adapter_is_named_from_the_root(adapter, tmp_path, monkeypatch):
    """So that the adapter that is saved is found from any working folder."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "model"}))
    for config in (ModelConfig(path="adapter"), ModelConfig(path="model", lora=LoraSettings(rank=2))):
        _, adapted = load_adapted(config)
        assert adapted.peft_config["default"].base_model_name_or_path == str(tmp_path / "model")


def test_a_base_is_looked_for_beside_the_adapter_too(adapter, folder, tmp_path, monkeypatch):
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "../model"}))
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere" / "deep")
    model, _ = load_adapted(ModelConfig(path=adapter))
    assert torch.equal(
        model.get_input_embeddings().weight, load_model(ModelConfig(path=folder)).model.embed_tokens.weight
    )


def test_an_adapter_without_a_tokenizer_has_that_of_its_base(adapter):
    assert load_tokenizer(ModelConfig(path=adapter))("t7 t8")["input_ids"] == [7, 8]


def test_an_adapter_is_read_to_where_its_model_is(adapter, monkeypatch):
    """Left to itself, peft reads by way of any accelerator of the machine, such as Apple's."""
    monkeypatch.setattr("peft.peft_model.infer_device", lambda: "meta")
    model, _ = load_adapted(ModelConfig(path=adapter))
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert logits(model).isfinite().all()


def test_reference_and_adapter_learn_apart(adapter):
    """A step of what learns leaves the snapshot bit for bit."""
    model, adapted = load_adapted(ModelConfig(path=adapter))
    snapshot = {name: p.clone() for name, p in adapted.named_parameters() if ".reference." in name}
    model(input_ids=IDS).logits.sum().backward()
    assert {name for name, p in adapted.named_parameters() if p.grad is not None} == {
        name for name in trainable(adapted) if ".default." in name
    }
    move(adapted)
    assert all(torch.equal(adapted.get_parameter(name), p) for name, p in snapshot.items())


@pytest.mark.parametrize("variant", [{"use_rslora": True}, {"use_dora": True}], ids=str)
def test_a_variant_begins_as_the_model_and_is_saved_as_it_learned(folder, tmp_path, variant):
    """Its reference is the model as loaded, and the merged folder and the adapter say what it says."""
    model, adapted = load_adapted(ModelConfig(path=folder, lora=LoraSettings(rank=4, alpha=6, **variant)))
    as_it_came = logits(load_model(ModelConfig(path=folder)))
    assert_close(logits(model), as_it_came)
    move(adapted)
    moved = logits(model)
    assert not torch.allclose(moved, as_it_came, atol=0.1)
    with as_reference(adapted):
        assert torch.equal(logits(model), as_it_came)
    tokenizer = load_tokenizer(ModelConfig(path=folder))
    save_policy(tmp_path / "final", model=model, adapted=adapted, tokenizer=tokenizer, dtype=torch.float32)
    assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "final")), moved, atol=1e-4, rtol=1e-4)
    continued, _ = load_adapted(ModelConfig(path=str(tmp_path / "final" / "adapter")))
    assert_close(logits(continued), moved)


def test_rslora_scales_by_the_root_of_the_rank(folder):
    model, _ = load_adapted(ModelConfig(path=folder, lora=LoraSettings(rank=4, alpha=6, use_rslora=True)))
    assert model.model.layers[0].self_attn.q_proj.scaling["default"] == 6 / 2


def test_dora_learns_the_length_of_each_row(folder):
    model, _ = load_adapted(ModelConfig(path=folder, lora=LoraSettings(rank=4, use_dora=True)))
    layer = model.model.layers[0].self_attn.q_proj
    length = layer.lora_magnitude_vector["default"].weight
    assert_close(length, layer.base_layer.weight.norm(dim=1))
    assert length.requires_grad
    model(input_ids=IDS).logits.sum().backward()
    assert length.grad.abs().sum() > 0


WHOLE = LoraSettings(rank=2, modules_to_save=("embed_tokens", "norm", "lm_head"))


def test_named_layers_are_trained_whole(folder):
    """The last norm, and none of those whose names end as its own does."""
    model, adapted = load_adapted(ModelConfig(path=folder, lora=WHOLE))
    assert torch.equal(logits(model), logits(load_model(ModelConfig(path=folder))))
    learning = {name for name, learns in trainable(adapted).items() if learns}
    assert {name.removeprefix("base_model.model.") for name in learning if "lora_" not in name} == {
        f"{layer}.modules_to_save.default.weight" for layer in ("model.embed_tokens", "model.norm", "lm_head")
    }
    assert sum("lora_A" in name for name in learning) == 3 * 7
    model(input_ids=IDS).logits.square().sum().backward()
    assert {name for name, p in adapted.named_parameters() if p.grad is not None} == learning
    assert model.lm_head.modules_to_save["default"].weight.grad.any()


def test_a_layer_that_is_trained_whole_has_no_adapter(folder):
    _, adapted = load_adapted(ModelConfig(path=folder, lora=LoraSettings(rank=2, modules_to_save=("q_proj",))))
    assert [name for name in trainable(adapted) if "lora_A" in name and "q_proj" in name] == []
    assert sum(learns for name, learns in trainable(adapted).items() if "q_proj" in name) == 3


@pytest.mark.parametrize("name", ["head", "mlp", "proj"])
def test_layers_that_the_model_lacks_are_refused_by_those_it_has(folder, name):
    lora = LoraSettings(rank=2, modules_to_save=("embed_tokens", name))
    with pytest.raises(ModelError, match=rf"modules_to_save \({name}\) .* embed_tokens, gate_proj, input_layernorm"):
        load_adapted(ModelConfig(path=folder, lora=lora))


@pytest.mark.parametrize("moving", [False, True], ids=["stays", "moves"])
def test_the_reference_has_the_layers_as_they_were(folder, moving):
    model, adapted = load_adapted(ModelConfig(path=folder, lora=WHOLE), moving_reference=moving)
    start, flags = logits(model), trainable(adapted)
    move(adapted)
    moved = logits(model)
    with as_reference(adapted):
        assert torch.equal(logits(model), start)
    assert torch.equal(logits(model), moved)
    assert trainable(adapted) == flags
    if moving:
        weights, names = dict(adapted.named_parameters()), reference_names(adapted)
        assert len(names) == sum(flags.values())
        with torch.no_grad():
            for name, source in names.items():
                weights[name].copy_(weights[source])
        with as_reference(adapted):
            assert torch.equal(logits(model), moved)


def test_a_base_has_the_layers_as_they_were(folder):
    """And shares them: they are in memory once."""
    model, adapted = load_adapted(ModelConfig(path=folder, lora=WHOLE))
    start, flags = logits(model), trainable(adapted)
    move(adapted)
    base = base_of(adapted)
    assert torch.equal(logits(base), start)
    assert base.lm_head.weight is model.lm_head.original_module.weight
    assert trainable(adapted) == flags
    assert not any(p.requires_grad for p in base.parameters())


def test_layers_trained_whole_are_saved_merged_and_continued(folder, tmp_path):
    model, adapted = load_adapted(ModelConfig(path=folder, lora=WHOLE))
    move(adapted)
    moved = logits(model)
    tokenizer = load_tokenizer(ModelConfig(path=folder))
    save_policy(tmp_path / "final", model=model, adapted=adapted, tokenizer=tokenizer, dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert torch.equal(merged.lm_head.weight, model.lm_head.modules_to_save["default"].weight)
    assert_close(logits(merged), moved, atol=1e-4, rtol=1e-4)
    config = ModelConfig(path=str(tmp_path / "final" / "adapter"))
    assert check_model(config) == []
    continued, theirs = load_adapted(config)
    assert_close(logits(continued), moved)
    move(theirs)
    with as_reference(theirs):
        assert_close(logits(continued), moved)


@pytest.mark.parametrize("layer", ["lm_head", "embed_tokens"])
def test_a_tied_embedding_that_is_trained_whole_is_refused(tmp_path, layer):
    config = ModelConfig(path=save_folder(tmp_path, llama_tied()), lora=LoraSettings(modules_to_save=(layer,)))
    for refuses in (check_model, load_adapted):
        with pytest.raises(ModelError, match=r"one matrix .* model\.lora\.modules_to_save"):
            refuses(config)
