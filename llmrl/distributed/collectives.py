"""What ranks say to each other. One process has nobody to talk to."""

import os
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

from llmrl.roles import Collectives


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
        dist.all_gather_object(gathered, x)
        return gathered

    def _reduced(self, x: Tensor, operation: Any) -> Tensor:
        reduced = x.clone()
        dist.all_reduce(reduced, operation)
        return reduced


def join_ranks() -> Collectives:
    """The process group that a launcher such as `accelerate launch` asks for, or this process alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return OneProcess()
    PartialState(cpu=not torch.cuda.is_available())
    return ProcessGroup()


def leave_ranks() -> None:
    """Ends the process group, where there is one: without that gloo now and then aborts at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()
