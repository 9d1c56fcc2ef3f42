"""The device of this process, and how it is set up."""

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from llmrl.distributed.launch import LaunchError, is_on, local_rank


def pick_device() -> torch.device:
    """Device of this process: a CUDA GPU of its own if there is one and the launch does not ask for the CPU; else CPU.

    Other accelerators, such as Apple's, lack float64, in which sums are taken.

    Raises:
        LaunchError: The machine has fewer GPUs than processes.
    """
    if is_on("ACCELERATE_USE_CPU") or not torch.cuda.is_available():
        return torch.device("cpu")
    number, count = local_rank(), torch.cuda.device_count()
    if number >= count:
        raise LaunchError(
            f"process {number} of this machine needs a GPU of its own, and there are {count}; launch with "
            f'--num_processes {count}, or on the CPU with CUDA_VISIBLE_DEVICES="" before the command'
        )
    return torch.device("cuda", number)


def prepare_device(*, deterministic: bool = False) -> None:
    """Configures torch for this process. Call it before any computation. On a CPU only `deterministic` has an effect.

    Attention never goes through cuDNN, which torch tries first on an H100 and its successors: there it plans each new
    shape, tens of milliseconds of host time at every decoded token and every microbatch, and its gradient under a mask
    can be NaN (pytorch issue 196678).

    Args:
        deterministic: Every operator gives the same bits each time, or raises if it cannot.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it torch refuses products of matrices
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@contextmanager
def torch_as_it_was() -> Iterator[None]:
    """Context that puts back what `prepare_device` changes."""
    fills: bool = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    with_cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    mode = torch.get_deterministic_debug_mode()
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(with_cudnn)
        torch.set_deterministic_debug_mode(mode)
        torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]


KEPT_MEMORY = {-4: 0, -1: 2**31 - 1, -2: 2**28}
"""What `mallopt` sets: M_MMAP_MAX, M_TRIM_THRESHOLD and M_TOP_PAD, the last two in bytes."""


def keep_freed_memory() -> bool:
    """Makes this process keep freed memory for its next tensors. Returns whether it does.

    Without that glibc takes each large tensor from the system and gives it back at once; on a CPU, mapping and clearing
    the pages can cost more than the arithmetic. The peak stays the same, but memory stays at it. Nothing changes on a
    GPU, with another C library, or where the environment has variables of glibc's own: ``MALLOC_...``.

    It is for a process that does nothing but train or sample: a library must not decide this for its users.
    """
    is_chosen = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if is_chosen or torch.cuda.is_available() or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(parameter, value) for parameter, value in KEPT_MEMORY.items())


def synchronize(device: torch.device) -> None:
    """Waits until the work queued on a GPU is done; does nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
