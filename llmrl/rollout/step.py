"""One step of decoding as a function of tensors that stay where they are, so that a CUDA graph can hold it.

Each slot holds a row. Rows lie at the left margin and write at a column of their own, so that a column is a position.
Here three rows of a step, about to read their last token and to write its keys and values at ``end``:

    slot 0    a b c d e _ . .     end 5
    slot 1    f g h _ . . . .     end 3
    slot 2    i j k l x x x x     end 4    complete: reads and writes the same as before, and nothing of it advances

Nothing in a step asks the host, and nothing that outlives it moves: uniforms of all tokens are drawn when a row comes
in, masks are made once for all layers, and that a row is complete is a number on the device.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from llmrl.batches import StopReason
from llmrl.functional.sampling import draw_tokens
from llmrl.roles import Sampling
from llmrl.rollout.linear import Forward, replacing
from llmrl.rollout.support import with_cache
from llmrl.routing import RouteRecorder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NOT_FINITE = -1
"""Stop reason of a row whose logits are not finite numbers. Never in a `Rollout`."""
GROUPED_ATTENTION = "llmrl_grouped"
"""Name of `attend_grouped` among the attention functions of transformers."""
TORCH_ATTENTION = "sdpa"
"""Beginning of the names of torch's attention there; with an ending, it is the same for rows of a batch."""


@dataclass(frozen=True, kw_only=True)
class Slots:
    """Rows being decoded, R of them, on the device: C columns of keys and values, responses of at most T tokens.

    Column T of what is per token is where complete rows write.
    """

    states: Tensor
    """(L, 2, R, heads, C, head_dim): keys and values of each layer."""
    last_ids: Tensor
    """(R,): the token that the next step reads."""
    ends: Tensor
    """(R,): its column."""
    num_drawn: Tensor
    """(R,): tokens of the response."""
    stop_reason: Tensor
    """(R,): a `StopReason`, or `NOT_FINITE`."""
    uniforms: Tensor
    """(R, T + 1), float64: one for each token."""
    ids: Tensor
    """(R, T + 1)."""
    logprobs: Tensor
    """(R, T + 1)."""
    routes: Tensor
    """(R, T + 1, L): of the tokens drawn, by layers that route; there may be none."""
    max_tokens: Tensor
    """(): length limit of a response, at most T."""

    @classmethod
    def empty(
        cls,
        states: Sequence[tuple[Tensor, Tensor]],
        *,
        rows: int,
        columns: int,
        max_tokens: int,
        num_routers: int = 0,
    ) -> "Slots":
        """Slots without rows, for keys and values like these of each layer, (N, heads, P, head_dim).

        Raises:
            ValueError: They are of several shapes.
        """
        shapes = {tuple(x.shape) for pair in states for x in pair}
        if len(shapes) > 1:
            raise ValueError(f"keys and values of the layers differ in their shapes: {sorted(shapes)}")
        like = states[0][0]
        integers: dict[str, Any] = {"dtype": torch.long, "device": like.device}
        width = max_tokens + 1
        return cls(
            states=like.new_zeros(len(states), 2, rows, like.shape[1], columns, like.shape[3]),
            last_ids=torch.zeros(rows, **integers),
            ends=torch.zeros(rows, **integers),
            num_drawn=torch.zeros(rows, **integers),
            stop_reason=torch.full((rows,), StopReason.EOS, **integers),
            uniforms=torch.zeros(rows, width, dtype=torch.float64, device=like.device),
            ids=torch.zeros(rows, width, **integers),
            logprobs=torch.zeros(rows, width, device=like.device),
            routes=torch.zeros(rows, width, num_routers, dtype=torch.int16, device=like.device),
            max_tokens=torch.tensor(max_tokens, **integers),
        )

    @property
    def num_rows(self) -> int:
        return self.states.shape[2]

    @property
    def num_columns(self) -> int:
        return self.states.shape[4]

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.ids.shape[1] - 1

    @property
    def room(self) -> dict[str, int]:
        return {"rows": self.num_rows, "columns": self.num_columns, "max_tokens": self.num_tokens}

    @property
    def per_row(self) -> dict[str, Tensor]:
        """All but keys and values, by name."""
        return {name: x for name, x in vars(self).items() if name not in ("states", "max_tokens")}

    def reset(self, max_tokens: int) -> None:
        """Takes all rows out. Zeros, because a masked NaN would still spoil a sum."""
        self.states.zero_()
        self.ends.zero_()
        self.stop_reason.fill_(StopReason.EOS)
        self.max_tokens.fill_(max_tokens)

    def first(self, rows: int, columns: int) -> "Slots":
        """Views of the first rows and columns."""
        return Slots(
            states=self.states[:, :, :rows, :, :columns],
            max_tokens=self.max_tokens,
            **{name: x[:rows] for name, x in self.per_row.items()},
        )

    def move(self, sources: Tensor, targets: Tensor, columns: int) -> None:
        """Copies rows, their keys and values up to `columns`, to other slots, none of which is a source."""
        states = self.states[:, :, :, :, :columns]
        states[:, :, targets] = states[:, :, sources]
        for x in self.per_row.values():
            x[targets] = x[sources]


