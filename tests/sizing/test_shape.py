import json
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from llmrl.models.adapters import load_adapted
from llmrl.models.config import ModelConfig
from llmrl.sizing import read_shape, shape_of
from tests.hybrids import HYBRIDS

MODELS = Path(__file__).parents[2] / "recipes" / "models"


def test_shape_by_hand(shape):
    # a layer: q 64, k 32, v 32, o 64, gate, up and down 128 each, two norms of 8; then a norm, and two matrices of 256
    assert shape.num_layer == 64 + 32 + 32 + 64 + 3 * 128
    assert shape.num_linear == 2 * 576
    assert shape.num_parameters == 2 * (576 + 16) + 8 + 2 * 256
    assert (shape.num_embedding, shape.num_head, shape.largest, shape.vocab_size) == (256, 256, 256, 32)
    assert (shape.hidden_size, shape.query_size, shape.key_size, shape.feed_forward_size) == (8, 8, 4, 16)
    assert shape.num_trunk == shape.num_parameters - 256


def test_tied_embeddings_count_once(llama):
    tied = LlamaConfig(**{**llama.to_dict(), "tie_word_embeddings": True})
    assert shape_of(tied).num_parameters == shape_of(llama).num_parameters - 256
    assert shape_of(tied).num_head == 0


@pytest.mark.parametrize("config", [GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=32), "llama"], ids=str)
def test_there_are_as_many_parameters_as_in_the_real_model(config, llama):
    config = llama if config == "llama" else config
    model = AutoModelForCausalLM.from_config(config)
    assert shape_of(config).num_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("targets", [(), ("q_proj", "down_proj")])
def test_an_adapter_has_as_many_parameters_as_peft_makes(llama, shape, targets):
    adapted = get_peft_model(
        AutoModelForCausalLM.from_config(llama),
        LoraConfig(r=3, target_modules=list(targets) or "all-linear", task_type="CAUSAL_LM"),
    )
    assert shape.num_adapter(3, targets) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def test_layers_that_are_trained_whole_are_counted_by_name(shape):
    assert shape.num_whole(()) == 0
    assert shape.num_whole(("embed_tokens", "norm", "1.mlp.up_proj")) == 256 + 8 + 128
    assert sum(num for _, num in shape.layers) == shape.num_parameters


@pytest.mark.parametrize("folder", sorted(MODELS.glob("tiny*")), ids=lambda folder: folder.name)
def test_a_folder_is_read_without_its_weights(folder):
    config = ModelConfig(path=str(folder), from_scratch=True)
    shape, (model, _) = read_shape(config), load_adapted(config)
    assert shape is not None
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())


def test_a_folder_with_an_adapter_has_the_shape_of_its_base(tmp_path):
    base = str(MODELS / "tiny_char_llama")
    adapter = {"base_model_name_or_path": base, "r": 4, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    shape, whole = read_shape(ModelConfig(path=str(tmp_path))), read_shape(ModelConfig(path=base))
    assert shape is not None
    assert whole is not None
    assert shape.num_parameters == whole.num_parameters
    assert (shape.adapter_rank, shape.adapter_targets) == (4, ("q_proj",))


@pytest.mark.parametrize("family", HYBRIDS)
def test_a_model_that_carries_states_has_no_shape(family, tmp_path):
    """What a row keeps is not counted by tokens there."""
    HYBRIDS[family]().save_pretrained(tmp_path)
    assert read_shape(ModelConfig(path=str(tmp_path))) is None


def test_what_cannot_be_read_has_no_shape(tmp_path):
    assert read_shape(ModelConfig(path="nobody/nosuchmodel")) is None
    assert read_shape(ModelConfig(path=str(tmp_path))) is None
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard_of"}))
    assert read_shape(ModelConfig(path=str(tmp_path))) is None
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "auto_map": {"AutoConfig": "x.Y"}}))
    assert read_shape(ModelConfig(path=str(tmp_path))) is None


def test_layers_of_whole_blocks_can_be_quantized(llama):
    """Of 64 inputs, not of 96: all but the projection down."""
    wide = LlamaConfig(**(llama.to_dict() | {"hidden_size": 64, "intermediate_size": 96}))
    shape = shape_of(wide)
    assert shape.num_linear - shape.num_quantized == 2 * 96 * 64 + 2 * 8 * 64  # and o_proj, of 2 heads of 4
    assert shape.largest_linear == 96 * 64
