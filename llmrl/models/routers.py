"""Routers of mixtures of experts: the layers that choose which experts read a token."""

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def routers_of(model: "PreTrainedModel | nn.Module") -> list[str]:
    """Names of the linear layers that route tokens to experts: those in a `router`, and gates beside experts.

    Most families have routers of classes of their own, which no adapter fits; these are the linear ones.
    """
    from transformers.pytorch_utils import Conv1D

    linear = (name for name, layer in model.named_modules() if isinstance(layer, nn.Linear | Conv1D))
    return [name for name in linear if _routes(model, name)]


def _routes(model: nn.Module, name: str) -> bool:
    outer, _, own = name.rpartition(".")
    if "router" in name.split("."):
        return True
    others = (child for child, _ in model.get_submodule(outer).named_children() if child != own)
    return (own == "gate" or own.endswith("expert_gate")) and any("expert" in child for child in others)
