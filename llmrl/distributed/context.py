"""Context of a process in a run: its launch, its device, its collectives and its progress."""

from dataclasses import dataclass
from typing import Literal

import torch

from llmrl.roles import Collectives, Progress


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Number of processes, and how weights are sharded over them."""

    world_size: int
    sharding: Literal["none", "deepspeed", "fsdp"]
    """none: every process holds all weights. deepspeed: ZeRO, at the stage that the launch file says. fsdp: FSDP2."""
    zero_stage: int = 0
    """Stage of DeepSpeed's ZeRO, 0 without DeepSpeed. From stage 3 no process has whole weights."""

    @property
    def splits_weights(self) -> bool:
        """Whether a process holds only a part of each weight, except while it computes with it."""
        return self.sharding == "fsdp" or self.zero_stage == 3


@dataclass(frozen=True, kw_only=True)
class Context:
    """Launch, device, collectives and progress of this process: read from the environment once and passed down."""

    launch: Launch
    device: torch.device
    """Device on which this process computes."""
    collectives: Collectives
    progress: Progress

    @property
    def loading_device(self) -> torch.device:
        """Device on which trained models are loaded: the CPU if the launch shards their weights, else `device`."""
        return torch.device("cpu") if self.launch.splits_weights else self.device

    @property
    def copy_device(self) -> torch.device | None:
        """Device for a full copy of the weights, needed when training splits them over ranks; None: share them."""
        return self.device if self.launch.splits_weights else None
