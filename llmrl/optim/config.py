"""Settings of the optimizer."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW on float32 weights. Loshchilov and Hutter 2019, arXiv:1711.05101."""

    learning_rate: float = 1e-6
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After warm-up: constant, linear or cosine decay; the decay reaches 0 one step after the last."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up to the peak learning rate; the first step is already above 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; vectors (norms, biases) are not decayed."""
    beta1: float = 0.9
    """Decay of the running mean of gradients."""
    beta2: float = 0.999
    """Decay of the running mean of squared gradients."""
    max_grad_norm: float = 1.0
    """Clips the global gradient norm to this value."""

    def __post_init__(self) -> None:
        if self.learning_rate < 0 or not math.isfinite(self.learning_rate):
            raise ValueError(f"optimizer.learning_rate ({self.learning_rate}) must be 0 or greater")
        if self.warmup_steps < 0:
            raise ValueError(f"optimizer.warmup_steps ({self.warmup_steps}) must be 0 or greater")
        if not self.weight_decay >= 0:
            raise ValueError(f"optimizer.weight_decay ({self.weight_decay}) must be 0 or greater")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name} ({getattr(self, name)}) must be at least 0 and less than 1")
        if not self.max_grad_norm > 0:
            raise ValueError(
                f"optimizer.max_grad_norm ({self.max_grad_norm}) must be greater than 0; .inf turns clipping off"
            )
