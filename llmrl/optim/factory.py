"""Factory of trainables, and placement of frozen modules: whole in every process, or split over ranks."""

from collections.abc import Mapping
from functools import partial
from typing import Protocol, runtime_checkable

from torch import nn

from llmrl.distributed.config import DistributedConfig
from llmrl.distributed.context import Context
from llmrl.optim.config import OptimizerConfig
from llmrl.optim.local import LocalTrainable
from llmrl.roles import Trainable


def place_frozen(module: nn.Module, config: DistributedConfig, context: Context) -> None:
    """Puts a module that never learns where it computes: whole on every rank, or split over them."""
    if config.frozen == "replicated" or context.collectives.world_size == 1:
        module.to(context.device)
        return
    from llmrl.optim.fsdp import shard

    shard(module, context.device, is_frozen=True)


@runtime_checkable
class Caller(Protocol):
    """A role that calls a module: a policy, a critic, a scorer."""

    module: nn.Module


def make_trainable(
    caller: Caller,
    config: OptimizerConfig,
    *,
    num_steps: int,
    context: Context,
    peaks: Mapping[str, float] | None = None,
) -> Trainable:
    """`Trainable` of a role's module: under DeepSpeed, under FSDP2 or local. From here on the role calls the wrapped
    module. See `LocalTrainable` for the arguments.

    Copy the module, or try it, before: afterwards it may hold only parts of its weights.
    """
    match context.launch.sharding:
        case "deepspeed":
            from llmrl.optim.deepspeed import DeepSpeedTrainable

            kind = partial(DeepSpeedTrainable, device=context.device)
        case "fsdp":
            from llmrl.optim.fsdp import ShardedTrainable

            kind = partial(ShardedTrainable, device=context.device)
        case _:
            kind = LocalTrainable
    trainable = kind(caller.module, config, num_steps=num_steps, collectives=context.collectives, peaks=peaks)
    caller.module = trainable.wrapped  # sharded weights are whole, and gradients summed, only in calls of the wrapper
    return trainable
