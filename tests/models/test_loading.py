import json
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from llmrl.models.adapters import as_loaded, load_adapted
from llmrl.models.config import LoraSettings, ModelConfig
from llmrl.models.folders import ModelError
from llmrl.models.loading import load_model, load_tokenizer
from llmrl.models.training import turn_dropout_off
from llmrl.models.vocabulary import check_ids, check_vocabulary, end_ids, num_token_ids

from .tiny import gpt2, llama, llama_tied, make_tokenizer, save_folder

IDS = torch.tensor([[7, 8, 9, 20, 21]])


@pytest.fixture
def adapter(folder, tmp_path):
    """The folder of an adapter that does something, with dropout in its config."""
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=0.5, task_type="CAUSAL_LM")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), lora)
    move(adapted)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    return str(tmp_path / "adapter")


def move(adapted):
    """What training does: other weights wherever they may learn."""
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p))


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def trainable(adapted):
    return {name: p.requires_grad for name, p in adapted.named_parameters()}


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


@pytest.mark.parametrize("make", [gpt2, lambda: llama(attention_dropout=0.5)], ids=["gpt2", "llama"])
def test_dropout_is_off_in_train_mode(make, tmp_path):
    torch.manual_seed(0)
    model = make().train()
    assert not torch.equal(logits(model), logits(model))  # it was on
    turn_dropout_off(model)
    assert torch.equal(logits(model), logits(model))
    loaded = load_model(ModelConfig(path=save_folder(tmp_path, make()))).train()
    assert torch.equal(logits(loaded), logits(loaded))


def test_dropout_stays_in_the_config(tmp_path):
    """The folder that a run leaves is a model with the dropout that its maker gave it."""
    model = load_model(ModelConfig(path=save_folder(tmp_path / "before", gpt2())))
    model.save_pretrained(tmp_path / "after")
    assert AutoConfig.from_pretrained(tmp_path / "after").resid_pdrop == 0.1


def test_dropout_of_an_adapter_is_off(adapter, folder):
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter).train()
    assert not torch.equal(logits(plain), logits(plain))  # it was on
    model, _ = load_adapted(ModelConfig(path=adapter))
    assert torch.equal(logits(model.train()), logits(model))


def test_no_module_loses_what_is_not_dropout():
    module = nn.Module()
    module.drop_path, module.dropout_layers, module.scale = 0.3, 2, 0.5
    turn_dropout_off(module)
    assert (module.drop_path, module.dropout_layers, module.scale) == (0.0, 2, 0.5)


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

    with as_loaded(adapted):
        assert torch.equal(logits(model), as_it_came)
    assert torch.equal(logits(model), moved)
    assert trainable(adapted) == flags

    with pytest.raises(KeyError), as_loaded(adapted):
        raise KeyError
    assert torch.equal(logits(model), moved)
    assert trainable(adapted) == flags


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


# --- the end of a response --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of_tokenizer", "of_generation", "union"),
    [
        (2, GenerationConfig(eos_token_id=[5, 3]), (2, 3, 5)),
        (2, GenerationConfig(eos_token_id=2), (2,)),
        (2, GenerationConfig(eos_token_id=None), (2,)),
        (0, None, (0,)),
        (None, GenerationConfig(eos_token_id=7), (7,)),
    ],
)
def test_end_ids_are_the_union(of_tokenizer, of_generation, union):
    tokenizer, model = SimpleNamespace(eos_token_id=of_tokenizer), SimpleNamespace(generation_config=of_generation)
    assert end_ids(tokenizer, model) == union


def test_no_end_at_all():
    tokenizer, model = SimpleNamespace(eos_token_id=None), SimpleNamespace(generation_config=None)
    with pytest.raises(ModelError, match="end-of-sequence"):
        end_ids(tokenizer, model)


def test_end_ids_of_a_folder(tmp_path):
    model = llama()
    model.generation_config = GenerationConfig(eos_token_id=[5, 3])
    config = ModelConfig(path=save_folder(tmp_path, model))
    assert end_ids(load_tokenizer(config), load_model(config)) == (2, 3, 5)


def test_the_tokenizer_keeps_its_template(folder):
    assert load_tokenizer(ModelConfig(path=folder)).chat_template == AutoTokenizer.from_pretrained(folder).chat_template


def test_a_folder_that_lacks_weights_is_refused(folder):
    file = f"{folder}/model.safetensors"
    weights = load_file(file)
    del weights["lm_head.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights, such as lm_head\.weight, are missing for a LlamaForCausalLM"):
        load_model(ModelConfig(path=folder))


def test_token_ids_are_those_that_both_tokenizer_and_head_know():
    tokenizer, model = make_tokenizer(), llama()
    assert num_token_ids(tokenizer, model) == 37  # t0 ... t36, fewer than the rows of the head
    tokenizer.add_tokens([f"extra{n}" for n in range(100)])
    assert num_token_ids(tokenizer, model) == model.config.vocab_size


def test_ordinary_tokens_without_an_embedding_are_refused():
    tokenizer, model = make_tokenizer(), llama()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<sound>", "<film>", "<smell>"]})
    check_vocabulary(ModelConfig(path="m"), model, tokenizer)  # ids 37 to 40, of 40 embeddings
    tokenizer.add_tokens(["plain"])
    with pytest.raises(ModelError, match=r"has 1 tokens, such as 'plain' \(id 41\), beyond the 40 embeddings"):
        check_vocabulary(ModelConfig(path="m"), model, tokenizer)


def test_an_eos_without_an_embedding_is_refused():
    tokenizer, model = make_tokenizer(), llama()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<sound>", "<film>"]})
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    with pytest.raises(ModelError, match=r"has 1 tokens, such as '<end>' \(id 40\), beyond the 40 embeddings"):
        check_vocabulary(ModelConfig(path="m"), model, tokenizer)


def test_data_with_a_token_without_an_embedding_is_refused():
    tokenizer, model = make_tokenizer(), llama()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<sound>", "<film>", "<smell>"]})
    check_ids("rows.jsonl", [[1, 39], []], model, tokenizer)
    with pytest.raises(ModelError, match=r"^rows\.jsonl has tokens beyond .*: '<smell>' \(id 40\); .*resize_token"):
        check_ids("rows.jsonl", [[1], [2, 40]], model, tokenizer)
