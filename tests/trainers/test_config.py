import math
from typing import Any

import pytest

from llmrl.trainers.config import EvaluationConfig, RewardModelConfig, RLRunConfig, SFTConfig, UpdateConfig

NAN = float("nan")


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("output_dir", "", r"run\.output_dir is empty; name a folder"),
        ("seed", -1, r"run\.seed \(-1\) must be at least 0 and less than 4294967296"),
        ("seed", 2**32, r"run\.seed \(4294967296\) must be at least 0 and less than 4294967296"),
        ("num_iterations", 0, r"run\.num_iterations \(0\) must be at least 1"),
        ("checkpoint_every", -1, r"run\.checkpoint_every \(-1\) must be 0 or greater"),
        ("keep_checkpoints", 0, r"run\.keep_checkpoints \(0\) must be at least 1"),
        ("samples_per_iteration", -1, r"run\.samples_per_iteration \(-1\) must be 0 or greater"),
    ],
)
def test_a_setting_of_the_run_out_of_range_is_refused(setting: str, value: Any, message: str):
    with pytest.raises(ValueError, match=f"^{message}"):
        RLRunConfig(**({"output_dir": "runs/x", "num_iterations": 1} | {setting: value}))


@pytest.mark.parametrize(
    ("setting", "value"),
    [("seed", 0), ("seed", 2**32 - 1), ("num_iterations", 1), ("checkpoint_every", 0), ("samples_per_iteration", 0)],
)
def test_the_ends_of_the_ranges_are_allowed(setting: str, value: Any):
    config = RLRunConfig(**({"output_dir": "runs/x", "num_iterations": 1} | {setting: value}))
    assert getattr(config, setting) == value


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": -1}, r"evaluation\.every \(-1\) must be 0 or greater"),
        ({"num_responses": 0}, r"evaluation\.num_responses \(0\) must be at least 1"),
        (
            {"temperature": 0.0},
            r"evaluation\.temperature \(0\.0\) must be greater than 0; evaluation\.num",
        ),
        ({"temperature": NAN}, r"evaluation\.temperature \(nan\) must be finite and greater than 0"),
        ({"temperature": math.inf}, r"evaluation\.temperature \(inf\) must be finite and greater than 0"),
        ({"pass_at": (0,)}, r"evaluation\.pass_at \(0\) must be between 1 and evaluation\.num_responses \(1\)"),
        (
            {"pass_at": (1, 5), "num_responses": 4},
            r"evaluation\.pass_at \(5\) must be between 1 and evaluation\.num_responses \(4\)",
        ),
    ],
)
def test_a_setting_of_the_evaluation_out_of_range_is_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"^{message}"):
        EvaluationConfig(**settings)


@pytest.mark.parametrize("name", ["num_epochs", "minibatch_size", "microbatch_tokens"])
def test_a_setting_of_the_update_out_of_range_is_refused(name: str):
    assert getattr(UpdateConfig(**{name: 1}), name) == 1
    with pytest.raises(ValueError, match=rf"^update\.{name} \(0\) must be at least 1(, or null)?$"):
        UpdateConfig(**{name: 0})


@pytest.mark.parametrize(
    ("setting", "value", "rule"),
    [
        ("num_epochs", 0, "at least 1"),
        ("batch_size", 0, "at least 1"),
        ("microbatch_tokens", 0, "at least 1"),
        ("num_reference_pairs", 0, "at least 1"),
        ("center_coef", -0.01, "0 or greater"),
        ("center_coef", math.nan, "finite and 0 or greater"),
        ("center_coef", math.inf, "finite and 0 or greater"),
        ("evaluate_every", -1, "0 or greater"),
    ],
)
def test_a_setting_of_the_reward_model_out_of_range_is_refused(setting: str, value: float, rule: str):
    with pytest.raises(ValueError, match=rf"^reward_model\.{setting} \({value}\) must be {rule}"):
        RewardModelConfig(**{setting: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("batch_size", 0, r"sft\.batch_size \(0\) must be at least 1"),
        ("microbatch_tokens", 0, r"sft\.microbatch_tokens \(0\) must be at least 1"),
        ("evaluate_every", -1, r"sft\.evaluate_every \(-1\) must be 0 or greater"),
    ],
)
def test_a_setting_of_sft_out_of_range_is_refused(setting: str, value: int, message: str):
    with pytest.raises(ValueError, match=f"^{message}"):
        SFTConfig(**{setting: value})
