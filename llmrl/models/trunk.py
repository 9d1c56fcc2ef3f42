"""The one pass through the trunk: where policy, critic and reward model get their hidden states.

Prompts arrive padded left and responses right, as `Sequences` has them. Where the model's attention allows it, the pass
is over one packed row: every prompt once, every response once, no padding (`packing`). Otherwise each prompt and its
response are moved to the left margin of a row without a gap, so that padding stands only after the last token. Causal
attention never looks there: no mask is needed. In both, positions count from 0 at the start of the prompt, so models
with rotary or absolute positions see what they saw in training.

How rows are laid out is known here and nowhere else. Callers ask for the state before a response token, which predicts
it, or at the last token. A response that goes on in a new context is read as several (`Contexts`), each for itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llmrl.batches import Contexts, Sequences
from llmrl.models.experts import Routed
from llmrl.models.packing import Packing, Runs, packs


class HiddenStates:
    """Last hidden states of a batch, found by response and token.

    B counts responses, the rows of `Sequences`.
    """

    def __init__(self, states: Float[Tensor, "R S H"], layout: "Layout", contexts: Contexts | None = None) -> None:
        """`contexts`: what the layout has in place of the responses."""
        self._states = states
        self._layout = layout
        self._contexts = contexts
        self.routed: Routed = []
        """What routers said in the pass, where somebody watched them."""

    def before(self, mask: Bool[Tensor, "B T"]) -> Float[Tensor, "M H"]:
        """The state before each response token in the mask, in reading order."""
        return self._states[self._places_before(mask)]

    def tokens_before(self, mask: Bool[Tensor, "B T"]) -> Int[Tensor, " M"]:
        """Where those states stand among all tokens of the pass, row after row."""
        row, column = self._places_before(mask)
        return row * self._states.shape[1] + column

    def last(self) -> Float[Tensor, "B H"]:
        """The state at the last token of each response, tool output included."""
        lengths = self._layout.lengths
        response = torch.arange(len(lengths), device=lengths.device) if self._contexts is None else self._contexts.last
        return self._states[self._place(response, lengths[response])]

    def _places_before(self, mask: Bool[Tensor, "B T"]) -> tuple[Tensor, Tensor]:
        """Row and column of the state before each response token in the mask."""
        response, token = mask.nonzero(as_tuple=True)
        if self._contexts is not None:
            response, token = self._contexts.find(response, token)
        return self._place(response, token)

    def _place(self, response: Int[Tensor, " M"], token: Int[Tensor, " M"]) -> tuple[Tensor, Tensor]:
        """Row and column of the state before these tokens of these responses."""
        layout = self._layout
        column = torch.where(token > 0, layout.start[response] + token, layout.prompt_end[response]) - 1
        return layout.row[response], column


def encode(trunk: Any, sequences: Sequences, *, dtype: torch.dtype) -> HiddenStates:
    """Hidden states of sequences: packed if the trunk `packs`, otherwise in a row each.

    Args:
        trunk: Base model of transformers, without its head.
        dtype: Arithmetic of the pass.
    """
    device = sequences.response_ids.device
    packed = len(sequences.response_ids) > 0 and packs(trunk, dtype, device)
    contexts = None if sequences.restarts is None else Contexts.of(sequences)
    read = sequences if contexts is None else contexts.sequences
    layout = packed_row(read) if packed else rows_of_sequences(read)
    with computing_in(dtype, device):
        states = last_hidden_states(trunk, layout.ids, **layout.context)
        return HiddenStates(states, layout, contexts)


def last_hidden_states(trunk: Any, ids: Int[Tensor, "R S"], **context: Any) -> Float[Tensor, "R S H"]:
    """Last hidden states of rows at the left margin; for no rows, which transformers cannot reshape, without a pass.

    `context`: see `Layout`.
    """
    if not len(ids):
        return torch.zeros(*ids.shape, trunk.config.get_text_config().hidden_size, device=ids.device)
    return trunk(input_ids=ids, use_cache=False, **context).last_hidden_state


def computing_in(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """Autocast to bfloat16, or nothing. Its cache is off: a pass reads each weight once, and the cache would keep a
    copy of every one of them to its end."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype != torch.float32, cache_enabled=False)


