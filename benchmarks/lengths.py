"""Response lengths that every engine is made to keep: the same ones, drawn from a seed."""

import torch
from torch import Tensor
from transformers import LogitsProcessor

from llmrl.rollout.graphs import SlotDecoding
from llmrl.rollout.responses import Responses
from llmrl.rollout.sampler import Sampler
from llmrl.rollout.step import Step

MOST = 2.0**20
"""A length over this is a fraction, exactly."""


def draw_lengths(count: int, limit: int, *, mixed: bool, generator: torch.Generator) -> Tensor:
    """Tokens of each response, EOS included: uniform from 1 to the limit if mixed, else the limit."""
    if mixed:
        return torch.randint(1, limit + 1, (count,), generator=generator)
    return torch.full((count,), limit)


def force_length(logits: Tensor, remaining: Tensor, eos_id: int) -> None:
    """Forbids EOS in rows with more than one token to go, and everything else in rows with one; in place, and without
    a wait for the device."""
    last = remaining == 1
    logits.masked_fill_(last[:, None], -torch.inf)
    logits[:, eos_id] = torch.where(last, 0.0, -torch.inf).to(logits.dtype)


class ForcedLengths(LogitsProcessor):
    """Forced lengths of `generate`, a row each; prompts are this wide."""

    def __init__(self, lengths: Tensor, *, eos_id: int, width: int) -> None:
        self.lengths = lengths
        self.eos_id = eos_id
        self.width = width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        force_length(scores, self.lengths - (input_ids.shape[1] - self.width), self.eos_id)
        return scores


def force_sampler(lengths: Tensor, *, eos_id: int) -> None:
    """Forces the lengths of llmrl's engines, in this process from now on; each rollout has as many rows.

    A recorded step knows no response numbers. There a row's length comes with its random numbers, as a fraction, in the
    column that no token reads.
    """
    extend, uniforms, draw = Sampler.extend, SlotDecoding._uniforms, Step.draw

    def extend_with_forced_length(self: Sampler, responses: Responses, rows: Tensor, logits: Tensor) -> list[int]:
        wanted = lengths[responses.numbers[rows] % len(lengths)]
        force_length(logits, wanted - responses.lengths[rows], eos_id)
        return extend(self, responses, rows, logits)

    def uniforms_with_length(self: SlotDecoding, indices: Tensor) -> Tensor:
        numbers = uniforms(self, indices)
        numbers[:, -1] = lengths[self.responses.numbers[indices] % len(lengths)] / MOST
        return numbers

    def draw_with_forced_length(self: Step, logits: Tensor) -> None:
        wanted = (self.slots.uniforms[:, -1] * MOST).long()
        force_length(logits, wanted - self.slots.num_drawn, eos_id)
        draw(self, logits)

    Sampler.extend, SlotDecoding._uniforms, Step.draw = (
        extend_with_forced_length,
        uniforms_with_length,
        draw_with_forced_length,
    )
