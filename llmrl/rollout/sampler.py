"""Sampler of next tokens: the same for every engine that has logits."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llmrl.functional.sampling import draw_tokens
from llmrl.functional.streams import uniforms
from llmrl.roles import Sampling
from llmrl.rollout.responses import Responses


class Sampler:
    """Draws the next tokens of responses, each from its own random stream.

    Args:
        sampling: Temperature, random streams, and whether to draw at all.
        vocab_size: Ids from there on have no probability.
    """

    def __init__(self, sampling: Sampling, *, vocab_size: int) -> None:
        self.sampling = sampling
        self.vocab_size = vocab_size

    def extend(self, responses: Responses, rows: Int[Tensor, " R"], logits: Float[Tensor, "R V"]) -> list[int]:
        """Appends to each of these rows a token drawn from its logits. Returns their stop reasons: the one wait for the
        device per step.

        Raises:
            FloatingPointError: Logits are not finite numbers.
        """
        ids, logprobs = draw_tokens(
            logits[:, : self.vocab_size], self._uniforms(responses, rows), temperature=self.sampling.temperature
        )
        stop_reason = responses.append(rows, ids, logprobs)
        on_host = torch.stack([stop_reason.float(), logprobs]).tolist()
        for index, logprob in enumerate(on_host[1]):
            if not math.isfinite(logprob):
                raise not_finite(responses, int(rows[index]))
        return [int(reason) for reason in on_host[0]]

    def _uniforms(self, responses: Responses, rows: Int[Tensor, " R"]) -> Tensor | None:
        if self.sampling.greedy:
            return None
        numbers, positions = responses.numbers[rows], responses.stream_positions(rows)
        return uniforms(self.sampling.seed, self.sampling.purpose, numbers, positions)


def not_finite(responses: Responses, row: int) -> FloatingPointError:
    """The error that the logits before a row's last token are not finite."""
    return FloatingPointError(
        f"the model's logits for prompt {row // responses.group_size} of this rollout are not finite at response token "
        f"{int(responses.lengths[row]) - 1} (response number {int(responses.numbers[row])}): the weights have "
        "diverged, or overflow in this precision"
    )
