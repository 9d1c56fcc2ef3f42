"""Attention over one packed row: every prompt once, every response once, no padding.

The row holds the unique prompts one after another, then the responses in the order of their prompts. For the prompts
"ab" and "c" with the responses "x", "yz" and "v":

    a b c x y z v

A prompt token attends to its prompt up to itself; a response token to the whole prompt and to its response up to
itself. The second is two attentions, over the prompt and over the response, joined by their log-sum-exps (the split of
Hydragen, Juravsky et al. 2024, arXiv:2402.05099), so keys and values are nowhere repeated. With the joined log-sum-exp
and output, the gradient of attention over all keys is the sum of both parts' gradients (FlashAttention-2, Dao 2023,
arXiv:2307.08691, algorithm 2), so the backward pass is the kernel's own on each part.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PRODUCTS_OF_A_CALL = 2**13
"""Products of a query and a key, in each head, that take as long as one more call of the CPU's kernel, about."""
PACKED = "sdpa_packed"
"""Name of the attention: over a packed row if the pass brings its `Packing`, otherwise that of torch (sdpa)."""


def packs(trunk: Any, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether passes over this trunk are packed: `pack_where_exact` said so, and the device has a kernel for them.

    CUDA's flash kernel takes no float32, heads of at most 256 numbers, by eights, and a GPU from Ampere on.
    """
    config = trunk.config.get_text_config(decoder=True)
    if config._attn_implementation != PACKED or device.type not in ("cpu", "cuda"):
        return False
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return device.type == "cpu" or (
        dtype == torch.bfloat16 and size <= 256 and size % 8 == 0 and torch.cuda.get_device_capability(device) >= (8, 0)
    )


@dataclass(frozen=True)
class PaddedRuns:
    """Where some runs stand in a row, and how they are padded to the longest."""

    columns: Tensor
    """Columns of their tokens, one run after another."""
    filled: Tensor
    """(R, L): True on tokens."""

    @classmethod
    def of(cls, starts: Sequence[int], lengths: Sequence[int]) -> "PaddedRuns":
        """Runs from these columns on, of these lengths."""
        offsets = torch.arange(max(lengths), device="cpu")
        filled = offsets < torch.tensor(lengths, device="cpu")[:, None]
        return cls((torch.tensor(starts, device="cpu")[:, None] + offsets)[filled], filled)

    def pad(self, x: Tensor) -> Tensor:
        """(R, heads, L, D) from (N, heads, D), with zeros, of which nothing is read."""
        padded = x.new_zeros(*self.filled.shape, *x.shape[1:])
        padded[self.filled] = x[self.columns]
        return padded.transpose(1, 2)

    def unpad(self, x: Tensor) -> Tensor:
        """The tokens of (R, heads, L, D), one run after another."""
        return x.transpose(1, 2)[self.filled]

    def hidden(self, dtype: torch.dtype) -> Tensor:
        """(R, 1, 1, L): what attention adds to its logits, so that no query sees padding."""
        return torch.zeros_like(self.filled, dtype=dtype).masked_fill(~self.filled, -torch.inf)[:, None, None]


@dataclass(frozen=True)
class Bucket:
    """Runs that one call of a kernel attends over."""

    queries: PaddedRuns
    keys: PaddedRuns


@dataclass(frozen=True)
class Runs:
    """Runs of queries, each of which attends to the run of keys with the same number."""

    query_lengths: Sequence[int]
    key_lengths: Sequence[int]
    query_ends: Tensor
    key_ends: Tensor
    """0, then the column after each run; int32, on the device."""

    @classmethod
    def of(cls, query_lengths: Sequence[int], key_lengths: Sequence[int], device: torch.device) -> "Runs":
        """Runs of these lengths, one after another."""
        ends = [
            torch.tensor([0, *lengths], device="cpu").cumsum(0, dtype=torch.int32).to(device, non_blocking=True)
            for lengths in (query_lengths, key_lengths)
        ]
        return cls(query_lengths, key_lengths, *ends)

    @cached_property
    def buckets(self) -> list[Bucket]:
        """The runs that have queries, short ones and those of like lengths together: every layer attends over these."""
        starts = [[0, *accumulate(lengths)] for lengths in (self.query_lengths, self.key_lengths)]
        lengths = list(zip(self.query_lengths, self.key_lengths, strict=True))
        buckets: list[list[int]] = []
        longest, products = (0, 0), 0
        for run in sorted((run for run, (queries, _) in enumerate(lengths) if queries), key=lengths.__getitem__):
            both = max(longest[0], lengths[run][0]), max(longest[1], lengths[run][1])
            alone = lengths[run][0] * lengths[run][1] + PRODUCTS_OF_A_CALL
            if buckets and (len(buckets[-1]) + 1) * both[0] * both[1] <= products + alone:
                buckets[-1].append(run)
                longest, products = both, products + alone
            else:
                buckets.append([run])
                longest, products = lengths[run], alone
        return [
            Bucket(*(
                PaddedRuns.of([starts[side][run] for run in runs], [lengths[run][side] for run in runs])
                for side in (0, 1)
            ))
            for runs in buckets
        ]  # fmt: skip


@dataclass(frozen=True)
class Packing:
    """Where prompts and responses stand in a packed row."""

    num_prompt_tokens: int
    own: Runs
    """Each prompt and each response, attending to itself."""
    prefixes: Runs
    """The responses to each prompt, attending to the prompt."""


def packed_attention_forward(
    module: torch.nn.Module,
    query: Float[Tensor, "B heads N D"],
    key: Float[Tensor, "B kv_heads S D"],
    value: Float[Tensor, "B kv_heads S D"],
    attention_mask: Tensor | None,
    packing: Packing | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it; by the layout of the one row, if there is one, in place of a mask.

    Raises:
        ValueError: The layer asks for what packed attention does not have.
    """
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if asked := [name for name, value in kwargs.items() if _changes_scores(name, value)]:
        raise ValueError(f"packed attention has no {asked[0]}")
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    by_token = [x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value)]
    return PackedAttention.apply(*by_token, packing, scale)[None], None


