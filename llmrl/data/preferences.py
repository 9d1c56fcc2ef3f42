"""Preference pairs: two responses to a prompt, one of which was preferred, encoded once and dealt in shuffled epochs.

A row holds the two sides, and the prompt in one of these forms:

    prompt column         a text or messages; the sides are texts, or messages that end with the response
    messages on each side no prompt column: all but the last message, which both sides share
    transcripts           "\\n\\nHuman: ...\\n\\nAssistant: ...": all up to the last "Assistant:" that both sides share
                          and that answers the human; messages then, or a text still where no chat template is used
    other texts           the longest common beginning, shortened to white space, which goes to the responses

Beside a prompt column the sides may hold the whole conversation, if the prompt is what they share or the end of that;
two texts that both go on from a prompt of several words do.
A pair with an empty response is dropped and named, but a transcript may end with an assistant who says nothing: that
response is the EOS alone.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from llmrl.batches import PreferencePairs, Row
from llmrl.data.chat import (
    WRITTEN_MESSAGES,
    Message,
    Prompt,
    as_messages,
    as_sequences,
    eos_of,
    messages_problem,
    prompt_ids,
    prompt_problem,
    response_ids,
    text_problem,
    uses_chat,
)
from llmrl.data.config import PairsConfig
from llmrl.data.files import DataError, Rows, kind, listed
from llmrl.data.mixture import by_set, weights_of
from llmrl.data.rows import column_names, keep_usable, missing_column, missing_columns, places_of, read_rows
from llmrl.data.seam import common_length, keep_in_template, notes_on_seams
from llmrl.data.source import MixedSource

TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
"""The beginning of a turn in a transcript."""
TRANSCRIPT_ROLES = {"Human": "user", "Assistant": "assistant"}
REASONS = {
    "empty": "a response is empty",
    "identical": "both responses are identical",
    "duplicates": "they repeat an earlier pair",
    "contradictions": "another pair with the same prompt prefers the other way round",
    "too_long": "they are longer than max_tokens",
    "equal_when_cut": "both responses are the same tokens, truncated to max_tokens",
}
"""Why pairs are dropped, by the names that the report card has. Of contradictions all are."""
OF_TEXTS = ("empty", "identical", "duplicates", "contradictions")
OF_TOKENS = ("too_long", "equal_when_cut")
"""Reasons of each kind."""


@dataclass(frozen=True, kw_only=True)
class Preference:
    """One pair as text."""

    prompt: Prompt
    chosen: str
    rejected: str
    margin: float
    """Margin of the pair, 0 where the data has none."""
    source: str | None
    place: str
    """Place of its row, for messages."""


@dataclass(frozen=True, kw_only=True)
class PairCounts:
    """How many rows there are, and the places of those that were dropped, by the reason, a key of `REASONS`."""

    rows: int
    dropped: Mapping[str, Sequence[str]]

    @classmethod
    def total(cls, counts: "Sequence[PairCounts]") -> "PairCounts":
        """The counts of several sets together."""
        places = {name: [place for each in counts for place in each.dropped.get(name, ())] for name in REASONS}
        return cls(rows=sum(each.rows for each in counts), dropped=places)

    @property
    def kept(self) -> int:
        """Pairs that are left."""
        return self.rows - sum(map(len, self.dropped.values()))

    def numbers(self) -> dict[str, int]:
        """``rows``, ``kept``, and the number of those dropped for each reason."""
        return {"rows": self.rows, "kept": self.kept, **{name: len(self.dropped.get(name, ())) for name in REASONS}}

    def lines(self, reasons: Sequence[str] = (*OF_TEXTS, *OF_TOKENS)) -> list[str]:
        """One sentence for each of these reasons for which pairs were dropped, with the first places."""
        found = [(REASONS[name], places) for name in reasons if (places := self.dropped.get(name))]
        return [f"dropped {len(x)} of {self.rows} pairs: {reason} ({listed(x)})" for reason, x in found]


@dataclass(frozen=True, kw_only=True)
class EncodedPair:
    """One pair as token ids."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    margin: float
    source: str | None


class _BadPair(Exception):
    """Why one row is no preference pair; collected and listed with the others."""


class _EmptyResponse(Exception):
    """A pair of the right form, one response of which is empty."""


