"""A policy over any causal language model of transformers.

Prompts arrive padded left and responses right, as `Sequences` has them. Inside, each row is moved to the left margin,
prompt and response without a gap, so that padding stands only behind the last token. Causal attention never looks
there: no mask is needed, positions count from 0, and models with rotary or absolute positions or a sliding window see
what they saw in training.

The shift from logits to labels exists here and nowhere else: the hidden state *before* response token t predicts it.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from llmrl.experience import Sequences, by_token_budget
from llmrl.models.heads import Head

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PolicyModule(nn.Module):
    """The module that is wrapped and trained: every parameter is touched inside its forward."""

    def __init__(self, model: "PreTrainedModel", head: Head, *, temperature: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.head = head
        self.temperature = temperature
        self.dtype = dtype

    def forward(self, sequences: Sequences) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
        """``(logprobs, entropy)`` of the tokens in the response mask; 0 elsewhere."""
        ids, response_start = to_left_margin(sequences)
        mask = sequences.response_mask
        row, token = mask.nonzero(as_tuple=True)
        mixed = self.dtype != torch.float32
        with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=mixed):
            hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            before = hidden[row, response_start[row] + token - 1]
            chosen, chosen_entropy = self.head(self.model, before, sequences.response_ids[mask], self.temperature)
        logprobs = torch.zeros(mask.shape, device=ids.device).masked_scatter(mask, chosen.float())
        entropy = torch.zeros(mask.shape, device=ids.device).masked_scatter(mask, chosen_entropy.float())
        return logprobs, entropy


class TransformersPolicy:
    """`Policy` over a `PolicyModule`, wrapped or not.

    Without gradient it forms its own microbatches, so that a whole rollout can be handed in; with gradient the caller
    decides, because the activations stay until the backward pass.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        microbatch_tokens: int,
        context: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self.module = module
        self.microbatch_tokens = microbatch_tokens
        self.context = context
        """Entered around every forward: how one base model with adapters plays the reference."""

    def logprobs(self, sequences: Sequences) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
        with self.context():
            if torch.is_grad_enabled():
                return self.module(sequences)
            return self._in_microbatches(sequences)

    def _in_microbatches(self, sequences: Sequences) -> tuple[Tensor, Tensor]:
        logprobs = torch.zeros(sequences.response_mask.shape, device=sequences.response_ids.device)
        entropy = torch.zeros_like(logprobs)
        for index in by_token_budget(sequences.num_tokens, self.microbatch_tokens):
            logprobs[index], entropy[index] = self.module(sequences.select(index))
        return logprobs, entropy


def to_left_margin(sequences: Sequences) -> tuple[Int[Tensor, "B S"], Int[Tensor, " B"]]:
    """Each row's prompt and response side by side from column 0 on, and the column where its response starts.

    Columns behind the last token hold id 0, which exists in every vocabulary and which nothing reads.
    """
    ids = torch.cat([sequences.prompt_ids, sequences.response_ids], dim=1)
    mask = torch.cat([sequences.prompt_mask, _attended(sequences)], dim=1)
    lengths = mask.sum(dim=1)
    columns = torch.arange(int(lengths.max()), device=ids.device)
    filled = columns < lengths[:, None]
    packed = torch.zeros(filled.shape, dtype=ids.dtype, device=ids.device).masked_scatter(filled, ids[mask])
    return packed, sequences.prompt_mask.sum(dim=1)


def _attended(sequences: Sequences) -> Bool[Tensor, "B T"]:
    columns = torch.arange(sequences.response_ids.shape[1], device=sequences.response_ids.device)
    return columns < sequences.response_lengths[:, None]
