import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertLMHeadModel, T5Config

from llmrl.models.checking import check_model, check_reward_model
from llmrl.models.config import LoraSettings, ModelConfig
from llmrl.models.folders import ModelError

from .tiny import gpt2, llama, llama_tied, make_tokenizer, save_folder

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:77\nsize 123456\n"


@pytest.fixture
def adapter(folder, tmp_path):
    return save_adapter(folder, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])


def save_adapter(base, folder, **lora) -> str:
    config = LoraConfig(r=2, task_type="CAUSAL_LM", **lora)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(str(folder))
    return str(folder)


def change(folder, name="config.json", **changes):
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refusal(check=check_model, needs=None, **config) -> str:
    with pytest.raises(ModelError) as error:
        check(ModelConfig(**config), **(needs or {}))
    assert "\n" not in str(error.value)
    return str(error.value)


def both_refuse(path) -> str:
    """What policies and reward models are refused with alike."""
    told = refusal(path=path)
    assert refusal(check_reward_model, {"needs_head": False}, path=path) == told
    return told


def test_whole_folders_pass(folder, adapter):
    assert check_model(ModelConfig(path=folder)) == []
    assert check_model(ModelConfig(path=folder, lora=LoraSettings())) == []
    assert check_model(ModelConfig(path=adapter)) == []
    assert check_reward_model(ModelConfig(path=folder), needs_head=False) == []
    assert check_reward_model(ModelConfig(path=folder, lora=LoraSettings()), needs_head=False) == []


def test_no_weight_is_read(folder, adapter, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("checking must not load weights")

    for name in ("load_file", "load"):
        monkeypatch.setattr(f"safetensors.torch.{name}", refuse)
    monkeypatch.setattr(PeftModel, "from_pretrained", refuse)
    made = AutoModelForCausalLM.from_pretrained

    def on_meta(*args, device_map, **kwargs):
        assert device_map == torch.device("meta")
        return made(*args, device_map=device_map, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", on_meta)
    for path in (folder, adapter):
        assert check_model(ModelConfig(path=path)) == []


# --- files ------------------------------------------------------------------------------------------------------------


def test_no_config(tmp_path):
    assert "holds no config.json" in both_refuse(str(tmp_path))


def test_no_weights(folder, tmp_path):
    (tmp_path / "model" / "model.safetensors").unlink()
    assert "holds no weights" in refusal(path=folder)
    assert "model.from_scratch=true" in refusal(path=folder)
    assert check_model(ModelConfig(path=folder, from_scratch=True)) == []


def test_pickled_weights_do_not_count(folder, tmp_path):
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "pytorch_model.bin")
    assert "save them as safetensors" in refusal(path=folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"])
def test_pointers_of_git_lfs(folder, tmp_path, name):
    (tmp_path / "model" / name).write_text(POINTER)
    assert f"has a {name} that is a Git LFS pointer" in both_refuse(folder)


def test_generation_settings_that_are_no_json(folder, tmp_path):
    (tmp_path / "model" / "generation_config.json").write_text("{")
    assert "has a generation_config.json that is no JSON object" in both_refuse(folder)


def test_weights_of_another_size(folder, tmp_path):
    change(tmp_path / "model", intermediate_size=8)
    assert "9 weights, such as model.layers.0.mlp.down_proj.weight, are of another shape" in both_refuse(folder)


def test_weights_that_are_missing(folder, tmp_path):
    change(tmp_path / "model", num_hidden_layers=4)
    assert "weights, such as model.layers.3." in refusal(path=folder)
    assert "weights, such as model.layers.3." in refusal(check_reward_model, {"needs_head": False}, path=folder)


@pytest.mark.parametrize("layers", [1, 0])
def test_weights_of_more_layers_than_the_config_has(folder, tmp_path, layers):
    change(tmp_path / "model", num_hidden_layers=layers)
    told = f"{9 * (3 - layers)} weights, such as model.layers.{layers}.input_layernorm.weight, are not those of a "
    assert f"{told}LlamaForCausalLM" in refusal(path=folder)
    assert f"{told}LlamaForSequenceClassification" in refusal(check_reward_model, {"needs_head": False}, path=folder)


def test_bodies_saved_alone_have_the_layers_of_the_config(tmp_path):
    model = gpt2()
    path = save_folder(tmp_path, model)
    model.transformer.save_pretrained(tmp_path)
    assert check_model(ModelConfig(path=path)) == []
    change(tmp_path, n_layer=1)
    assert "weights, such as h.1.attn.c_attn.weight, are not those of a GPT2LMHeadModel" in refusal(path=path)


def test_heads_that_nothing_reads_are_left_out(folder, tmp_path):
    file = tmp_path / "model" / "model.safetensors"
    heads = {"v_head.summary.weight": torch.ones(1, 32), "mtp.layers.0.weight": torch.ones(2)}
    save_file(load_file(file) | heads, file, metadata={"format": "pt"})
    assert check_model(ModelConfig(path=folder)) == []


def test_code_of_the_folder_runs_only_when_allowed(folder, tmp_path):
    change(tmp_path / "model", auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    assert "model.trust_remote_code=true" in both_refuse(folder)
    assert check_model(ModelConfig(path=folder, trust_remote_code=True)) == []


def test_code_of_the_tokenizer_counts_too(folder, tmp_path):
    change(tmp_path / "model", "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", None]})
    assert "model.trust_remote_code=true" in both_refuse(folder)
    assert check_model(ModelConfig(path=folder, trust_remote_code=True)) == []


# --- families ---------------------------------------------------------------------------------------------------------


def test_a_type_that_is_not_known(folder, tmp_path):
    change(tmp_path / "model", model_type="llama77")
    assert "is of type llama77, which transformers" in both_refuse(folder)
    for odd in (None, ["llama"], 3):
        change(tmp_path / "model", model_type=odd)
        assert "without a model_type" in both_refuse(folder)


@pytest.mark.parametrize(
    "settings",
    [
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"compression_config": {"quant_method": "fp8"}},
    ],
)
def test_quantized_weights(folder, tmp_path, settings):
    change(tmp_path / "model", **settings)
    method = next(iter(settings.values()))["quant_method"]
    assert f"is quantized ({method})" in both_refuse(folder)


