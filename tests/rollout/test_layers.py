"""Layers of transformers' caches by version."""

import importlib

import pytest
import torch
from transformers import cache_utils

from llmrl.rollout import layers

ADDED_LATER = [name for name in layers.__all__ if not name.startswith("Dynamic")]


@pytest.fixture
def reloaded():
    yield lambda: importlib.reload(layers)
    importlib.reload(layers)


def test_the_classes_are_those_of_transformers():
    for name in layers.__all__:
        assert getattr(layers, name) is getattr(cache_utils, name)


@pytest.mark.parametrize("name", ADDED_LATER)
def test_a_version_without_a_class_has_no_layer_of_it(name, reloaded):
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(cache_utils, name)
        lacking = getattr(reloaded(), name)
    assert not isinstance(cache_utils.DynamicLayer(), lacking)


def test_states_in_another_form_are_not_taken_for_states_by_number(reloaded):
    class LinearAttentionLayer:
        def __init__(self):
            self.conv_states = torch.zeros(1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_utils, "LinearAttentionLayer", LinearAttentionLayer)
        assert not isinstance(LinearAttentionLayer(), reloaded().LinearAttentionLayer)
