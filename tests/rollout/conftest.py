"""Fixtures of the rollout tests: see `tiny` for the models."""

import pytest
import torch

from llmrl.rollout.native import NativeEngine
from llmrl.rollout.transformers import TransformersEngine

from .tiny import EOS, FAMILIES, VOCAB, Counter, build, make_prompts


@pytest.fixture(params=FAMILIES)
def any_model(request):
    return build(request.param)


@pytest.fixture
def model():
    return build("llama")


@pytest.fixture
def progress():
    return Counter()


@pytest.fixture
def native(progress):
    def make(model, *, max_rows=64, dtype=torch.float32, eos_ids=EOS, vocab_size=VOCAB):
        return NativeEngine(
            model, eos_ids=eos_ids, vocab_size=vocab_size, dtype=dtype, max_rows=max_rows, progress=progress
        )

    return make


@pytest.fixture
def generating(progress):
    def make(model, *, dtype=torch.float32):
        return TransformersEngine(model, eos_ids=EOS, vocab_size=VOCAB, dtype=dtype, progress=progress)

    return make


@pytest.fixture(params=["native", "generating"])
def any_engine(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def prompts():
    """Ragged, padded with the EOS, with an EOS inside."""
    return make_prompts([7, 8, 9, 2, 11, 12, 13, 14, 15], [20], [3, 4, 30, 31], [2, 2, 17], [33, 34, 6, 10, 16, 18])
