"""Reward models from folders: heads that are new, kept or refused, adapters, and a pad of their own."""

import json
import logging
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import nn
from torch.testing import assert_close
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import get_verbosity

from llmrl.models.checking import check_model, check_reward_model
from llmrl.models.config import LoraSettings, ModelConfig
from llmrl.models.folders import ModelError
from llmrl.models.reward_loading import adapt, choose_pad, load_reward_model
from llmrl.models.reward_model import score_layer
from llmrl.models.reward_record import Normalization, saved_normalization
from llmrl.models.saving import save_policy
from tests.models.rewards import alone, move, pairs, reward_model, scorer_of, sequences
from tests.rollout.tiny import SIZES

from .tiny import gpt2, llama, make_tokenizer, save_folder


@pytest.fixture
def causal(tmp_path) -> str:
    """The folder of a causal language model, which has no head."""
    torch.manual_seed(0)
    return save_folder(tmp_path / "causal", llama())


def test_a_new_head_of_zeros(causal):
    model = load_reward_model(ModelConfig(path=causal), head_init="zero")
    assert not score_layer(model).weight.any()
    assert not scorer_of(model).scores(sequences()).any()


def test_a_new_normal_head_has_variance_1_over_hidden_size_plus_1(tmp_path):
    """arXiv:2009.01325, appendix B."""
    wide = llama(hidden_size=1023, num_attention_heads=1, num_key_value_heads=1, num_hidden_layers=1)
    path = save_folder(tmp_path, wide)
    torch.manual_seed(3)
    weight = score_layer(load_reward_model(ModelConfig(path=path), head_init="normal")).weight
    assert weight.shape == (1, 1023)
    assert weight.var().item() == pytest.approx(1 / 1024, rel=5 * (2 / 1023) ** 0.5)
    assert abs(weight.mean().item()) < 5 * 1 / 32 / 1023**0.5


@pytest.mark.parametrize("from_scratch", [False, True])
def test_what_is_random_comes_from_the_seed(causal, from_scratch):
    weights = []
    for _ in range(2):
        torch.manual_seed(3)
        model = load_reward_model(ModelConfig(path=causal, from_scratch=from_scratch), head_init="normal")
        weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
    assert all(torch.equal(x, weights[1][name]) for name, x in weights[0].items())
    trained = load_file(Path(causal) / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(weights[0]["model.embed_tokens.weight"], trained) != from_scratch


@pytest.mark.parametrize("head_init", ["zero", "normal", None])
def test_a_head_that_is_there_is_kept(head_init, tmp_path):
    model = reward_model("llama")
    path = save_folder(tmp_path, model)
    loaded = load_reward_model(ModelConfig(path=path), head_init=head_init)
    assert torch.equal(loaded.score.weight, model.score.weight)


def test_weights_are_float32_and_dropout_is_off(tmp_path):
    torch.manual_seed(0)
    path = save_folder(tmp_path, gpt2().bfloat16())
    model = load_reward_model(ModelConfig(path=path), head_init="normal").train()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert max(module.p for module in model.modules() if isinstance(module, nn.Dropout)) == 0.0


def refusal(call, *args, **settings) -> str:
    with pytest.raises(ModelError) as error:
        call(*args, **settings)
    return str(error.value)


def test_a_missing_head_is_refused(causal):
    config = ModelConfig(path=causal)
    assert "such as score.weight, are missing" in refusal(load_reward_model, config, head_init=None)
    message = refusal(check_reward_model, config, needs_head=True)
    assert message.startswith(f"model.path ({causal}) has no score head; train one with `llmrl reward-model`")
    check_reward_model(config, needs_head=False)


@pytest.fixture
def table():
    """What transformers says of a load."""
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("transformers").addHandler(handler)
    yield records
    logging.getLogger("transformers").removeHandler(handler)


def test_a_new_head_is_no_news(causal, table):
    verbosity = get_verbosity()
    load_reward_model(ModelConfig(path=causal), head_init="normal")
    assert table == []
    assert get_verbosity() == verbosity
    AutoModelForSequenceClassification.from_pretrained(causal)  # which would say it
    assert table


def drop(weights):
    del weights["model.norm.weight"]


def bend(weights):
    weights["model.norm.weight"] = weights["model.norm.weight"][:-1].clone()


def add_to_trunk(weights):
    weights["model.norm.bias"] = torch.zeros(3)


def add_to_head(weights):
    weights["score.bias"] = torch.zeros(1)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (drop, "model.norm.weight, are missing for a LlamaForSequenceClassification and would be random"),
        (bend, "model.norm.weight, are of another shape than its config.json says"),
        (add_to_trunk, "model.norm.bias, are not those of a LlamaForSequenceClassification"),
        (add_to_head, "score.bias, are not those of a LlamaForSequenceClassification"),
    ],
)
def test_weights_that_do_not_fit_are_refused_whatever_becomes_of_the_head(causal, table, change, told):
    file = Path(causal) / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})
    message = refusal(load_reward_model, ModelConfig(path=causal), head_init="normal")
    assert message == f"model.path ({causal}): 1 weights, such as {told}; choose a model that is complete"
    assert table == []


