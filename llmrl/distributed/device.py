"""The device of this process."""

import torch
from accelerate import PartialState


def pick_device() -> torch.device:
    """A GPU if there is one, else the CPU."""
    device = PartialState().device
    assert device is not None, "a process state knows its device"
    return device