def on_mask(mask: Bool[Tensor, "B T"], chosen: Float[Tensor, " M"]) -> Float[Tensor, "B T"]:
    """Numbers of the tokens in the mask, given in reading order, as (B, T) in float32; 0 elsewhere."""
    return torch.zeros(mask.shape, device=chosen.device).masked_scatter(mask, chosen.float())


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Rows as the trunk reads them, and where each response stands in them."""

    ids: Int[Tensor, "R S"]
    """Columns after the last token hold id 0, which exists in every vocabulary and which nothing reads."""
    row: Int[Tensor, " B"]
    prompt_end: Int[Tensor, " B"]
    """Column after the last token of the prompt."""
    start: Int[Tensor, " B"]
    """Column of the first token of the response."""
    lengths: Int[Tensor, " B"]
    """Tokens of the response."""
    context: Mapping[str, Any]
    """Further inputs of the trunk: attention mask, position ids, packing; none for plain causal attention."""


def packed_row(sequences: Sequences) -> Layout:
    """Every prompt once, then every response, in one row, as `packing` describes."""
    mask, prompt_of_row, lengths = sequences.unique_prompt_mask, sequences.prompt_of_row, sequences.response_lengths
    prompt_lengths, by_prompt = mask.sum(dim=1), prompt_of_row.argsort(stable=True)
    prompts, prompt_ends = prompt_lengths.tolist(), prompt_lengths.cumsum(0)
    num_prompt_tokens = sum(prompts)
    starts = torch.empty_like(lengths)
    starts[by_prompt] = num_prompt_tokens + lengths[by_prompt].cumsum(0) - lengths[by_prompt]
    read = _attended(sequences)[by_prompt]
    columns = torch.arange(read.shape[1], device=read.device)
    positions = (sequences.prompt_lengths[:, None] + columns)[by_prompt]
    own = [*prompts, *lengths[by_prompt].tolist()]
    of_prompts = torch.zeros_like(prompt_lengths).index_add(0, prompt_of_row, lengths)
    return Layout(
        ids=torch.cat([sequences.unique_prompt_ids[mask], sequences.response_ids[by_prompt][read]])[None],
        row=torch.zeros_like(lengths),
        prompt_end=prompt_ends[prompt_of_row],
        start=starts,
        lengths=lengths,
        context={
            "attention_mask": read.new_ones(1, 1, 1, 1),  # four axes: transformers passes it on as it is
            "position_ids": torch.cat([(mask.cumsum(dim=1) - 1)[mask], positions[read]])[None],
            "packing": Packing(
                num_prompt_tokens=num_prompt_tokens,
                own=Runs.of(own, own, read.device),
                prefixes=Runs.of(of_prompts.tolist(), prompts, read.device),
            ),
        },
    )


def rows_of_sequences(sequences: Sequences) -> Layout:
    """Each prompt and its response side by side."""
    ids = at_left_margin((sequences.prompt_ids, sequences.prompt_mask), (sequences.response_ids, _attended(sequences)))
    prompts = sequences.prompt_lengths
    return Layout(
        ids=ids,
        row=torch.arange(len(ids), device=ids.device),
        prompt_end=prompts,
        start=prompts,
        lengths=sequences.response_lengths,
        context={},
    )


def at_left_margin(*parts: tuple[Int[Tensor, "R _"], Bool[Tensor, "R _"]]) -> Int[Tensor, "R S"]:
    """The tokens in the masks of all parts side by side from column 0 on; 0 after them."""
    ids, mask = (torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True))
    lengths = mask.sum(dim=1)
    columns = torch.arange(int(lengths.max()) if len(lengths) else 1, device=ids.device)
    filled = columns < lengths[:, None]
    return torch.zeros_like(filled, dtype=ids.dtype).masked_scatter(filled, ids[mask])


def _attended(sequences: Sequences) -> Bool[Tensor, "B T"]:
    """True on every response token, tool output included."""
    columns = torch.arange(sequences.response_ids.shape[1], device=sequences.response_ids.device)
    return columns < sequences.response_lengths[:, None]
