"""The arithmetic of models, where a recipe leaves it to the device."""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, TypeVar

import torch

from llmrl.config import AnyRun
from llmrl.distributed.device import pick_device
from llmrl.models.config import ModelConfig
from llmrl.models.loading import DTYPES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

R = TypeVar("R", bound=AnyRun)


def dtype_of(config: ModelConfig) -> torch.dtype:
    """Dtype that a model computes in: that of its settings, else the default of the device."""
    return DTYPES[config.dtype or default_dtype()]


def default_dtype() -> Literal["float32", "bfloat16"]:
    """bfloat16 on a GPU, where products in float32 are many times slower; float32 on a CPU."""
    return "bfloat16" if pick_device().type == "cuda" else "float32"


def with_dtypes(config: R) -> R:
    """The run with its dtype filled in, as it is recorded, printed and estimated."""
    return replace(config, model=replace(config.model, dtype=config.model.dtype or default_dtype()))


def precision_warnings(model: "PreTrainedModel", dtype: torch.dtype) -> Iterator[str]:
    """Yields warnings about arithmetic of a loaded model that is seldom meant."""
    shape = model.config.get_text_config()
    num_heads, num_keys = (getattr(shape, f"num_{name}_heads", None) for name in ("attention", "key_value"))
    if dtype == torch.float32 and model.device.type == "cuda" and num_keys not in (None, num_heads):
        yield (
            f"model.dtype float32 on a GPU: the {num_heads} attention heads of the model share {num_keys} keys, and in "
            "float32 torch has only a kernel for that which holds tokens x tokens numbers for each head; set "
            "model.dtype=bfloat16 if memory runs out"
        )
