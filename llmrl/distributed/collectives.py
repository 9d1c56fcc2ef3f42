"""Communication between ranks, and the same interface for a single process."""

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llmrl.distributed.activity import HERE
from llmrl.distributed.context import Context
from llmrl.distributed.device import pick_device, synchronize
from llmrl.distributed.launch import WAY_OUT, LaunchError, check_rendezvous, read_launch
from llmrl.distributed.stop import STOP
from llmrl.roles import Collectives, Progress

COLLECTIVE_TIMEOUT = timedelta(hours=12)
"""Timeout of torch's collectives. Long, because the heartbeat ends ranks earlier, and names the one that is late."""

JOIN_TIMEOUT = timedelta(minutes=10)
"""Time that ranks wait for each other at the start: the launcher, where they meet, may have died."""


class OneProcess(Collectives):
    """`Collectives` of a run in a single process: every sum over ranks is the number itself."""

    rank = 0
    world_size = 1

    def sum(self, x: Tensor) -> Tensor:
        return x

    def gather(self, x: Any) -> list[Any]:
        return [x]


class ProcessGroup(Collectives):
    """`Collectives` over torch's default process group: gloo between CPUs, NCCL between GPUs.

    Raises:
        Interrupted: A signal came to any rank, and they may leave here: by the same `gather` on all of them.
    """

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()

    def sum(self, x: Tensor) -> Tensor:
        total = x.clone()
        with HERE.waiting():
            dist.all_reduce(total)
            synchronize(total.device)  # NCCL only queues it: the wait would happen outside of `waiting`
        return total

    def gather(self, x: Any) -> list[Any]:
        gathered: list[Any] = [None] * self.world_size
        with HERE.waiting():
            dist.all_gather_object(gathered, (x, STOP.number))
        STOP.look_together([number for _, number in gathered])
        return [x for x, _ in gathered]


def join_ranks() -> Collectives:
    """Collectives of this launch: over a process group if there are several processes, else of this process alone.

    Tensors on GPUs go through NCCL, everything else through gloo. A single process has a group too if it was launched
    for DeepSpeed or FSDP, which need one.

    Raises:
        LaunchError: The other ranks cannot be reached.
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
        store, rank, world_size = _meet()
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT)
    return ProcessGroup()


def _meet() -> tuple[dist.Store, int, int]:
    """The store of this launch, this rank, and how many ranks there are."""
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=JOIN_TIMEOUT))
    except dist.DistError as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise LaunchError(
            f"the ranks of this launch did not meet at {place} (MASTER_ADDR and MASTER_PORT) within "
            f"{JOIN_TIMEOUT.total_seconds():.0f} s: its launcher or a rank has ended, or cannot be reached from here; "
            f"{WAY_OUT}"
        ) from error
    store.set_timeout(COLLECTIVE_TIMEOUT)
    return dist.PrefixStore("default_pg", store), rank, world_size


def make_context(collectives: Collectives, progress: Progress) -> Context:
    """Context of this process, with launch and device read from the environment."""
    return Context(launch=read_launch(), device=pick_device(), collectives=collectives, progress=progress)


def leave_ranks() -> None:
    """Destroys the process group, if there is one: without that gloo sometimes aborts at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()
