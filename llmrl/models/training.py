"""Preparation of a loaded model: dropout and noise off, device, dtype of linear layers, a new head."""

import math
from types import MethodType
from typing import TYPE_CHECKING

import torch
from torch import nn

from llmrl.models.config import HeadInit

if TYPE_CHECKING:
    from transformers import PreTrainedModel


NOISES = ("jitter_noise", "input_jitter_noise", "moe_jitter_eps")
"""Attributes of mixtures of experts: spread of the random factors on hidden states in train mode."""


SAMPLING_ROUTER = "router_jitter_noise"
"""Attribute of the router of Phi-MoE, which draws experts in train mode. Eval mode reads the number too: it stays."""


def initialize_head(head: nn.Linear, init: HeadInit) -> None:
    """Initializes a head with one output: zeros, or normal with variance 1 / (hidden size + 1)."""
    with torch.no_grad():
        head.weight.zero_() if init == "zero" else head.weight.normal_(std=1 / math.sqrt(head.in_features + 1))


def ready_to_train(model: "PreTrainedModel", device: torch.device, *, gradient_checkpointing: bool) -> None:
    """Moves a model to the device and sets train mode, which gradient checkpointing needs."""
    model.to(device).train()  # type: ignore[arg-type]
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def turn_dropout_off(model: nn.Module) -> None:
    """Sets every dropout probability and every noise to 0, so that train mode, which gradient checkpointing needs, is
    deterministic."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or name in NOISES):
                setattr(module, name, 0.0)
        if hasattr(module, SAMPLING_ROUTER):
            module.train = MethodType(_stay_in_eval_mode, module)
            module.eval()


def _stay_in_eval_mode(module: nn.Module, mode: bool = True) -> nn.Module:
    """Replaces `train` of a router that draws experts at random in train mode."""
    return nn.Module.train(module, False)


def shrink_linear_layers(model: "PreTrainedModel", dtype: torch.dtype, *, head: nn.Module | None) -> None:
    """Casts the linear layers to the dtype to which autocast would cast them in every forward: the same numbers in less
    memory. Everything else stays in float32, as under autocast, and so does the head."""
    from transformers.pytorch_utils import Conv1D

    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not head:
            module.to(dtype)
