"""Expectations of old forms are what transformers 4.57 wrote of the same settings."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from llmrl.models.companions import Companions, in_both_forms
from llmrl.models.config import ModelConfig
from llmrl.models.folders import ModelError
from llmrl.models.loading import load_model, load_tokenizer
from llmrl.models.saving import save_policy

from .tiny import gpt2, llama, make_tokenizer, save_folder

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}


def read(folder, name="config.json"):
    return json.loads((folder / name).read_text())


def write(folder, name="config.json", *, drop=(), **changes):
    file = folder / name
    settings = read(folder, name) if file.is_file() else {}
    kept = {key: value for key, value in settings.items() if key not in drop}
    file.write_text(json.dumps(kept | changes))


@pytest.fixture
def source(tmp_path):
    """A folder as transformers 4.57 leaves it."""
    torch.manual_seed(0)
    folder = tmp_path / "source"
    save_folder(folder, llama())
    scaling = LLAMA3 | {"rope_type": "llama3"}
    write(folder, drop=("rope_parameters", "dtype"), rope_theta=5e5, rope_scaling=scaling, torch_dtype="float32")
    write(folder, "tokenizer_config.json", drop=("backend", "is_local"), tokenizer_class="PreTrainedTokenizerFast")
    write(folder, "special_tokens_map.json", eos_token="t2", pad_token="t2", unk_token="t0")
    return folder


def save_again(source, tmp_path, change=lambda model, tokenizer: None, dtype=torch.float32):
    config = ModelConfig(path=str(source))
    model, tokenizer = load_model(config), load_tokenizer(config)
    change(model, tokenizer)
    save_policy(tmp_path / "final", model=model, adapted=None, tokenizer=tokenizer, dtype=dtype)
    return tmp_path / "final"


# --- config.json ------------------------------------------------------------------------------------------------------


def test_both_readers_find_their_rotary_settings(source, tmp_path):
    final = save_again(source, tmp_path)
    settings = read(final)
    assert settings["rope_theta"] == 5e5
    assert settings["rope_scaling"] == LLAMA3 | {"rope_type": "llama3"}
    assert settings["rope_parameters"] == LLAMA3 | {"rope_type": "llama3", "rope_theta": 5e5}
    assert AutoConfig.from_pretrained(final).rope_parameters == AutoConfig.from_pretrained(source).rope_parameters


@pytest.mark.parametrize(
    ("rope", "old"),
    [
        ({"rope_type": "default", "rope_theta": 3e4}, {"rope_theta": 3e4}),
        (
            {"rope_type": "default", "rope_theta": 3e4, "partial_rotary_factor": 0.5},
            {"rope_theta": 3e4, "partial_rotary_factor": 0.5},
        ),
        (
            {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6},
            {"rope_theta": 1e6, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        ),
        (
            {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            {"rope_theta": 1e6, "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_local_base_freq": 1e4},
        ),
    ],
    ids=["default", "partial", "yarn", "windows"],
)
def test_the_old_form_is_made_where_the_source_has_none(rope, old):
    assert in_both_forms({"rope_parameters": rope}, {}) == {"rope_parameters": rope} | old
    within = in_both_forms({"text_config": {"rope_parameters": rope}}, {"text_config": {"rotary_pct": 1.0}})
    assert within == {"text_config": {"rope_parameters": rope, "rotary_pct": 1.0} | old}


def test_a_model_without_rotary_positions_gets_none(tmp_path):
    save_folder(tmp_path / "source", gpt2())
    assert not [name for name in read(save_again(tmp_path / "source", tmp_path)) if "rope" in name]


def test_settings_that_transformers_drops_are_kept(source, tmp_path):
    write(source, rotary_emb_base=77, _name_or_path="elsewhere")
    settings = read(save_again(source, tmp_path))
    assert settings["rotary_emb_base"] == 77
    assert "_name_or_path" not in settings
    assert settings["transformers_version"] == AutoConfig.from_pretrained(source).to_dict()["transformers_version"]


def test_the_dtype_has_both_names(source, tmp_path):
    settings = read(save_again(source, tmp_path, dtype=torch.bfloat16))
    assert settings["dtype"] == settings["torch_dtype"] == "bfloat16"


def test_outputs_that_were_switched_off_are_as_they_came(source, tmp_path):
    write(source, output_hidden_states=True)
    assert read(save_again(source, tmp_path))["output_hidden_states"] is True


# --- generation_config.json -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [{}, {"num_beams": 1, "do_sample": False}])
def test_generation_settings_go_out_as_they_came(source, tmp_path, extra):
    """Flags of sampling without do_sample among them, which transformers may refuse to save."""
    flags = {"eos_token_id": [2, 5], "temperature": 0.9, "top_p": 0.6} | extra
    (source / "generation_config.json").write_text(json.dumps(flags))
    assert read(save_again(source, tmp_path), "generation_config.json") == flags


def test_transformers_may_refuse_generation_settings_and_the_model_is_saved(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise ValueError("GenerationConfig is invalid")

    model = llama()
    model.generation_config = GenerationConfig(temperature=0.9, eos_token_id=[2, 5])
    monkeypatch.setattr(
        GenerationConfig, "validate", lambda self, **_: refuse() if self.temperature is not None else None
    )
    save_policy(tmp_path / "m", model=model, adapted=None, tokenizer=make_tokenizer(), dtype=torch.float32)
    assert read(tmp_path / "m", "generation_config.json")["temperature"] == 0.9
    assert model.generation_config.eos_token_id == [2, 5]


# --- the tokenizer ----------------------------------------------------------------------------------------------------


def test_the_files_of_the_tokenizer_are_those_that_came(source, tmp_path):
    words = read(source, "tokenizer.json")
    (source / "tokenizer.json").write_text(json.dumps(words, indent=7))
    (source / "tokenizer.model").write_bytes(b"sentences")
    write(source, "tokenizer_config.json", of_its_own=5)
    final = save_again(source, tmp_path)
    for name in ("tokenizer.json", "tokenizer.model"):
        assert (final / name).read_bytes() == (source / name).read_bytes()
    assert read(final, "tokenizer_config.json") == read(source, "tokenizer_config.json")
    assert read(final, "special_tokens_map.json") == read(source, "special_tokens_map.json")


def test_a_tokenizer_that_cuts_and_pads_by_itself_stays_one(source, tmp_path):
    cut = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    write(source, "tokenizer.json", truncation=cut)
    assert read(save_again(source, tmp_path), "tokenizer.json")["truncation"] == cut


def test_names_that_only_transformers_5_knows_are_replaced(source, tmp_path):
    write(source, "tokenizer_config.json", tokenizer_class="TokenizersBackend", extra_special_tokens=["t7"])
    final = save_again(source, tmp_path)
    settings = read(final, "tokenizer_config.json")
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["additional_special_tokens"] == ["t7"]
    assert "extra_special_tokens" not in settings
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (source, final))
    assert after("t3 t9")["input_ids"] == before("t3 t9")["input_ids"] == [3, 9]
    assert set(after.all_special_tokens) == set(before.all_special_tokens) == {"t0", "t2", "t7"}


def test_a_pad_that_was_chosen_is_saved(source, tmp_path):
    write(source, "tokenizer_config.json", pad_token={"content": "t2", "__type": "AddedToken", "special": True})

    def choose(model, tokenizer):
        tokenizer.pad_token = "t9"

    final = save_again(source, tmp_path, choose)
    assert read(final, "tokenizer_config.json")["pad_token"] == "t9"
    assert read(final, "special_tokens_map.json")["pad_token"] == "t9"
    assert AutoTokenizer.from_pretrained(final).pad_token_id == 9


def test_named_templates_are_kept(source, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(source)
    templates = {"default": tokenizer.chat_template, "tool_use": "tools"}
    tokenizer.chat_template = templates
    tokenizer.save_pretrained(source)
    assert AutoTokenizer.from_pretrained(save_again(source, tmp_path)).chat_template == templates


# --- before training --------------------------------------------------------------------------------------------------


def test_what_could_not_be_saved_is_found_at_once(source, monkeypatch):
    config = ModelConfig(path=str(source))
    model, tokenizer = load_model(config), load_tokenizer(config)
    companions = Companions(model, tokenizer)
    companions.try_out(model, None, tokenizer)

    def refuse(*_, **__):
        raise ValueError("a setting\nof two lines")

    for owner in (type(model.config), type(tokenizer)):
        with monkeypatch.context() as patched:
            patched.setattr(owner, "save_pretrained", refuse)
            with pytest.raises(ModelError, match="could not be saved after training: ValueError: a setting;"):
                companions.try_out(model, None, tokenizer)


def test_the_source_may_go(source, tmp_path):
    config = ModelConfig(path=str(source))
    model, tokenizer = load_model(config), load_tokenizer(config)
    companions = Companions(model, tokenizer)
    source.rename(tmp_path / "gone")
    folder = tmp_path / "final"
    common = {"adapted": None, "tokenizer": tokenizer, "dtype": torch.float32}
    save_policy(folder, model=model, companions=companions, **common)
    assert read(folder)["rope_theta"] == 5e5
    assert read(folder, "tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"
