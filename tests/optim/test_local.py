import copy
import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load, save
from torch import nn
from torch.testing import assert_close

from llmrl.optim import local as module_under_test
from llmrl.optim.config import OptimizerConfig
from llmrl.optim.local import LocalTrainable, in_buckets
from llmrl.optim.schedule import MAX_SKIPPED_STEPS
from llmrl.roles import Collectives, StateMismatch
from tests.distributed.threads import on_ranks
from tests.optim.tiny import PEAK, SCHEDULES, Scalar, learn, network, trainable_of


def weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def assert_equal_weights(module, expected):
    assert all(torch.equal(p, expected[name]) for name, p in module.named_parameters())


def adamw(weight, slopes, *, beta1, beta2, decay):
    """Loshchilov and Hutter 2019, algorithm 2, in Python's floats."""
    m = v = 0.0
    for t, slope in enumerate(slopes, 1):
        m = beta1 * m + (1 - beta1) * slope
        v = beta2 * v + (1 - beta2) * slope**2
        m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
        weight = weight - PEAK * decay * weight - PEAK * m_hat / (math.sqrt(v_hat) + 1e-8)
    return weight


# --- the step ---------------------------------------------------------------------------------------------------------


def test_adamw_by_hand():
    """Decay is decoupled and falls on matrices alone."""
    module = Scalar()
    trainable = trainable_of(module, betas=(0.8, 0.9), weight_decay=0.5)
    matrix_slopes, vector_slopes = (3.0, -1.0, 0.5), (4.0, 0.25, -2.0)
    for slopes in zip(matrix_slopes, vector_slopes, strict=True):
        trainable.backward(module.loss(*slopes))
        trainable.optimizer_step()
    expected = adamw(2.0, matrix_slopes, beta1=0.8, beta2=0.9, decay=0.5)
    assert module.matrix.item() == pytest.approx(expected, rel=1e-5)
    expected = adamw(1.0, vector_slopes, beta1=0.8, beta2=0.9, decay=0.0)
    assert module.vector.item() == pytest.approx(expected, rel=1e-5)


def test_the_gradient_is_clipped_by_its_global_norm():
    """Of 3 and 4 the norm is 5; scaled down to 1 they are 0.6 and 0.8, and the running mean takes a tenth of it."""
    module = Scalar()
    trainable = trainable_of(module, max_grad_norm=1.0)
    trainable.backward(module.loss(3.0, 4.0))
    assert trainable.optimizer_step().item() == pytest.approx(5.0)
    moments = trainable.state_dict()["optimizer"]
    assert moments["matrix"]["exp_avg"].item() == pytest.approx(0.06, rel=1e-4)
    assert moments["vector"]["exp_avg"].item() == pytest.approx(0.08, rel=1e-4)


def test_a_small_gradient_is_not_scaled_up():
    module = Scalar()
    trainable = trainable_of(module, max_grad_norm=1.0)
    trainable.backward(module.loss(0.3, 0.4))
    assert trainable.optimizer_step().item() == pytest.approx(0.5)
    assert trainable.state_dict()["optimizer"]["matrix"]["exp_avg"].item() == pytest.approx(0.03)


def test_microbatches_add_up_and_a_step_clears():
    module = Scalar()
    trainable = trainable_of(module)
    trainable.backward(module.loss(1.0, 0.0))
    trainable.backward(module.loss(2.0, 4.0))
    assert trainable.optimizer_step().item() == pytest.approx(5.0)
    assert module.matrix.grad is None
    trainable.backward(module.loss(0.0, 2.0))
    assert trainable.optimizer_step().item() == pytest.approx(2.0)


def test_frozen_weights_take_no_part():
    module = Scalar()
    module.matrix.requires_grad_(False)
    trainable = trainable_of(module)
    trainable.backward(module.loss(3.0, 4.0))
    assert trainable.optimizer_step().item() == pytest.approx(4.0)
    assert module.matrix.item() == 2.0
    state = trainable.state_dict()
    assert state["parameters"].keys() == state["optimizer"].keys() == {"vector"}


def test_learning_rate_zero_changes_no_bit():
    module = network()
    before = weights(module)
    learn(trainable_of(module, learning_rate=0.0, weight_decay=0.1), 3)
    assert_equal_weights(module, before)


# --- the schedule -----------------------------------------------------------------------------------------------------


# --- learning rates of their own --------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_each_parameter_follows_the_schedule_from_its_own_peak(schedule):
    """Under a constant gradient AdamW moves a weight by its learning rate."""
    module = Scalar(matrix=0.0, vector=0.0)
    trainable = trainable_of(module, num_steps=6, schedule=schedule, warmup_steps=2, peaks={"vector": 3.0})
    position = 0.0
    for share in SCHEDULES[schedule]:
        assert trainable.learning_rate == pytest.approx(PEAK * share, abs=1e-12)  # what is told is the others' rate
        trainable.backward(module.loss(-7.0, -7.0))
        trainable.optimizer_step()
        position += share
        assert module.matrix.item() == pytest.approx(PEAK * position, rel=1e-5, abs=1e-7)
        assert module.vector.item() == pytest.approx(3.0 * position, rel=1e-5, abs=1e-7)


