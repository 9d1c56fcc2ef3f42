"""Ranks as threads of one process, so that what ranks do together can be tested in milliseconds."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any, TypeVar

import torch
from torch import Tensor

from llmrl.roles import Collectives

Result = TypeVar("Result")


class ThreadGroup(Collectives):
    """`Collectives` of one of several threads."""

    def __init__(self, rank: int, meeting: Barrier, board: list[Any]) -> None:
        self.rank = rank
        self.world_size = meeting.parties
        self.meeting = meeting
        self.board = board

    def gather(self, x: Any) -> list[Any]:
        self.board[self.rank] = x
        self.meeting.wait(timeout=20)
        gathered = list(self.board)
        self.meeting.wait(timeout=20)
        return gathered

    def sum(self, x: Tensor) -> Tensor:
        return torch.stack(self.gather(x.clone())).sum(dim=0)


def on_ranks(world_size: int, work: Callable[[Collectives], Result]) -> list[Result]:
    """What `work` returns on each rank. It must not draw from the random numbers of torch, which the threads share."""
    meeting, board = Barrier(world_size), [None] * world_size
    with ThreadPoolExecutor(world_size) as threads:
        waiting = [threads.submit(work, ThreadGroup(rank, meeting, board)) for rank in range(world_size)]
        return [each.result() for each in waiting]
