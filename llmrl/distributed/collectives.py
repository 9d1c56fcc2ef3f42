"""What ranks say to each other. One process has nobody to talk to."""

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

from llmrl.distributed.activity import HERE
from llmrl.distributed.config import DistributedConfig
from llmrl.roles import Collectives

MARGIN_S = 60.0
"""What a collective may last beyond the longest phase: whoever ends a run that is stuck is to be quicker than torch."""


class OneProcess:
    """`Collectives` of a run in a single process: every sum over ranks is the number itself."""

    rank = 0
    world_size = 1

    def sum(self, x: Tensor) -> Tensor:
        return x

    def max(self, x: Tensor) -> Tensor:
        return x

    def gather(self, x: Any) -> list[Any]:
        return [x]


class ProcessGroup:
    """`Collectives` over torch's default process group: gloo between CPUs, NCCL between GPUs."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()

    def sum(self, x: Tensor) -> Tensor:
        return self._reduced(x, dist.ReduceOp.SUM)

    def max(self, x: Tensor) -> Tensor:
        return self._reduced(x, dist.ReduceOp.MAX)

    def gather(self, x: Any) -> list[Any]:
        gathered: list[Any] = [None] * self.world_size
        with HERE.waiting():
            dist.all_gather_object(gathered, x)
        return gathered

    def _reduced(self, x: Tensor, operation: Any) -> Tensor:
        reduced = x.clone()
        with HERE.waiting():
            dist.all_reduce(reduced, operation)
        return reduced


def join_ranks(config: DistributedConfig | None = None) -> Collectives:
    """The process group that a launcher such as `accelerate launch` asks for, or this process alone.

    The first call makes the group, and needs its settings.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return OneProcess()
    limit = {} if config is None else {"timeout": timedelta(seconds=config.phase_timeout_s + MARGIN_S)}
    PartialState(cpu=not torch.cuda.is_available(), **limit)
    return ProcessGroup()


def leave_ranks() -> None:
    """Ends the process group, where there is one: without that gloo now and then aborts at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()
