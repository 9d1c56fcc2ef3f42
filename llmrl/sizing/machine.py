"""The memory of this machine, which an estimate is compared with."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from llmrl.distributed.device import pick_device

CONTAINER_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Memory of a machine in bytes."""

    cpu: int
    gpu: int | None
    """Memory of one GPU in bytes; None where none is used."""


def this_machine() -> Machine:
    """The memory that this process could use: all of it, whatever else takes a part at the moment."""
    device = pick_device()
    gpu = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    limits = [int(text) for file in CONTAINER_LIMITS if (text := _content(file)).isdecimal()]
    return Machine(cpu=min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *limits]), gpu=gpu)


def _content(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
