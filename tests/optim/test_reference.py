"""References that follow: weights by the definition, the time of a move, the state. Whole runs on several ranks:
tests/test_many_processes.py."""

import copy

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.testing import assert_close

from llmrl.optim.fsdp import shard
from llmrl.optim.reference import AdapterCopy, WeightsReference
from llmrl.roles import MovingReference
from tests.contexts import CPU
from tests.distributed.one_rank import group  # noqa: F401

from .tiny import learn, network, trainable_of


def weights_of(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def following(*, every=1, mixing=1.0, keeps_state=True, dtype=torch.float32, is_split=False):
    """``(trained, reference)``, equal at the start."""
    module = network()
    frozen = copy.deepcopy(module).requires_grad_(False).to(dtype)
    if is_split:
        shard(frozen, CPU, is_frozen=True)
    trained = trainable_of(module)
    return trained, WeightsReference(frozen, module, trained, every=every, mixing=mixing, keeps_state=keeps_state)


@pytest.mark.parametrize("mixing", [1.0, 0.6, 0.05])
def test_every_weight_moves_by_its_share_of_the_way(mixing):
    trained, reference = following(mixing=mixing)
    expected = weights_of(reference.module)
    for n in range(3):
        learn(trained, 2, first=2 * n)
        reference.finish_iteration(n + 1)
        for name, weight in trained.module.named_parameters():
            expected[name] = mixing * weight.detach() + (1 - mixing) * expected[name]
    assert_close(weights_of(reference.module), expected)
    assert not any(p.requires_grad for p in reference.module.parameters())


def test_a_copy_is_one_to_the_bit():
    trained, reference = following()
    learn(trained, 3)
    reference.finish_iteration(1)
    assert_close(weights_of(reference.module), weights_of(trained.module), rtol=0, atol=0)
    learn(trained, 1, first=3)
    assert not torch.equal(reference.module[0].weight, trained.module[0].weight)  # a copy, not the same memory


def test_a_copy_in_bfloat16_is_the_actor_rounded_once():
    trained, reference = following(dtype=torch.bfloat16)
    learn(trained, 3)
    reference.finish_iteration(1)
    rounded = {name: weight.bfloat16() for name, weight in weights_of(trained.module).items()}
    assert_close(weights_of(reference.module), rounded, rtol=0, atol=0)


def test_it_moves_at_the_end_of_every_kth_iteration():
    trained, reference = following(every=3)
    assert isinstance(reference, MovingReference)
    moved = []
    for number in range(1, 8):
        learn(trained, 1, first=number)
        before = weights_of(reference.module)
        told = reference.finish_iteration(number).values()["reference/moved"]
        assert bool(told) == any(not torch.equal(before[name], w) for name, w in weights_of(reference.module).items())
        moved.append(told)
    assert moved == [0, 0, 1, 0, 0, 1, 0]


@pytest.mark.parametrize("is_split", [False, True])
@pytest.mark.usefixtures("group")
def test_a_state_is_taken_over_by_a_reference_that_is_whole_or_split(is_split):
    trained, reference = following(mixing=0.5)
    learn(trained, 2)
    reference.finish_iteration(1)
    _, other = following(mixing=0.5, is_split=is_split)
    other.load_state_dict(copy.deepcopy(reference.state_dict()))
    assert_close(other.state_dict(), reference.state_dict(), rtol=0, atol=0)


@pytest.mark.usefixtures("group")
def test_a_split_reference_moves_as_a_whole_one_does():
    (trained, whole), (other, split) = following(mixing=0.3), following(mixing=0.3, is_split=True)
    assert whole.holds_all
    assert not split.holds_all
    for n, (trainable, reference) in enumerate([(trained, whole), (other, split)] * 2):
        learn(trainable, 2, first=n // 2)
        reference.finish_iteration(1)
    assert all(isinstance(p, DTensor) for p in split.module.parameters())
    assert_close(split.state_dict(), whole.state_dict(), rtol=0, atol=0)
    split.keeps_state = False  # another rank than the first
    assert split.state_dict() == {}


def test_an_adapter_is_copied_to_the_frozen_one():
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(3, 4).requires_grad_(False))
    with torch.no_grad():
        module[1].weight.zero_()
    trained = trainable_of(module)
    reference = AdapterCopy(trained, {"1.weight": "0.weight"}, every=2)
    assert isinstance(reference, MovingReference)
    assert reference.holds_all
    bias = module[1].bias.clone()
    reference.finish_iteration(1)
    assert (module[1].weight == 0).all()
    reference.finish_iteration(2)
    assert torch.equal(module[1].weight, module[0].weight)
    assert torch.equal(module[1].bias, bias)
    state = copy.deepcopy(reference.state_dict())
    assert state.keys() == {"1.weight"}
    with torch.no_grad():
        module[0].weight.add_(1.0)
    assert torch.equal(module[1].weight, state["1.weight"])  # a copy
    reference.finish_iteration(4)
    assert torch.equal(module[1].weight, module[0].weight)
    reference.load_state_dict(state)
    assert_close(reference.state_dict(), state, rtol=0, atol=0)
