"""A policy over any causal language model of transformers.

Prompts arrive padded left and responses right, as `Sequences` has them. Inside, each row is moved to the left margin,
prompt and response without a gap, so that padding stands only behind the last token. Causal attention never looks
there: no mask is needed, positions count from 0, and models with rotary or absolute positions or a sliding window see
what they saw in training.

The shift from logits to labels exists here and nowhere else: the hidden state *before* response token t predicts it.
"""

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from llmrl.batches import Sequences, TokenOutputs
from llmrl.microbatches import in_microbatches
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

    def forward(self, sequences: Sequences) -> dict[str, Tensor]:
        """`logprobs` and `entropy` (B, T) of the tokens in the response mask; 0 elsewhere. A dict, because wrappers
        that shard weights look for tensors in dicts and tuples only."""
        ids, response_start = to_left_margin(sequences)
        return self.read(self.hidden(ids), sequences, response_start)

    def hidden(self, ids: Int[Tensor, "B S"]) -> Float[Tensor, "B S H"]:
        """The last hidden states of rows at the left margin."""
        with computing_in(self.dtype, ids.device):
            return last_hidden_states(self.model.base_model, ids)

    def read(
        self, hidden: Float[Tensor, "B S H"], sequences: Sequences, response_start: Int[Tensor, " B"]
    ) -> dict[str, Tensor]:
        """Outputs from the last hidden states."""
        mask = sequences.response_mask
        row, token = mask.nonzero(as_tuple=True)
        before = hidden[row, response_start[row] + token - 1]
        with computing_in(self.dtype, hidden.device):
            chosen, chosen_entropy = self.head(self.model, before, sequences.response_ids[mask], self.temperature)
        logprobs = torch.zeros(mask.shape, device=hidden.device).masked_scatter(mask, chosen.float())
        entropy = torch.zeros(mask.shape, device=hidden.device).masked_scatter(mask, chosen_entropy.float())
        return {"logprobs": logprobs, "entropy": entropy}


class TransformersPolicy:
    """`Policy` over a `PolicyModule`, wrapped or not.

    Without gradient it forms its own microbatches, so that a whole rollout can be handed in; with gradient the caller
    decides, because the activations stay until the backward pass.
    """

    def __init__(self, module: nn.Module, *, microbatch_tokens: int) -> None:
        self.module = module
        self.microbatch_tokens = microbatch_tokens

    def logprobs(self, sequences: Sequences) -> TokenOutputs:
        """See `Policy`."""
        return outputs_of(self.module, sequences, self.microbatch_tokens)


def outputs_of(module: nn.Module, sequences: Sequences, microbatch_tokens: int) -> TokenOutputs:
    """Outputs of a module: in one pass with gradient, in microbatches without."""

    def ask(part: Sequences) -> TokenOutputs:
        return TokenOutputs(named=module(part))

    if torch.is_grad_enabled():
        return ask(sequences)
    return in_microbatches(ask, sequences, sequences.num_tokens, microbatch_tokens)


def last_hidden_states(trunk: Any, ids: Int[Tensor, "B S"], **context: Tensor) -> Float[Tensor, "B S H"]:
    """Last hidden states of rows at the left margin; for no rows, which transformers cannot reshape, without a pass.

    `context` is what attention is told beyond the ids.
    """
    if not len(ids):
        return torch.zeros(*ids.shape, trunk.config.get_text_config().hidden_size, device=ids.device)
    return trunk(input_ids=ids, use_cache=False, **context).last_hidden_state


def computing_in(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """Autocast to bfloat16, or nothing. Its cache is off: a pass reads each weight once, and the cache would keep a
    copy of every one of them to its end."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype != torch.float32, cache_enabled=False)


def to_left_margin(sequences: Sequences) -> tuple[Int[Tensor, "B S"], Int[Tensor, " B"]]:
    """Each row's prompt and response side by side from column 0 on, and the column where its response starts.

    Columns behind the last token hold id 0, which exists in every vocabulary and which nothing reads.
    """
    ids = torch.cat([sequences.prompt_ids, sequences.response_ids], dim=1)
    mask = torch.cat([sequences.prompt_mask, attended(sequences)], dim=1)
    lengths = mask.sum(dim=1)
    columns = torch.arange(int(lengths.max()) if len(lengths) else 1, device=ids.device)
    filled = columns < lengths[:, None]
    packed = torch.zeros(filled.shape, dtype=ids.dtype, device=ids.device).masked_scatter(filled, ids[mask])
    return packed, sequences.prompt_mask.sum(dim=1)


def attended(sequences: Sequences) -> Bool[Tensor, "B T"]:
    """True on every response token, tool output included."""
    columns = torch.arange(sequences.response_ids.shape[1], device=sequences.response_ids.device)
    return columns < sequences.response_lengths[:, None]
