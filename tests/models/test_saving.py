import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmrl.files import WriteError
from llmrl.models.adapters import load_adapted
from llmrl.models.checking import check_model
from llmrl.models.config import LoraSettings, ModelConfig
from llmrl.models.loading import load_tokenizer
from llmrl.models.saving import Blueprint, save_policy

from .tiny import FAMILIES, build, llama, make_tokenizer, save_folder

IDS = torch.tensor([[7, 8, 9, 20, 21]])


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def save(folder, model, *, adapted=None, dtype=torch.float32, records=None):
    save_policy(folder, model=model, adapted=adapted, tokenizer=make_tokenizer(), dtype=dtype, records=records)
    return folder


def state_of(model):
    """Which tensors, their values and whether they learn."""
    return {name: (id(p), p.dtype, p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}


def assert_untouched(model, before):
    after = state_of(model)
    assert after.keys() == before.keys()
    for name, (*same, values) in before.items():
        assert after[name][:3] == tuple(same)
        assert torch.equal(after[name][3], values)


@pytest.fixture
def adapted(tmp_path):
    """``(model, adapted)`` in the middle of training."""
    torch.manual_seed(0)
    path = save_folder(tmp_path / "base", llama())
    model, adapted = load_adapted(ModelConfig(path=path, lora=LoraSettings(rank=2)))
    disturb(adapted)
    return model, adapted


def disturb(adapted):
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))


def test_a_full_model_comes_back(family, tmp_path):
    model = build(family)
    loaded = AutoModelForCausalLM.from_pretrained(save(tmp_path / "final", model))
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded), logits(model))


def test_tied_embeddings_stay_tied(tmp_path):
    folder = save(tmp_path / "final", build("llama_tied"))
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_tokenizer_and_chat_template_come_along(tmp_path):
    loaded = AutoTokenizer.from_pretrained(save(tmp_path / "final", build("llama")))
    messages = [{"role": "user", "content": "t7"}]
    assert loaded("t7 t8 t36")["input_ids"] == [7, 8, 36]
    assert loaded.apply_chat_template(messages, tokenize=False) == "t7 t2 "


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_saved_in_bfloat16_while_the_live_model_stays(family, tmp_path):
    model = FAMILIES[family]()
    before = state_of(model)
    folder = save(tmp_path / "final", model, dtype=torch.bfloat16)
    assert_untouched(model, before)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for name, p in loaded.named_parameters():
        assert p.dtype == torch.bfloat16
        assert torch.equal(p, before[name][3].bfloat16())


def test_the_folder_is_replaced_whole(tmp_path):
    folder = tmp_path / "run" / "final"
    folder.mkdir(parents=True)
    (folder / "left_over.txt").write_text("of an earlier save")
    (tmp_path / "run" / ".final.new").mkdir()
    (tmp_path / "run" / ".final.new" / "torso.txt").write_text("of a save that died")
    save(folder, build("llama"))
    assert not (folder / "left_over.txt").exists()
    assert not (folder / "torso.txt").exists()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["final"]


def test_a_save_that_fails_leaves_the_folder(tmp_path, monkeypatch):
    model = build("llama")
    folder = save(tmp_path / "final", model)

    def disk_full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(type(model), "save_pretrained", disk_full)
    with pytest.raises(WriteError, match=r"final cannot be written: no space left on device \(101 KiB needed, "):
        save(folder, model)
    assert AutoModelForCausalLM.from_pretrained(folder) is not None
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_records_stand_beside_the_model_from_the_first_moment_on(tmp_path, monkeypatch):
    rename, seen = Path.rename, []

    def look(partial, target):
        seen.append(json.loads((partial / "card.json").read_text()))
        return rename(partial, target)

    monkeypatch.setattr(Path, "rename", look)
    folder = save(tmp_path / "final", build("llama"), records={"card.json": {"accuracy": 0.5}})
    assert seen == [json.loads((folder / "card.json").read_text())] == [{"accuracy": 0.5}]


def test_merged_adapters_are_the_live_policy(adapted, tmp_path):
    model, peft_model = adapted
    before, live = state_of(peft_model), logits(model)
    folder = save(tmp_path / "final", model, adapted=peft_model)
    assert_close(logits(AutoModelForCausalLM.from_pretrained(folder)), live, rtol=1e-4, atol=1e-4)
    assert_untouched(peft_model, before)
    assert torch.equal(logits(model), live)


def test_the_adapter_beside_it_loads_with_peft(adapted, tmp_path):
    model, peft_model = adapted
    folder = save(tmp_path / "final", model, adapted=peft_model, dtype=torch.bfloat16)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(logits(PeftModel.from_pretrained(base, folder / "adapter")), logits(model))
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    assert list(folder.rglob("README.md")) == []  # the run writes its own card; that of peft is empty


def test_a_saved_adapter_can_be_continued(adapted, tmp_path):
    """And saved again: the merged model and the adapter are those that learned, not the snapshot they started from."""
    model, peft_model = adapted
    config = ModelConfig(path=str(save(tmp_path / "final", model, adapted=peft_model) / "adapter"))
    assert check_model(config) == []
    assert load_tokenizer(config)("t7 t8")["input_ids"] == [7, 8]
    continued, its_adapter = load_adapted(config)
    assert torch.equal(logits(continued), logits(model))

    disturb(its_adapter)
    folder = save(tmp_path / "again", continued, adapted=its_adapter)
    assert_close(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(continued), rtol=1e-4, atol=1e-4)
    again, _ = load_adapted(ModelConfig(path=str(folder / "adapter")))
    assert torch.equal(logits(again), logits(continued))
    assert not torch.allclose(logits(again), logits(model), atol=0.1)


# --- weights that are elsewhere ---------------------------------------------------------------------------------------


def test_a_blueprint_takes_no_memory_and_leaves_the_model_alone(family):
    model = build(family)
    before = state_of(model)
    blueprint = Blueprint(model, None)
    assert {p.device.type for p in blueprint.modules[0].parameters()} == {"meta"}
    assert_untouched(model, before)


def test_a_filled_blueprint_is_the_model_with_other_weights(family):
    """Tied ones stay tied, and what is written to the model's config later is in the filled one's."""
    model = build(family)
    blueprint = Blueprint(model, None)
    expected = logits(model)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    model.config.a_note = "later"
    filled, none = blueprint.filled(weights)
    assert none is None
    assert_close(logits(filled), expected, rtol=0, atol=0)
    assert filled.config.a_note == "later"
    same = [m.get_input_embeddings().weight is m.get_output_embeddings().weight for m in (model, filled)]
    assert same[0] == same[1]
    again, _ = blueprint.filled({name: 2 * w for name, w in weights.items()})
    assert_close(logits(filled), expected, rtol=0, atol=0)
    assert not torch.equal(logits(again), expected)


def test_a_blueprint_of_an_adapted_model_has_both_views(adapted, tmp_path):
    model, view = adapted
    blueprint = Blueprint(model, view)
    whole, whole_view = blueprint.filled({name: p.detach().clone() for name, p in model.named_parameters()})
    assert whole_view.get_base_model() is whole
    for ours, theirs in ((save(tmp_path / "a", model, adapted=view), save(tmp_path / "b", whole, adapted=whole_view)),):
        for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
            assert (ours / name).read_bytes() == (theirs / name).read_bytes()
