"""Modules as a launch asks for them. The environment of a launch is read anew at each call."""

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from llmrl.distributed.collectives import OneProcess
from llmrl.distributed.config import DistributedConfig
from llmrl.distributed.device import pick_device
from llmrl.optim.config import OptimizerConfig
from llmrl.optim.factory import make_trainable, place_frozen
from llmrl.optim.fsdp import ShardedTrainable
from llmrl.optim.local import LocalTrainable
from tests.contexts import context_of
from tests.distributed.one_rank import group  # noqa: F401

DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "LOCAL_RANK": "0"}
ZERO3 = DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


class Role:
    """Whoever calls a module."""

    def __init__(self) -> None:
        self.module: nn.Module = nn.Linear(3, 2)


class TwoRanks(OneProcess):
    world_size = 2


@pytest.mark.parametrize(
    ("environment", "kind"),
    [({}, LocalTrainable), (FSDP, ShardedTrainable)],
)
def test_a_role_calls_its_module_as_it_was_wrapped(environment, kind, monkeypatch, group):  # noqa: F811
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    role = Role()
    module = role.module
    trainable = make_trainable(role, OptimizerConfig(), num_steps=1, context=context_of(group))
    assert type(trainable) is kind
    assert trainable.module is module
    assert role.module is trainable.wrapped
    assert role.module(torch.ones(1, 3)).requires_grad


def test_what_is_frozen_is_whole_unless_it_is_to_be_split_over_several_ranks(group):  # noqa: F811
    for config, ranks, is_split in (
        (DistributedConfig(), TwoRanks(), False),
        (DistributedConfig(frozen="split"), OneProcess(), False),
        (DistributedConfig(frozen="split"), TwoRanks(), True),
    ):
        module = nn.Linear(3, 2).requires_grad_(False)
        place_frozen(module, config, context_of(ranks))
        assert isinstance(module.weight, DTensor) == is_split
        assert module.weight.device.type == pick_device().type
