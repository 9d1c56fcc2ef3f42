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
    from transformers.cache_utils import Cache


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
CACHE_ARGUMENTS = ("cache", "past_key_values", "cache_params")
"""Names of the argument of a forward that takes the cache. transformers has one for all models from 5.24 on."""


def check_cache(kind: "type[PreTrainedModel]", config: "PreTrainedConfig") -> None:
    """Refuses models that keep something else than keys and values, found by the distance of columns, and states of
    fixed size.

    Asks for the cache that transformers itself would build: indexed and compressed layers have classes of their own
    there. Attention in chunks looks at absolute columns, which differ from token positions here.

    Args:
        kind: Class of the model.
        config: Its settings.

    Raises:
        RolloutError: With the reason.
    """
    config = config.get_text_config(decoder=True)
    if cache_argument(kind) is None:
        raise refusal(config, f"its forward takes no cache ({' or '.join(CACHE_ARGUMENTS)})")
    layers = DynamicCache(config=config).layers
    needed = {"input_ids", "logits_to_keep"}
    if not all(type(layer) is LinearAttentionLayer for layer in layers):
        needed |= {"attention_mask", "position_ids"}
    if missing := needed - _arguments(kind):
        raise refusal(config, f"its forward takes no {', '.join(sorted(missing))}")
    if any(type(layer) not in LAYERS for layer in layers):
        raise refusal(config, "its cache is more than keys and values and states of fixed size")
    if any(mode not in KEEPS_ITS_OWN for mode in getattr(config, "kv_sharing_modes", None) or ()):
        raise refusal(config, "its layers share keys and values")
    if getattr(config, "attention_chunk_size", None) is not None:
        raise refusal(config, "it attends in chunks by absolute position")


def carries_states(config: "PreTrainedConfig") -> bool:
    """Whether a layer carries the state of a convolution or recurrence along the row. Then a token that is masked
    leaves a trace all the same."""
    return any(isinstance(layer, LinearAttentionLayer) for layer in DynamicCache(config=config).layers)


def reads_by_position(kind: "type[PreTrainedModel]") -> bool:
    """Whether models of a class take a mask and positions beside their cache; those without attention do not."""
    return "position_ids" in _arguments(kind)


def cache_argument(kind: "type[PreTrainedModel]") -> str | None:
    """Name of the argument by which models of a class take their cache; None where they take none."""
    return next((name for name in CACHE_ARGUMENTS if name in _arguments(kind)), None)


def with_cache(model: "PreTrainedModel", cache: "Cache") -> "dict[str, Cache]":
    """The cache as an argument of the model's forward, of a class that `check_cache` lets pass."""
    name = cache_argument(type(model))
    assert name is not None, "check_cache refuses a forward without one"
    return {name: cache}


@cached
def _arguments(kind: "type[PreTrainedModel]") -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)


def refusal(config: "PreTrainedConfig", reason: str) -> RolloutError:
    """The error that the native engine cannot decode models of these settings, and the way out."""
    return RolloutError(
        f"the native engine cannot decode models of type {config.get_text_config(decoder=True).model_type}: "
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
