"""A device that is none: its tensors say that they lie elsewhere, and compute on the CPU.

So it shows without a GPU what would fail on one: operators that are given a tensor of the CPU beside one of the device.
Allowed is what torch allows between the CPU and CUDA: copies, numbers without axes, and indices that lie on the CPU.

    with Simulated() as device:
        ...  # `pick_device` says `device.name`; `device.waits` counts how often the host has waited for a number
"""

import sys
from collections import Counter
from contextlib import ExitStack
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

NAME = torch.device("lazy", 0)
"""A type that torch knows and that its builds bring nothing for."""
COPIES = ("_to_copy", "copy_")
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive", "equal")


class Meeting(RuntimeError):
    """A tensor of the CPU met one of the device."""


class Far(torch.Tensor):
    """A tensor of the simulated device."""

    device_in_use: "Simulated | None" = None
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, near):
        return torch.Tensor._make_wrapper_subclass(
            cls, near.size(), strides=near.stride(), storage_offset=near.storage_offset(), dtype=near.dtype, device=NAME
        )

    def __init__(self, near):
        self.near = near
        """The numbers, on the CPU."""

    def __repr__(self):
        return f"Far({self.near!r})"

    def tolist(self):
        Far.device_in_use.waits["tolist"] += 1
        return self.near.tolist()

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return Far.device_in_use.run(operator, args, kwargs or {})


class Simulated(TorchDispatchMode):
    """Is there as long as its `with` block lasts."""

    name = NAME

    def __init__(self):
        super().__init__()
        self.waits = Counter()
        """How often each operator made the host wait."""
        self.stack = ExitStack()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        return self.run(operator, args, kwargs or {})

    def run(self, operator, args, kwargs):
        """One operator, on the CPU; what it returns lies where torch would have put it."""
        name = operator._schema.name.partition("::")[2]
        given = list[torch.Tensor]()
        args_here, kwargs_here = _each_tensor(lambda x: given.append(x) or getattr(x, "near", x), (args, kwargs))
        far = [x for x in given if isinstance(x, Far)]
        near = [x for x in given if not isinstance(x, Far)]
        if far and near and name not in COPIES:
            self.check(name, args, near)
        if far and (name in WAITS or _is_by_mask(name, args)):
            self.waits[name] += 1
        to = kwargs.get("device")
        stays_far = bool(far) if to is None else torch.device(to).type == NAME.type
        if name == "copy_":
            stays_far = isinstance(args[0], Far)
        if to is not None:
            kwargs_here["device"] = torch.device("cpu") if stays_far else to
        result = operator(*args_here, **kwargs_here)
        if not stays_far:
            return result
        known = {id(x.near): x for x in far}  # what works in place returns the tensor that it was given
        return _each_tensor(lambda x: known[id(x)] if id(x) in known else Far(x), result)

    def check(self, name, args, near):
        allowed = {id(x) for x in near if x.dim() == 0}
        if name in INDEXED and isinstance(args[0], Far):
            allowed |= {id(x) for x in args[1]}
        strange = [tuple(x.shape) for x in near if id(x) not in allowed]
        if strange:
            raise Meeting(f"{name}: a tensor of the CPU, of shape {strange[0]}, meets one of the device")

    # --- what else knows of devices -----------------------------------------------------------------------------------

    def __enter__(self):
        super().__enter__()
        Far.device_in_use = self
        self.replace(torch, "autocast", _without_autocast(torch.autocast))
        self.replace(torch, "is_autocast_enabled", lambda device_type="cpu": False)
        self.replace(torch.optim, "AdamW", _unfused(torch.optim.AdamW))
        self.replace(torch, "lazy", SimpleNamespace(_initialized=False), create=True)  # asked by checkpoints
        for name, module in list(sys.modules.items()):
            if name.startswith("llmrl.") and hasattr(module, "pick_device"):
                self.replace(module, "pick_device", lambda: NAME)
        for setter, before in (
            (torch.__future__.set_swap_module_params_on_conversion, False),  # lets `module.to(NAME)` change the class
            (torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors()),  # lets `torch.tensor` be seen
        ):
            setter(True)
            self.stack.callback(setter, before)
        return self

    def __exit__(self, *failure):
        super().__exit__(*failure)
        self.stack.close()
        Far.device_in_use = None

    def replace(self, owner, name, value, **settings):
        self.stack.enter_context(patch.object(owner, name, value, **settings))


def _each_tensor(function, value):
    """What an operator takes or returns, with something else for each tensor in it."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)([_each_tensor(function, x) for x in value])
    if isinstance(value, dict):
        return {name: _each_tensor(function, x) for name, x in value.items()}
    return value


def _is_by_mask(name, args):
    """Whether an operator looks for True in a mask, and so must know how many there are."""
    return name in INDEXED and any(x is not None and x.dtype == torch.bool for x in args[1])


def _without_autocast(autocast):
    def made(device_type, **settings):
        is_far = device_type == NAME.type
        return autocast("cpu", **settings | {"enabled": False}) if is_far else autocast(device_type, **settings)

    return made


def _unfused(adamw):
    return lambda groups, **settings: adamw(groups, **settings | {"fused": False})
