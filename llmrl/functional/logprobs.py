"""Log-probabilities and entropies of tokens, in nats: from logits, or straight from hidden states and the output layer.

The softmax is taken in float32 (float64 stays), at the temperature that divides the logits. A logit of -infinity is a
token of probability 0: it contributes nothing to an entropy or a gradient.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from llmrl.functional.masking import check_shapes

SMALLEST_EXPONENT = -87.0
"""Its exponential, 2e-38, is the smallest normal float32: negligible beside 1, and unlike the denormal numbers and the
infinity below it, neither slow nor a cause of NaN."""


def token_logprobs(
    logits: Float[Tensor, "B T V"], ids: Int[Tensor, "B T"], *, temperature: float = 1.0
) -> Float[Tensor, "B T"]:
    """Log-probabilities of the given ids, nats: log softmax(logits / temperature).

    Raises:
        ValueError: The temperature is not positive, or shapes differ.
    """
    check_shapes(logits=(logits, "B T V"), ids=(ids, "B T"))
    scaled = _scale(logits, temperature)
    return scaled.gather(-1, ids.long()[..., None]).squeeze(-1) - scaled.logsumexp(dim=-1)


def entropy(logits: Float[Tensor, "B T V"], *, temperature: float = 1.0) -> Float[Tensor, "B T"]:
    """Entropies of the token distributions, nats: H = -Σ p log p with p = softmax(logits / temperature).

    Raises:
        ValueError: The temperature is not positive.
    """
    logprobs = _scale(logits, temperature).log_softmax(dim=-1)
    probabilities = logprobs.exp()
    return -(probabilities * logprobs.masked_fill(probabilities == 0, 0.0)).sum(dim=-1)


def linear_token_logprobs(
    hidden: Float[Tensor, "M H"],
    weight: Float[Tensor, "V H"],
    ids: Int[Tensor, " M"],
    *,
    temperature: float = 1.0,
    bias: Float[Tensor, " V"] | None = None,
    chunk_tokens: int = 256,
) -> tuple[Float[Tensor, " M"], Float[Tensor, " M"]]:
    """`token_logprobs` and `entropy` of logits = hidden @ weight.T + bias that are never held all at once.

    The logits of `chunk_tokens` tokens at a time are computed in the forward pass and again in the backward pass. The
    matrix products are in the dtype of the inputs, or that of autocast where it is on; all else is in float32 at least,
    the sum of the weight's gradient over chunks included.

    Args:
        hidden: Last hidden states, one row per token.
        weight: Weight of the output layer.
        ids: The token of each row whose log-probability is wanted.
        temperature: Divides the logits; greater than 0.
        bias: Bias of the output layer.
        chunk_tokens: Bounds the memory; never changes the result.

    Returns:
        ``(logprobs, entropy)``, nats, both differentiable in `hidden`, `weight` and `bias`.

    Raises:
        ValueError: `temperature` is not positive, `chunk_tokens` is below 1, or shapes differ.
    """
    shapes = {"hidden": (hidden, "M H"), "weight": (weight, "V H"), "ids": (ids, "M")}
    check_shapes(**shapes, **({} if bias is None else {"bias": (bias, "V")}))
    _check_temperature(temperature)
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens ({chunk_tokens}) must be at least 1")
    return _LinearTokenLogprobs.apply(hidden, weight, bias, ids.long(), temperature, chunk_tokens)


class _LinearTokenLogprobs(torch.autograd.Function):
    """Forward and backward of `linear_token_logprobs`. With z the scaled logits, p their softmax and H its entropy:

    ∂ log p_i / ∂ z_j = [i = j] - p_j
    ∂ H / ∂ z_j = -p_j (log p_j + H)
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        temperature: float,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.temperature, ctx.chunk_tokens, ctx.matmul_dtype = temperature, chunk_tokens, _matmul_dtype(hidden)
        logprobs, entropies, normalizers = (hidden.new_empty(len(ids), dtype=_softmax_dtype(hidden)) for _ in range(3))
        with torch.autocast(hidden.device.type, enabled=False):
            for rows, logits in _logit_chunks(ctx, hidden, weight.to(ctx.matmul_dtype), bias):
                peak = logits.amax(dim=1)
                shifted = logits.sub_(peak[:, None])  # by hand: torch.logsumexp is eight times slower on a CPU
                chosen = shifted.gather(1, ids[rows, None]).squeeze(1)
                shares = shifted.clamp_(min=SMALLEST_EXPONENT).exp()
                total = shares.sum(dim=1)
                normalizers[rows] = peak + total.log()
                logprobs[rows] = chosen - total.log()
                entropies[rows] = total.log() - shares.mul_(shifted).sum(dim=1) / total
        ctx.save_for_backward(hidden, weight, bias, ids, normalizers, entropies)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]: once_differentiable hides the names
        ctx: Any, *grad_outputs: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        grad_logprobs, grad_entropies = grad_outputs
        hidden, weight, bias, ids, normalizers, entropies = ctx.saved_tensors
        grad_logprobs = torch.zeros_like(entropies) if grad_logprobs is None else grad_logprobs
        needs_hidden, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=_softmax_dtype(hidden)) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=_softmax_dtype(hidden)) if needs_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            cast_weight = weight.to(ctx.matmul_dtype)
            for rows, logits in _logit_chunks(ctx, hidden, cast_weight, bias):
                grad_logits = _grad_logits(
                    logits.sub_(normalizers[rows, None]),
                    ids[rows],
                    entropies[rows],
                    grad_logprobs[rows],
                    None if grad_entropies is None else grad_entropies[rows],
                ).div_(ctx.temperature)
                if grad_bias is not None:
                    grad_bias += grad_logits.sum(dim=0)
                grad_logits = grad_logits.to(ctx.matmul_dtype)
                if grad_hidden is not None:
                    grad_hidden[rows] = (grad_logits @ cast_weight).to(hidden.dtype)
                if grad_weight is not None:
                    _add_product(grad_weight, grad_logits.T, hidden[rows].to(ctx.matmul_dtype))
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None


def _logit_chunks(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Yields ``(rows, logits)``: rows of a chunk, and their logits over the temperature, which may be overwritten."""
    bias = None if bias is None else bias.to(ctx.matmul_dtype)
    for start in range(0, len(hidden), ctx.chunk_tokens):
        rows = slice(start, start + ctx.chunk_tokens)
        logits = linear(hidden[rows].to(ctx.matmul_dtype), weight, bias)
        yield rows, logits.to(_softmax_dtype(hidden)).div_(ctx.temperature)


def _grad_logits(
    logps: Tensor, ids: Tensor, entropies: Tensor, grad_logprobs: Tensor, grad_entropies: Tensor | None
) -> Tensor:
    """Gradient with respect to the scaled logits of one chunk. Overwrites `logps`, their log-softmax."""
    probabilities = logps.clamp_(min=SMALLEST_EXPONENT).exp()
    slope = grad_logprobs[:, None]
    if grad_entropies is not None:
        slope = logps.add_(entropies[:, None]).mul_(grad_entropies[:, None]).add_(slope)
    return probabilities.mul_(slope).neg_().scatter_add_(1, ids[:, None], grad_logprobs[:, None])


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, without a temporary of the size of the weight where the precisions allow it."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _scale(logits: Tensor, temperature: float) -> Tensor:
    _check_temperature(temperature)
    return logits.to(_softmax_dtype(logits)) / temperature


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature ({temperature}) must be greater than 0")


def _softmax_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _matmul_dtype(hidden: Tensor) -> torch.dtype:
    """Dtype that autocast would choose: its own where it is on, except for float64, which it leaves alone."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden.dtype
