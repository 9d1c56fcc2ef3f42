"""Which models the native engine can decode, and how long their sequences may be."""

import inspect
from typing import TYPE_CHECKING

from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class RolloutError(ValueError):
    """A rollout that the model or the engine cannot make, and what to do about it."""


PLAIN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)
FORWARD_ARGUMENTS = {"input_ids", "attention_mask", "position_ids", "past_key_values", "logits_to_keep"}


def check_cache(model: "PreTrainedModel") -> None:
    """Refuses models whose state is more than keys and values that attention finds by the distance of columns.

    Asks for the cache that transformers itself would build: recurrent, convolutional, indexed and shared layers have
    classes of their own there. Attention in chunks looks at absolute columns, which differ from token positions here.
    """
    config = model.config.get_text_config(decoder=True)
    missing = FORWARD_ARGUMENTS - set(inspect.signature(model.forward).parameters)
    if missing:
        reason = f"its forward takes no {', '.join(sorted(missing))}"
    elif any(type(layer) not in PLAIN_LAYERS for layer in DynamicCache(config=config).layers):
        reason = "its cache is more than plain keys and values"
    elif getattr(config, "attention_chunk_size", None) is not None:
        reason = "it attends in chunks by absolute position"
    else:
        return
    raise RolloutError(
        f"the native engine cannot decode models of type {config.model_type}: {reason}; set rollout.engine=transformers"
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
