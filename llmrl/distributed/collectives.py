"""Communication between ranks, and the same interface for a single process."""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llmrl.distributed.activity import HERE
from llmrl.distributed.context import Context
from llmrl.distributed.device import pick_device, synchronize
from llmrl.distributed.launch import check_rendezvous, read_launch
from llmrl.roles import Collectives, Progress

COLLECTIVE_TIMEOUT = timedelta(hours=12)
"""Ranks may wait so long for each other. How long is too long is for the heartbeat to say, which names who is late."""


class OneProcess(Collectives):
    """`Collectives` of a run in a single process: every sum over ranks is the number itself."""

    rank = 0
    world_size = 1

    def sum(self, x: Tensor) -> Tensor:
        return x

    def gather(self, x: Any) -> list[Any]:
        return [x]


class ProcessGroup(Collectives):
    """`Collectives` over torch's default process group: gloo between CPUs, NCCL between GPUs."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()

    def sum(self, x: Tensor) -> Tensor:
        total = x.clone()
        with HERE.waiting():
            dist.all_reduce(total)
            synchronize(total.device)  # NCCL only queues it, and whoever waits would not be seen to
        return total

    def gather(self, x: Any) -> list[Any]:
        gathered: list[Any] = [None] * self.world_size
        with HERE.waiting():
            dist.all_gather_object(gathered, x)
        return gathered


def join_ranks() -> Collectives:
    """The process group that a launcher such as `accelerate launch` asks for, or this process alone.

    What lies on GPUs goes through NCCL, everything else through gloo. A single process has a group too where it was
    launched for DeepSpeed or FSDP, which need one.
    """
    launch = read_launch()
    if launch.world_size == 1 and launch.sharding == "none":
        return OneProcess()
    if not dist.is_initialized():
        check_rendezvous(launch.world_size)
        device = pick_device()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
    return ProcessGroup()


def make_context(collectives: Collectives, progress: Progress) -> Context:
    """The context of this process, as it was launched."""
    return Context(launch=read_launch(), device=pick_device(), collectives=collectives, progress=progress)


def leave_ranks() -> None:
    """Ends the process group, where there is one: without that gloo now and then aborts at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()
