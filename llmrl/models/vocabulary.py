"""Ids of a tokenizer beside the embeddings of a model: how many, which end a response, which the model lacks."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from llmrl.models.config import ModelConfig
from llmrl.models.folders import (
    ModelError,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


RESIZE = "give them embeddings with model.resize_token_embeddings(len(tokenizer)) and save the model, or leave them out"


def num_token_ids(tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel") -> int:
    """Ids that the tokenizer can decode and the model has logits for: what lies beyond is padding of the embedding."""
    return min(max(tokenizer.get_vocab().values()) + 1, model.get_output_embeddings().weight.shape[0])  # type: ignore[union-attr]


def check_vocabulary(config: ModelConfig, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuses a tokenizer with tokens that have no embedding, except special ones: those of Gemma 3 1B name an image.

    Raises:
        ModelError: An ordinary text could have such a token, or it is the EOS, which ends every response.
    """
    num_rows, added, eos = _num_embeddings(model), tokenizer.added_tokens_decoder, tokenizer.eos_token_id
    beyond = {
        id: token
        for token, id in tokenizer.get_vocab().items()
        if id >= num_rows and (id == eos or not (id in added and added[id].special))
    }
    if beyond:
        raise ModelError(
            f"model.path ({config.path}): its tokenizer has {len(beyond)} tokens, such as {beyond[min(beyond)]!r} "
            f"(id {min(beyond)}), beyond the {num_rows} embeddings of the model; {RESIZE}"
        )


def check_ids(
    path: str, texts: Iterable[Sequence[int]], model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase"
) -> None:
    """Refuses data with a token that has no embedding.

    Raises:
        ModelError: `path` has one; the tokenizer has more tokens than the model.
    """
    num_rows = _num_embeddings(model)
    if max(tokenizer.get_vocab().values()) < num_rows:
        return
    beyond = sorted({id for ids in texts for id in ids if id >= num_rows})
    if beyond:
        names = ", ".join(f"{tokenizer.convert_ids_to_tokens(id)!r} (id {id})" for id in beyond[:5])
        raise ModelError(f"{path} has tokens beyond the {num_rows} embeddings of the model: {names}; {RESIZE}")


def _num_embeddings(model: "PreTrainedModel") -> int:
    embedding = model.get_input_embeddings()
    embedding = getattr(embedding, "base_layer", embedding)  # below an adapter
    embedding = getattr(embedding, "original_module", embedding)  # of which a copy is trained whole
    assert isinstance(embedding, nn.Embedding)
    return embedding.num_embeddings  # its weight may be split over ranks


def end_ids(tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel") -> tuple[int, ...]:
    """The ids that end a response: those of the tokenizer and of the model's generation config together."""
    ids = set(_as_ids(tokenizer.eos_token_id))
    if model.generation_config is not None:
        ids |= set(_as_ids(model.generation_config.eos_token_id))
    if not ids:
        raise ModelError(
            "neither the tokenizer nor the generation config names an end-of-sequence token; set one in the folder"
        )
    return tuple(sorted(ids))


def _as_ids(value: Any) -> Iterator[int]:
    """Yields the ids of one id, a list of ids or None."""
    match value:
        case int():
            yield value
        case list():
            yield from value
