"""Linear layers whose weights are stored in 4 bits, by bitsandbytes: the base of QLoRA.

Dettmers et al. 2023, arXiv:2305.14314. Of each 64 weights w, m is the largest |w|, and w is stored as the nearest to
w / m of the 16 numbers of NormalFloat (NF4). The m are stored in 8 bits, with a float32 scale for each 256 of them
(double quantization): 0.127 bits a weight. A layer computes with the weights that these stand for.
"""

import copy
from typing import TYPE_CHECKING, Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import dequantize_4bit
from torch import Tensor, nn

from llmrl.distributed.device import pick_device

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class NF4Linear(bnb.nn.Linear4bit):
    """A layer that computes in the dtype in which a plain linear layer would: that of autocast, else of its input.

    That of bitsandbytes has a dtype of its own, casts its bias in place, and on some CPUs packs its weight anew in eval
    mode, through which there is no backward pass.
    """

    source_cls: type[nn.Module]
    """Class of the layer in the folder's model, set by transformers."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return bnb.matmul_4bit(x.to(dtype), self.weight.t(), bias=bias, quant_state=_state_of(self))


def loading_arguments(unquantized: list[str]) -> dict[str, Any]:
    """Arguments by which transformers quantizes layer by layer what it reads, on the device of this process.

    `unquantized`: names of the linear layers that stay as they are.
    """
    from transformers import BitsAndBytesConfig

    return {
        "device_map": {"": pick_device()},
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            llm_int8_skip_modules=unquantized,
        ),
    }


def settle(model: "PreTrainedModel") -> None:
    """Makes a model that transformers has quantized one whose layers follow autocast, and whose settings say nothing of
    it: what is saved is not quantized."""
    for layer in model.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            layer.__class__ = NF4Linear
            layer.quant_state = None  # the weight has it too; a copy of the modules would copy it
    model.hf_quantizer.remove_quantization_config(model)  # type: ignore[union-attr]
    mark(model, quantized=True)


@torch.no_grad()
def merged(adapted: "PeftModel", dtype: torch.dtype) -> "PreTrainedModel":
    """A copy of a model on a quantized base, its adapters merged, in plain layers on the CPU: to rounding, the function
    that was trained. Layer by layer, from the float32 weights that the 4 bits stand for, rounded once."""
    from peft.tuners.lora import Linear
    from peft.tuners.lora.bnb import Linear4bit

    stored = {id(p): p for p in adapted.parameters() if isinstance(p, bnb.nn.Params4bit)}
    copied = copy.deepcopy(adapted, stored)
    for name, layer in list(copied.named_modules()):
        if isinstance(layer, Linear4bit):
            quantized: Any = layer.base_layer
            layer.base_layer = dequantized(quantized)
            layer.__class__ = Linear  # type: ignore[assignment]
            layer.merge()
            copied.set_submodule(name, _as_in_folder(quantized, layer.base_layer).to("cpu", dtype))
    for name, layer in list(copied.named_modules()):
        if isinstance(layer, NF4Linear):
            copied.set_submodule(name, _as_in_folder(layer, dequantized(layer)).to("cpu", dtype))
    model: PreTrainedModel = copied.merge_and_unload()  # type: ignore[operator]
    mark(model, quantized=False)
    return model.to("cpu", dtype)  # type: ignore[arg-type]


def dequantized(layer: NF4Linear) -> nn.Linear:
    """A plain layer with the float32 weights that the 4 bits stand for."""
    plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    plain.weight = nn.Parameter(dequantize_4bit(layer.weight.data, _state_of(layer)).float())
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.detach().clone())
    return plain


def mark(model: "PreTrainedModel", *, quantized: bool) -> None:
    """Sets the attribute by which peft chooses its layers."""
    for each in (model, model.base_model):
        vars(each)["is_loaded_in_4bit"] = quantized


def _state_of(layer: NF4Linear) -> Any:
    """The scales of its weights."""
    return layer.weight.quant_state  # type: ignore[attr-defined]


def _as_in_folder(layer: NF4Linear, plain: nn.Linear) -> nn.Module:
    """The plain layer in the class that the model's code has for it."""
    from transformers.pytorch_utils import Conv1D

    if layer.source_cls is not Conv1D:
        return plain
    with torch.device("meta"):
        turned = Conv1D(plain.out_features, plain.in_features)
    turned.weight = nn.Parameter(plain.weight.T.contiguous())
    turned.bias = plain.bias
    return turned
