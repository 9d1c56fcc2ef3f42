"""The one pass through the trunk: where policy, critic and reward model get their hidden states.

Prompts arrive padded left and responses right, as `Sequences` has them. Here each row is moved to the left margin,
prompt and response without a gap, so that padding stands only after the last token. Causal attention never looks
there: no mask is needed, positions count from 0, and models with rotary or absolute positions or a sliding window see
what they saw in training. The two responses of a pair may share a row, and with it their prompt.

How rows are laid out is known here and nowhere else. Callers ask for the state before a response token, which predicts
it, or at the last token.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llmrl.batches import PreferencePairs, Sequences, pad_columns
from llmrl.models.packing import PACKED, Packing, Runs


class HiddenStates:
    """Last hidden states of a batch, found by response and token.

    B counts responses: one for each row of `Sequences`, two for each of `PreferencePairs`, chosen and rejected in turn.
    """

    def __init__(self, states: Float[Tensor, "R S H"], layout: "Layout") -> None:
        self._states = states
        self._layout = layout

    def before(self, mask: Bool[Tensor, "B T"]) -> Float[Tensor, "M H"]:
        """The state before each response token in the mask, in reading order."""
        return self._before(*mask.nonzero(as_tuple=True))

    def last(self) -> Float[Tensor, "B H"]:
        """The state at the last token of each response, tool output included."""
        lengths = self._layout.lengths
        return self._before(torch.arange(len(lengths), device=lengths.device), lengths)

    def _before(self, response: Int[Tensor, " M"], token: Int[Tensor, " M"]) -> Float[Tensor, "M H"]:
        layout = self._layout
        column = torch.where(token > 0, layout.start[response] + token, layout.prompt_end[response]) - 1
        return self._states[layout.row[response], column]


def encode(trunk: Any, batch: Sequences | PreferencePairs, *, dtype: torch.dtype) -> HiddenStates:
    """Hidden states of sequences, a row each, or of pairs, a row each with their prompt once.

    Args:
        trunk: Base model of transformers, without its head.
        dtype: Arithmetic of the pass.
    """
    layout = layout_for(trunk, batch)
    with computing_in(dtype, layout.ids.device):
        return HiddenStates(last_hidden_states(trunk, layout.ids, **layout.context), layout)


def last_hidden_states(trunk: Any, ids: Int[Tensor, "R S"], **context: Any) -> Float[Tensor, "R S H"]:
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


def on_mask(mask: Bool[Tensor, "B T"], chosen: Float[Tensor, " M"]) -> Float[Tensor, "B T"]:
    """One number for each token in the mask, in reading order, put in its place; 0 elsewhere. In float32."""
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
    """What attention is told beyond the ids."""


def layout_for(trunk: Any, batch: Sequences | PreferencePairs) -> Layout:
    """The layout of a batch for this trunk: packed, if its attention was set so and no window cuts a sequence."""
    if trunk.config.get_text_config()._attn_implementation == PACKED:
        return packed_row(batch)
    return rows_of_pairs(batch) if isinstance(batch, PreferencePairs) else rows_of_sequences(batch)


def packed_row(batch: Sequences | PreferencePairs) -> Layout:
    """Every unique prompt, then every response, in one row, as `packing` describes."""
    sides = [batch.chosen, batch.rejected] if isinstance(batch, PreferencePairs) else [batch]
    first, num_sides = sides[0], len(sides)
    prompt_of_response = first.prompt_of_row.repeat_interleave(num_sides)
    order = prompt_of_response.argsort(stable=True)
    widest = max(side.response_ids.shape[1] for side in sides)
    response_ids = torch.stack([pad_columns(side.response_ids, widest, left=False) for side in sides], dim=1)
    lengths = torch.stack([side.response_lengths for side in sides], dim=1).flatten()
    in_prompt, in_response = first.unique_prompt_mask, torch.arange(widest, device=lengths.device) < lengths[:, None]
    prompt_lengths = in_prompt.sum(dim=1)
    prompt_ends = prompt_lengths.cumsum(0)
    starts = torch.empty_like(lengths)
    starts[order] = prompt_ends[-1] + lengths[order].cumsum(0) - lengths[order]
    ids = torch.cat([first.unique_prompt_ids[in_prompt], response_ids.flatten(0, 1)[order][in_response[order]]])
    positions = torch.cat(
        [
            (in_prompt.cumsum(dim=1) - 1)[in_prompt],
            (prompt_lengths[prompt_of_response, None] + torch.arange(widest, device=lengths.device))[order][in_response[order]],
        ]
    )
    per_prompt = torch.zeros_like(prompt_lengths).index_add(0, prompt_of_response, lengths)
    own = [*prompt_lengths.tolist(), *lengths[order].tolist()]
    packing = Packing(
        num_prompt_tokens=int(prompt_ends[-1]),
        own=Runs.of(own, own, ids.device),
        prefixes=Runs.of(per_prompt.tolist(), prompt_lengths.tolist(), ids.device),
    )
    return Layout(
        ids=ids[None],
        row=torch.zeros_like(lengths),
        prompt_end=prompt_ends[prompt_of_response],
        start=starts,
        lengths=lengths,
        context={
            "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device),  # four axes: taken as it is
            "position_ids": positions[None],
            "packing": packing,
        },
    )


def rows_of_sequences(sequences: Sequences) -> Layout:
    """Each prompt and its response side by side."""
    ids, _ = at_left_margin(
        (sequences.prompt_ids, sequences.prompt_mask), (sequences.response_ids, _attended(sequences))
    )
    prompts = sequences.prompt_lengths
    return Layout(
        ids=ids,
        row=torch.arange(len(ids), device=ids.device),
        prompt_end=prompts,
        start=prompts,
        lengths=sequences.response_lengths,
        context={},
    )


def rows_of_pairs(pairs: PreferencePairs) -> Layout:
    """Each prompt, its chosen and its rejected response side by side.

    Positions of both responses count on from the prompt. For "ab" with "x" and "yz", what each token attends to:

            a b x y z
        a   1
        b   1 1
        x   1 1 1
        y   1 1   1
        z   1 1   1 1
    """
    chosen, rejected = pairs.chosen, pairs.rejected
    ids, filled = at_left_margin(
        (chosen.prompt_ids, chosen.prompt_mask),
        (chosen.response_ids, _attended(chosen)),
        (rejected.response_ids, _attended(rejected)),
    )
    prompts = chosen.prompt_lengths
    starts = torch.stack([prompts, prompts + chosen.response_lengths], dim=1)
    columns = torch.arange(ids.shape[1], device=ids.device)
    in_rejected = columns >= starts[:, 1:]
    in_chosen = (columns >= starts[:, :1]) & ~in_rejected
    positions = columns - in_rejected * chosen.response_lengths[:, None]
    causal = columns[:, None] >= columns
    across = in_rejected[:, :, None] & in_chosen[:, None, :]
    return Layout(
        ids=ids,
        row=torch.arange(len(ids), device=ids.device).repeat_interleave(2),
        prompt_end=prompts.repeat_interleave(2),
        start=starts.flatten(),
        lengths=torch.stack([chosen.response_lengths, rejected.response_lengths], dim=1).flatten(),
        context={
            "attention_mask": (causal & ~across)[:, None],
            "position_ids": positions * filled,  # padding may lie beyond the last that a model has
        },
    )


def at_left_margin(
    *parts: tuple[Int[Tensor, "R _"], Bool[Tensor, "R _"]],
) -> tuple[Int[Tensor, "R S"], Bool[Tensor, "R S"]]:
    """``(ids, filled)``: the tokens in the masks of all parts side by side from column 0 on, and where they are."""
    ids, mask = (torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True))
    lengths = mask.sum(dim=1)
    columns = torch.arange(int(lengths.max()) if len(lengths) else 1, device=ids.device)
    filled = columns < lengths[:, None]
    return torch.zeros_like(filled, dtype=ids.dtype).masked_scatter(filled, ids[mask]), filled


def _attended(sequences: Sequences) -> Bool[Tensor, "B T"]:
    """True on every response token, tool output included."""
    columns = torch.arange(sequences.response_ids.shape[1], device=sequences.response_ids.device)
    return columns < sequences.response_lengths[:, None]