def read_preference_rows(config: PairsConfig) -> Rows:
    """The rows that a config names, checked."""
    return keep_usable_pairs(read_rows(config), config)


def keep_usable_pairs(rows: Sequence[Row], config: PairsConfig) -> Rows:
    """The rows that are pairs; see `keep_usable` for the others."""
    return _parse_rows(rows, config)[0]


def keep_pairs_in_template(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, config: PairsConfig) -> Rows:
    """The rows whose prompt the chat template takes, with notes on the pairs that will be dropped, and on where prompts
    and chosen responses meet."""
    eos_of(tokenizer)  # refused here, before the model loads
    config = _as_read(config, tokenizer)
    rows, pairs, empty = _parse_rows(rows, config)
    prompt_of = {pair.place: pair.prompt for pair in pairs}
    kept = keep_in_template(rows, [prompt_of.get(place) for place in places_of(rows)], tokenizer, config)
    left = set(places_of(kept))
    taken = [pair for pair in pairs if pair.place in left]
    _, counts = _different(kept, taken, [place for place in empty if place in left])
    kept.notes += counts.lines()
    kept.notes += notes_on_seams([(pair.prompt, pair.chosen) for pair in taken], tokenizer, config)
    return kept


def parse_preferences(rows: Sequence[Row], config: PairsConfig) -> tuple[list[Preference], PairCounts]:
    """The pairs worth learning from, in data order, and counts of the others."""
    return _different(*_parse_rows(rows, config))


def _different(
    rows: Sequence[Row], parsed: Sequence[Preference], empty: Sequence[str]
) -> tuple[list[Preference], PairCounts]:
    """See `parse_preferences`; the arguments are what `_parse_rows` returns."""
    different = [pair for pair in parsed if pair.chosen != pair.rejected]
    first: dict[tuple[str, str, str], Preference] = {}
    for pair in different:
        first.setdefault((_prompt_key(pair.prompt), pair.chosen, pair.rejected), pair)
    kept = [pair for (prompt, better, worse), pair in first.items() if (prompt, worse, better) not in first]
    steps = pairwise((parsed, different, list(first.values()), kept))
    dropped = [empty, *(_sorted_out(before, after) for before, after in steps)]
    return kept, PairCounts(rows=len(rows), dropped=dict(zip(OF_TEXTS, dropped, strict=True)))


def _sorted_out(before: Sequence[Preference], after: Sequence[Preference]) -> list[str]:
    """Places of the pairs that are not left."""
    left = {pair.place for pair in after}
    return [pair.place for pair in before if pair.place not in left]


def encode_pairs(
    preferences: Sequence[Preference], tokenizer: PreTrainedTokenizerBase, config: PairsConfig
) -> tuple[list[EncodedPair], dict[str, list[str]]]:
    """``(pairs, dropped)``: the ids of the pairs that fit, and the places of the others by the reason."""
    prompts, places = [pair.prompt for pair in preferences], [pair.place for pair in preferences]
    encoded = zip(
        preferences,
        prompt_ids(prompts, tokenizer, config, places=places) if preferences else [],
        response_ids([pair.chosen for pair in preferences], tokenizer, config) if preferences else [],
        response_ids([pair.rejected for pair in preferences], tokenizer, config) if preferences else [],
        strict=True,
    )
    pairs: list[EncodedPair] = []
    dropped: dict[str, list[str]] = {reason: [] for reason in OF_TOKENS}
    for pair, prompt, chosen, rejected in encoded:
        room = config.max_tokens - len(prompt)
        if room < (1 if config.truncate else max(len(chosen), len(rejected))):
            dropped["too_long"].append(pair.place)
        elif chosen[:room] == rejected[:room]:
            dropped["equal_when_cut"].append(pair.place)
        else:
            pairs.append(
                EncodedPair(
                    prompt_ids=prompt,
                    chosen_ids=chosen[:room],
                    rejected_ids=rejected[:room],
                    margin=pair.margin,
                    source=pair.source,
                )
            )
    return pairs, dropped


