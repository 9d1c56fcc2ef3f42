"""The device of this process."""

import torch

from llmrl.distributed.launch import LaunchError, is_on, local_rank


def pick_device() -> torch.device:
    """A CUDA GPU if there is one and the launch does not say CPU, each process of a machine its own, else the CPU:
    others, such as Apple's, lack the float64 that sums are taken in.

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
