"""FSDP2 of torch: each rank holds a part of every weight, and gathers a layer while it computes with it.

Zhao et al. 2023, arXiv:2304.11277, in the form of `torch.distributed.fsdp.fully_shard`. It is called here directly:
`Accelerator.prepare` would wrap by its own rules and take the mean of gradients, which are parts of a sum here.
"""

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from llmrl.optim.config import OptimizerConfig
from llmrl.optim.local import LocalTrainable, whole_tensor
from llmrl.roles import Collectives


class ShardedTrainable(LocalTrainable):
    """`Trainable` for a module whose weights, gradients and optimizer states are split over ranks."""

    def __init__(
        self,
        module: nn.Module,
        config: OptimizerConfig,
        *,
        num_steps: int,
        collectives: Collectives,
        device: torch.device,
        peaks: Mapping[str, float] | None = None,
    ) -> None:
        """Splits the weights of `module`, which are then used on `device`; see `LocalTrainable`."""
        collectives.barrier()  # waits longer for a rank that is still loading than what comes next would
        shard(module, device)
        super().__init__(module, config, num_steps=num_steps, collectives=collectives, peaks=peaks)
        self.first = collectives.is_first
        self.holds_all = collectives.world_size == 1

    def add_up_gradients(self) -> None:
        """Does nothing: each backward pass has summed them over ranks."""

    @torch.no_grad()
    def whole(self, part: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """See `Trainable`."""
        cast(FSDPModule, self.module).reshard()
        for name, p in part.named_parameters():
            yield name, whole_tensor(p.detach())

    def assign(self, name: str, value: Tensor) -> None:
        """See `Trainable`."""
        cast(FSDPModule, self.module).reshard()
        super().assign(name, value)

    def state_dict(self) -> dict[str, Any]:
        """The state of `LocalTrainable`, gathered; empty on every rank except the first."""
        state = super().state_dict()
        for tensors in (state["parameters"], *state["optimizer"].values()):
            for name in list(tensors):
                whole = whole_tensor(tensors.pop(name))
                if self.first:
                    tensors[name] = whole.cpu()
        return state


def shard(module: nn.Module, device: torch.device, *, is_frozen: bool = False) -> None:
    """Splits the weights of a module over all ranks, on the device of each: layer by layer, then all other weights as
    one unit. Gradients are summed over ranks.

    That unit, embeddings and head, stays gathered from a forward pass to its backward pass; in a frozen module, which
    has no backward pass, only during the forward pass.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in list(_layers(module)):
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh, reshard_after_forward=True if is_frozen else None)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """Layers of the transformers models in a module: the classes in their `_no_split_modules`."""
    names = {name for part in module.modules() for name in getattr(part, "_no_split_modules", None) or ()}
    return (part for part in module.modules() if type(part).__name__ in names)