class PairSource(MixedSource[EncodedPair]):
    """Deals preference pairs in shuffled epochs. Each set of rows is searched for repeated and contradicting pairs by
    itself."""

    def __init__(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, config: PairsConfig, *, seed: int
    ) -> None:
        sets, counts = zip(*(_encode_set(part, tokenizer, each) for each, part in by_set(rows, config)), strict=True)
        self.counts = PairCounts.total(counts)
        super().__init__([(pairs, ()) for pairs in sets], seed=seed, rows=rows, weights=weights_of(config))

    @property
    def sources(self) -> tuple[str | None, ...]:
        """Source of each pair, in data order."""
        return tuple(pair.source for pair in self._examples)

    def next(self, num_pairs: int) -> PreferencePairs:
        """The next pairs as one batch."""
        return _batch(self.take(num_pairs))

    def all(self) -> PreferencePairs:
        """Every pair once, in data order; what `next` deals is not changed by it."""
        return _batch(self._examples)

    def evenly_spaced(self, num_pairs: int) -> PreferencePairs:
        """This many pairs, spread over the data from the first to the last; all where there are no more."""
        places = torch.linspace(0, self.num_rows - 1, min(num_pairs, self.num_rows), dtype=torch.float64).round()
        return _batch([self._examples[n] for n in places.long().tolist()])

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with one of its responses."""
        return max(len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in self._examples)


def _encode_set(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, config: PairsConfig
) -> tuple[list[EncodedPair], PairCounts]:
    """The pairs of one set of rows that are left, and counts of the others."""
    config = _as_read(config, tokenizer)
    preferences, counts = parse_preferences(rows, config)
    pairs, dropped = encode_pairs(preferences, tokenizer, config)
    counts = replace(counts, dropped={**counts.dropped, **dropped})
    if not pairs:
        raise DataError(
            f"{config.path}: no pair is left: "
            + "; ".join(counts.lines())
            + (f"; raise data.max_tokens ({config.max_tokens})" if any(dropped.values()) else "")
        )
    return pairs, counts


def _batch(pairs: Sequence[EncodedPair]) -> PreferencePairs:
    prompts = [pair.prompt_ids for pair in pairs]
    return PreferencePairs(
        chosen=as_sequences(prompts, [pair.chosen_ids for pair in pairs]),
        rejected=as_sequences(prompts, [pair.rejected_ids for pair in pairs]),
        margin=torch.tensor([pair.margin for pair in pairs]),
    )


def _prompt_key(prompt: Prompt) -> str:
    """Equal for equal prompts only; a text never equals messages."""
    return json.dumps(prompt, sort_keys=True, default=str)


def _as_read(config: PairsConfig, tokenizer: PreTrainedTokenizerBase) -> PairsConfig:
    """The config by which rows are parsed for a tokenizer: without a chat template, transcripts stay texts."""
    return config if uses_chat(tokenizer, config) else replace(config, template="none")


def _parse_rows(rows: Sequence[Row], config: PairsConfig) -> tuple[Rows, list[Preference], list[str]]:
    """The rows that are pairs, the pairs of those without an empty response, and the places of those with one; see
    `keep_usable` for the others."""
    columns, places = _present_columns(rows, config), places_of(rows)
    parsed = [_try_row(row, config, columns, place) for row, place in zip(rows, places, strict=True)]
    problems = iter([str(found) if isinstance(found, _BadPair) else None for found in parsed])
    kept = keep_usable(rows, config, lambda row: next(problems))
    pairs = [found for found in parsed if isinstance(found, Preference)]
    empty = [place for place, found in zip(places, parsed, strict=True) if isinstance(found, _EmptyResponse)]
    if not pairs:
        raise DataError(f"{config.path}: each of the {len(kept)} pairs has an empty response")
    return kept, pairs, empty


def _try_row(row: Row, config: PairsConfig, present: list[str], place: str) -> "Preference | _BadPair | _EmptyResponse":
    try:
        return _parse_row(row, config, present, place)
    except (_BadPair, _EmptyResponse) as problem:
        return problem


def _present_columns(rows: Sequence[Row], config: PairsConfig) -> list[str]:
    """The columns that some row has. One that the settings name and no row has is refused."""
    present = column_names(rows)
    for setting in ("prompt_column", "margin_column", "source_column"):
        name = getattr(config, setting)
        if name not in present and name != getattr(PairsConfig, setting):
            missing = missing_column(dict.fromkeys(present), name)
            raise DataError(f"{config.path}: data.{setting}: no row has it: {missing}")
    return present


def _parse_row(row: Row, config: PairsConfig, present: list[str], place: str) -> Preference:
    has_prompt = config.prompt_column in present
    settings = ("chosen_column", "rejected_column", *(["prompt_column"] if has_prompt else []))
    if missing := missing_columns(row, config, *settings):
        raise _BadPair(missing)
    prompt, chosen, rejected = _split_with_prompt(row, config) if has_prompt else _split(row, config)
    return Preference(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        margin=_margin(row, config),
        source=_source(row, config),
        place=place,
    )


def _split_with_prompt(row: Row, config: PairsConfig) -> tuple[Prompt, str, str]:
    """``(prompt, chosen, rejected)`` of a row with a prompt of its own."""
    prompt = row[config.prompt_column]
    if problem := prompt_problem(prompt):
        raise _BadPair(f"{config.prompt_column!r} {problem}")
    chosen, rejected = _sides(row, config)
    if isinstance(prompt, str) and isinstance(chosen, str) and _is_open_transcript(prompt):
        if chosen.startswith(prompt) and rejected.startswith(prompt):
            return _split_transcripts(chosen, rejected, config)
        return _split_transcripts(prompt + chosen, prompt + rejected, config)
    if isinstance(chosen, str):
        begun = isinstance(prompt, str) and _go_on_from(prompt, chosen, rejected)
        return (prompt, chosen[len(prompt) :], rejected[len(prompt) :]) if begun else (prompt, chosen, rejected)
    own = as_messages(prompt)
    shared = chosen[:-1]
    if len(shared) > len(own) and shared == rejected[:-1] and shared[-len(own) :] == own:
        return _split_messages(chosen, rejected)
    for column, side in ((config.chosen_column, chosen), (config.rejected_column, rejected)):
        if side[:-1] not in ([], own):
            raise _BadPair(
                f"{column!r} begins with other messages than {config.prompt_column!r}; let it hold the response alone, "
                f"or leave the prompt out by data.rename_columns={{{config.prompt_column}: null}}"
            )
    return prompt, chosen[-1]["content"], rejected[-1]["content"]


def _go_on_from(prompt: str, *sides: str) -> bool:
    """Whether texts repeat the prompt and then respond. One word, as "Hello", a response may begin with of itself."""
    return len(prompt.split()) > 1 and all(x.startswith(prompt) and x[len(prompt) :].strip() for x in sides)


def _split(row: Row, config: PairsConfig) -> tuple[Prompt, str, str]:
    """``(prompt, chosen, rejected)`` of a row whose sides both begin with the prompt."""
    chosen, rejected = _sides(row, config)
    if not isinstance(chosen, str):
        return _split_messages(chosen, rejected)
    if _is_transcript(chosen) and _is_transcript(rejected):
        return _split_transcripts(chosen, rejected, config)
    return _split_texts(chosen, rejected, config)


def _sides(row: Row, config: PairsConfig) -> tuple[Any, Any]:
    """Both sides: two texts, or two lists of messages that end with the assistant's."""
    chosen, rejected = row[config.chosen_column], row[config.rejected_column]
    for column, side in ((config.chosen_column, chosen), (config.rejected_column, rejected)):
        if problem := _side_problem(side):
            raise _BadPair(f"{column!r} {problem}")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise _BadPair("one side is a text and the other is messages; make both the same")
    if not all((side if isinstance(side, str) else side[-1]["content"]).strip() for side in (chosen, rejected)):
        raise _EmptyResponse
    return (chosen, rejected) if isinstance(chosen, str) else (as_messages(chosen), as_messages(rejected))


