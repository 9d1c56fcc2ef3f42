"""Keys and values of the rows being decoded: preallocated slots, right-aligned at one common write column.

Three live rows, about to write their next token to column ``end``. The longest row has just left slot 1 and the
last row moved there, so that attention reads slots 0 to 2 and no column before ``start``:

    slot 0    . . . a b c d e _ . .
    slot 1    x x x x . f g h _ . .     x: left over from the earlier row, masked
    slot 2    . . . . . . i j _ . .
                    ^         ^
                  start      end
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

SLACK_COLUMNS = 64
"""Columns beyond the longest possible row, where new rows replace finished ones: at least this many steps lie between
two moves of the window to the front."""
COLUMN_STEP = 128
"""Columns are a multiple of this, so that one rollout finds the memory that another one has given back."""


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


class SlotCache(Cache):
    """A `SlotLayer` per layer of the model, over one window."""

    layers: list[SlotLayer]

    def __init__(self, slots: int, columns: int) -> None:
        super().__init__(layers=[])
        self.slots = slots
        self.columns = columns
        self.window = Window()

    def fill(self, slot: int, states: Sequence[tuple[Tensor, Tensor]], copies: int) -> None:
        """Puts each layer's keys and values of rows, padded left, before the write column: each row into `copies`
        slots, from `slot` on."""
        if not self.layers:
            self.layers = [SlotLayer(self.window, self._buffer(keys), self._buffer(values)) for keys, values in states]
        for layer, pair in zip(self.layers, states, strict=True):
            for buffer, rows in zip(layer.buffers, pair, strict=True):
                start = self.window.end - rows.shape[2]
                target = buffer[slot : slot + len(rows) * copies, :, start : self.window.end]
                target.unflatten(0, (-1, copies)).copy_(rows[:, None])

    def copy_slots(self, slots: Sequence[int]) -> Cache:
        """The window of these slots in a cache of its own, which grows by every token that the model writes."""
        copy = Cache(layers=[DynamicLayer() for _ in self.layers])
        for index, layer in enumerate(self.layers):
            keys, values = layer.view(self.window.start, self.window.end)
            copy.update(keys[slots], values[slots], index)
        return copy

    def move_row(self, source: int, target: int) -> None:
        """Copies the live columns of one slot to another."""
        for layer in self.layers:
            for buffer in layer.view(self.window.start, self.window.end):
                buffer[target] = buffer[source]

    def move_columns(self, shift: int) -> None:
        """Moves the window this many columns to the front; to the back, where negative."""
        start, end = self.window.start, self.window.end
        for layer in self.layers:
            for old, new in zip(layer.view(start, end), layer.view(start - shift, end - shift), strict=True):
                new.copy_(old.clone())  # the two may overlap
        self.window.start -= shift
        self.window.end -= shift

    def _buffer(self, states: Tensor) -> Tensor:
        """Zeros, because a masked NaN would still spoil a sum."""
        return states.new_zeros(self.slots, states.shape[1], self.columns, states.shape[3])


def layer_states(cache: Cache) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer of a cache of transformers, (rows, heads, columns, head_dim) each."""
    return [_states(layer) for layer in cache.layers]


def _states(layer: object) -> tuple[Tensor, Tensor]:
    assert isinstance(layer, DynamicLayer)
    assert layer.keys is not None
    assert layer.values is not None
    return layer.keys, layer.values