def test_an_encoder_decoder(folder, tmp_path):
    T5Config(vocab_size=40).save_pretrained(tmp_path / "model")
    assert "is an encoder-decoder (t5)" in both_refuse(folder)


def test_a_model_that_reads_both_ways(tmp_path):
    sizes = {
        "vocab_size": 40,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_attention_heads": 1,
        "num_hidden_layers": 1,
    }
    model = BertLMHeadModel(BertConfig(**sizes, eos_token_id=2))
    path = save_folder(tmp_path, model)
    assert "reads in both directions (bert)" in both_refuse(path)
    change(tmp_path, is_decoder=True)
    assert check_model(ModelConfig(path=path)) == []


def test_a_decoder_that_was_made_to_read_both_ways(folder, tmp_path):
    change(tmp_path / "model", use_bidirectional_attention=True)
    assert "reads in both directions (llama)" in both_refuse(folder)


def test_a_model_of_no_text(folder, tmp_path):
    AutoConfig.for_model("vit").save_pretrained(tmp_path / "model")
    assert "is of type vit, of which transformers has no CausalLM model" in refusal(path=folder)


# --- tokenizers -------------------------------------------------------------------------------------------------------


def test_no_tokenizer(folder, tmp_path):
    (tmp_path / "model" / "tokenizer.json").unlink()
    assert "holds no tokenizer" in both_refuse(folder)


def test_a_tokenizer_that_cannot_be_read(folder, tmp_path):
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    assert "cannot be loaded" in both_refuse(folder)


def test_a_tokenizer_with_tokens_beyond_the_embedding(folder, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"more{n}" for n in range(5)])
    tokenizer.save_pretrained(tmp_path / "model")
    assert "has 2 tokens, such as 'more3' (id 40), beyond the 40 embeddings" in both_refuse(folder)


def test_nothing_ends_a_response(folder, tmp_path):
    model = tmp_path / "model"
    change(model, "tokenizer_config.json", eos_token=None)
    change(model, "config.json", eos_token_id=None)
    change(model, "generation_config.json", eos_token_id=None)
    assert "no end-of-sequence token" in both_refuse(folder)
    change(model, "generation_config.json", eos_token_id=[2])
    assert check_model(ModelConfig(path=folder)) == []


# --- adapters ---------------------------------------------------------------------------------------------------------


def test_targets_that_the_model_lacks(tmp_path):
    path = save_folder(tmp_path, gpt2())
    told = refusal(path=path, lora=LoraSettings(targets=("q_proj", "c_attn")))
    assert "model.lora.targets (q_proj) names no layer of a GPT2LMHeadModel" in told
    assert "c_attn, c_fc, c_proj" in told


def test_an_adapter_on_the_embedding_is_taken(tmp_path):
    path = save_folder(tmp_path, llama())
    assert check_model(ModelConfig(path=path, lora=LoraSettings(targets=("embed_tokens",)))) == []


def test_adapters_on_tied_embeddings(tmp_path):
    path = save_folder(tmp_path / "tied", llama_tied())
    assert "one matrix" in refusal(path=path, lora=LoraSettings(targets=("lm_head", "q_proj")))
    for own in ({"modules_to_save": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}):
        adapter = save_adapter(path, tmp_path / next(iter(own.values()))[0], target_modules=["q_proj"], **own)
        assert "one matrix" in refusal(path=adapter)


