"""Kinds of layers of transformers' caches. Versions before 5.23 lack some: what none of their models has."""

import inspect

from transformers import cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

__all__ = [
    "DummyLayer",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
    "LinearAttentionLayer",
]


def known(name: str) -> type:
    """The class of that name; one that no layer has where the version lacks it, or keeps states in another form than by
    number."""
    found = getattr(cache_utils, name, None)
    if found is None or (name.startswith("Linear") and "number_of_states" not in inspect.signature(found).parameters):
        return type(name, (), {})
    return found


DummyLayer = known("DummyLayer")
LinearAttentionLayer = known("LinearAttentionLayer")
LinearAttentionAndFullAttentionLayer = known("LinearAttentionAndFullAttentionLayer")
LinearAttentionAndSlidingWindowAttentionLayer = known("LinearAttentionAndSlidingWindowAttentionLayer")