def _side_problem(side: Any) -> str | None:
    match side:
        case str() if WRITTEN_MESSAGES.match(side):
            return text_problem(side)
        case str():
            return None
        case []:
            return "is an empty list of messages"
        case list():
            return messages_problem(side) or _ending_problem(side[-1])
    return f"must be a text or a list of messages, not {kind(side)}"


def _ending_problem(message: Message) -> str | None:
    if message["role"] == "assistant":
        return None
    return f"ends with a message of the role {message['role']!r}; end with the assistant's response"


def _split_messages(chosen: list[Any], rejected: list[Any]) -> tuple[Prompt, str, str]:
    prompt = chosen[:-1]
    if rejected[:-1] != prompt:
        raise _BadPair("its sides must share all messages but the last")
    if not prompt:
        raise _BadPair("its sides hold a response only; put the prompt before it, or into a column of its own")
    if problem := prompt_problem(prompt):
        raise _BadPair(f"what its sides share {problem}")
    return prompt, chosen[-1]["content"], rejected[-1]["content"]


def _is_transcript(text: str) -> bool:
    return text.lstrip().startswith("Human:") and "\n\nAssistant:" in text


def _is_open_transcript(text: str) -> bool:
    """Whether a text ends where the assistant of a transcript is to speak."""
    return _is_transcript(text) and text.rstrip().endswith("\n\nAssistant:")


