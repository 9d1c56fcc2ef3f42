import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmrl.models.adapters import load_adapted
from llmrl.models.config import ModelConfig
from llmrl.models.folders import ModelError
from llmrl.models.loading import load_model, load_pretrained, load_tokenizer
from tests.models.tiny import IDS, logits

from .tiny import llama, make_tokenizer, save_folder

# --- loading ----------------------------------------------------------------------------------------------------------


def test_weights_are_those_of_the_folder_in_the_dtype_asked_for(folder):
    torch.manual_seed(0)
    original = llama()
    model = load_model(ModelConfig(path=folder))
    assert torch.equal(logits(model), logits(original))
    halved = load_model(ModelConfig(path=folder), dtype=torch.bfloat16)
    assert {p.dtype for p in halved.parameters()} == {torch.bfloat16}
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(halved.state_dict()[name], original.state_dict()[name].bfloat16())


def test_pickled_weights_are_never_loaded(folder, tmp_path):
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save(llama().state_dict(), tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"cannot be loaded: .*safetensors"):
        load_model(ModelConfig(path=folder))


@pytest.mark.parametrize("name", ["some/model", None], ids=["in the cache of the hub", "in a folder"])
def test_an_index_that_names_a_pickle_is_refused_before_it_is_read(folder, tmp_path, monkeypatch, name):
    (tmp_path / "model" / "model.safetensors").unlink()
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "pytorch_model.bin"}}))
    torch.save(llama().state_dict(), tmp_path / "model" / "pytorch_model.bin")

    def in_the_cache(_: str, file: str) -> str | None:
        return str(tmp_path / "model" / file) if (tmp_path / "model" / file).exists() else None

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", in_the_cache)
    monkeypatch.setattr(torch, "load", None)
    config = ModelConfig(path=name or folder)
    with pytest.raises(ModelError, match=r"names 'pytorch_model\.bin', which is no safetensors file"):
        load_pretrained(config, AutoModelForCausalLM, llama().config, dtype=torch.float32)


def test_a_tokenizer_that_cannot_be_called_is_told_when_it_loads(tmp_path):
    """transformers takes the setting as it is, and compares with it at the first text."""
    path = save_folder(tmp_path, llama())
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_max_length": [8]}))
    with pytest.raises(ModelError, match=r"^model\.path \(.*\) cannot be loaded: TypeError"):
        load_tokenizer(ModelConfig(path=path))


@pytest.mark.parametrize("load", [load_tokenizer, load_model, load_adapted])
def test_a_hub_that_cannot_be_reached_is_asked_once(load, monkeypatch):
    asked = []

    def no_answer(self, *, url, timeout):
        asked.append((url, timeout))
        raise TimeoutError("no answer\nto be had")

    monkeypatch.setattr("huggingface_hub.HfApi.get_hf_file_metadata", no_answer)
    told = r"^model\.path \(nosuchmodel\) is neither a folder here nor a model on the hub .* reached: no answer$"
    with pytest.raises(ModelError, match=told) as caught:
        load(ModelConfig(path="nosuchmodel"))
    assert isinstance(caught.value.__cause__, OSError)
    ((url, timeout),) = asked
    assert url.endswith("/nosuchmodel/resolve/main/config.json")
    assert timeout <= 5


def test_a_model_in_the_cache_needs_no_hub(folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda _, name: f"{folder}/{name}")
    monkeypatch.setattr("huggingface_hub.HfApi.get_hf_file_metadata", lambda *_, **__: pytest.fail("it was asked"))
    loaded = []
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda path, **_: loaded.append(path) or make_tokenizer())
    load_tokenizer(ModelConfig(path="somebody/model"))
    assert loaded == ["somebody/model"]


def test_from_scratch_takes_the_shape_and_not_the_weights(folder, tmp_path):
    (tmp_path / "model" / "model.safetensors").unlink()
    config = ModelConfig(path=folder, from_scratch=True)
    torch.manual_seed(5)
    first, second = load_model(config), load_model(config)
    torch.manual_seed(5)
    assert torch.equal(logits(first), logits(llama()))
    assert not torch.equal(logits(second), logits(first))


def test_home_is_found(folder, adapter, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(load_tokenizer(ModelConfig(path="~/model"))) == 37
    assert torch.equal(logits(load_model(ModelConfig(path="~/model"))), logits(load_model(ModelConfig(path=folder))))
    ours, _ = load_adapted(ModelConfig(path="~/adapter"))
    assert torch.equal(logits(ours), logits(load_adapted(ModelConfig(path=adapter))[0]))


def test_outputs_that_nothing_reads_are_off(tmp_path):
    torch.manual_seed(0)
    model = load_model(ModelConfig(path=save_folder(tmp_path, llama(output_hidden_states=True))))
    assert model(input_ids=IDS).hidden_states is None


def test_router_logits_are_off(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = dict.fromkeys(("hidden_size", "intermediate_size"), 16) | {"vocab_size": 40, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2, "output_router_logits": True}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads))
    loaded = load_model(ModelConfig(path=save_folder(tmp_path, model)))
    assert not loaded.config.output_router_logits
    assert loaded(input_ids=IDS).router_logits is None


def test_whatever_a_library_raises_is_one_line(folder, monkeypatch):
    def fail(*_, **__):
        raise KeyError("a name\nand more")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(ModelError, match=r"^model\.path \(.*\) cannot be loaded: KeyError: .*$") as error:
        load_model(ModelConfig(path=folder))
    assert isinstance(error.value.__cause__, KeyError)


def test_weights_of_another_shape_are_refused_not_drawn(folder, tmp_path):
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"intermediate_size": 8}))
    with pytest.raises(ModelError, match=r"9 weights, such as .*mlp\.down_proj.*another shape"):
        load_model(ModelConfig(path=folder))


# --- adapters ---------------------------------------------------------------------------------------------------------


# --- the end of a response --------------------------------------------------------------------------------------------


def test_the_tokenizer_keeps_its_template(folder):
    assert load_tokenizer(ModelConfig(path=folder)).chat_template == AutoTokenizer.from_pretrained(folder).chat_template


def test_a_folder_that_lacks_weights_is_refused(folder):
    file = f"{folder}/model.safetensors"
    weights = load_file(file)
    del weights["lm_head.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights, such as lm_head\.weight, are missing for a LlamaForCausalLM"):
        load_model(ModelConfig(path=folder))