class ColumnLayer(DynamicLayer):
    """One layer's keys and values, (R, heads, C, head_dim) each. Each row writes at its own end.

    Sliding-window layers keep all columns too: their mask is another one.
    """

    def __init__(self, keys: Tensor, values: Tensor, ends: Tensor) -> None:
        super().__init__()
        self.buffers = (keys, values)
        self.ends = ends
        self.rows = torch.arange(len(ends), device=ends.device)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes one token per row and returns all columns: what lies after a row's end is masked."""
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer.transpose(1, 2).index_put_((self.rows, self.ends), states[:, :, 0])
        return self.buffers

    def get_seq_length(self) -> int:
        return self.buffers[0].shape[2] - 1


class Step:
    """Draws one more token for each row that is not complete.

    Args:
        model: Its parameters are read where they are.
        norms: What stands for some of its norms, see `fused_norms`.
        slots: The rows.
        sampling: Temperature, and whether to draw at all.
        eos_ids: Any of them ends a response.
        vocab_size: Ids from there on have no probability.
        routers: Those of the model whose choices are recorded, as many as the slots have room for.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        norms: Mapping[nn.Module, Forward],
        slots: Slots,
        sampling: Sampling,
        *,
        eos_ids: tuple[int, ...],
        vocab_size: int,
        routers: Sequence[nn.Module] = (),
    ) -> None:
        device = slots.ends.device
        self.model = model
        self.norms = norms
        self.slots = slots
        self.temperature = sampling.temperature
        self.greedy = sampling.greedy
        self.eos_ids = torch.tensor(eos_ids, dtype=torch.long, device=device)
        self.vocab_size = vocab_size
        self.recorder = RouteRecorder(routers)
        self.windows = attention_windows(model)
        self.columns = torch.arange(slots.num_columns, device=device)
        self.visible = slots.states.new_zeros(())
        self.hidden = slots.states.new_full((), -torch.inf)
        self.cache = Cache(layers=[ColumnLayer(keys, values, slots.ends) for keys, values in slots.states])

    @torch.no_grad()
    def __call__(self) -> None:
        self.draw(self.logits())

    def logits(self) -> Tensor:
        """(R, V): after the last token of each row."""
        with lean(self.model, self.norms), self.recorder.recording():
            output = self.model(
                input_ids=self.slots.last_ids[:, None],
                attention_mask=self.masks(),
                position_ids=self.slots.ends[:, None],
                use_cache=True,
                logits_to_keep=1,
                **with_cache(self.model, self.cache),
            )
        return output.logits[:, -1]

    def masks(self) -> Tensor | dict[str, Tensor]:
        """What attention adds to its logits, (R, 1, 1, C): the same for all layers, or by their kind."""
        distance = self.slots.ends[:, None] - self.columns
        masks = dict[str, Tensor]()
        for kind, window in self.windows.items():
            seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
            masks[kind] = torch.where(seen, self.visible, self.hidden)[:, None, None, :]
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def draw(self, logits: Tensor) -> None:
        """Appends a token to each row that is not complete."""
        slots = self.slots
        live = slots.stop_reason == StopReason.NONE
        column = torch.where(live, slots.num_drawn, slots.num_tokens)[:, None]
        uniforms = None if self.greedy else slots.uniforms.gather(1, column)[:, 0]
        ids, logprobs = draw_tokens(logits[:, : self.vocab_size], uniforms, temperature=self.temperature)
        slots.ids.scatter_(1, column, ids[:, None])
        slots.logprobs.scatter_(1, column, logprobs[:, None])
        if self.recorder.routers:
            routes = self.recorder.take(slots.num_rows)[:, None]
            slots.routes.scatter_(1, column[:, :, None].expand_as(routes), routes)
        slots.last_ids.copy_(torch.where(live, ids, slots.last_ids))
        slots.num_drawn.add_(live)
        slots.ends.add_(live)
        stop_reason = torch.full_like(slots.stop_reason, StopReason.NONE)
        stop_reason.masked_fill_(slots.num_drawn == slots.max_tokens, StopReason.LENGTH)
        stop_reason.masked_fill_((ids[:, None] == self.eos_ids).any(dim=1), StopReason.EOS)
        stop_reason.masked_fill_(~logprobs.isfinite(), NOT_FINITE)
        slots.stop_reason.copy_(torch.where(live, stop_reason, slots.stop_reason))


def attention_windows(model: "PreTrainedModel") -> dict[str, int | None]:
    """Tokens that a layer attends to, None for all, by the kinds of layers: the names that their masks have in
    transformers."""
    windows = {getattr(layer, "sliding_window", None) for layer in DynamicCache(config=model.config).layers}
    return {"full_attention" if window is None else "sliding_attention": window for window in windows}


@contextmanager
def lean(model: "PreTrainedModel", norms: Mapping[nn.Module, Forward]) -> Iterator[None]:
    """Has attention of torch go through `attend_grouped`, and these norms through what stands for them, temporarily."""
    config = model.config.get_text_config(decoder=True)
    own = config._attn_implementation
    if own is not None and own.startswith(TORCH_ATTENTION):
        config._attn_implementation = GROUPED_ATTENTION
    try:
        with replacing(norms):
            yield
    finally:
        config._attn_implementation = own


def fused_norms(model: "PreTrainedModel") -> dict[nn.Module, Forward]:
    """One kernel of torch for each RMS norm of the model that says the same, where its own code takes eight."""
    norms = {module: norm for module in model.modules() if (norm := _fused(module)) is not None}
    same = {type(module): _agree(module, norm) for module, norm in norms.items()}
    return {module: norm for module, norm in norms.items() if same[type(module)]}


def _fused(module: nn.Module) -> Forward | None:
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not type(module).__name__.endswith("RMSNorm") or weight is None or eps is None:
        return None
    return partial(rms_norm, normalized_shape=weight.shape, weight=weight, eps=eps)


def _agree(module: nn.Module, norm: Forward) -> bool:
    weight = next(module.parameters())
    x = torch.linspace(-2.0, 3.0, len(weight), device=weight.device, dtype=weight.dtype)
    ours, theirs = norm(x), module(x)
    tolerance = 4 * torch.finfo(x.dtype).eps
    return ours.dtype == theirs.dtype and torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance)


def attend_grouped(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attention of one token per row; heads that share keys and values are rows of one product, so none is copied.

    Args:
        module: Unused.
        query: (R, heads, 1, head_dim).
        key: (R, heads that keys have, C, head_dim).
        value: The same.
        attention_mask: (R, 1, 1, C), added.
        scaling: Factor of the logits; None for 1 / sqrt(head_dim).
        dropout: 0.
        more: Unused, if it changes nothing.

    Raises:
        TypeError: Something else is to be added or capped.
    """
    changing = [name for name in ("softcap", "s_aux", "position_bias") if more.get(name) is not None]
    if changing or dropout:
        raise TypeError(f"attention with {', '.join(changing) or 'dropout'}")
    rows, heads, _, head_dim = query.shape
    packed = query.reshape(rows, key.shape[1], heads // key.shape[1], head_dim)
    output = scaled_dot_product_attention(packed, key, value, attn_mask=attention_mask, scale=scaling)
    return output.reshape(rows, 1, heads, value.shape[3]), None


AttentionInterface.register(GROUPED_ATTENTION, attend_grouped)
