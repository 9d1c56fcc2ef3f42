import math

import pytest

from llmrl.optim.config import OptimizerConfig


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", -1e-6),
        ("learning_rate", math.nan),
        ("learning_rate", math.inf),
        ("warmup_steps", -1),
        ("weight_decay", -0.1),
        ("weight_decay", math.nan),
        ("max_grad_norm", 0.0),
        ("max_grad_norm", math.nan),
    ],
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"^optimizer\.{name} \({value}\)"):
        OptimizerConfig(**{name: value})


@pytest.mark.parametrize("betas", [(1.0, 0.5), (0.5, 1.0), (0.5, -0.1), (0.5, math.nan)])
def test_both_betas_are_below_1(betas):
    (bad,) = {*betas} - {0.5}
    with pytest.raises(ValueError, match=rf"^optimizer\.betas \({bad}\) must be .*at least 0 and less than 1$"):
        OptimizerConfig(betas=betas)


@pytest.mark.parametrize("betas", [(), (0.9,), (0.9, 0.99, 0.999)])
def test_there_are_two_betas(betas):
    with pytest.raises(ValueError, match=r"^optimizer\.betas \(\[.*\]\) must be two numbers, such as \[0.9, 0.999\]$"):
        OptimizerConfig(betas=betas)
