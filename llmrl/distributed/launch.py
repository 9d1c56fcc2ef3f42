"""The launch, from the environment variables that `accelerate launch` sets: number of processes, sharding."""

import os
import re
from importlib.util import find_spec
from typing import Any

from llmrl.distributed.context import Launch
from llmrl.errors import Error

RENDEZVOUS = ("RANK", "MASTER_ADDR", "MASTER_PORT")
"""Variables that a launcher sets for each of several processes, in addition to WORLD_SIZE."""
MIXED_PRECISIONS = {"bfloat16": "bf16"}
"""Name that accelerate has for the mixed precision of a dtype: products in it, weights in float32."""
WAY_OUT = "see recipes/accelerate/ for files that work"


class LaunchError(Error, ValueError):
    """A launch that asks for what llmrl does not support or this machine does not have."""


def read_launch() -> Launch:
    """The launch of this process; a single process if the environment says nothing.

    Raises:
        LaunchError: The launcher asks for what llmrl does not support.
    """
    world_size = number("WORLD_SIZE", least=1, otherwise=1)
    if is_on("ACCELERATE_USE_MEGATRON_LM"):
        raise LaunchError(f"Megatron-LM of the launch file is not supported; choose DeepSpeed or FSDP: {WAY_OUT}")
    if is_on("ACCELERATE_USE_DEEPSPEED"):
        return Launch(world_size=world_size, sharding="deepspeed", zero_stage=_zero_stage())
    if is_on("ACCELERATE_USE_FSDP"):
        _check_fsdp()
        return Launch(world_size=world_size, sharding="fsdp")
    return Launch(world_size=world_size, sharding="none")


def check_mixed_precision(dtype: str) -> None:
    """Checks that the launch asks for no other precision than the recipe, whose `model.dtype` is what computes.

    Raises:
        LaunchError: It does.
    """
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION") or "no"
    if precision not in ("no", MIXED_PRECISIONS.get(dtype)):
        raise LaunchError(
            f"mixed_precision ({precision}) of the launch, in its file or as ACCELERATE_MIXED_PRECISION, differs from "
            f'model.dtype ({dtype}), which is what computes; set mixed_precision to "no"'
            + (", or model.dtype to bfloat16" if precision == "bf16" else "")
        )


def _zero_stage() -> int:
    if find_spec("deepspeed") is None:
        raise LaunchError("DeepSpeed of the launch file is not installed; install llmrl[deepspeed]")

    stage = deepspeed_settings()["zero_optimization"]["stage"]
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


def check_rendezvous(world_size: int) -> None:
    """Checks the variables that ranks need for their rendezvous, before any rank waits for the others.

    Raises:
        LaunchError: One is missing or invalid.
    """
    missing = [name for name in RENDEZVOUS if not os.environ.get(name)]
    if missing:
        raise LaunchError(
            f"WORLD_SIZE ({world_size}) is set in the environment, and {' and '.join(missing)} not: unset WORLD_SIZE "
            f"for one process, or start several with accelerate launch; {WAY_OUT}"
        )
    if (rank := number("RANK", least=0, otherwise=0)) >= world_size:
        raise LaunchError(f"RANK ({rank}) in the environment must be less than WORLD_SIZE ({world_size})")
    number("MASTER_PORT", least=0, otherwise=0)


def local_rank() -> int:
    """Rank of this process on its machine; 0 if no launcher sets it, or sets it to -1."""
    return max(number("LOCAL_RANK", least=-1, otherwise=0), 0)


def gpu_warning(*, has_gpu: bool) -> str | None:
    """A warning if the launch seems to be for GPUs and this process computes on the CPU; else None."""
    is_launched = "ACCELERATE_MIXED_PRECISION" in os.environ or number("WORLD_SIZE", least=1, otherwise=1) > 1
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    hides_gpus = not visible or visible.startswith("-1")
    if has_gpu or not is_launched or hides_gpus or is_on("ACCELERATE_USE_CPU"):
        return None
    return (
        "the launch does not say that it is for the CPU, and torch sees no GPU on this machine: everything computes on "
        "the CPU. If that is meant, launch with recipes/accelerate/cpu_two_processes.yaml or cpu_one.yaml, or set "
        "ACCELERATE_USE_CPU=true before the command"
    )


def number(name: str, *, least: int, otherwise: int) -> int:
    """Integer value of an environment variable, or `otherwise` if it is not set or empty.

    Raises:
        LaunchError: It is not a whole number, or less than `least`.
    """
    text = os.environ.get(name) or str(otherwise)
    if not re.fullmatch(r"-?[0-9]+", text) or int(text) < least:
        raise LaunchError(f"{name} ({text}) in the environment must be a whole number from {least} on; unset it")
    return int(text)


def is_on(name: str) -> bool:
    """Whether an environment variable is true, 1 or yes."""
    return os.environ.get(name, "false").lower() in ("true", "1", "yes")


def deepspeed_settings() -> dict[str, Any]:
    """DeepSpeed's settings from the launch file: its own lines, or the DeepSpeed file that it names.

    Raises:
        LaunchError: They set what the recipe sets.
    """
    from accelerate.utils import DeepSpeedPlugin

    settings = DeepSpeedPlugin(zero3_init_flag=False).deepspeed_config
    for name in RECIPE_SECTIONS:
        if settings.get(name, {}).get("enabled", name in ("optimizer", "scheduler") and name in settings):
            raise LaunchError(
                f"{name} in the DeepSpeed file of the launch: that is for the recipe to say (optimizer, model.dtype); "
                f"take it out there; {WAY_OUT}"
            )
    zero = settings["zero_optimization"]
    for name in ("offload_optimizer", "offload_param"):
        if (zero.get(name) or {}).get("device") == "nvme":
            raise LaunchError(f"{name}_device (nvme) of the launch file is not supported; choose cpu or none")
    if zero.get("reduce_bucket_size", "auto") == "auto":  # their own is ten times as many: 2 GB for each engine
        zero["reduce_bucket_size"] = BUCKET_ELEMENTS
    return settings


RECIPE_SECTIONS = ("optimizer", "scheduler", "fp16", "bf16", "amp", "torch_autocast")
"""Sections of a DeepSpeed file for which a recipe has settings."""


BUCKET_ELEMENTS = 50_000_000
"""Gradient elements reduced over ranks at once, unless a DeepSpeed file sets the number."""
