"""Numbers for single tokens of a response, as a reward function gives them, and the tokens on which they land."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from reprlib import repr as shortened
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from llmrl.batches import Sequences

LARGEST_SCORE = torch.finfo(torch.float32).max
BROKEN = "\ufffd"
"""Character that decoders write for bytes that are no character."""


@dataclass(frozen=True, kw_only=True)
class Spelling:
    """The tokens of one response and the text that they spell."""

    ids: list[int]
    text: str
    decode: Callable[[list[int]], str]
    """Decodes `ids` to `text`, and any prefix of `ids` to its text."""

    @property
    def expected(self) -> str:
        """What a list for the tokens of this response must hold, for messages."""
        return (
            f"a finite number for each of its {len(self.ids)} tokens, "
            f"or (offset, finite number) pairs with whole offsets from 0 to {len(self.text)}"
        )

    def misfit(self, given: list[Any]) -> str | None:
        """Why a list cannot be for the tokens of this response; None if it can. An empty one can."""
        fits = self._is_pair if _has_pairs(given) else is_number
        for place, item in enumerate(given):
            if not fits(item):
                return f"a list with {shortened(item)} at place {place}"
        fills = _has_pairs(given) or len(given) in (0, len(self.ids))
        return None if fills else f"a list of length {len(given)}"

    def land(self, given: list[Any]) -> list[float]:
        """One number for each token, from a list without `misfit`. Numbers that land on the same token add up."""
        if given and not _has_pairs(given):
            return [float(number) for number in given]
        prefix = cache(lambda last: self.decode(self.ids[: last + 1]))
        landed = [0.0] * len(self.ids)
        for offset, number in given:
            landed[self._token_at(offset, prefix)] += number
        return landed

    def _token_at(self, offset: int, prefix: Callable[[int], str]) -> int:
        """The first token whose `prefix` agrees with the text up to a character, that one included.

        A prefix that ends within a character reads otherwise there, and with some decoders already before. What is
        right in a prefix stays as long in all further ones: so a search by length finds where to look from, except
        for text with the sign of a broken character, which may be right by chance.
        """
        if offset == len(self.text):
            return len(self.ids) - 1
        tokens, wanted = range(len(self.ids)), self.text[: offset + 1]
        first = 0 if BROKEN in wanted else bisect_left(tokens, True, key=lambda last: len(prefix(last)) > offset)
        return next(last for last in tokens[first:] if prefix(last).startswith(wanted))

    def _is_pair(self, item: Any) -> bool:
        if not isinstance(item, list | tuple) or len(item) != 2:
            return False
        offset, number = item
        return type(offset) is int and 0 <= offset <= len(self.text) and is_number(number)


def spell_responses(
    sequences: Sequences, tokenizer: PreTrainedTokenizerBase, starts: Sequence[int] | None = None
) -> list[Spelling]:
    """Each response up to its length, from its token `starts` on where they are given; as text without special tokens,
    and otherwise just as the tokens spell it."""

    def decode(ids: list[int]) -> str:
        (text,) = tokenizer.batch_decode([ids], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    lengths = sequences.response_lengths.tolist()
    starts = starts or [0] * len(lengths)
    rows = zip(sequences.response_ids.tolist(), starts, lengths, strict=True)
    return [Spelling(ids=row[start:end], text=decode(row[start:end]), decode=decode) for row, start, end in rows]


def token_texts(ids: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase) -> list[list[str]]:
    """The text of each token, decoded by itself; for a special token its name."""
    distinct = sorted({token for row in ids for token in row})
    decoded = tokenizer.batch_decode([[token] for token in distinct], clean_up_tokenization_spaces=False)
    texts = dict(zip(distinct, decoded, strict=True))
    return [[texts[token] for token in row] for row in ids]


def is_number(value: Any) -> bool:
    """A finite number that float32 can hold."""
    return isinstance(value, int | float) and abs(value) <= LARGEST_SCORE


def _has_pairs(given: list[Any]) -> bool:
    return any(isinstance(item, list | tuple) for item in given)
