"""Shuffled source of examples: a new random order each epoch, resumed exactly."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from llmrl.batches import Row, fingerprint
from llmrl.data.files import DataError
from llmrl.data.mixture import dealt_after, next_set, whole_weights
from llmrl.functional.streams import Purpose, permutation

Example = TypeVar("Example")


class ShuffledSource(Generic[Example]):
    """Deals every example exactly once per epoch, without end.

    The order of an epoch is a function of the seed and the epoch, so the position is the whole state.

    Of several sets, the quota method picks the one that each example comes from, see `next_set`, and each is dealt in
    epochs of its own.

    Args:
        examples: Encoded examples, so that dealing them is cheap.
        dropped: Places of the rows that were too long to be among the examples.
        seed: Seed of the run.
        rows: Rows that the examples were made of; a resumed run must have the same.
        sizes: Examples of each set, which stand one set after another; none given: they are one set.
        weights: Weights of the sets.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        dropped: Sequence[str] = (),
        seed: int,
        rows: Sequence[Row] = (),
        sizes: Sequence[int] = (),
        weights: Sequence[float] = (1.0,),
    ) -> None:
        self.dropped = dropped
        self._examples = examples
        self._decks = [_Deck(size, seed, number) for number, size in enumerate(sizes or [len(examples)])]
        self._firsts = [0, *accumulate(sizes)]
        self._weights = whole_weights(weights)
        self._position = 0
        self._fingerprint = fingerprint(rows)

    @property
    def examples(self) -> Sequence[Example]:
        """Every example once, in data order."""
        return self._examples

    @property
    def num_rows(self) -> int:
        """Examples per epoch: the rows less the dropped ones."""
        return len(self._examples)

    @property
    def epoch(self) -> float:
        """Passes through the data so far."""
        return self._position / self.num_rows

    def take(self, count: int) -> list[Example]:
        """The next examples; they may span epochs."""
        dealt = dealt_after(self._position, self._weights)
        before = list(dealt)
        numbers = []
        for _ in range(count):
            numbers.append(next_set(dealt, self._weights))
            dealt[numbers[-1]] += 1
        parts = zip(self._decks, before, dealt, strict=True)
        places = [iter(deck.places(start, end)) for deck, start, end in parts]
        self._position += count
        return [self._examples[self._firsts[number] + next(places[number])] for number in numbers]

    def state_dict(self) -> dict[str, Any]:
        return {"position": self._position, "num_rows": self.num_rows, "fingerprint": self._fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["num_rows"] != self.num_rows:
            raise DataError(
                f"the checkpoint was made with {state['num_rows']} usable rows, but the data now has {self.num_rows}; "
                "resume with the same data and settings, or start a new run"
            )
        if state.get("fingerprint", self._fingerprint) != self._fingerprint:
            raise DataError(
                f"the checkpoint was made with other data: there are {self.num_rows} usable rows as before, but their "
                "content or their order has changed; resume with the same data, or start a new run"
            )
        self._position = state["position"]


class MixedSource(ShuffledSource[Example]):
    """Deals the examples of one or several sets of rows, each in the share of its weight.

    Args:
        sets: Encoded examples of each set, and the places of its rows that were too long.
        seed: Seed of the run.
        rows: Rows of all sets.
        weights: Weights of the sets.
    """

    def __init__(
        self,
        sets: Sequence[tuple[Sequence[Example], Sequence[str]]],
        *,
        seed: int,
        rows: Sequence[Row],
        weights: Sequence[float],
    ) -> None:
        super().__init__(
            [example for examples, _ in sets for example in examples],
            dropped=[place for _, places in sets for place in places],
            seed=seed,
            rows=rows,
            sizes=[len(examples) for examples, _ in sets],
            weights=weights,
        )


class _Deck:
    """Places of the examples of one set, in a new random order each epoch."""

    def __init__(self, size: int, seed: int, number: int) -> None:
        def order(epoch: int) -> Tensor:
            return permutation(size, seed, Purpose.DATA, epoch=epoch, iteration=number)

        self.size = size
        self._order = lru_cache(maxsize=2)(order)  # a batch seldom touches more than two epochs

    def places(self, start: int, end: int) -> list[int]:
        """Places of what is dealt from one position of the stream of this set to another."""
        if start == end:
            return []
        first_epoch, first_place = divmod(start, self.size)
        order = torch.cat([self._order(epoch) for epoch in range(first_epoch, -(-end // self.size))])
        return order[first_place : first_place + end - start].tolist()