@pytest.mark.parametrize("name", ["transformer.h.0.attn.masked_bias", "transformer.h.0.attn.attention.bias"])
def test_causal_masks_of_old_folders_are_left_out(tmp_path, name):
    path = save_folder(tmp_path, gpt2())
    file = Path(path) / "model.safetensors"
    save_file({**load_file(file), name: torch.zeros(3)}, file, metadata={"format": "pt"})
    load_reward_model(ModelConfig(path=path), head_init="normal")


@pytest.mark.parametrize("head_init", ["normal", None])
def test_a_classifier_that_lost_its_head_is_refused(tmp_path, head_init):
    path = save_folder(tmp_path, reward_model("llama"))
    file = Path(path) / "model.safetensors"
    weights = load_file(file)
    del weights["score.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    assert refusal(load_reward_model, ModelConfig(path=path), head_init=head_init) == (
        f"model.path ({path}): 1 weights, such as score.weight, are missing for a LlamaForSequenceClassification and "
        "would be random; choose a model that is complete"
    )
    load_reward_model(ModelConfig(path=path, from_scratch=True), head_init="normal")


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_broken_config_is_named(tmp_path, text):
    path = save_folder(tmp_path, reward_model("llama"))
    (tmp_path / "config.json").write_text(text)
    told = f"model.path ({path}) has a config.json that is no JSON object; save the model again"
    assert refusal(check_reward_model, ModelConfig(path=path), needs_head=True) == told
    assert refusal(check_model, ModelConfig(path=path)) == told


def test_one_label_by_its_number(tmp_path):
    path = save_folder(tmp_path, reward_model("llama"))
    settings = json.loads((tmp_path / "config.json").read_text())
    settings = {name: value for name, value in settings.items() if name not in ("id2label", "label2id")}
    (tmp_path / "config.json").write_text(json.dumps({**settings, "num_labels": 1}))
    check_reward_model(ModelConfig(path=path), needs_head=True)
    assert load_reward_model(ModelConfig(path=path), head_init=None).config.num_labels == 1


def test_heads_of_other_kinds_are_left_out(causal):
    file = Path(causal) / "model.safetensors"
    save_file({**load_file(file), "v_head.summary.weight": torch.zeros(3)}, file, metadata={"format": "pt"})
    load_reward_model(ModelConfig(path=causal), head_init="normal")


@pytest.mark.parametrize("num_labels", [2, 3])
def test_several_labels_are_refused(num_labels, tmp_path):
    model = LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=num_labels))
    config = ModelConfig(path=save_folder(tmp_path, model))
    sentence = f"model.path ({config.path}) has {num_labels} labels; a reward model has exactly one"
    for needs_head in (True, False):
        assert refusal(check_reward_model, config, needs_head=needs_head) == sentence
    for head_init in (None, "normal"):  # a model of the hub is not checked before
        assert refusal(load_reward_model, config, head_init=head_init) == sentence


def test_a_folder_with_one_label_and_a_hub_name_pass(tmp_path):
    path = save_folder(tmp_path, reward_model("llama"))
    for name in (path, "nobody/such-a-model"):
        check_reward_model(ModelConfig(path=name), needs_head=True)


def test_an_adapter_is_refused(causal, tmp_path):
    """Before anything loads: the folder that it lies in holds the merged model."""
    config = ModelConfig(path=causal, lora=LoraSettings(rank=2))
    adapted = adapt(load_reward_model(config, head_init="normal"), config)
    adapted.save_pretrained(str(tmp_path / "final" / "adapter"))
    path = str(tmp_path / "final" / "adapter")
    for needs_head in (True, False):
        message = refusal(check_reward_model, ModelConfig(path=path), needs_head=needs_head)
        assert message.startswith(f"model.path ({path}) is a peft adapter")


def test_a_model_that_reads_its_score_in_another_way_is_refused(tmp_path):
    config = BertConfig(
        vocab_size=40, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_labels=1
    )
    path = save_folder(tmp_path, BertForSequenceClassification(config))
    message = refusal(load_reward_model, ModelConfig(path=path), head_init="normal")
    assert message.startswith("BertForSequenceClassification (bert) has no linear layer `score` to one number")


