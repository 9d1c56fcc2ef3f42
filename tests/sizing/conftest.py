"""A model small enough to count by hand, and settings of every kind of run."""

import pytest
from transformers import LlamaConfig

from llmrl.sizing import ModelShape, shape_of


@pytest.fixture(scope="session")
def llama() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        vocab_size=32,
        tie_word_embeddings=False,
    )


@pytest.fixture(scope="session")
def shape(llama: LlamaConfig) -> ModelShape:
    return shape_of(llama)
