"""Memory that ran out: how it shows, one line on it, and work that is done again in less."""

import gc
import re
import resource
import sys
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from llmrl.errors import Error
from llmrl.messages import in_units

Result = TypeVar("Result")

OF_THE_CPU = re.compile(r"DefaultCPUAllocator: .*?you tried to allocate (\d+) bytes|std::bad_alloc")
OF_THE_GPU = re.compile(r"CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED")
"""Texts of errors that have no class of their own in torch."""
WAYS_OUT = {
    "start": "set model.lora.rank where all weights are trained, spread the run over devices, or take a smaller model",
    "rollout": "lower rollout.max_rows, or rollout.prompts_per_iteration with rollout.engine=transformers",
    "reward": "lower reward.model.microbatch_tokens",
    "logprobs": "lower update.microbatch_tokens",
    "update": "set model.gradient_checkpointing=true, or lower microbatch_tokens of update, sft or reward_model",
    "checkpoint": "take a machine with more memory of the CPU: weights and optimizer are gathered there",
    "saving": "take a machine with more memory of the CPU: the weights are gathered there",
}
OTHER_WAYS_OUT = "lower rollout.max_rows where responses are sampled, else microbatch_tokens"


class MemoryFull(Error, RuntimeError):
    """Memory ran out, and nothing is left that would make room; the message is one line, with what to set."""


def making_room(work: Callable[[], Result], make_room: Callable[[str], None]) -> Result:
    """Result of `work`, which is done again whenever memory ran out in it.

    Before that `make_room` is called with the `usage`, and raises `MemoryFull` if there is no way to make any. All that
    the failed work held is free by then: its traceback, which keeps every tensor alive, is gone.
    """
    while True:
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            found = usage(error)
            if found is None:
                raise
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        make_room(found)


def is_full(error: BaseException | None) -> bool:
    """Whether an error says that memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error) if isinstance(error, RuntimeError) else ""
    return bool(OF_THE_CPU.search(text) or OF_THE_GPU.search(text))


def usage(error: BaseException) -> str | None:
    """``GPU, peak 70 GiB of 79.1 GiB``: whose memory ran out, and the most of it that tensors took; of a CPU the most
    that the process took, and what was asked for. None for any other error.

    An error counts too that was raised while such a one was handled: the recording of a CUDA graph may end by one.
    """
    full = next((each for each in (error, error.__context__) if is_full(each)), None)
    if full is None:
        return None
    asked = OF_THE_CPU.search(str(full))
    if asked or isinstance(full, MemoryError):
        needed = f"{in_units(int(asked[1]))} more asked for, " if asked and asked[1] else ""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 2**10)
        return f"CPU, {needed}peak {in_units(peak)}"
    if not torch.cuda.is_initialized():
        return "GPU"
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return f"GPU, peak {in_units(torch.cuda.max_memory_allocated())} of {in_units(total)}"


def out_of_memory(usage: str, phase: str, way_out: str, *, with_what: str = "") -> str:
    """Line on memory that ran out in a phase of a run; of several ranks it names this one."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    where = f"{phase} on rank {dist.get_rank()}" if several else phase
    return f"out of memory in {where}{with_what} ({usage}): {way_out}"


def describe_full_memory(error: BaseException, phase: str) -> str | None:
    """One line on memory that ran out in a phase of a run, with the setting to change; None for any other error."""
    found = usage(error)
    if found is None:
        return None
    way_out = WAYS_OUT.get(phase, OTHER_WAYS_OUT)
    return out_of_memory(found, phase, f"{way_out}; --dry-run estimates what takes how much")
