"""Ids of tokenizers beside the embeddings of models."""

from types import SimpleNamespace

import pytest
from transformers import GenerationConfig

from llmrl.models.config import ModelConfig
from llmrl.models.folders import ModelError
from llmrl.models.loading import load_model, load_tokenizer
from llmrl.models.vocabulary import check_ids, check_vocabulary, end_ids, num_token_ids

from .tiny import llama, make_tokenizer, save_folder


@pytest.mark.parametrize(
    ("of_tokenizer", "of_generation", "union"),
    [
        (2, GenerationConfig(eos_token_id=[5, 3]), (2, 3, 5)),
        (2, GenerationConfig(eos_token_id=2), (2,)),
        (2, GenerationConfig(eos_token_id=None), (2,)),
        (0, None, (0,)),
        (None, GenerationConfig(eos_token_id=7), (7,)),
    ],
)
def test_end_ids_are_the_union(of_tokenizer, of_generation, union):
    tokenizer, model = SimpleNamespace(eos_token_id=of_tokenizer), SimpleNamespace(generation_config=of_generation)
    assert end_ids(tokenizer, model) == union


def test_no_end_at_all():
    tokenizer, model = SimpleNamespace(eos_token_id=None), SimpleNamespace(generation_config=None)
    with pytest.raises(ModelError, match="end-of-sequence"):
        end_ids(tokenizer, model)


def test_end_ids_of_a_folder(tmp_path):
    model = llama()
    model.generation_config = GenerationConfig(eos_token_id=[5, 3])
    config = ModelConfig(path=save_folder(tmp_path, model))
    assert end_ids(load_tokenizer(config), load_model(config)) == (2, 3, 5)


def test_token_ids_are_those_that_both_tokenizer_and_head_know():
    tokenizer, model = make_tokenizer(), llama()
    assert num_token_ids(tokenizer, model) == 37  # t0 ... t36, fewer than the rows of the head
    tokenizer.add_tokens([f"extra{n}" for n in range(100)])
    assert num_token_ids(tokenizer, model) == model.config.vocab_size


def test_ordinary_tokens_without_an_embedding_are_refused():
    tokenizer, model = make_tokenizer(), llama()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<sound>", "<film>", "<smell>"]})
    check_vocabulary(ModelConfig(path="m"), model, tokenizer)  # ids 37 to 40, of 40 embeddings
    tokenizer.add_tokens(["plain"])
    with pytest.raises(ModelError, match=r"has 1 tokens, such as 'plain' \(id 41\), beyond the 40 embeddings"):
        check_vocabulary(ModelConfig(path="m"), model, tokenizer)


def test_an_eos_without_an_embedding_is_refused():
    tokenizer, model = make_tokenizer(), llama()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<sound>", "<film>"]})
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    with pytest.raises(ModelError, match=r"has 1 tokens, such as '<end>' \(id 40\), beyond the 40 embeddings"):
        check_vocabulary(ModelConfig(path="m"), model, tokenizer)


def test_data_with_a_token_without_an_embedding_is_refused():
    tokenizer, model = make_tokenizer(), llama()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<sound>", "<film>", "<smell>"]})
    check_ids("rows.jsonl", [[1, 39], []], model, tokenizer)
    with pytest.raises(ModelError, match=r"^rows\.jsonl has tokens beyond .*: '<smell>' \(id 40\); .*resize_token"):
        check_ids("rows.jsonl", [[1], [2, 40]], model, tokenizer)
