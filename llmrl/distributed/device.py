"""The device of this process."""

import os

import torch


def pick_device() -> torch.device:
    """A CUDA GPU if there is one, each process of a machine its own, else the CPU: others, such as Apple's, lack the
    float64 that sums are taken in."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