def test_a_peak_of_zero_keeps_a_parameter():
    module = network()
    before = weights(module)
    learn(trainable_of(module, peaks={"2.weight": 0.0}), 3)
    kept = {name for name, p in module.named_parameters() if torch.equal(p, before[name])}
    assert kept == {"2.weight"}


def test_a_peak_for_nothing_is_no_silent_mistake():
    with pytest.raises(AssertionError):
        trainable_of(network(), peaks={"head.weight": 1.0})


def test_clipping_is_global_whatever_the_learning_rates():
    """Of 3 and 4 the norm is 5; scaled down to 1 they are 0.6 and 0.8, and the running mean takes a tenth of it."""
    module = Scalar()
    trainable = trainable_of(module, max_grad_norm=1.0, peaks={"vector": 3.0})
    trainable.backward(module.loss(3.0, 4.0))
    assert trainable.optimizer_step().item() == pytest.approx(5.0)
    moments = trainable.state_dict()["optimizer"]
    assert moments["matrix"]["exp_avg"].item() == pytest.approx(0.06, rel=1e-4)
    assert moments["vector"]["exp_avg"].item() == pytest.approx(0.08, rel=1e-4)


def test_weight_decay_goes_by_the_learning_rate_of_the_matrix():
    module = Scalar()
    trainable = trainable_of(module, weight_decay=0.5, peaks={"matrix": 0.2})
    trainable.backward(module.loss(0.0, 0.0))
    trainable.optimizer_step()
    assert module.matrix.item() == pytest.approx(2.0 * (1 - 0.2 * 0.5))
    assert module.vector.item() == 1.0


# --- the state --------------------------------------------------------------------------------------------------------


def leaves(state):
    for value in state.values():
        yield from leaves(value) if isinstance(value, dict) else [value]


def through_a_file(state):
    """What a checkpoint does: tensors through safetensors, the rest through JSON."""
    if isinstance(state, dict):
        return {key: through_a_file(value) for key, value in state.items()}
    return (
        load(save({"x": state.contiguous()}))["x"] if isinstance(state, torch.Tensor) else json.loads(json.dumps(state))
    )


@pytest.mark.parametrize("peaks", [None, {"2.weight": 0.3}])
@pytest.mark.parametrize("num_before", [0, 3])
def test_a_resumed_run_continues_bit_for_bit(num_before, peaks):
    settings = {"schedule": "cosine", "warmup_steps": 2, "weight_decay": 0.1, "max_grad_norm": 0.5, "peaks": peaks}
    original = trainable_of(network(), **settings)
    learn(original, num_before)
    saved = copy.deepcopy(through_a_file(original.state_dict()))
    learn(original, 3, first=num_before)

    other = trainable_of(network(seed=1), **settings)
    learn(other, 2, first=50)  # whatever it did before is gone
    other.load_state_dict(saved)
    rate_after_loading = other.learning_rate
    learn(other, 3, first=num_before)
    assert_equal_weights(other.module, weights(original.module))
    assert other.learning_rate == original.learning_rate
    fresh = trainable_of(network(), **settings)
    learn(fresh, num_before)
    assert rate_after_loading == fresh.learning_rate


def test_the_state_holds_tensors_and_numbers():
    trainable = trainable_of(network())
    learn(trainable, 1)
    assert all(isinstance(value, torch.Tensor | int | float) for value in leaves(trainable.state_dict()))
    assert not any(value.requires_grad for value in leaves(trainable.state_dict()) if isinstance(value, torch.Tensor))


def test_loading_shares_no_memory():
    trainable = trainable_of(network())
    learn(trainable, 2)
    saved = copy.deepcopy(trainable.state_dict())
    untouched = copy.deepcopy(saved)
    other = trainable_of(network())
    other.load_state_dict(saved)
    learn(other, 2)
    for ours, theirs in itertools.zip_longest(leaves(saved), leaves(untouched)):
        assert_close(ours, theirs, rtol=0.0, atol=0.0)


def other_width(module):
    """As another LoRA rank: the same names with other shapes."""
    module[0], module[2] = nn.Linear(3, 5), nn.Linear(5, 1)


def frozen_first(module):
    """As adapters on a model that was trained whole: some names are no longer trained."""
    module[0].requires_grad_(False)


def one_more(module):
    module.append(nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (other_width, r"3 differ, such as 0\.bias, which was \(4,\) and is \(5,\)"),
        (frozen_first, r"2 differ, such as 0\.bias, which was \(4,\) and is not trained"),
        (one_more, r"2 differ, such as 3\.bias, which was not trained and is \(1,\)"),
    ],
)
def test_a_state_of_other_weights_is_refused_and_changes_nothing(change, told):
    saved = trainable_of(network())
    learn(saved, 1)
    module = network(seed=1)
    change(module)
    other = trainable_of(module)
    before = weights(module)
    with pytest.raises(StateMismatch, match=told):
        other.load_state_dict(saved.state_dict())
    assert_equal_weights(module, before)
    assert other.num_steps_done == 0


