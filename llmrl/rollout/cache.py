"""What a model keeps of the rows being decoded, in preallocated slots: keys and values, right-aligned at one common
write column, and the states of convolutions and recurrences, which have no columns.

Three live rows, about to write their next token to column ``end``. The longest row has just left slot 1 and the
last row moved there, so that attention reads slots 0 to 2 and no column before ``start``:

    slot 0    . . . a b c d e _ . .
    slot 1    x x x x . f g h _ . .     x: left over from the earlier row, masked
    slot 2    . . . . . . i j _ . .
                    ^         ^
                  start      end
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from llmrl.rollout.layers import (
    DummyLayer,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

SLACK_COLUMNS = 64
"""Columns beyond the longest possible row, where new rows replace finished ones: at least this many steps lie between
two moves of the window to the front."""
COLUMN_STEP = 128
"""Columns are a multiple of this, so that one rollout finds the memory that another one has given back."""

STATE_NOTES = (
    "number_of_states",
    "conv_kernel_size",
    "has_previous_state",
    "is_conv_states_initialized",
    "is_recurrent_states_initialized",
    "device",
    "dtype",
)
"""What a layer of transformers notes of its states of fixed size."""


def num_columns(longest: int, *, refills: bool) -> int:
    """Columns for rows of at most `longest` tokens; `refills` where new rows replace finished ones."""
    needed = longest + (SLACK_COLUMNS if refills else 0)
    return -(-needed // COLUMN_STEP) * COLUMN_STEP


@dataclass
class Window:
    """The part of the buffers in use: slots up to `rows`, columns from `start` up to `end`."""

    rows: int = 0
    start: int = 0
    end: int = 0


class SlotLayer(DynamicLayer):
    """One layer's buffers of keys and of values, (slots, heads, columns, head_dim) each.

    Sliding-window layers keep all columns too: the model masks by the distance of columns, and right alignment makes
    that the distance of tokens.
    """

    def __init__(self, window: Window, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.window = window
        self.buffers = (keys, values)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Writes one token per live row and returns what attention may read."""
        keys, values = self.view(self.window.start, self.window.end + 1)
        keys[:, :, -1:] = key_states
        values[:, :, -1:] = value_states
        return keys, values

    def get_seq_length(self) -> int:
        return self.window.end - self.window.start

    def view(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the live rows in columns from `start` up to `end`."""
        keys, values = self.buffers
        return keys[: self.window.rows, :, start:end], values[: self.window.rows, :, start:end]


class MixedSlotLayer(SlotLayer, LinearAttentionAndFullAttentionLayer):
    """The same for a layer that has states of fixed size too."""


class SlotStates(dict[int, Any]):
    """States of one layer by number, (slots, ...) each; those that the layer lacks are None. An item is the live rows
    of a state, which the model overwrites at each step; `values` are all slots."""

    def __init__(self, window: Window, states: Mapping[int, Tensor | None]) -> None:
        super().__init__(states)
        self.window = window

    def __getitem__(self, number: int) -> Tensor | None:
        state = super().__getitem__(number)
        return None if state is None else state[: self.window.rows]


class SlotCache(Cache):
    """What each layer of the model keeps, in slots, over one window."""

    def __init__(self, slots: int, columns: int) -> None:
        super().__init__(layers=[])
        self.slots = slots
        self.columns = columns
        self.window = Window()

    def fill(
        self, slot: int, source: Cache, copies: int, *, rows: slice = slice(None), columns: slice = slice(None)
    ) -> None:
        """Puts rows of a cache of transformers, padded left, before the write column: each row into `copies` slots,
        from `slot` on."""
        if not self.layers:
            self.layers = [self._slots_like(layer) for layer in source.layers]
        for layer, filled in zip(self.layers, source.layers, strict=True):
            for buffer, states in zip(_keys_and_values(layer), _keys_and_values(filled), strict=True):
                kept = states[rows, :, columns]
                _spread(kept, buffer[:, :, self.window.end - kept.shape[2] : self.window.end], slot, copies)
            for buffer, states in zip(_fixed_states(layer), _fixed_states(filled), strict=True):
                _spread(states[rows], buffer, slot, copies)

    def copy_slots(self, slots: Sequence[int], *, start: int | None = None) -> Cache:
        """The window of these slots, from a column on, in a cache of its own, which grows by every token that the model
        writes."""
        copy = Cache(layers=[_empty_like(layer) for layer in self.layers])
        for index, layer in enumerate(self.layers):
            if isinstance(layer, SlotLayer):
                keys, values = layer.view(self.window.start if start is None else start, self.window.end)
                copy.update(keys[slots], values[slots], index)
            if isinstance(layer, LinearAttentionLayer):
                _take_states(copy.layers[index], layer, lambda state: state[slots], dict)
        return copy

    def move_row(self, source: int, target: int) -> None:
        """Copies what one slot holds, of keys and values the live columns, to another."""
        for layer in self.layers:
            live = layer.view(self.window.start, self.window.end) if isinstance(layer, SlotLayer) else ()
            for buffer in (*live, *_fixed_states(layer)):
                buffer[target] = buffer[source]

    def move_columns(self, shift: int) -> None:
        """Moves the window this many columns to the front; to the back, where negative."""
        start, end = self.window.start, self.window.end
        for layer in self.layers:
            if isinstance(layer, SlotLayer):
                for old, new in zip(layer.view(start, end), layer.view(start - shift, end - shift), strict=True):
                    new.copy_(old.clone())  # the two may overlap
        self.window.start -= shift
        self.window.end -= shift

    def _slots_like(self, layer: Any) -> Any:
        """Empty slots for what a layer of a cache of transformers holds."""
        slots = _empty_like(layer)
        if isinstance(layer, DynamicLayer):
            kind = MixedSlotLayer if isinstance(layer, LinearAttentionLayer) else SlotLayer
            slots = kind(self.window, *map(self._buffer, _keys_and_values(layer)))
        if isinstance(layer, LinearAttentionLayer):
            _take_states(
                slots,
                layer,
                lambda state: state.new_zeros(self.slots, *state.shape[1:]),
                lambda states: SlotStates(self.window, states),
            )
        return slots

    def _buffer(self, states: Tensor) -> Tensor:
        """Zeros, because a masked NaN would still spoil a sum."""
        return states.new_zeros(self.slots, states.shape[1], self.columns, states.shape[3])


def layer_states(cache: Cache) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer of a cache of transformers, (rows, heads, columns, head_dim) each."""
    states = [_keys_and_values(layer) for layer in cache.layers]
    assert all(states)
    return states  # type: ignore[return-value]


def holds_states(layer: Any) -> bool:
    """Whether a layer of a cache of transformers has been written to, or has nothing to hold."""
    return isinstance(layer, DummyLayer) or bool(_keys_and_values(layer) or _fixed_states(layer))


def _keys_and_values(layer: Any) -> tuple[Tensor, ...]:
    """Buffers of keys and of values; none of a layer that has no attention."""
    if isinstance(layer, SlotLayer):
        return layer.buffers
    return () if getattr(layer, "keys", None) is None else (layer.keys, layer.values)


def _fixed_states(layer: Any) -> list[Tensor]:
    """States of convolutions, then of recurrences, with all their rows."""
    if not isinstance(layer, LinearAttentionLayer):
        return []
    by_number = (layer.conv_states, layer.recurrent_states)
    return [state for states in by_number for state in states.values() if state is not None]


def _take_states(target: Any, source: Any, convert: Callable[[Tensor], Tensor], container: Callable[..., Any]) -> None:
    """Gives a layer the states of another, converted, and what transformers notes beside them."""
    for name in STATE_NOTES:
        setattr(target, name, getattr(source, name))
    for name in ("conv_states", "recurrent_states"):
        states = getattr(source, name).items()  # with all rows, also of `SlotStates`
        setattr(target, name, container({n: None if x is None else convert(x) for n, x in states}))


def _empty_like(layer: Any) -> Any:
    """A layer of transformers that holds what the other does, and grows."""
    if isinstance(layer, DummyLayer):
        return DummyLayer()
    if not isinstance(layer, LinearAttentionLayer):
        return DynamicLayer()
    number_of_states = layer.number_of_states
    kind = LinearAttentionAndFullAttentionLayer if isinstance(layer, DynamicLayer) else LinearAttentionLayer
    return kind(number_of_states)


def _spread(rows: Tensor, buffer: Tensor, slot: int, copies: int) -> None:
    buffer[slot : slot + len(rows) * copies].unflatten(0, (-1, copies)).copy_(rows[:, None])
