"""How a process takes part in a run: its launch, its device, the ranks beside it, and who receives its progress."""

from dataclasses import dataclass
from typing import Literal

import torch

from llmrl.roles import Collectives, Progress


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How a run was launched."""

    world_size: int
    sharding: Literal["none", "deepspeed", "fsdp"]
    """none: every process holds all weights. deepspeed: ZeRO, at the stage that the launch file says. fsdp: FSDP2."""
    zero_stage: int = 0
    """Stage of DeepSpeed's ZeRO: from 3 on no process has whole weights."""

    @property
    def splits_weights(self) -> bool:
        """Whether a process holds only a part of each weight, except while it computes with it."""
        return self.sharding == "fsdp" or self.zero_stage == 3


@dataclass(frozen=True, kw_only=True)
class Context:
    """What every part of a run shares. Read from the environment once and handed down."""

    launch: Launch
    device: torch.device
    """Where this process computes."""
    collectives: Collectives
    progress: Progress

    @property
    def loading_device(self) -> torch.device:
        """Where models that learn are loaded: where they compute, or on the CPU if no device has to hold them whole."""
        return torch.device("cpu") if self.launch.splits_weights else self.device

    @property
    def copy_device(self) -> torch.device | None:
        """Device for a full copy of the weights, needed when training splits them over ranks; None: share them."""
        return self.device if self.launch.splits_weights else None
