"""Settings of the optimizer."""

from dataclasses import dataclass
from typing import Annotated, Literal

from llmrl.section import Bound, Section


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section, place="optimizer"):
    """AdamW on float32 weights. Loshchilov and Hutter 2019, arXiv:1711.05101."""

    learning_rate: Annotated[float, Bound(least=0)] = 1e-6
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After warm-up: constant, linear or cosine decay; the decay reaches 0 one step after the last."""
    warmup_steps: Annotated[int, Bound(least=0)] = 0
    """Optimizer steps of linear warm-up to the peak learning rate; the first step is already above 0."""
    weight_decay: Annotated[float, Bound(least=0)] = 0.0
    """Decoupled weight decay of matrices; vectors (norms, biases) are not decayed."""
    betas: Annotated[tuple[float, ...], Bound(least=0, below=1)] = (0.9, 0.999)
    """Decay of the running means of gradients and of squared gradients."""
    max_grad_norm: Annotated[float, Bound(above=0, allows_infinity=True, way_out=".inf turns clipping off")] = 1.0
    """Clips the global gradient norm to this value."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.betas) != 2:
            raise ValueError(f"optimizer.betas ({list(self.betas)}) must be two numbers, such as [0.9, 0.999]")
