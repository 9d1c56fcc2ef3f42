"""`llmrl` with a fault planted on rank 1: python faulty.py FAULT PHASE ITERATION ARGUMENTS_OF_LLMRL"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

from llmrl.cli import main
from llmrl.distributed.activity import HERE, FollowedProgress
from llmrl.distributed.heartbeat import BEAT_S


def fail() -> None:
    raise AssertionError("planted")


def kill() -> None:
    time.sleep(2 * BEAT_S)  # until the others know where this rank is
    os.kill(os.getpid(), signal.SIGKILL)


def freeze() -> None:
    time.sleep(2 * BEAT_S)
    os.kill(os.getpid(), signal.SIGSTOP)


def hang() -> None:
    while True:
        time.sleep(1)


def run_out() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


FAULTS = {"has no memory": run_out, "fails": fail, "is killed": kill, "freezes": freeze, "hangs": hang}
HEALTHY = FollowedProgress.phase


def phase(self: FollowedProgress, name: str, total: int) -> None:
    HEALTHY(self, name, total)
    if os.environ["RANK"] == "1" and (HERE.phase, str(HERE.iteration)) == (place, iteration):
        Path("fault.json").write_text(json.dumps({"pid": os.getpid(), "time": time.time()}))
        FAULTS[fault]()


fault, place, iteration, *sys.argv[1:] = sys.argv[1:]
FollowedProgress.phase = phase
main()
