"""Heads: from hidden states to log-probabilities, without ever holding a (tokens x vocabulary) tensor."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmrl.functional.logprobs import entropy, linear_token_logprobs, token_logprobs
from llmrl.models.folders import ModelError
from llmrl.models.probe import exact_float32, probe_rows
from llmrl.models.trunk import last_hidden_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK_TOKENS = 256
PROBE_TOLERANCE = 1e-3
PROBE_LOGITS = 30.0


@runtime_checkable
class Head(Protocol):
    """``(logprobs, entropy)`` of chosen ids from the trunk's last hidden states."""

    def __call__(
        self, model: "PreTrainedModel", hidden: Float[Tensor, "M H"], ids: Int[Tensor, " M"], temperature: float
    ) -> tuple[Float[Tensor, " M"], Float[Tensor, " M"]]: ...


class LinearHead:
    """`Head` whose logits are ``hidden @ weight.T + bias``. Ids beyond the tokenizer's get no probability."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def __call__(self, model, hidden, ids, temperature):
        linear = model.get_output_embeddings()
        bias = None if linear.bias is None else linear.bias[: self.vocab_size]
        weight = linear.weight[: self.vocab_size]
        return linear_token_logprobs(hidden, weight, ids, temperature=temperature, bias=bias, chunk_tokens=CHUNK_TOKENS)


class OwnHead:
    """`Head` by the model's own forward on a few hidden states at a time: soft caps, scales and adapters included."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def __call__(self, model, hidden, ids, temperature):
        parts = [
            checkpoint(self._chunk, model, some_hidden, some_ids, temperature, use_reentrant=False)
            for some_hidden, some_ids in zip(hidden.split(CHUNK_TOKENS), ids.split(CHUNK_TOKENS), strict=True)
        ]
        logprobs, entropies = zip(*parts, strict=True)  # type: ignore[arg-type]
        return torch.cat(logprobs), torch.cat(entropies)

    def _chunk(self, model, hidden, ids, temperature):
        with trunk_replaced(model):
            logits = model(inputs_embeds=hidden[None], use_cache=False).logits[..., : self.vocab_size].float()
        return (
            token_logprobs(logits, ids[None], temperature=temperature)[0],
            entropy(logits, temperature=temperature)[0],
        )


class IdentityTrunk(nn.Module):
    """Replaces the trunk: returns its input embeddings as the last hidden states."""

    def forward(self, *_: object, inputs_embeds: Tensor, **__: object) -> "TrunkOutput":
        return TrunkOutput(inputs_embeds)


class TrunkOutput:
    """The last hidden states, by name or as entry 0; None for whatever else the output of a trunk may hold."""

    def __init__(self, last_hidden_state: Tensor) -> None:
        self.last_hidden_state = last_hidden_state

    def __getitem__(self, index: int | slice):
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


@contextmanager
def trunk_replaced(model: "PreTrainedModel") -> Iterator[None]:
    """Replaces the trunk temporarily, so that the model's forward is its head alone."""
    trunk = getattr(model, model.base_model_prefix)
    setattr(model, model.base_model_prefix, IdentityTrunk())
    try:
        yield
    finally:
        setattr(model, model.base_model_prefix, trunk)


@contextmanager
def input_scaled(module: nn.Module, factor: float | Tensor) -> Iterator[None]:
    """Temporarily scales the input of a module by `factor`."""
    handle = module.register_forward_pre_hook(lambda _, args: (args[0] * factor, *args[1:]))
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
@exact_float32()
def choose_head(model: "PreTrainedModel", vocab_size: int) -> Head:
    """The head whose log-probabilities are the model's own, found by trying them on a probe.

    Raises:
        ModelError: No head agrees with the model's logits.
    """
    ids = probe_rows(model, vocab_size)
    labels = ids.roll(-1, dims=1)
    hidden = last_hidden_states(model.base_model, ids).flatten(0, 1)
    logits = model(input_ids=ids, use_cache=False).logits
    output_layer = model.get_output_embeddings()
    assert output_layer is not None, "a causal language model has an output layer"
    for head, factor in _candidates(model, vocab_size, loud=PROBE_LOGITS / logits.float().abs().max()):
        with input_scaled(output_layer, factor):
            logits = model(input_ids=ids, use_cache=False).logits[..., :vocab_size].float()
        expected = token_logprobs(logits, labels)
        try:
            logprobs, _ = head(model, hidden * factor, labels.flatten(), 1.0)
        except (AttributeError, TypeError) as error:
            raise _refusal(model) from error
        if torch.allclose(logprobs.view_as(expected), expected, atol=PROBE_TOLERANCE, rtol=0.0):
            return head
    raise _refusal(model)


def _candidates(model: "PreTrainedModel", vocab_size: int, *, loud: Tensor) -> Iterator[tuple[Head, float | Tensor]]:
    """Yields heads, and the factor on the hidden states at which each is tried.

    The linear one is tried at logits as large as training may make them: at those of random weights no soft cap shows.
    """
    output_layer = model.get_output_embeddings()
    inner = getattr(output_layer, "original_module", output_layer)  # peft wraps a layer that is trained whole
    if type(inner) is nn.Linear:
        yield LinearHead(vocab_size), loud
    yield OwnHead(vocab_size), 1.0


def _refusal(model: "PreTrainedModel") -> ModelError:
    return ModelError(
        f"{type(model).__name__} ({model.config.model_type}) does something between its last hidden states and its "
        "logits that cannot be repeated in chunks; choose another model"
    )
