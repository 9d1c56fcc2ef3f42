"""The device of this process."""

import torch
from accelerate import PartialState


def pick_device() -> torch.device:
    """A CUDA GPU if there is one, else the CPU: others, such as Apple's, lack the float64 that sums are taken in."""
    device = PartialState().device
    assert device is not None, "a process state knows its device"
    return device if device.type == "cuda" else torch.device("cpu")
