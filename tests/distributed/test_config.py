import math

import pytest

from llmrl.distributed.config import DistributedConfig


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("silent_after_s", 2.9),
        ("silent_after_s", math.nan),
        ("phase_timeout_s", 0.0),
        ("phase_timeout_s", -1.0),
        ("phase_timeout_s", math.inf),
        ("phase_timeout_s", math.nan),
    ],
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"^distributed\.{name} \({value}\)"):
        DistributedConfig(**{name: value})


def test_the_limits_themselves_are_allowed():
    assert DistributedConfig(silent_after_s=3.0, phase_timeout_s=0.1).silent_after_s == 3.0
