"""Low-rank adapters of peft on a causal language model."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from llmrl.batches import Sequences, TokenOutputs
from llmrl.models.config import LoraSettings, ModelConfig
from llmrl.models.folders import (
    ModelError,
    base_of_adapter,
    is_adapter,
    resolved,
)
from llmrl.models.loading import load_model, reading
from llmrl.models.routers import routers_of
from llmrl.models.training import turn_dropout_off
from llmrl.roles import Policy

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

REFERENCE = "reference"
"""Name of a frozen adapter that is the reference."""


@contextmanager
def naming_adapter(config: ModelConfig) -> Iterator[None]:
    """Context in which an error about the base of an adapter names the adapter."""
    try:
        yield
    except ModelError as error:
        raise ModelError(
            f"model.path ({config.path}) is an adapter whose base cannot be used: {error}; the base is "
            "base_model_name_or_path in adapter_config.json"
        ) from error


def load_adapted(config: ModelConfig, *, moving_reference: bool = False) -> "tuple[PreTrainedModel, PeftModel | None]":
    """The model to be trained, in float32, and peft's view of it if adapters are trained.

    The reference of an adapted model is the model as loaded. A new adapter changes nothing yet, so that is the model
    with the adapter off; for an adapter that came with the folder, or where the reference will move, it is a frozen
    copy, under the name ``reference``.
    """
    from peft import PeftModel, get_peft_model

    if is_adapter(config.path):
        base = base_of_adapter(config)
        with naming_adapter(config):
            model = load_model(base)
        path, device = resolved(config.path), str(model.device)  # peft would read by way of any accelerator it finds
        with reading(config):
            adapted = PeftModel.from_pretrained(model, path, is_trainable=True, torch_device=device)
            adapted.load_adapter(path, adapter_name=REFERENCE, is_trainable=False, torch_device=device)
            adapted.set_adapter("default")  # in peft 0.18 the frozen one has frozen this one too
        adapted.peft_config["default"].base_model_name_or_path = resolved(base.path)
    elif config.lora is not None:
        model = load_model(config)
        check_layers(config.lora, model)
        with reading(config):
            whole = layers_to_save(config.lora, model)
            settings = lora_config(config.lora, model, task_type="CAUSAL_LM", modules_to_save=whole)
            adapted = get_peft_model(model, copy.deepcopy(settings))  # peft writes the found layers into its own
            if moving_reference:
                _add_reference(adapted, settings)
    else:
        return load_model(config), None
    refuse_tied(model)
    turn_dropout_off(model)
    return model, adapted  # type: ignore[return-value]


def _add_reference(adapted: "PeftModel", config: "LoraConfig") -> None:
    """Adds a frozen copy of the new adapter."""
    adapted.add_adapter(REFERENCE, config)
    weights = dict(adapted.named_parameters())
    with torch.no_grad():
        for name, source in reference_names(adapted).items():
            weights[name].requires_grad_(False).copy_(weights[source])


def reference_names(module: nn.Module) -> dict[str, str]:
    """Names of the weights of the frozen adapter in a module, each with that of its trained counterpart."""
    names = [name for name, _ in module.named_parameters() if f".{REFERENCE}." in f"{name}."]
    return {name: f"{name}.".replace(f".{REFERENCE}.", ".default.")[:-1] for name in names}


def check_layers(lora: LoraSettings, model: "PreTrainedModel") -> None:
    """Refuses names of layers that a model lacks, or that cannot have an adapter.

    Raises:
        ModelError: `lora.targets` or `lora.modules_to_save` has such a name.
    """
    from transformers.pytorch_utils import Conv1D

    layers = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Embedding | Conv1D)]
    for setting, names, those, what, otherwise in (
        ("targets", lora.targets, layers, "can have an adapter", "every linear layer"),
        ("modules_to_save", lora.modules_to_save, _with_weights(model), "has weights of its own", "adapters alone"),
    ):
        if unknown := [x for x in names if not any(_is_named(layer, x) for layer in those)]:
            there = sorted({layer.rpartition(".")[2] for layer in those})
            raise ModelError(
                f"model.lora.{setting} ({', '.join(unknown)}) names no layer of a {type(model).__name__} that {what}; "
                f"there are {', '.join(there)}; name some of them, or leave it out for {otherwise}"
            )


def layers_to_save(lora: LoraSettings, model: "PreTrainedModel") -> list[str]:
    """Full names of the layers in `lora.modules_to_save`. peft compares the ends of names, where "norm" is the end of
    "input_layernorm" too."""
    return [layer for layer in _with_weights(model) if any(_is_named(layer, x) for x in lora.modules_to_save)]


def _with_weights(model: nn.Module) -> list[str]:
    return [name for name, layer in model.named_modules() if next(layer.parameters(recurse=False), None) is not None]


def _is_named(layer: str, name: str) -> bool:
    return f".{layer}".endswith(f".{name}")


def lora_config(
    settings: LoraSettings, model: "PreTrainedModel", *, task_type: str, modules_to_save: list[str] | None = None
) -> "LoraConfig":
    """peft's settings of an adapter on a model, made from ours."""
    from peft import LoraConfig

    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        target_modules=list(settings.targets) or "all-linear",
        exclude_modules=None if settings.targets else routers_of(model) or None,
        modules_to_save=modules_to_save or None,
        task_type=task_type,
    )  # type: ignore[arg-type]


def base_of(adapted: "PeftModel") -> "PreTrainedModel":
    """A copy of the modules of an adapted model without its adapters, sharing the frozen weights.

    Another adapter injected there leaves this one alone, and the weights are in memory once. So several roles on one
    base need not switch adapters, which would have to be switched back before each backward pass.
    """
    from peft.utils import ModulesToSaveWrapper

    view = copy.deepcopy(adapted, {id(x): x for x in (*adapted.parameters(), *adapted.buffers())})
    for name, layer in list(view.named_modules()):
        if isinstance(layer, ModulesToSaveWrapper):  # of which `unload` would keep the trained copy
            view.set_submodule(name, layer.original_module)
    return view.unload()  # type: ignore[operator]


def refuse_tied(model: "PreTrainedModel") -> None:
    """Refuses adapters on tied embeddings, which cannot be saved: merged into one layer, they would change the other.

    Raises:
        ModelError: An adapter, or a whole copy that is trained beside it, is on one of them.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    if model.config.tie_word_embeddings and any(isinstance(x, BaseTunerLayer | ModulesToSaveWrapper) for x in layers):
        raise ModelError(
            f"{type(model).__name__} has one matrix for its input and its output embedding, which an adapter on either "
            "would pull apart; leave both out of model.lora.targets and model.lora.modules_to_save, or out of "
            "target_modules and modules_to_save of an adapter that is continued"
        )


@contextmanager
def as_reference(adapted: "PeftModel") -> Iterator[None]:
    """Temporarily makes an adapted model the reference: the model as it was loaded.

    Switching back restores `requires_grad`, which peft takes from adapters that are not active.
    """
    if REFERENCE not in adapted.peft_config:
        with adapted.disable_adapter():
            yield
        return
    adapted.set_adapter(REFERENCE)
    try:
        yield
    finally:
        adapted.set_adapter("default")


class AdapterReference:
    """`Policy` of the reference that LoRA makes free: the actor as it was loaded, its adapter temporarily off."""

    def __init__(self, actor: Policy, adapted: "PeftModel") -> None:
        self.actor = actor
        self.adapted = adapted

    def logprobs(self, sequences: Sequences) -> TokenOutputs:
        """See `Policy`."""
        with as_reference(self.adapted):
            return self.actor.logprobs(sequences)
