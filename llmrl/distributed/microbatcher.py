"""The passes of this rank over a batch, in microbatches whose size follows the memory that there is."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from llmrl.batches import ReadBatch
from llmrl.distributed.activity import HERE
from llmrl.distributed.context import Context
from llmrl.memory import MemoryFull, making_room, out_of_memory
from llmrl.microbatches import TokenBudget, halved, parts_of_rank

Parts = Sequence[Tensor]
"""Row indices of forward passes, (rows of the pass,) each."""
Result = TypeVar("Result")


class Microbatcher:
    """Splits batches into this rank's forward passes, each within a token budget.

    Where memory runs out, the budget is halved, for the rest of the run, and a line says so. Several processes, and
    weights that DeepSpeed or FSDP2 holds, cannot go back in the middle of a step: then that line is the error.
    """

    def __init__(self, budget: TokenBudget, context: Context) -> None:
        self.budget = budget
        self.collectives = context.collectives
        self.progress = context.progress
        self.can_go_back = context.collectives.world_size == 1 and context.launch.sharding == "none"
        """Whether work in which memory ran out can be done again."""

    def run(self, batch: ReadBatch, work: Callable[[Parts, Parts], Result]) -> Result:
        """Result of ``work(parts, idle)``, see `parts_of_rank`: called again, with smaller parts, after memory ran out,
        so that it begins by dropping what an earlier call has left.

        Raises:
            MemoryFull: One row does not fit, or there is no way back.
        """

        def attempt() -> Result:
            return work(*parts_of_rank(batch, self.budget, self.collectives.rank, self.collectives.world_size))

        return making_room(attempt, partial(self._make_room, batch))

    def _make_room(self, batch: ReadBatch, usage: str) -> None:
        setting, smaller = self.budget.setting, halved(batch, self.budget)
        checkpointing = "set model.gradient_checkpointing=true, or " if torch.is_grad_enabled() else ""
        size = f" with microbatches of {self.budget.max_tokens} tokens"
        if not self.can_go_back:
            raise MemoryFull(out_of_memory(usage, HERE.phase, f"{checkpointing}lower {setting}", with_what=size))
        if smaller is None:
            way_out = f"{checkpointing}shorten the longest rows, or take a smaller model"
            raise MemoryFull(out_of_memory(usage, HERE.phase, way_out, with_what=" with one row in a microbatch"))
        self.budget = smaller
        now = f"goes on with {smaller.max_tokens}; set {setting}={smaller.max_tokens}"
        self.progress.message(out_of_memory(usage, HERE.phase, now, with_what=size))
