"""What the launcher asks for: how many processes, and how the weights that learn lie on them.

`accelerate launch` tells its processes by environment variables.
"""

import os
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

WAY_OUT = "see recipes/accelerate/ for files that work"


class LaunchError(ValueError):
    """A launch that cannot be served as it was asked for."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How a run was launched."""

    world_size: int
    sharding: Literal["none", "deepspeed", "fsdp"]
    """none: every process holds all weights. deepspeed: ZeRO, at the stage that the launch file says. fsdp: FSDP2."""
    zero_stage: int = 0
    """Of DeepSpeed: from 3 on no process has whole weights."""

    @property
    def splits_weights(self) -> bool:
        """Whether a process holds only a part of each weight, but for while it computes with it."""
        return self.sharding == "fsdp" or self.zero_stage == 3


def read_launch() -> Launch:
    """How this process was launched; by itself, where nobody says anything.

    Raises:
        LaunchError: The launcher asks for what llmrl does not do.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no":
        raise LaunchError(
            f"mixed_precision ({precision}) of the launch file: precision is the recipe's; set mixed_precision to "
            '"no" there and model.dtype to bfloat16 in the recipe'
        )
    if is_on("ACCELERATE_USE_MEGATRON_LM"):
        raise LaunchError(f"Megatron-LM of the launch file is not supported; choose DeepSpeed or FSDP: {WAY_OUT}")
    if is_on("ACCELERATE_USE_DEEPSPEED"):
        return Launch(world_size=world_size, sharding="deepspeed", zero_stage=_zero_stage())
    if is_on("ACCELERATE_USE_FSDP"):
        _check_fsdp()
        return Launch(world_size=world_size, sharding="fsdp")
    return Launch(world_size=world_size, sharding="none")


def _zero_stage() -> int:
    if find_spec("deepspeed") is None:
        raise LaunchError("DeepSpeed of the launch file is not installed; install llmrl[deepspeed]")
    from llmrl.distributed.deepspeed import read_settings

    stage = read_settings()["zero_optimization"]["stage"]
    if stage not in (1, 2, 3):
        raise LaunchError(f"zero_stage ({stage}) of the launch file must be 1, 2 or 3; {WAY_OUT}")
    return stage


def _check_fsdp() -> None:
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise LaunchError(f"fsdp_version ({version}) of the launch file must be 2; {WAY_OUT}")
    if is_on("FSDP_OFFLOAD_PARAMS"):
        raise LaunchError(
            "fsdp_offload_params of the launch file is not supported; set it to false, or choose DeepSpeed, which can "
            f"keep optimizer states and weights in the memory of the CPU: {WAY_OUT}"
        )


def is_on(name: str) -> bool:
    """Whether a variable of the environment says yes."""
    return os.environ.get(name, "false").lower() in ("true", "1", "yes")