# --- gradients that are not finite ------------------------------------------------------------------------------------


@pytest.mark.parametrize("slope", [math.nan, math.inf])
def test_a_step_without_a_finite_gradient_changes_the_schedule_alone(slope):
    module = network()
    trainable = trainable_of(module, schedule="linear", max_grad_norm=1.0)
    learn(trainable, 1)
    before, moments = weights(module), copy.deepcopy(trainable.state_dict()["optimizer"])
    trainable.backward(slope * module(torch.ones(1, 3)).sum())
    assert not trainable.optimizer_step().isfinite()
    assert_equal_weights(module, before)
    assert_close(trainable.state_dict()["optimizer"], moments, rtol=0.0, atol=0.0)
    assert all(p.grad is None for p in module.parameters())
    assert trainable.learning_rate == pytest.approx(PEAK * 8 / 10)


def test_the_fifth_in_a_row_ends_the_run():
    module = Scalar()
    trainable = trainable_of(module)

    def step(slope):
        trainable.backward(module.loss(slope, 1.0))
        trainable.optimizer_step()

    assert MAX_SKIPPED_STEPS == 5
    for slope in [math.nan] * 4 + [1.0] + [math.nan] * 4:
        step(slope)
    for _ in range(2):  # a run that goes on afterwards gets as many again
        with pytest.raises(FloatingPointError, match=r"5 optimizer steps one after another; .* learning_rate of its o"):
            step(math.nan)
        for slope in [math.nan] * 4:
            step(slope)


def test_skipped_steps_are_counted_across_a_resume():
    module = Scalar()
    trainable = trainable_of(module)
    for _ in range(4):
        trainable.backward(module.loss(math.nan, 1.0))
        trainable.optimizer_step()
    other = trainable_of(Scalar())
    other.load_state_dict(trainable.state_dict())
    other.backward(other.module.loss(math.nan, 1.0))
    with pytest.raises(FloatingPointError):
        other.optimizer_step()


# --- several ranks ----------------------------------------------------------------------------------------------------


def test_gradients_of_ranks_add_up_before_they_are_clipped():
    """As one process with the sum of their losses; a parameter without a gradient anywhere keeps none."""
    losses = [lambda m: (m.a.weight * 3.0).sum(), lambda m: (m.a.weight * 1.0).sum() + (m.b.weight * 2.0).sum()]

    initial = nn.ModuleDict({name: nn.Linear(2, 1, bias=False) for name in ("a", "b", "idle")})

    def step(losses, collectives):
        module = copy.deepcopy(initial)
        config = OptimizerConfig(learning_rate=PEAK, max_grad_norm=0.5, weight_decay=0.1)
        trainable = LocalTrainable(module, config, num_steps=2, collectives=collectives)
        for loss in losses:
            trainable.backward(loss(SimpleNamespace(**module)))
        return trainable.optimizer_step(), [p.detach().clone() for p in module.parameters()]

    norm, expected = step(losses, None)
    for each_norm, weights in on_ranks(2, lambda ranks: step([losses[ranks.rank]], ranks)):
        assert_close(each_norm, norm)
        assert_close(weights, expected)
    assert torch.equal(expected[2], initial["idle"].weight)


def test_one_of_several_ranks_cannot_learn_alone(monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="world_size > 1 needs `collectives`"):
        LocalTrainable(network(), OptimizerConfig(), num_steps=1)


class Joined(Collectives):
    """`Collectives` of one of two ranks, of which the other has twice the gradient; counts what they do together."""

    rank, world_size = 0, 2

    def __init__(self):
        self.num_sums = 0

    def sum(self, x):
        self.num_sums += 1
        return x + 2 * x

    def gather(self, x):
        return [x, x]


@pytest.mark.parametrize(("max_elements", "num_buckets"), [(1, 4), (8, 3), (16, 2), (21, 1)])
def test_gradients_are_added_up_in_buckets(monkeypatch, max_elements, num_buckets):
    """Of 12, 4, 4 and 1 elements; bit for bit as one by one."""
    monkeypatch.setattr(module_under_test, "BUCKET_ELEMENTS", max_elements)
    module, ranks = network(), Joined()
    together = LocalTrainable(module, OptimizerConfig(), num_steps=2, collectives=ranks)
    together.backward(module(torch.randn(5, 3)).square().sum())
    own = [p.grad.clone() for p in module.parameters()]
    together.add_up_gradients()
    assert ranks.num_sums == 1 + num_buckets  # first of all who has a gradient
    for p, grad in zip(module.parameters(), own, strict=True):
        assert torch.equal(p.grad, grad + 2 * grad)


def test_a_bucket_is_full_before_the_next_begins():
    parameters = [nn.Parameter(torch.zeros(size)) for size in (3, 9, 2, 2, 1, 4)]
    sizes = [[p.numel() for p in bucket] for bucket in in_buckets(parameters, 5)]
    assert sizes == [[3], [9], [2, 2, 1], [4]]
    assert list(in_buckets([], 5)) == []
