"""The bytes of all tensors that live, exactly, on any device: what the allocator of a GPU would call allocated.

Sees every tensor that an operation makes, those of the backward pass and of optimizers included. It does not see what
kernels take for themselves while they run, nor how an allocator rounds and fragments.
"""

import gc
import weakref
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveTensors(TorchDispatchMode):
    """While it is entered, `in_use` and `peak` are kept; `peaks` has the highest of each phase that was begun."""

    def __init__(self) -> None:
        super().__init__()
        self.in_use = 0
        self.peak = 0
        self.peaks: dict[str, int] = {}
        self._phase = ""
        self._sizes: dict[int, int] = {}
        self._resize = torch.UntypedStorage.resize_

    def __enter__(self) -> "LiveTensors":
        for each in gc.get_objects():
            if issubclass(type(each), Tensor):
                self._see(each)

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            """FSDP frees and fills whole weights this way."""
            result = self._resize(storage, size)
            if storage._cdata in self._sizes:
                self._set(storage._cdata, storage.nbytes())
            return result

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        self.begin_phase("")

    def begin_phase(self, name: str) -> None:
        """Closes the phase that there was."""
        if self._phase:
            self.peaks[self._phase] = max(self.peaks.get(self._phase, 0), self.peak)
        self._phase, self.peak = name, self.in_use

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # then what it does with its parts comes by here
        result = func(*args, **(kwargs or {}))
        for each in tree_iter(result):
            if isinstance(each, Tensor):
                self._see(each)
        return result

    def _see(self, tensor: Tensor) -> None:
        tensor = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
        if isinstance(tensor, FakeTensor) or tensor.device.type == "meta" or tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            weakref.finalize(storage, self._forget, key)
            self._sizes[key] = 0
        self._set(key, storage.nbytes())

    def _set(self, key: int, size: int) -> None:
        self.in_use += size - self._sizes[key]
        self._sizes[key] = size
        self.peak = max(self.peak, self.in_use)

    def _forget(self, key: int) -> None:
        self.in_use -= self._sizes.pop(key)
