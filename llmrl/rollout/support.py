"""Which models the native engine can decode, and how long their sequences may be."""

import inspect
from functools import cache as cached
from typing import TYPE_CHECKING

from transformers.cache_utils import DynamicCache

from llmrl.errors import Error
from llmrl.rollout.layers import (
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


class RolloutError(Error, ValueError):
    """A rollout that the model or the engine cannot make, and what to do about it."""


LAYERS = (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    DummyLayer,
)
"""Kinds of layers of a cache that `SlotCache` holds."""
KEEPS_ITS_OWN = (None, "store")
"""Modes of a layer, in configs of transformers, that does not read the keys and values of another."""
ARGUMENTS = {"input_ids", "past_key_values", "attention_mask", "position_ids", "logits_to_keep"}
ARGUMENTS_WITHOUT_ATTENTION = {"input_ids", "cache_params", "logits_to_keep"}


def check_cache(model: "PreTrainedModel") -> None:
    """Refuses models that keep something else than keys and values, found by the distance of columns, and states of
    fixed size.

    Asks for the cache that transformers itself would build: indexed and compressed layers have classes of their own
    there. Attention in chunks looks at absolute columns, which differ from token positions here.
    """
    config = model.config.get_text_config(decoder=True)
    arguments = ARGUMENTS if reads_by_position(type(model)) else ARGUMENTS_WITHOUT_ATTENTION
    missing = arguments - _arguments(type(model))
    if missing:
        raise refusal(model, f"its forward takes no {', '.join(sorted(missing))}")
    if any(type(layer) not in LAYERS for layer in DynamicCache(config=config).layers):
        raise refusal(model, "its cache is more than keys and values and states of fixed size")
    if any(mode not in KEEPS_ITS_OWN for mode in getattr(config, "kv_sharing_modes", None) or ()):
        raise refusal(model, "its layers share keys and values")
    if getattr(config, "attention_chunk_size", None) is not None:
        raise refusal(model, "it attends in chunks by absolute position")


def carries_states(config: "PreTrainedConfig") -> bool:
    """Whether a layer carries the state of a convolution or recurrence along the row. Then a token that is masked
    leaves a trace all the same."""
    return any(isinstance(layer, LinearAttentionLayer) for layer in DynamicCache(config=config).layers)


def reads_by_position(kind: "type[PreTrainedModel]") -> bool:
    """Whether models of a class take a mask and positions beside their cache; those without attention do not."""
    return "cache_params" not in _arguments(kind)


@cached
def _arguments(kind: "type[PreTrainedModel]") -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)


def refusal(model: "PreTrainedModel", reason: str) -> RolloutError:
    """The error that the native engine cannot decode this model, and the way out."""
    return RolloutError(
        f"the native engine cannot decode models of type {model.config.get_text_config(decoder=True).model_type}: "
        f"{reason}; set rollout.engine=transformers"
    )


def check_length(
    model: "PreTrainedModel", prompt_tokens: int, max_response_tokens: int, *, whose: str = "the model"
) -> None:
    """Refuses sequences longer than a table of absolute positions; `whose` it is, the error says."""
    limit = position_limit(model)
    if limit is not None and prompt_tokens + max_response_tokens > limit:
        raise RolloutError(
            f"rollout.max_response_tokens ({max_response_tokens}) with a prompt of {prompt_tokens} tokens exceeds the "
            f"{limit} positions of {whose}; try at most {limit - prompt_tokens}, or shorter prompts"
        )


def position_limit(model: "PreTrainedModel") -> int | None:
    """Length of the table of absolute positions; None for a model without one. Rotary models extrapolate."""
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "rope_parameters", None) is not None:
        return None
    return getattr(config, "max_position_embeddings", None)
