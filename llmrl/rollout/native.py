"""The engine of our own: decodes only rows that are still growing, over the model's own forward.

All live rows share one write column, so a step writes one slice and the model builds its masks as always. A prompt is
prefilled once for its whole group. A row that finishes gives its slot to the last live row, so finished rows cost
nothing; as soon as a group's slots are free, the next prompt moves in. The result depends on none of this.

Padding would enter the state of a convolution or a recurrence. So a model that has one reads prompts of one length at a
time, the shortest first, without padding.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, takewhile
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from llmrl.batches import NewContext, Prompts, Rollout, StopReason
from llmrl.distributed.activity import HERE
from llmrl.memory import MemoryFull, is_full, making_room, out_of_memory
from llmrl.messages import class_and_message
from llmrl.roles import Progress, Replies, Sampling, Trainable
from llmrl.rollout.cache import SlotCache, holds_states, num_columns
from llmrl.rollout.linear import few_row_forwards, replacing
from llmrl.rollout.responses import Responses
from llmrl.rollout.rope import pin_rope
from llmrl.rollout.sampler import Sampler
from llmrl.rollout.support import (
    RolloutError,
    carries_states,
    check_cache,
    check_length,
    reads_by_position,
    refusal,
    with_cache,
)
from llmrl.rollout.weights import SamplingWeights, evaluating
from llmrl.routing import RouteRecorder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmrl.rollout.graphs import GraphDecoder

PREFILL_TOKENS = 16_384
"""Prompt tokens of one forward pass, padding included."""


STEPS_ASIDE = 16
"""Steps in which other rows grow, before a row that was set aside is waited for."""


class NativeEngine:
    """`RolloutEngine` over any causal language model that keeps keys and values, states of fixed size, or both.

    Args:
        model: The trained model, adapters injected in place or none. Sampling reads its weights live where they have
            `dtype`, and otherwise a copy that `load_weights` refreshes.
        eos_ids: Any of them ends a response.
        vocab_size: Length of the tokenizer; ids from there on, the padding of the embedding, have no probability.
        dtype: Precision of sampling.
        max_rows: Responses decoded at once. Fewer, for the rest of the run, once memory has run out.
        progress: Advanced by the number of responses that each step completes.
        copy_device: Device for a full copy of the weights, needed when the trained ones will be sharded; None: share
            them.
    """

    graphs: "GraphDecoder | None" = None
    """Decodes in the place of the general path, where there is one."""
    routers: "Sequence[nn.Module]" = ()
    """Routers of the model that samples, whose choices are recorded."""

    def __init__(
        self,
        model: "PreTrainedModel",
        *,
        eos_ids: tuple[int, ...],
        vocab_size: int,
        dtype: torch.dtype,
        max_rows: int,
        progress: Progress,
        copy_device: torch.device | None = None,
    ) -> None:
        check_cache(type(model), model.config)
        self.weights = SamplingWeights(model, dtype, copy_device)
        if carries_states(model.config):
            self._check_states()
        self.eos_ids = eos_ids
        self.vocab_size = vocab_size
        self.max_rows = max_rows
        self.rows_that_fit = max_rows
        """As far as is known, where memory has run out."""
        self.progress = progress

    def generate(
        self, prompts: Prompts, sampling: Sampling, replies: Callable[[Responses], Replies] | None = None
    ) -> Rollout:
        """G responses to each prompt, on the model's device.

        `replies` begins what answers the turns of the responses; None: a response is one turn. Such responses are
        decoded without CUDA graphs.

        Where memory runs out, half as many are decoded at once, from the start. The responses are, to the bit, those of
        an engine with this smaller `max_rows`; those of any other differ by the rounding of logits.

        Raises:
            MemoryFull: The responses to one prompt do not fit.
        """
        model = self.weights.fresh()
        longest = int(prompts.mask.sum(dim=1).max())
        check_length(model, longest, sampling.max_response_tokens)
        pin_rope(model, longest + sampling.max_response_tokens)
        if sampling.num_responses > self.max_rows:
            raise RolloutError(
                f"rollout.max_rows ({self.max_rows}) must hold a whole group of {sampling.num_responses} responses; "
                f"set it to at least {sampling.num_responses}"
            )
        prompts = prompts.to(model.device)
        return making_room(
            partial(self._decode, model, prompts, sampling, longest + sampling.max_response_tokens, replies),
            partial(self._make_room, len(prompts.rows), sampling.num_responses),
        )

    def _decode(
        self,
        model: "PreTrainedModel",
        prompts: Prompts,
        sampling: Sampling,
        columns: int,
        begin: Callable[[Responses], Replies] | None,
    ) -> Rollout:
        """Responses that take up to this many columns with their prompts."""
        slots = self._num_slots(len(prompts.rows), sampling.num_responses)
        responses = Responses(prompts, sampling, eos_ids=self.eos_ids)
        replies = None if begin is None else begin(responses)
        num_complete = 0

        def advance(count: int) -> None:
            nonlocal num_complete
            num_complete += count
            self.progress.advance(count)

        try:
            with evaluating(model), replacing(few_row_forwards(model)):
                if self.graphs is not None and replies is None:
                    self.graphs.decode(model, responses, sampling, advance, num_slots=slots)
                else:
                    sampler = Sampler(sampling, vocab_size=self.vocab_size)
                    cache = SlotCache(slots, num_columns(columns, refills=slots < len(responses.numbers)))
                    recorder = RouteRecorder(self.routers)
                    with recorder.recording():
                        Decoding(model, cache, sampler, responses, advance, replies, recorder).run()
        except (RuntimeError, MemoryError):
            self.progress.advance(-num_complete)  # of which nothing is left
            raise
        return responses.rollout()

    def _num_slots(self, num_prompts: int, group_size: int) -> int:
        """Responses decoded at once: of whole groups."""
        return min(num_prompts, max(self.rows_that_fit // group_size, 1)) * group_size

    def _make_room(self, num_prompts: int, group_size: int, usage: str) -> None:
        """Halves the responses decoded at once.

        Raises:
            MemoryFull: They are those to one prompt.
        """
        if self.graphs is not None:
            self.graphs.recorded = None
        slots = self._num_slots(num_prompts, group_size)
        size = f" with {slots} responses decoded at once"
        if slots == group_size:
            way_out = "lower rollout.max_response_tokens, the responses per prompt, or the length of prompts"
            raise MemoryFull(out_of_memory(usage, HERE.phase, way_out, with_what=size))
        self.rows_that_fit = slots // 2
        fewer = self._num_slots(num_prompts, group_size)
        now = f"goes on with {fewer}; set rollout.max_rows={fewer}"
        self.progress.message(out_of_memory(usage, HERE.phase, now, with_what=size))

    def _check_states(self) -> None:
        """Refuses a model that does not keep its states in a cache of transformers: has it read one token.

        Raises:
            RolloutError: With the reason.
        """
        model = self.weights.fresh()
        cache = DynamicCache(config=model.config)
        ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        try:
            with evaluating(model):
                last_logits(model, ids, torch.ones_like(ids, dtype=torch.bool), ids, cache)
        except (ValueError, TypeError, AttributeError, LookupError, RuntimeError, ImportError) as error:
            if is_full(error):
                raise
            raise refusal(model.config, class_and_message(error)) from error
        if not all(holds_states(layer) for layer in cache.layers):
            raise refusal(model.config, "it keeps states outside its cache")

    def load_weights(self, trained: Trainable) -> None:
        """Copies the weights of `trained.module.model`, unless the engine reads them live."""
        self.weights.load(trained)


@dataclass
class Row:
    """A response that is being decoded."""

    index: int
    """Its row in `Responses`."""
    start: int
    """Column of its first prompt token."""
    stop_reason: int = StopReason.NONE


@dataclass(frozen=True)
class Aside:
    """A row whose turn has ended, and which waits for what is fed to it, outside of the slots."""

    row: Row
    cache: Cache
    """What the model keeps of the rows that were set aside with it, their last tokens left out, padded left."""
    number: int
    """Its number in the cache."""
    length: int
    """Number of its tokens in the cache."""
    since: int
    """Steps of the decoding before it was set aside."""


class Decoding:
    """Decoding of one rollout. Live rows are slots 0 .. len(rows) - 1 of the cache.

    The last token of a live row is not in the cache yet: the next pass reads it.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        cache: SlotCache,
        sampler: Sampler,
        responses: Responses,
        advance: Callable[[int], None],
        replies: Replies | None,
        recorder: RouteRecorder,
    ) -> None:
        """`advance`: called with the number of responses that have become complete."""
        self.model = model
        self.cache = cache
        self.sampler = sampler
        self.responses = responses
        self.advance = advance
        self.recorder = recorder
        self.prompts = responses.prompts
        self.prompt_lengths = self.prompts.mask.sum(dim=1).tolist()
        self.longest_prompt = max(self.prompt_lengths)
        self.group_size = responses.group_size
        self.pads = not carries_states(model.config)
        waiting = range(len(self.prompts.rows))
        self.waiting = deque(waiting if self.pads else sorted(waiting, key=self.prompt_lengths.__getitem__))
        self.rows: list[Row] = []
        self.replies = replies
        self.aside: dict[int, Aside] = {}
        """Rows that wait for what is fed to them, by their index. Each has a slot that is kept free for it."""
        self.num_steps = 0
        self.layout: list[tuple[int, int]] = []
        """Index and start of each live row, as `layout_on_device` has them."""
        self.layout_on_device = self._tensor([])

    def run(self) -> None:
        """Decodes until every response is complete."""
        while self.rows or self.waiting or self.aside:
            while self.admit():
                self.retire()
            self.rejoin()
            if self.rows:
                self.step()
                self.retire()

    def admit(self) -> bool:
        """Moves waiting prompts in, as many as have free slots for whole groups and fit in one forward pass, and draws
        their first tokens. Returns whether there were any."""
        free = (self.cache.slots - len(self.rows) - len(self.aside)) // self.group_size
        count = self._num_in_one_pass([self.prompt_lengths[prompt] for prompt in islice(self.waiting, free)])
        if count == 0:
            return False
        window = self.cache.window
        if not self.rows:
            window.end = self.longest_prompt
        admitted = [self.waiting.popleft() for _ in range(count)]
        rows = [
            Row(prompt * self.group_size + g, window.end - self.prompt_lengths[prompt])
            for prompt in admitted
            for g in range(self.group_size)
        ]
        self._begin(rows, self.prompts, admitted, max(self.prompt_lengths[prompt] for prompt in admitted))
        return True

    def step(self) -> None:
        """Draws one more token for every live row."""
        window = self.cache.window
        if window.end == self.cache.columns:
            self._move_to_front()
        indices, starts = self._place()
        mask = torch.arange(window.start, window.end + 1, device=starts.device) >= starts[:, None]
        ids = self.responses.last_ids(indices)
        logits = last_logits(self.model, ids[:, None], mask, (window.end - starts)[:, None], self.cache)
        window.end += 1
        self.num_steps += 1
        self._extend(self.rows, indices, logits)

    def rejoin(self) -> None:
        """Feeds the rows that were set aside long enough ago, all of them where no other is growing, and has them grow
        on; those to which nothing is fed are complete. It waits for their replies, so that which rows are decoded
        together, and with it the rounding of their logits, depends on no clock."""
        due = [
            index for index, aside in self.aside.items() if not self.rows or self.num_steps - aside.since >= STEPS_ASIDE
        ]
        if not due:
            return
        assert self.replies is not None, "who set them aside"
        fed = {index: ids for index, ids in self.replies.take(due).items() if ids}
        back = [self.aside.pop(index) for index in due]
        same = {index: ids for index, ids in fed.items() if not isinstance(ids, NewContext)}
        self._take_in([aside for aside in back if aside.row.index in same])
        if same:
            self.feed(same)
        self.advance(len(due) - len(fed))
        if len(same) < len(fed):
            self._restart([aside.row for aside in back if aside.row.index in fed.keys() - same.keys()], fed)
            self.retire()

    def feed(self, fed: Mapping[int, Sequence[int]]) -> None:
        """Feeds tokens to live rows, by their index in `Responses`: one or more to each, and all at once.

        Between a draw and `retire`, so that a row goes on which its EOS has just ended. The next step draws what comes
        after the last fed token.

        Raises:
            ValueError: A response has no room for them.
        """
        rows = [row for row in self.rows if row.index in fed]
        assert len(rows) == len(fed), "only live rows can be fed"
        assert all(fed.values()), "a row is fed at least one token"
        indices = self._indices(rows)
        last_ids = self.responses.last_ids(indices).tolist()
        self.responses.feed(fed)
        for row, stop_reason in zip(rows, self.responses.stop_reason[indices].tolist(), strict=True):
            row.stop_reason = stop_reason
        unread = [[last_id, *fed[row.index][:-1]] for last_id, row in zip(last_ids, rows, strict=True)]
        room = min((row.start - len(ids) for row, ids in zip(rows, unread, strict=True)), default=0)
        if room < 0:
            self._shift(room)
        while rows:
            count = self._num_in_one_pass([len(ids) for ids in unread])
            self._read(rows[:count], unread[:count])
            rows, unread = rows[count:], unread[count:]

    def retire(self) -> None:
        """Gives the slot of every complete row to the last live one, and fits the window to the rows that are left."""
        num_rows, num_aside = len(self.rows), self._set_aside()
        for slot in reversed(range(num_rows)):
            if self.rows[slot].stop_reason != StopReason.NONE:
                last = self.rows.pop()
                if slot < len(self.rows):
                    self.rows[slot] = last
                    self.cache.move_row(len(self.rows), slot)
        self._fit_window()
        self.advance(num_rows - len(self.rows) - num_aside)

    def _set_aside(self) -> int:
        """Keeps what the model holds of the rows whose turn has ended by itself, and asks for the replies to them.
        Returns their number."""
        slots = [slot for slot, row in enumerate(self.rows) if row.stop_reason == StopReason.EOS]
        if self.replies is None or not slots:
            return 0
        rows = [self.rows[slot] for slot in slots]
        kept = self.cache.copy_slots(slots, start=min(row.start for row in rows))
        for number, row in enumerate(rows):
            self.aside[row.index] = Aside(row, kept, number, self.cache.window.end - row.start, self.num_steps)
        self.replies.ask(self.responses.last_turns(self._indices(rows)))
        return len(rows)

    def _take_in(self, back: list[Aside]) -> None:
        """Gives slots to rows that were set aside, their tokens before the write column."""
        self._make_way(max((aside.length for aside in back), default=0))
        for aside in back:
            row, kept = slice(aside.number, aside.number + 1), slice(-aside.length, None)
            self.cache.fill(len(self.rows), aside.cache, copies=1, rows=row, columns=kept)
            aside.row.start = self.cache.window.end - aside.length
            self.rows.append(aside.row)
        self._fit_window()

    def _restart(self, rows: list[Row], contexts: Mapping[int, Sequence[int]]) -> None:
        """Has rows that were set aside go on in new contexts, by their index in `Responses`: these are read like
        prompts, and the next tokens are drawn."""
        self.responses.feed({row.index: contexts[row.index] for row in rows})
        rows = sorted(rows, key=lambda row: len(contexts[row.index]))
        while rows:
            ids = [contexts[row.index] for row in rows]
            count = self._num_in_one_pass([len(each) for each in ids])
            width = len(ids[count - 1])
            self._make_way(width)
            for row, each in zip(rows[:count], ids, strict=False):
                row.start = self.cache.window.end - len(each)
            padded = self._tensor([[0] * (width - len(each)) + list(each) for each in ids[:count]])
            begins = width - self._tensor([len(each) for each in ids[:count]])
            mask = torch.arange(width, device=padded.device) >= begins[:, None]
            self._begin(rows[:count], Prompts(ids=padded, mask=mask, rows=()), list(range(count)), width)
            rows = rows[count:]

    def _make_way(self, longest: int) -> None:
        """Puts the write column where rows of this length fit before it."""
        window = self.cache.window
        if not self.rows:
            window.end = max(longest, self.longest_prompt)  # so that a waiting prompt has room beside them
        elif window.end < longest:
            self._shift(window.end - longest)

    def _extend(self, rows: list[Row], indices: Tensor, logits: Tensor, copies: int = 1) -> None:
        """Draws the next tokens of rows, of which the last pass read one for each `copies`."""
        if self.recorder.routers:
            routes = self.recorder.take(len(rows) // copies).repeat_interleave(copies, dim=0)
            self.responses.set_routes(indices, self.responses.lengths[indices], routes)
        for row, stop_reason in zip(rows, self.sampler.extend(self.responses, indices, logits), strict=True):
            row.stop_reason = stop_reason

    def _begin(self, rows: list[Row], prompts: Prompts, chosen: list[int], width: int) -> None:
        """Has the model read the chosen prompts, the longest of this width, gives the next slots to rows, as many
        adjacent ones for each prompt, and draws their next tokens."""
        copies = len(rows) // len(chosen)
        cache = DynamicCache(config=self.model.config)
        logits = read_prompts(self.model, prompts, chosen, width, cache)
        self.cache.fill(len(self.rows), cache, copies=copies)
        self.rows += rows
        self._fit_window()
        self._extend(rows, self._indices(rows), logits.repeat_interleave(copies, dim=0), copies)

    def _read(self, rows: list[Row], unread: list[list[int]]) -> None:
        """Has the model read each row's unread tokens, and writes their keys and values before the write column; what
        the row had moves to the front by as many columns.

        Tokens are padded on the right: then no row has a gap between what it had and what is new.
        """
        start, end = self.cache.window.start, self.cache.window.end
        slot_of = {row.index: slot for slot, row in enumerate(self.rows)}
        slots = [slot_of[row.index] for row in rows]
        starts = self._tensor([row.start for row in rows])[:, None]
        counts = self._tensor([len(ids) for ids in unread])[:, None]
        width = max(len(ids) for ids in unread)
        ids = self._tensor([ids + [0] * (width - len(ids)) for ids in unread])
        columns = torch.arange(start, end + width, device=ids.device)
        positions = end - starts + torch.arange(width, device=ids.device).minimum(counts - 1)
        cache = self.cache.copy_slots(slots)
        mask = (columns >= starts) & (columns < end + counts)
        step = width if self.pads else 1  # a recurrence that goes on by several tokens at once is rounded otherwise
        for first in range(0, width, step):
            read = slice(first, first + step)
            last_logits(self.model, ids[:, read], mask[:, : end - start + read.stop], positions[:, read], cache)
        for n, (slot, row) in enumerate(zip(slots, rows, strict=True)):
            kept = slice(row.start - start, end - start + len(unread[n]))
            self.cache.fill(slot, cache, copies=1, rows=slice(n, n + 1), columns=kept)
            row.start -= len(unread[n])
        self._fit_window()

    def _num_in_one_pass(self, lengths: Sequence[int]) -> int:
        """How many rows of these lengths, in order, the model reads in one forward pass; of one length, where it takes
        no padding."""
        if not self.pads:
            lengths = list(takewhile(lambda length: length == lengths[0], lengths))
        return num_in_one_pass(lengths)

    def _place(self) -> tuple[Tensor, Tensor]:
        """Indices and starts of the live rows on the device, copied there only when they have changed."""
        layout = [(row.index, row.start) for row in self.rows]
        if layout != self.layout:
            self.layout, self.layout_on_device = layout, self._tensor(layout)
        return self.layout_on_device[:, 0], self.layout_on_device[:, 1]

    def _fit_window(self) -> None:
        window = self.cache.window
        window.rows = len(self.rows)
        window.start = min((row.start for row in self.rows), default=window.end)

    def _move_to_front(self) -> None:
        """Moves the window as far to the front as the longest waiting prompt allows."""
        window = self.cache.window
        self._shift(window.end - max(window.end - window.start, self.longest_prompt))

    def _shift(self, columns: int) -> None:
        """Moves the window this many columns to the front; to the back, where negative."""
        self.cache.move_columns(columns)
        for row in self.rows:
            row.start -= columns

    def _indices(self, rows: list[Row]) -> Tensor:
        return self._tensor([row.index for row in rows])

    def _tensor(self, numbers: Sequence[object]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=self.prompts.ids.device)


def read_prompts(
    model: "PreTrainedModel", prompts: Prompts, chosen: Tensor | list[int], width: int, cache: Cache
) -> Tensor:
    """Writes keys and values of the chosen prompts, padded left to `width` tokens, into an empty cache. Returns the
    logits after their last tokens."""
    mask = prompts.mask[chosen, -width:]
    return last_logits(model, prompts.ids[chosen, -width:], mask, (mask.cumsum(dim=1) - 1).clamp(min=0), cache)


def last_logits(model: "PreTrainedModel", ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache) -> Tensor:
    """Logits of the last column by the model's own forward; positions count real tokens only. A model without attention
    asks for neither mask nor positions: its rows are of one length."""
    context: dict[str, Any] = dict(with_cache(model, cache))
    if reads_by_position(type(model)):
        context |= {"attention_mask": mask, "position_ids": positions}
    return model(input_ids=ids, use_cache=True, logits_to_keep=1, **context).logits[:, -1]


def num_in_one_pass(lengths: Sequence[int]) -> int:
    """How many rows of these lengths, in order and padded to the longest, fit in one forward pass: at least one, if
    there is any."""
    width = 0
    for count, length in enumerate(lengths):
        width = max(width, length)
        if count and (count + 1) * width > PREFILL_TOKENS:
            return count
    return len(lengths)
