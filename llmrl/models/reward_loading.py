"""Reward models from folders: whole, or as an adapter on the base of another model."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from llmrl.models.adapters import check_layers, layers_to_save, lora_config
from llmrl.models.config import HeadInit, ModelConfig
from llmrl.models.folders import ModelError, json_object, resolved, same_model
from llmrl.models.loading import load_pretrained, read_config, reading, refuse_weights
from llmrl.models.reward_model import score_layer
from llmrl.models.training import initialize_head, turn_dropout_off

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


PAD_NAMES = (
    "<pad>",
    "[PAD]",
    "<PAD>",
    "<|pad|>",
    "<|padding|>",
    "<|endoftext|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_0|>",
    "<unk>",
)
"""Tokens that can serve as padding where a vocabulary has them to spare."""


def load_reward_model(config: ModelConfig, *, head_init: HeadInit | None) -> "PreTrainedModel":
    """A sequence classification model with one label, in float32, its dropout off.

    Args:
        config: A folder or a hub name.
        head_init: Initial weights of a new head, for a causal language model. None: a folder without a head is
            refused. A sequence classification model that lacks its head is refused in either case.
    """
    from transformers import AutoModelForSequenceClassification

    settings = read_config(config)
    classifies = label_settings(config, settings)
    model, report = load_pretrained(config, AutoModelForSequenceClassification, settings, dtype=torch.float32)
    head = score_layer(model)
    new_head = head_init is not None and (config.from_scratch or not classifies)
    refuse_weights(config, model, report, has_score=not new_head)
    if config.from_scratch or "score.weight" in report["missing_keys"]:
        assert isinstance(head, nn.Linear)
        assert head_init is not None, "a folder without a head was refused"
        initialize_head(head, head_init)
    turn_dropout_off(model)
    return model


def label_settings(config: ModelConfig, settings: "PretrainedConfig") -> bool:
    """Whether these settings are those of a sequence classification model; if not, they get one label.

    Raises:
        ModelError: They have several labels.
    """
    classifies = any(name.endswith("ForSequenceClassification") for name in settings.architectures or [])
    if classifies and settings.num_labels != 1:
        raise ModelError(f"model.path ({config.path}) has {settings.num_labels} labels; a reward model has exactly one")
    if not classifies:
        settings.num_labels = 1
    return classifies


def check_shared_base(config: ModelConfig, actor: ModelConfig) -> None:
    """Refuses, before weights load, a reward model that is no adapter on the actor's base.

    Raises:
        ModelError: It was not trained by LoRA, or from another model.
    """
    settings = Path(resolved(config.path)) / "adapter" / "adapter_config.json"
    if not settings.is_file():
        raise ModelError(
            f"model.path ({config.path}) holds no adapter/, so it was not trained with model.lora and cannot stand on "
            "the actor's base; leave reward.model.on_actor_base out, or train it with model.lora"
        )
    trained_from = json_object(settings, config.path).get("base_model_name_or_path") or "a model without a name"
    if not same_model(trained_from, actor.path):
        raise ModelError(
            f"model.path ({config.path}) is an adapter on {trained_from}, and the actor's base is {actor.path}; leave "
            "reward.model.on_actor_base out, or train the reward model from the actor's own model"
        )


def load_reward_on_base(config: ModelConfig, base: "PreTrainedModel") -> "PreTrainedModel":
    """Reward model on the weights of a causal language model, which stay where they are: its adapter and its head.

    Args:
        config: A folder that passed `check_shared_base`.
        base: The causal language model, without adapters, which becomes part of what is returned.
    """
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    path = resolved(config.path)
    settings = read_config(config)
    with reading(config), torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(settings, trust_remote_code=config.trust_remote_code)
    setattr(model, model.base_model_prefix, base.base_model)
    score = score_layer(model).to_empty(device=base.device)  # peft keeps it beside the one that it reads and uses
    for p in score.parameters():
        torch.nn.init.zeros_(p)
    with reading(config):
        PeftModel.from_pretrained(model, str(Path(path) / "adapter"), torch_device=str(base.device))
    turn_dropout_off(model)
    return model


def adapt(model: "PreTrainedModel", config: ModelConfig) -> "PeftModel | None":
    """peft's view of the model with adapters injected in place, the head and layers that the settings name trained
    whole; None: no adapters."""
    if config.lora is None:
        return None
    from peft import get_peft_model

    check_layers(config.lora, model)
    whole = ["score", *layers_to_save(config.lora, model)]
    with reading(config):
        adapted = get_peft_model(model, lora_config(config.lora, model, task_type="SEQ_CLS", modules_to_save=whole))
    turn_dropout_off(model)
    return adapted  # type: ignore[return-value]


def choose_pad(tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel") -> bool:
    """Gives tokenizer and model a pad of their own where the vocabulary has one to spare.

    llmrl reads no pad, but plain transformers looks for the last id that is not pad.

    Returns:
        Whether pad and EOS now differ, so that plain transformers reads the score where llmrl does.
    """
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        vocabulary = tokenizer.get_vocab()
        taken = (tokenizer.eos_token, tokenizer.bos_token)
        free = [name for name in PAD_NAMES if name in vocabulary and name not in taken]
        if free or tokenizer.pad_token_id is None:
            tokenizer.pad_token = free[0] if free else tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    return tokenizer.pad_token_id != tokenizer.eos_token_id