def test_so_does_code_of_the_tokenizer_beside_an_adapter(adapter, tmp_path):
    (tmp_path / "adapter" / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["own.Own", null]}}')
    assert f"model.path ({adapter}) brings its own Python code" in refusal(path=adapter)
    assert check_model(ModelConfig(path=adapter, trust_remote_code=True)) == []


def test_an_adapter_that_names_a_module_to_import(adapter, tmp_path):
    change(tmp_path / "adapter", "adapter_config.json", megatron_config={"a": 1}, megatron_core="payload")
    assert "would import a module that the adapter names" in refusal(path=adapter)


def test_an_adapter_is_continued_as_it_is(adapter):
    assert "leave model.lora out" in refusal(path=adapter, lora=LoraSettings())
    assert "leave model.from_scratch out" in refusal(path=adapter, from_scratch=True)


def test_an_adapter_without_weights(adapter, tmp_path):
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    assert "holds no adapter_model.safetensors" in refusal(path=adapter)


def test_an_adapter_whose_weights_are_cut(adapter, tmp_path):
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert "adapter_model.safetensors of" in refusal(path=adapter)


def test_adapter_settings_that_are_no_json(adapter, tmp_path):
    (tmp_path / "adapter" / "adapter_config.json").write_text("{")
    assert "adapter_config.json that is no JSON object" in refusal(path=adapter)


@pytest.mark.parametrize("settings", [{"peft_type": "PROMPT_TUNING"}, {"task_type": "SEQ_CLS"}])
def test_adapters_of_other_kinds(adapter, tmp_path, settings):
    change(tmp_path / "adapter", "adapter_config.json", **settings)
    assert "only LORA for CAUSAL_LM is continued" in refusal(path=adapter)


def test_an_adapter_of_another_rank_than_it_says(adapter, tmp_path):
    change(tmp_path / "adapter", "adapter_config.json", r=3)
    told = refusal(path=adapter)
    assert "12 weights of the adapter do not fit its base" in told
    assert "(2, 48) where the base has (3, 48)" in told


def test_an_adapter_that_lacks_a_weight(adapter, tmp_path):
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    weights.pop(min(weights))
    save_file(weights, file)
    assert "1 weights of the adapter do not fit its base" in refusal(path=adapter)


def test_an_adapter_with_another_vocabulary(folder, tmp_path):
    wide = save_folder(tmp_path / "wide", llama(vocab_size=48))
    adapter = save_adapter(wide, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["lm_head"])
    change(tmp_path / "adapter", "adapter_config.json", base_model_name_or_path=folder)
    assert "(48, 32) where the base has (40, 32)" in refusal(path=adapter)


def test_the_base_of_an_adapter_is_never_random(adapter, tmp_path):
    (tmp_path / "model" / "model.safetensors").unlink()
    told = refusal(path=adapter)
    assert "holds no weights" in told
    assert "base_model_name_or_path in adapter_config.json" in told


def test_the_base_of_an_adapter_is_checked_too(adapter, tmp_path):
    change(tmp_path / "model", auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    told = refusal(path=adapter)
    assert f"model.path ({adapter}) is an adapter whose base cannot be used" in told
    assert "brings its own Python code" in told
    assert check_model(ModelConfig(path=adapter, trust_remote_code=True)) == []


def test_an_adapter_without_a_base(adapter, tmp_path):
    change(tmp_path / "adapter", "adapter_config.json", base_model_name_or_path=None)
    assert "does not name its base model" in refusal(path=adapter)


def test_an_adapter_whose_base_has_moved(adapter, tmp_path):
    (tmp_path / "model").rename(tmp_path / "modell")
    assert f"did you mean {tmp_path / 'modell'}?" in refusal(path=adapter)


# --- hub names --------------------------------------------------------------------------------------------------------


def test_a_hub_name_that_is_not_here_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (sentence,) = check_model(ModelConfig(path="nobody/such-a-model"))
    assert sentence == "model.path (nobody/such-a-model) is a hub name that is not in the local cache"
    (tmp_path / "tiny_llama").mkdir()
    (sentence,) = check_model(ModelConfig(path="tiny_lama"))
    assert sentence.endswith("; did you mean the folder tiny_llama?")


def test_a_hub_name_that_is_here(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda _, name: f"{folder}/{name}")
    monkeypatch.setattr("llmrl.models.checking.read_config", lambda _: AutoConfig.from_pretrained(folder))
    assert check_model(ModelConfig(path="somebody/model")) == []
    change(tmp_path / "model", "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", None]})
    assert "model.path (somebody/model) brings its own Python code" in refusal(path="somebody/model")


def test_no_hub_name_is_no_name_of_the_hub():
    assert "model.path (a b*c)" in refusal(path="a b*c")
