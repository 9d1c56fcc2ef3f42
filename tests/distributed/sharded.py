"""What must hold of every `Trainable`, however it keeps its weights: it is `LocalTrainable` in all that shows."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from llmrl.distributed.collectives import ProcessGroup
from llmrl.optim.config import OptimizerConfig
from llmrl.optim.local import LocalTrainable
from llmrl.optim.schedule import MAX_SKIPPED_STEPS
from llmrl.roles import StateMismatch, Trainable
from tests.contexts import CPU

CONFIG = OptimizerConfig(
    learning_rate=0.1, schedule="cosine", warmup_steps=1, weight_decay=0.1, max_grad_norm=0.5, betas=(0.9, 0.9)
)
PEAKS = {"2.weight": 0.03}


def network() -> nn.Sequential:
    """Five weights, one of which is frozen; no size is a multiple of anything."""
    generator = torch.Generator().manual_seed(3)
    module = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1), nn.Linear(1, 1, bias=False))
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=generator)
    module[3].weight.requires_grad_(False)
    return module


def loss(trainable: Trainable, n: int) -> Tensor:
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(n))
    return (trainable.wrapped(x) - x.sum(dim=1, keepdim=True)).square().mean()


def learn(trainable: Trainable, first: int, last: int) -> list[Tensor]:
    """Steps on two microbatches each; their norms."""
    norms = []
    for n in range(first, last):
        for microbatch in (2 * n, 2 * n + 1):
            trainable.backward(loss(trainable, microbatch))
        norms.append(trainable.optimizer_step().clone())
    return norms


def whole(trainable: Trainable) -> dict[str, Tensor]:
    return {name: p.clone() for name, p in trainable.whole(trainable.module)}


class LikeLocal:
    """Tests of a kind of `Trainable`; a subclass names it."""

    kind: Any

    def pair(self, group: ProcessGroup) -> tuple[LocalTrainable, Trainable]:
        local, other = network(), network()
        return (
            LocalTrainable(local, CONFIG, num_steps=9, peaks=PEAKS),
            self.kind(other, CONFIG, num_steps=9, collectives=group, device=CPU, peaks=PEAKS),
        )

    def test_steps_are_those_of_one_process(self, group: ProcessGroup):
        """Clipping, schedule, weight decay, several microbatches, a peak of its own, a frozen weight."""
        local, other = self.pair(group)
        assert_close(learn(other, 0, 4), learn(local, 0, 4), check_dtype=False)
        assert_close(whole(other), whole(local))
        assert (other.num_steps_done, other.learning_rate) == (4, local.learning_rate)

    def test_whole_is_every_weight_of_a_part_by_its_name(self, group: ProcessGroup):
        local, other = self.pair(group)
        assert_close(whole(other), dict(network().named_parameters()))
        (name, weight), (bias, _) = other.whole(other.module[2])
        assert (name, bias) == ("weight", "bias")
        assert_close(weight, local.module[2].weight.detach())

    def test_a_frozen_weight_is_assigned(self, group: ProcessGroup):
        local, other = self.pair(group)
        for trainable in (local, other):
            learn(trainable, 0, 1)
            trainable.assign("3.weight", torch.tensor([[0.25]]))
        assert dict(other.whole(other.module))["3.weight"].item() == 0.25
        learn(other, 1, 2)
        learn(local, 1, 2)
        assert_close(whole(other), whole(local))

    def test_a_state_goes_on_in_the_other_kind_both_ways(self, group: ProcessGroup):
        local, other = self.pair(group)
        learn(local, 0, 2)
        learn(other, 0, 2)
        new_local, new_other = self.pair(group)
        new_local.load_state_dict(copy.deepcopy(other.state_dict()))
        new_other.load_state_dict(copy.deepcopy(local.state_dict()))
        for trainable in (local, new_local, new_other):
            learn(trainable, 2, 4)
        assert_close(whole(new_local), whole(local))
        assert_close(whole(new_other), whole(local))
        assert new_local.num_steps_done == new_other.num_steps_done == 4

    def test_a_state_before_the_first_step_takes_back_all_that_came(self, group: ProcessGroup):
        local, other = self.pair(group)
        start = copy.deepcopy(other.state_dict())
        assert start["optimizer"] == {}
        learn(other, 0, 3)
        other.load_state_dict(start)
        learn(other, 0, 2)
        learn(local, 0, 2)
        assert_close(whole(other), whole(local))

    def test_a_gradient_that_is_not_finite_changes_no_weight(self, group: ProcessGroup):
        local, other = self.pair(group)
        learn(other, 0, 1)
        learn(local, 0, 1)
        before = whole(other)
        for trainable in (local, other):
            trainable.backward(loss(trainable, 1) * math.nan)
            assert not trainable.optimizer_step().isfinite()
        assert_close(whole(other), before)
        learn(other, 1, 3)
        learn(local, 1, 3)
        assert_close(whole(other), whole(local))

    def test_gradients_that_are_never_finite_end_it(self, group: ProcessGroup):
        _, other = self.pair(group)
        for _ in range(MAX_SKIPPED_STEPS - 1):
            other.backward(loss(other, 0) * math.inf)
            other.optimizer_step()
        other.backward(loss(other, 0) * math.inf)
        with pytest.raises(FloatingPointError, match=f"{MAX_SKIPPED_STEPS} optimizer steps one after another"):
            other.optimizer_step()

    def test_a_state_of_other_weights_is_refused(self, group: ProcessGroup):
        _, other = self.pair(group)
        state = copy.deepcopy(other.state_dict())
        before = whole(other)
        state["parameters"]["0.weight"] = torch.zeros(2, 2)
        with pytest.raises(StateMismatch, match=r"1 differ, such as 0\.weight, which was \(2, 2\) and is \(5, 3\)"):
            other.load_state_dict(state)
        assert_close(whole(other), before)

    def test_one_rank_alone_holds_everything(self, group: ProcessGroup):
        _, other = self.pair(group)
        assert other.holds_all
        assert isinstance(other, Trainable)