def test_a_head_with_several_outputs_is_none():
    assert "has no linear layer `score` to one number" in refusal(
        score_layer, LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=2))
    )


@pytest.fixture(params=[(), ("embed_tokens", "norm")], ids=["head", "layers"])
def whole(request):
    """Layers that are trained whole, beside the head."""
    return request.param


@pytest.fixture
def adapted(causal, whole):
    """``(model, adapted)`` in the middle of training."""
    torch.manual_seed(0)
    config = ModelConfig(path=causal, lora=LoraSettings(rank=2, modules_to_save=whole))
    assert check_reward_model(config, needs_head=False) == []
    model = load_reward_model(config, head_init="zero")
    adapted = adapt(model, config)
    move(adapted)
    return model, adapted


def test_without_lora_there_are_no_adapters(causal):
    config = ModelConfig(path=causal)
    model = load_reward_model(config, head_init="zero")
    assert adapt(model, config) is None
    assert all(p.requires_grad for p in model.parameters())


def test_adapters_and_the_head_learn_and_nothing_else(adapted, whole):
    model, _ = adapted
    assert score_layer(model) is model.score
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in learning if "lora_" not in name} == {
        f"{layer}.modules_to_save.default.weight" for layer in ("score", *(f"model.{name}" for name in whole))
    }
    assert any("lora_A" in name for name in learning)
    scorer = scorer_of(model, packed=True)
    torch.cat(scorer.pair_scores(pairs())).sum().backward()
    assert all((p.grad is not None) == (name in learning) for name, p in model.named_parameters())
    assert model.score.modules_to_save["default"].weight.grad.any()


def test_the_merged_folder_and_the_adapter_score_alike(adapted, causal, tmp_path):
    model, view = adapted
    ours = scorer_of(model).scores(sequences())
    assert ours.any()
    Normalization(mean=0.5, std=2.0).write(model.config)
    save_policy(tmp_path / "final", model=model, adapted=view, tokenizer=make_tokenizer(), dtype=torch.float32)

    merged = load_reward_model(ModelConfig(path=str(tmp_path / "final")), head_init=None)
    assert isinstance(merged.score, nn.Linear)
    assert saved_normalization(merged.config) == Normalization(mean=0.5, std=2.0)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "final")
    base = AutoModelForSequenceClassification.from_pretrained(causal, num_labels=1)
    beside = PeftModel.from_pretrained(base, str(tmp_path / "final" / "adapter")).get_base_model()
    beside.score = beside.score.modules_to_save["default"]
    with torch.no_grad():
        for other in (merged, plain, beside):
            assert_close(alone(other), ours, rtol=1e-4, atol=1e-4)
    assert torch.equal(scorer_of(model).scores(sequences()), ours)  # saving changed nothing


@pytest.mark.parametrize(
    ("words", "pad", "chosen", "differs"),
    [
        (["<eos>", "<mine>"], "<mine>", "<mine>", True),  # has one of its own
        (["<eos>", "<mine>", "<pad>"], "<mine>", "<mine>", True),
        (["<eos>", "<unk>", "<pad>"], "<eos>", "<pad>", True),
        (["<eos>", "<unk>", "<pad>"], None, "<pad>", True),
        (["<eos>", "<unk>"], "<eos>", "<unk>", True),
        (["<eos>", "<|endoftext|>"], "<eos>", "<eos>", False),  # which begins every text
        (["<eos>", "<|padding|>"], None, "<|padding|>", True),
        (["<eos>", "<PAD>"], "<eos>", "<PAD>", True),
        (["<eos>", "<|reserved_special_token_0|>"], "<eos>", "<|reserved_special_token_0|>", True),
        (["<eos>"], "<eos>", "<eos>", False),
        (["<eos>"], None, "<eos>", False),
    ],
)
def test_a_pad_of_its_own_where_the_vocabulary_has_one_to_spare(words, pad, chosen, differs):
    vocabulary = {word: n for n, word in enumerate(["word", "<|endoftext|>", *words])}
    if "<|endoftext|>" not in words:
        del vocabulary["<|endoftext|>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="word")),
        eos_token="<eos>",
        bos_token="<|endoftext|>" if "<|endoftext|>" in words else None,
        pad_token=pad,
    )
    size = len(tokenizer)
    model = reward_model("llama")
    assert choose_pad(tokenizer, model) == differs
    assert tokenizer.pad_token == chosen
    assert model.config.pad_token_id == vocabulary[chosen]
    assert len(tokenizer) == size  # no id that the model has no embedding for