def _split_transcripts(chosen: str, rejected: str, config: PairsConfig) -> tuple[Prompt, str, str]:
    """``(prompt, chosen, rejected)`` of two transcripts. A response with further turns, as models write, keeps them."""
    for column, text in ((config.chosen_column, chosen), (config.rejected_column, rejected)):
        if TURN.findall(text)[-1] != "Assistant":
            raise _BadPair(f"{column!r} ends with the words of the human; end with the assistant's response")
    answers = [
        now.end() for last, now in pairwise(TURN.finditer(chosen)) if (last[1], now[1]) == ("Human", "Assistant")
    ]
    shared = [end for end in answers if rejected.startswith(chosen[:end])]
    if not shared:
        raise _BadPair("its sides are transcripts that do not begin with the same words of the human")
    prompt, chosen, rejected = chosen[: shared[-1]], chosen[shared[-1] :], rejected[shared[-1] :]
    if config.template == "none":
        return prompt, chosen, rejected
    return _transcript_messages(prompt), chosen.strip(), rejected.strip()


def _transcript_messages(prompt: str) -> list[dict[str, str]]:
    """The turns before the open "Assistant:". A speaker's turns in a row are one message, as many templates demand."""
    parts = TURN.split(prompt)
    turns = zip(parts[1:-2:2], parts[2:-2:2], strict=True)
    return [
        {"role": TRANSCRIPT_ROLES[speaker], "content": "\n\n".join(text.strip() for _, text in said)}
        for speaker, said in groupby(turns, key=lambda turn: turn[0])
    ]


def split_open_transcript(prompt: str, response: str, *, as_messages: bool) -> tuple[Prompt, str]:
    """``(prompt, response)`` as training reads them where the prompt is an open transcript; others stay as they are."""
    if not _is_open_transcript(prompt):
        return prompt, response
    end = len(prompt.rstrip())
    prompt, response = prompt[:end], prompt[end:] + response
    return (_transcript_messages(prompt), response.strip()) if as_messages else (prompt, response)


def _split_texts(chosen: str, rejected: str, config: PairsConfig) -> tuple[Prompt, str, str]:
    if chosen == rejected:
        return "", chosen, rejected  # dropped as identical, wherever its prompt ends
    prompt = _common_beginning(chosen, rejected)
    if not prompt.strip():
        raise _BadPair(
            "its sides have no common beginning that could be the prompt; "
            f"put it into a column {config.prompt_column!r}, or name its column by data.prompt_column"
        )
    chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    if not chosen.strip() or not rejected.strip():
        raise _EmptyResponse
    return prompt, chosen, rejected


def _common_beginning(one: str, other: str) -> str:
    """Beginning that two texts share, in whole words and without white space at its end."""
    end = common_length(one, other)
    common = one[:end]
    if common[-1:].isspace() or (one[end : end + 1].isspace() and other[end : end + 1].isspace()):
        return common.rstrip()
    *head, _ = common.rsplit(maxsplit=1) or [""]
    return head[0] if head else ""


def _margin(row: Row, config: PairsConfig) -> float:
    value = row.get(config.margin_column)
    if value is None or value == "":  # an empty cell of a CSV file
        return 0.0
    try:
        margin = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        margin = math.nan
    if not 0 <= margin < math.inf:
        raise _BadPair(f"{config.margin_column!r} ({value!r}) must be a number that is 0 or greater")
    return margin


def _source(row: Row, config: PairsConfig) -> str | None:
    value = row.get(config.source_column)
    if value is not None and not isinstance(value, str):
        raise _BadPair(f"{config.source_column!r} must be a text, not {kind(value)}")
    return value or None
