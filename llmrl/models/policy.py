"""Policies over any causal language model of transformers."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llmrl.batches import Sequences, TokenOutputs
from llmrl.models.experts import Experts
from llmrl.models.heads import Head
from llmrl.models.trunk import HiddenStates, computing_in, encode, on_mask

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PolicyModule(nn.Module):
    """Language model and head as the module that is wrapped and trained: its forward uses every parameter."""

    def __init__(self, model: "PreTrainedModel", head: Head, *, temperature: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.head = head
        self.temperature = temperature
        self.dtype = dtype
        self.experts: Experts | None = None
        """Routers that are watched in passes that learn; None: none are."""

    def forward(self, sequences: Sequences) -> dict[str, Tensor]:
        """`logprobs` and `entropy` (B, T) of the tokens in the response mask; 0 elsewhere. Where `experts` are watched,
        `balance` (B, T), the Switch loss of each token, `routed` (B, L, E), how often each response chose each expert,
        and `routes` (B, T, L), see `routing`. A dict, because wrappers that shard weights look for tensors in dicts and
        tuples only."""
        return self.read(self.encode(sequences), sequences)

    def encode(self, sequences: Sequences) -> HiddenStates:
        """Hidden states of sequences."""
        if self.experts is None or not torch.is_grad_enabled():
            return encode(self.model.base_model, sequences, dtype=self.dtype)
        with self.experts.watching() as routed:
            hidden = encode(self.model.base_model, sequences, dtype=self.dtype)
        hidden.routed = routed
        return hidden

    def read(self, hidden: HiddenStates, sequences: Sequences) -> dict[str, Tensor]:
        """Outputs from the hidden states."""
        mask = sequences.response_mask
        before, ids = hidden.before(mask), sequences.response_ids[mask]
        with computing_in(self.dtype, ids.device):
            logprobs, entropy = self.head(self.model, before, ids, self.temperature)
        outputs = {"logprobs": on_mask(mask, logprobs), "entropy": on_mask(mask, entropy)}
        if self.experts is None or not hidden.routed:
            return outputs
        balance, routed, chosen = self.experts.read(hidden.routed, hidden.tokens_before(mask), mask)
        routes = chosen.new_zeros(*mask.shape, chosen.shape[1])
        routes[mask] = chosen
        return outputs | {"balance": on_mask(mask, balance), "routed": routed, "routes": routes}


class TransformersPolicy:
    """`Policy` over a `PolicyModule`, wrapped or not: one forward pass over all sequences. `DistributedPolicy` forms
    the microbatches of a rollout."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def logprobs(self, sequences: Sequences) -> TokenOutputs:
        """See `Policy`."""
        return TokenOutputs(named=self.module(sequences))
