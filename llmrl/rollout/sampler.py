"""How a next token is drawn: the same for every engine that has logits."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llmrl.functional.sampling import inverse_cdf
from llmrl.functional.streams import uniforms
from llmrl.roles import Progress, Sampling
from llmrl.rollout.responses import Response


class Sampler:
    """Draws the next token of each response, and knows when a response is complete."""

    def __init__(self, sampling: Sampling, *, eos_ids: tuple[int, ...], vocab_size: int, progress: Progress) -> None:
        self.sampling = sampling
        self.eos_ids = frozenset(eos_ids)
        self.vocab_size = vocab_size
        self.progress = progress

    def extend(self, responses: Sequence[Response], logits: Float[Tensor, "B V"]) -> None:
        """Adds to each response the token drawn from its row of the logits. The one wait for the device per step."""
        numbers = torch.tensor([response.number for response in responses], device=logits.device)
        tokens = torch.tensor([len(response.ids) for response in responses], device=logits.device)
        ids, logprobs = draw(logits[:, : self.vocab_size], numbers, tokens, self.sampling)
        for response, token_id, logprob in zip(
            responses, *torch.stack([ids.float(), logprobs]).tolist(), strict=True
        ):  # float32 holds every id up to 2**24
            self._append(response, int(token_id), logprob)

    def is_complete(self, response: Response) -> bool:
        """Whether it ended by itself or was cut by the length limit."""
        return response.finished or len(response.ids) == self.sampling.max_response_tokens

    def _append(self, response: Response, token_id: int, logprob: float) -> None:
        if not math.isfinite(logprob):
            prompt = (response.number - self.sampling.first_response) // self.sampling.num_responses
            raise FloatingPointError(
                f"the model's logits for prompt {prompt} of this rollout are not finite at response token "
                f"{len(response.ids)} (response number {response.number}): the weights have diverged, or overflow in "
                "this precision"
            )
        response.ids.append(token_id)
        response.logprobs.append(logprob)
        response.finished = token_id in self.eos_ids
        if self.is_complete(response):
            self.progress.advance()


def draw(
    logits: Float[Tensor, "B V"], numbers: Int[Tensor, " B"], tokens: Int[Tensor, " B"], sampling: Sampling
) -> tuple[Int[Tensor, " B"], Float[Tensor, " B"]]:
    """One token per row, by inverse CDF of softmax(logits / temperature), or the likeliest.

    Args:
        logits: Of the ids that may be drawn; any floating dtype, computed on in float32.
        numbers: Global response number of each row.
        tokens: Index in its response of the token to draw.

    Returns:
        ``(ids, logprobs)``, the log-probability at the temperature, NaN where the logits are not finite numbers.
    """
    all_logprobs = torch.log_softmax(logits.float() / sampling.temperature, dim=-1)
    if sampling.greedy:
        ids = all_logprobs.argmax(dim=-1)
    else:
        ids = inverse_cdf(all_logprobs.exp(), uniforms(sampling.seed, sampling.purpose, numbers, tokens))
    return ids, all_logprobs.gather(1, ids[:, None]).squeeze(1)
