"""Which model, in which arithmetic, and whether whole or by adapters."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from llmrl.paths import UserPath

if TYPE_CHECKING:
    pass


HeadInit = Literal["zero", "normal"]


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Low-rank adapters in place of full fine-tuning. Hu et al. 2021, arXiv:2106.09685."""

    rank: int = 16
    """Rank of each update."""
    alpha: int = 32
    """The update is scaled by alpha / rank."""
    targets: tuple[str, ...] | Literal["all-linear"] = ()
    """Names of the layers that get an adapter; none named, or all-linear: every linear layer but the LM head."""

    def __post_init__(self) -> None:
        if "all-linear" in self.targets:
            object.__setattr__(self, "targets", ())
        if self.rank < 1:
            raise ValueError(f"model.lora.rank ({self.rank}) must be at least 1")
        if self.alpha <= 0:
            raise ValueError(f"model.lora.alpha ({self.alpha}) must be greater than 0")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model is trained, and in which arithmetic."""

    path: UserPath
    """A folder in the form of transformers, or a name on the Hugging Face hub. A folder with a peft adapter continues
    that adapter."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Arithmetic of forward passes and sampling; null: bfloat16 on a GPU, float32 on a CPU. Trained weights are always
    kept in float32."""
    lora: LoraSettings | None = None
    """Trains low-rank adapters and freezes the model; null trains every weight."""
    gradient_checkpointing: bool = False
    """Recomputes activations in the backward pass: less memory, about a third more time."""
    from_scratch: bool = False
    """Random weights in the shape of the folder's config.json, instead of the folder's weights."""
    trust_remote_code: bool = False
    """Allows a model folder to bring and run its own Python code."""
    made_by: str | None = None
    """Command that creates this folder; printed if it is missing."""
