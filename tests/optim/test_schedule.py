"""The learning rate of each step, and gradients that cannot be used."""

import pytest

from tests.optim.tiny import PEAK, SCHEDULES, Scalar, learn, network, trainable_of


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_by_hand(schedule):
    """Six steps, two of them warm-up. Under a constant gradient AdamW moves a weight by the learning rate."""
    module = Scalar(vector=0.0)
    trainable = trainable_of(module, num_steps=6, schedule=schedule, warmup_steps=2)
    expected = [PEAK * share for share in SCHEDULES[schedule]]
    position = 0.0
    for rate in expected:
        assert trainable.learning_rate == pytest.approx(rate, abs=1e-12)
        trainable.backward(module.loss(0.0, -7.0))
        trainable.optimizer_step()
        position += rate
        assert module.vector.item() == pytest.approx(position, rel=1e-5, abs=1e-7)


def test_without_warm_up_the_first_step_is_at_the_peak():
    for schedule in SCHEDULES:
        assert trainable_of(Scalar(), schedule=schedule).learning_rate == PEAK


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_schedule_ends_at_zero(schedule):
    trainable = trainable_of(network(), num_steps=4, schedule=schedule)
    learn(trainable, 4)
    assert trainable.learning_rate == pytest.approx(0.0, abs=1e-12)
