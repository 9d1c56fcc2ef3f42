"""The engine of our own: decodes only rows that are still growing, over the model's own forward.

All live rows share one write column, so a step writes one slice and the model builds its masks as always. A prompt is
prefilled once for its whole group. A row that finishes gives its slot to the last live row, so finished rows cost
nothing; as soon as a group's slots are free, the next prompt moves in. The result depends on none of this.
"""

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from llmrl.batches import Prompts, Rollout
from llmrl.roles import Progress, Sampling, Trainable
from llmrl.rollout.cache import SlotCache, num_columns
from llmrl.rollout.responses import Response, assemble, new_responses
from llmrl.rollout.rope import pin_rope
from llmrl.rollout.sampler import Sampler
from llmrl.rollout.support import RolloutError, check_cache, check_length
from llmrl.rollout.weights import SamplingWeights, evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFILL_TOKENS = 16_384
"""Prompt tokens of one forward pass, padding included."""


class NativeEngine:
    """`RolloutEngine` over any causal language model whose cache is plain attention.

    Args:
        model: The trained model, adapters injected in place or none. Sampling reads its weights live where they have
            `dtype`, and otherwise a copy that `load_weights` refreshes.
        eos_ids: Any of them ends a response.
        vocab_size: Length of the tokenizer; ids from there on, the padding of the embedding, have no probability.
        dtype: Precision of sampling.
        max_rows: Responses decoded at once.
        progress: Advanced by one for each complete response.
        apart: Where to sample from copies of all weights, if those that are trained are about to be split over ranks.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        *,
        eos_ids: tuple[int, ...],
        vocab_size: int,
        dtype: torch.dtype,
        max_rows: int,
        progress: Progress,
        apart: torch.device | None = None,
    ) -> None:
        check_cache(model)
        self.weights = SamplingWeights(model, dtype, apart)
        self.eos_ids = eos_ids
        self.vocab_size = vocab_size
        self.max_rows = max_rows
        self.progress = progress

    def generate(self, prompts: Prompts, sampling: Sampling) -> Rollout:
        """G responses to each prompt, on the model's device."""
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
        responses = new_responses(prompts, sampling)
        sampler = Sampler(sampling, eos_ids=self.eos_ids, vocab_size=self.vocab_size, progress=self.progress)
        cache = self._new_cache(len(responses), sampling.num_responses, longest + sampling.max_response_tokens)
        with evaluating(model):
            Decoding(model, cache, sampler, prompts, responses, longest).run()
        return assemble(prompts, responses, sampling)

    def load_weights(self, trained: Trainable) -> None:
        """Copies the weights of `trained.module.model`, unless the engine reads them live."""
        self.weights.load(trained)

    def _new_cache(self, num_responses: int, group_size: int, columns: int) -> SlotCache:
        """Room for a rollout. It lives no longer than that: the update needs the memory."""
        slots = min(num_responses, self.max_rows // group_size * group_size)
        return SlotCache(slots, num_columns(columns, refills=slots < num_responses))


@dataclass
class Row:
    """A response that is being decoded."""

    response: Response
    start: int
    """Column of its first prompt token."""


class Decoding:
    """One rollout on its way. Live rows are slots 0 .. len(rows) - 1 of the cache."""

    def __init__(
        self,
        model: "PreTrainedModel",
        cache: SlotCache,
        sampler: Sampler,
        prompts: Prompts,
        responses: list[Response],
        longest_prompt: int,
    ) -> None:
        self.model = model
        self.cache = cache
        self.sampler = sampler
        self.prompts = prompts
        self.prompt_lengths = prompts.mask.sum(dim=1).tolist()
        self.longest_prompt = longest_prompt
        self.group_size = sampler.sampling.num_responses
        self.responses = responses
        self.waiting = deque(range(len(prompts.rows)))
        self.rows: list[Row] = []

    def run(self) -> None:
        while self.rows or self.waiting:
            while self._admit():
                pass
            if self.rows:
                self._step()

    def _admit(self) -> bool:
        """Moves waiting prompts in, as many as have free slots for whole groups and fit in one forward pass, and draws
        their first tokens. Returns whether there were any."""
        count = self._num_to_admit()
        if count == 0:
            return False
        window = self.cache.window
        if not self.rows:
            window.end = self.longest_prompt
        admitted = [self.waiting.popleft() for _ in range(count)]
        prefilled, logits = self._prefill(admitted)
        self.cache.fill(len(self.rows), prefilled, copies=self.group_size)
        rows = [
            Row(self.responses[prompt * self.group_size + g], window.end - self.prompt_lengths[prompt])
            for prompt in admitted
            for g in range(self.group_size)
        ]
        self.rows += rows
        self.sampler.extend([row.response for row in rows], logits.repeat_interleave(self.group_size, dim=0))
        self._retire()
        return True

    def _num_to_admit(self) -> int:
        free = min(len(self.waiting), (self.cache.slots - len(self.rows)) // self.group_size)
        width = 0
        for count in range(free):
            width = max(width, self.prompt_lengths[self.waiting[count]])
            if count and (count + 1) * width > PREFILL_TOKENS:
                return count
        return free

    def _prefill(self, admitted: list[int]) -> tuple[list[DynamicLayer], Tensor]:
        """Keys and values of prompts, padded left to the longest of them, and the logits after their last tokens."""
        width = max(self.prompt_lengths[prompt] for prompt in admitted)
        ids = self.prompts.ids[admitted, -width:]
        mask = self.prompts.mask[admitted, -width:]
        cache = DynamicCache(config=self.model.config)
        logits = self._forward(ids, mask, (mask.cumsum(dim=1) - 1).clamp(min=0), cache)
        return cast("list[DynamicLayer]", cache.layers), logits

    def _step(self) -> None:
        """One more token for every live row."""
        window = self.cache.window
        if window.end == self.cache.columns:
            self._move_to_front()
        device = self.prompts.ids.device
        tokens, starts = torch.tensor([(row.response.ids[-1], row.start) for row in self.rows], device=device).T
        mask = torch.arange(window.start, window.end + 1, device=device) >= starts[:, None]
        logits = self._forward(tokens[:, None], mask, (window.end - starts)[:, None], self.cache)
        window.end += 1
        self.sampler.extend([row.response for row in self.rows], logits)
        self._retire()

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """The model's own forward; positions count real tokens only. Logits of the last column."""
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]

    def _retire(self) -> None:
        """Gives the slot of every complete row to the last live one, and fits the window to the rows that are left."""
        self._fit_window()
        for slot in reversed(range(len(self.rows))):
            if self.sampler.is_complete(self.rows[slot].response):
                last = self.rows.pop()
                if slot < len(self.rows):
                    self.rows[slot] = last
                    self.cache.move_row(len(self.rows), slot)
        self._fit_window()

    def _fit_window(self) -> None:
        window = self.cache.window
        window.rows = len(self.rows)
        window.start = min((row.start for row in self.rows), default=window.end)

    def _move_to_front(self) -> None:
        """Moves the window as far to the front as the longest waiting prompt allows."""
        window = self.cache.window
        shift = window.end - max(window.end - window.start, self.longest_prompt)
        self.cache.move_columns(shift)
        for row in self.rows:
            row.start -= shift
