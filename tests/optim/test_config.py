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
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("max_grad_norm", 0.0),
        ("max_grad_norm", math.nan),
    ],
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"^optimizer\.{name} \({value}\)"):
        OptimizerConfig(**{name: value})
