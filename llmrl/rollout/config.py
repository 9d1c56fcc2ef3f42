"""Settings of the rollout."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How responses are drawn."""

    engine: Literal["native", "transformers"] = "native"
    """`native` decodes only unfinished rows; `transformers` calls `generate` and takes every model it knows."""
    prompts_per_iteration: int = 16
    """Prompts per iteration, over all ranks."""
    temperature: float = 1.0
    """Divides the logits, in sampling and in every log-probability of the actor."""
    max_response_tokens: int = 256
    """Length limit of a response, EOS included."""
    max_rows: int = 64
    """Responses that the native engine decodes at once on one device. Changes memory and time, never the result."""

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise ValueError(
                f"rollout.temperature ({self.temperature}) must be a finite number greater than 0; "
                "for the likeliest token evaluate greedily"
            )
        for name in ("prompts_per_iteration", "max_response_tokens", "max_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"rollout.{name} ({getattr(self, name)}) must be at least 1")
