"""Quantized bases: which layers `model.quantization` stores in 4 bits, and what it cannot go with."""

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from llmrl.files import read_object
from llmrl.hub import is_local
from llmrl.models.config import ModelConfig
from llmrl.models.folders import ModelError, is_adapter
from llmrl.models.routers import routers_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


BLOCK = 64
"""Weights that share a scale. bitsandbytes 0.50 reads wrong ones on a CPU where a block goes on in the next row."""


def quantized_layers(model: "PreTrainedModel") -> list[str]:
    """Names of the layers that a quantized base stores in 4 bits: the linear ones below its heads, except routers and
    those whose inputs are no multiple of `BLOCK`."""
    below_heads, routers = set(model.base_model.modules()), routers_of(model)
    return [
        name
        for name, layer in _linear(model).items()
        if layer in below_heads and name not in routers and num_inputs(layer) % BLOCK == 0
    ]


def num_inputs(layer: nn.Module) -> int:
    """Inputs of a linear layer, of torch or, as GPT-2 has them, of transformers."""
    return layer.in_features if isinstance(layer, nn.Linear) else layer.nx  # type: ignore[return-value]


def unquantized_layers(model: "PreTrainedModel") -> list[str]:
    """Names of the other linear layers."""
    quantized = quantized_layers(model)
    return [name for name in _linear(model) if name not in quantized]


def _linear(model: "PreTrainedModel") -> dict[str, nn.Module]:
    from transformers.pytorch_utils import Conv1D

    return {name: layer for name, layer in model.named_modules() if type(layer) in (nn.Linear, Conv1D)}


def check_quantization(config: ModelConfig) -> None:
    """Refuses, before any weights load, a quantized base that could not be loaded or trained on.

    Raises:
        ModelError: bitsandbytes is missing, no adapter is trained, the weights are random, or an adapter that was
            trained on 4 bits is merged into them.
    """
    if config.quantization is None:
        return
    setting = f"model.quantization ({config.quantization})"
    try:
        version("bitsandbytes")
    except PackageNotFoundError:
        raise ModelError(
            f'{setting} needs bitsandbytes, which is not installed: pip install "llmrl[quantized]", or leave it out'
        ) from None
    if _was_quantized(config.path):
        raise ModelError(
            f"{setting} would round away what model.path ({config.path}) has learned: a run on 4 bits has merged its "
            "adapter into these weights; set model.quantization=null, or, of a language model, name its adapter, "
            f"{Path(config.path) / 'adapter'}, with model.lora=null"
        )
    if config.lora is None and not (is_local(config.path) and is_adapter(config.path)):
        raise ModelError(
            f"{setting} stores weights in 4 bits, in which they cannot be trained, and there is no model.lora; set "
            "model.lora.rank=16, or leave model.quantization out"
        )
    if config.from_scratch:
        raise ModelError(
            f"{setting} is for weights that are read, and model.from_scratch draws random ones; leave one of them out"
        )


def _was_quantized(path: str) -> bool:
    """Whether a folder is the model that a run on a quantized base has left. An adapter is no such model."""
    run = Path(path).expanduser().absolute().parent
    match is_local(path) and read_object(run / "config.json"):
        case {"settings": {"model": {"quantization": str()}}}:
            return True
    return False


def check_quantized_layers(config: ModelConfig, model: "PreTrainedModel", whole: Iterable[str]) -> None:
    """Refuses a model without a layer that could be stored in 4 bits, and layers there that are to be trained whole.

    Args:
        config: The model.
        model: It, before its weights are quantized.
        whole: Full names of the layers that are trained whole.

    Raises:
        ModelError: With the names of such layers.
    """
    if config.quantization is None:
        return
    quantized = quantized_layers(model)
    if not quantized:
        raise ModelError(
            f"model.quantization ({config.quantization}) finds nothing to quantize in model.path ({config.path}): no "
            f"linear layer below the head with a multiple of {BLOCK} inputs; leave it out"
        )
    if both := sorted(set(whole) & set(quantized)):
        whose, way_out = "model.lora.modules_to_save", "leave them out, so that they get adapters, or "
        if config.lora is None:
            whose, way_out = f"model.path ({config.path}) is an adapter whose modules_to_save", ""
        raise ModelError(
            f"{whose} ({', '.join(both)}) cannot be trained whole where model.quantization ({config.quantization}) "
            f"stores them in 4 bits; {way_out}leave model.quantization out"
        )
