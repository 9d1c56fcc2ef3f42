"""Response lengths that every engine is made to keep: the same ones, drawn from a seed."""

import torch
from torch import Tensor
from transformers import LogitsProcessor

from llmrl.rollout.responses import Responses
from llmrl.rollout.sampler import Sampler


def draw_lengths(count: int, limit: int, *, mixed: bool, generator: torch.Generator) -> Tensor:
    """Tokens of each response, EOS included: uniform from 1 to the limit if mixed, else the limit."""
    if mixed:
        return torch.randint(1, limit + 1, (count,), generator=generator)
    return torch.full((count,), limit)


def force_length(logits: Tensor, remaining: Tensor, eos_id: int) -> None:
    """Forbids EOS in rows with more than one token to go, and everything else in rows with one; in place."""
    logits[:, eos_id] = -torch.inf
    last = remaining == 1
    logits[last] = -torch.inf
    logits[last, eos_id] = 0.0


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
    """Forces the lengths of llmrl's engines, in this process from now on; each rollout has as many rows."""
    extend = Sampler.extend

    def extend_with_forced_length(self: Sampler, responses: Responses, rows: Tensor, logits: Tensor) -> list[int]:
        wanted = lengths[responses.numbers[rows] % len(lengths)]
        force_length(logits, wanted - responses.lengths[rows], eos_id)
        return extend(self, responses, rows, logits)

    Sampler.extend = extend_with_forced_length
