"""Settings of the rollout."""

from dataclasses import dataclass
from typing import Annotated, Literal

from llmrl.section import Bound, Section


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(Section, place="rollout"):
    """How responses are drawn."""

    engine: Literal["native", "transformers"] = "native"
    """`native` decodes only unfinished rows; `transformers` calls `generate` and takes every model it knows."""
    prompts_per_iteration: Annotated[int, Bound(least=1)] = 16
    """Prompts per iteration, over all ranks."""
    temperature: Annotated[float, Bound(above=0, way_out="for the likeliest token evaluate greedily")] = 1.0
    """Divides the logits, in sampling and in every log-probability of the actor."""
    max_response_tokens: Annotated[int, Bound(least=1)] = 256
    """Length limit of a response, EOS included."""
    max_rows: Annotated[int, Bound(least=1)] = 64
    """Responses that the native engine decodes at once on one device. Changes memory and time, never the result."""
    graphs: Literal["auto", "off"] = "auto"
    """`auto` has the native engine decode by CUDA graphs on a GPU, for models that it can record. Never changes the
    result, beyond rounding."""
