"""Sampling of tokens: one uniform per token, through the inverse of the cumulative distribution."""

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor
from torch.nn.functional import pad

from llmrl.functional.masking import check_shapes

BLOCK = 256
"""Columns per block: two short searches, and no cumulative sum over the whole vocabulary."""


def draw_tokens(
    logits: Float[Tensor, "B V"], uniforms: Float[Tensor, " B"] | None, *, temperature: float
) -> tuple[Int[Tensor, " B"], Float[Tensor, " B"]]:
    """One token per row, sampled from softmax(logits / temperature) or the likeliest, and its log-probability.

    A pure function on the device: no state, and nothing waits for the host.

    Args:
        logits: Logits of the ids that may be drawn, in any floating dtype; computed in float32.
        uniforms: One u per row, in [0, 1); None takes the likeliest token.
        temperature: Divides the logits; greater than 0.

    Returns:
        ``(ids, logprobs)``: log-probabilities in nats at the temperature, NaN where the logits are not finite numbers.
    """
    all_logprobs = torch.log_softmax(logits.float() / temperature, dim=-1)
    ids = all_logprobs.argmax(dim=-1) if uniforms is None else inverse_cdf(all_logprobs.exp(), uniforms)
    return ids, all_logprobs.gather(1, ids[:, None]).squeeze(1)


def inverse_cdf(probabilities: Float[Tensor, "B V"], uniforms: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
    """The smallest id whose cumulative probability exceeds u times the row's total, in float64.

    Never an id of probability 0, whatever rounding does.

    Args:
        probabilities: Not negative, with a positive sum in each row, which need not be 1.
        uniforms: One u per row, in [0, 1).

    Raises:
        ValueError: Shapes differ.

    Reference: Devroye 1986, "Non-uniform random variate generation", section III.2.
    """
    check_shapes(probabilities=(probabilities, "B V"), uniforms=(uniforms, "B"))
    sums = _block_sums(probabilities)
    block, remainder = _search(sums, uniforms.double() * sums.sum(dim=1))
    columns = BLOCK * block[:, None] + torch.arange(BLOCK, device=block.device)
    vocabulary = probabilities.shape[1]
    within = probabilities.gather(1, columns.clamp(max=vocabulary - 1)).double()
    column, _ = _search(torch.where(columns < vocabulary, within, 0.0), remainder)
    return BLOCK * block + column


def _block_sums(probabilities: Float[Tensor, "B V"]) -> Float64[Tensor, "B K"]:
    """Sums over blocks of columns; the last one is over the remaining columns, of which there may be none."""
    num_blocks = probabilities.shape[1] // BLOCK
    whole, rest = probabilities[:, : num_blocks * BLOCK], probabilities[:, num_blocks * BLOCK :]
    sums = whole.unflatten(1, (num_blocks, BLOCK)).sum(dim=2, dtype=torch.float64)
    return torch.cat([sums, rest.sum(dim=1, keepdim=True, dtype=torch.float64)], dim=1)


def _search(
    masses: Float64[Tensor, "B K"], target: Float64[Tensor, " B"]
) -> tuple[Int[Tensor, " B"], Float64[Tensor, " B"]]:
    """Index of the first positive mass at which the cumulative sum exceeds the target, else of the last one; and the
    target minus the sum before it."""
    cumulative = _running_sums(masses)
    position = torch.arange(masses.shape[1], device=masses.device)
    positive = masses > 0
    exceeds = positive & (cumulative > target[:, None])
    first = torch.where(exceeds, position, masses.shape[1]).amin(dim=1)
    last = torch.where(positive, position, 0).amax(dim=1)
    index = torch.minimum(first, last)
    before = pad(cumulative, (1, 0)).gather(1, index[:, None]).squeeze(1)
    return index, target - before


def _running_sums(masses: Float64[Tensor, "B K"]) -> Float64[Tensor, "B K"]:
    """Cumulative sums of each row. On a GPU torch calls its own not deterministic: where determinism is asked for, a
    product with a triangle of ones replaces it."""
    if not torch.are_deterministic_algorithms_enabled():
        return masses.cumsum(dim=1)
    return masses @ torch.ones(masses.shape[1], masses.shape[1], dtype=masses.dtype, device=masses.device).triu()