def _changes_scores(name: str, value: Any) -> bool:
    """Whether a layer asks for more than products of queries and keys by this argument: a soft cap, or a tensor such as
    sinks, a bias or the keys that a query may see."""
    return (name in ("dropout", "softcap") and bool(value)) or (isinstance(value, Tensor) and name != "position_ids")


AttentionInterface.register(PACKED, packed_attention_forward)
AttentionMaskInterface.register(PACKED, sdpa_mask)


class PackedAttention(torch.autograd.Function):
    """(N, heads, D) from query (N, heads, D), key and value (N, kv_heads, D)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float) -> Tensor:
        n, kernel = packing.num_prompt_tokens, _kernel(query)
        out, lse = kernel.forward(query, key, value, packing.own, True, scale)
        if n < len(query):
            prefix_out, prefix_lse = kernel.forward(query[n:], key[:n], value[:n], packing.prefixes, False, scale)
            _join(out[n:], lse[n:], prefix_out, prefix_lse)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.packing, ctx.scale = packing, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, out, lse = ctx.saved_tensors
        packing, scale = ctx.packing, ctx.scale
        n, kernel, grad = packing.num_prompt_tokens, _kernel(query), grad.contiguous()
        grads = kernel.backward(grad, query, key, value, out, lse, packing.own, True, scale)
        if n < len(query):
            of_prefix = kernel.backward(
                grad[n:], query[n:], key[:n], value[:n], out[n:], lse[n:], packing.prefixes, False, scale
            )
            for whole, part in zip((grads[0][n:], grads[1][:n], grads[2][:n]), of_prefix, strict=True):
                whole += part
        return *grads, None, None


def _join(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> None:
    """Joins attention over other keys into `out` (M, heads, D) and `lse` (M, heads), in place."""
    joined = torch.logaddexp(lse, other_lse)
    mixed = out * (lse - joined).exp()[..., None] + other_out * (other_lse - joined).exp()[..., None]
    out.copy_(mixed)
    lse.copy_(joined)


class PaddedBuckets:
    """The CPU's flash kernel, called for runs of like lengths at once, padded to the longest of them."""

    @staticmethod
    def forward(query, key, value, runs, causal, scale):
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        lse = query.new_empty(query.shape[:2], dtype=torch.float32)
        for bucket in runs.buckets:
            parts = (bucket.queries.pad(query), bucket.keys.pad(key), bucket.keys.pad(value))
            some, some_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *parts, 0.0, causal, attn_mask=None if causal else bucket.keys.hidden(query.dtype), scale=scale
            )
            out[bucket.queries.columns] = bucket.queries.unpad(some)
            lse[bucket.queries.columns] = bucket.queries.unpad(some_lse[..., None])[..., 0]
        return out, lse

    @staticmethod
    def backward(grad, query, key, value, out, lse, runs, causal, scale):
        grads = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]
        groups = query.shape[1] // key.shape[1]
        repeated = [x.repeat_interleave(groups, dim=1) for x in (key, value)]
        for bucket in runs.buckets:
            queries, keys = bucket.queries, bucket.keys
            of_bucket = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                queries.pad(grad), queries.pad(query), *map(keys.pad, repeated), queries.pad(out),
                queries.pad(lse[..., None])[..., 0].contiguous(), 0.0, causal,
                attn_mask=None if causal else keys.hidden(query.dtype), scale=scale,
            )  # fmt: skip
            grads[0][queries.columns] = queries.unpad(of_bucket[0])
            for whole, part in zip(grads[1:], of_bucket[1:], strict=True):
                whole[keys.columns] = keys.unpad(part).unflatten(1, (-1, groups)).sum(dim=2)
        return grads


class VariableLengths:
    """CUDA's flash kernel, which takes all runs at once."""

    @staticmethod
    def forward(query, key, value, runs, causal, scale):
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            query, key, value, *_arguments(runs), 0.0, causal, False, scale=scale
        )
        return out, lse.transpose(0, 1).contiguous()

    @staticmethod
    def backward(grad, query, key, value, out, lse, runs, causal, scale):
        unused = torch.empty(0, device=query.device)  # state of dropout, which there is none of
        return list(
            torch.ops.aten._flash_attention_backward(
                grad, query, key, value, out, lse.transpose(0, 1).contiguous(), *_arguments(runs), 0.0, causal,
                unused, unused, scale=scale,
            )
        )  # fmt: skip


def _kernel(query: Tensor) -> type[PaddedBuckets] | type[VariableLengths]:
    return VariableLengths if query.is_cuda else PaddedBuckets


def _arguments(runs: Runs) -> tuple[Tensor, Tensor, int, int]:
    return runs.query_ends, runs.key_ends, max(runs.query_lengths), max(runs.key_lengths)
