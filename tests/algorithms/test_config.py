import math
import re

import pytest

from llmrl.algorithms.config import GRPOConfig, PPOConfig

NAN = float("nan")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"group_size": 0}, "algorithm.group_size (0) must be at least 1"),
        *(
            ({"group_size": 1, "baseline": name, "scale": "none"}, f"must be at least 2 with algorithm.baseline {name}")
            for name in ("mean", "leave_one_out", "optimal")
        ),
        ({"clip_low": 0.0}, "algorithm.clip_low (0.0)"),
        ({"clip_low": 1.5}, "algorithm.clip_low (1.5)"),
        ({"clip_high": 0.0}, "algorithm.clip_high (0.0)"),
        ({"dual_clip": 1.0}, "algorithm.dual_clip (1.0) must be greater than 1"),
        ({"kl_coef": -1.0}, "algorithm.kl_coef (-1.0)"),
        ({"overlong_buffer_tokens": -1}, "algorithm.overlong_buffer_tokens (-1)"),
        ({"max_redraws": -1}, "algorithm.max_redraws (-1)"),
        ({"baseline": "leave_one_out"}, "goes with algorithm.scale none"),
        ({"baseline": "none"}, "algorithm.baseline none goes with algorithm.scale none or batch"),
        (
            {"baseline": "optimal", "scale": "none", "credit": "token"},
            "algorithm.credit (token) compares parts of them",
        ),
        ({"baseline": "constant", "scale": "none"}, "algorithm.baseline constant needs algorithm.baseline_value"),
        ({"baseline_value": 0.5}, "algorithm.baseline_value (0.5) is read where algorithm.baseline is constant, not"),
        (
            {"baseline": "constant", "scale": "none", "baseline_value": NAN},
            "algorithm.baseline_value (nan) must be finite, or null",
        ),
        (
            {"baseline": "batch", "scale": "none", "max_redraws": 2},
            "algorithm.max_redraws (2) replaces groups of equal",
        ),
        (
            {"baseline": "mine.py:all", "scale": "none", "group_size": 1, "max_redraws": 2},
            "algorithm.baseline mine.py:all with 1 responses to a prompt compares none; set it to 0",
        ),
        ({"baseline": "mine.py:median"}, "algorithm.baseline mine.py:median goes with algorithm.scale none"),
        (
            {"baseline": "median"},
            "algorithm.baseline ('median') must be mean, leave_one_out, optimal, none, constant or batch, or",
        ),
        ({"loss": "mine.py"}, "algorithm.loss ('mine.py') must be clipped, cispo or policy_gradient, or"),
        ({"name": "ppo"}, "algorithm.name ('ppo') must be grpo, or name your own"),
        ({"ratio": "sequence"}, "goes with algorithm.aggregation sequence"),
        ({"entropy_coef": -0.1}, "algorithm.entropy_coef (-0.1) must be 0 or greater"),
        ({"kl_coef": 0.1, "reference_refresh_every": 0}, "algorithm.reference_refresh_every (0) must be at least 1"),
        ({"reference_refresh_every": 5}, "algorithm.reference_refresh_every (5) moves the reference of the KL, which"),
        ({"kl_coef": 0.1, "reference_mixing": 0.5}, "algorithm.reference_mixing (0.5) is read when the reference mov"),
        (
            {"kl_coef": 0.1, "reference_refresh_every": 5, "balance_bias_rate": 0.001},
            "algorithm.reference_refresh_every (5) moves the weights of the reference, and not the bias of its routers",
        ),
        (
            {"kl_coef": 0.1, "reference_refresh_every": 5, "reference_mixing": 0.0},
            "algorithm.reference_mixing (0.0) must be greater than 0 and at most 1",
        ),
    ],
)
def test_grpo_settings_that_make_no_sense(settings, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        GRPOConfig(**settings)


def test_scaling_with_a_kl_warns():
    assert "none gives it one price" in GRPOConfig(kl_coef=0.1).warnings()[0]
    assert GRPOConfig(kl_coef=0.1, scale="none").warnings() == []
    assert GRPOConfig(kl_coef=0.1, kl_form="k1_reward").warnings() == []  # it is scaled like the score it is paid from


@pytest.mark.parametrize("baseline", ["none", "batch", "mine.py:own"])
def test_one_response_to_a_prompt_goes_with_baselines_that_ask_for_no_siblings(baseline):
    assert GRPOConfig(group_size=1, baseline=baseline, scale="none").group_size == 1
    assert GRPOConfig().warnings() == []


@pytest.mark.parametrize("config", [GRPOConfig, PPOConfig])
def test_clips_that_no_loss_reads_warn(config):
    theirs = config(loss="mine.py:loss", clip_high=0.3, dual_clip=3.0)
    told = "is read only where algorithm.loss is clipped"
    assert theirs.warnings() == [f"algorithm.clip_high {told} or cispo", f"algorithm.dual_clip {told}"]
    assert config(loss="cispo", clip_high=4.0, dual_clip=3.0).warnings() == [f"algorithm.dual_clip {told}"]
    assert config(loss="policy_gradient", clip_low=1.0).warnings() == [f"algorithm.clip_low {told} or cispo"]
    assert config(loss="mine.py:loss").warnings() == config(clip_high=0.3).warnings() == []


@pytest.mark.parametrize("config", [GRPOConfig, PPOConfig])
def test_settings_of_a_correction_that_is_not_made_warn(config):
    told = "is read only where algorithm.importance is not none"
    unread = config(importance_level="sequence", importance_cap=5.0)
    assert unread.warnings() == [f"algorithm.importance_level {told}", f"algorithm.importance_cap {told}"]
    assert config(importance="masked", importance_level="sequence", importance_cap=5.0).warnings() == []


@pytest.mark.parametrize("credit", ["turn", "token"])
def test_one_ratio_for_a_response_averages_its_credit(credit):
    (warning,) = GRPOConfig(credit=credit, ratio="sequence", aggregation="sequence").warnings()
    assert f"so of the advantages that algorithm.credit {credit} gives them only the mean counts" in warning
    assert GRPOConfig(credit=credit, aggregation="sequence").warnings() == []
    assert GRPOConfig(ratio="sequence", aggregation="sequence").warnings() == []


def test_what_a_class_of_the_user_reads_is_not_known_beforehand():
    own = {"name": "mine.py:Mine", "loss": "mine.py:loss", "clip_high": 0.3, "kl_coef": 0.1}
    assert GRPOConfig(**own).warnings() == []


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"num_return_steps": 0}, "algorithm.num_return_steps (0) must be at least 1, or null"),
        ({"num_return_steps": 5, "gae_lambda": 1.0}, "algorithm.num_return_steps (5) takes the place of"),
        ({"gamma": -0.1}, "algorithm.gamma (-0.1) must be between 0 and 1"),
        ({"gamma": 1.1}, "algorithm.gamma (1.1) must be between 0 and 1"),
        ({"gamma": NAN}, "algorithm.gamma (nan)"),
        ({"gae_lambda": -0.1}, "algorithm.gae_lambda (-0.1) must be between 0 and 1"),
        ({"gae_lambda": 1.1}, "algorithm.gae_lambda (1.1) must be between 0 and 1"),
        ({"value_lambda": -0.1}, "algorithm.value_lambda (-0.1) must be between 0 and 1"),
        ({"value_lambda": 1.1}, "algorithm.value_lambda (1.1) must be between 0 and 1"),
        ({"clip_low": 0.0}, "algorithm.clip_low (0.0) must be greater than 0 and at most 1"),
        ({"clip_low": 1.1}, "algorithm.clip_low (1.1) must be greater than 0 and at most 1"),
        ({"clip_high": 0.0}, "algorithm.clip_high (0.0) must be greater than 0"),
        ({"dual_clip": 1.0}, "algorithm.dual_clip (1.0) must be greater than 1, or null"),
        ({"dual_clip": NAN}, "algorithm.dual_clip (nan) must be finite and greater than 1, or null"),
        (
            {"loss": "kl"},
            "algorithm.loss ('kl') must be clipped, cispo or policy_gradient, or name your own: path",
        ),
        ({"value_clip": 0.0}, "algorithm.value_clip (0.0) must be greater than 0, or null"),
        ({"entropy_coef": -0.1}, "algorithm.entropy_coef (-0.1) must be 0 or greater"),
        ({"kl_coef": -0.1}, "algorithm.kl_coef (-0.1) must be 0 or greater"),
        ({"kl_coef": math.inf}, "algorithm.kl_coef (inf)"),
        ({"kl_target": 0.0}, "algorithm.kl_target (0.0) must be greater than 0, or null"),
        ({"kl_target": 6.0, "kl_coef": 0.0}, "must not begin at 0; try 0.05"),
        ({"step_kl_target": 0.0}, "algorithm.step_kl_target (0.0) must be greater than 0, or null"),
        ({"stop_kl": 0.0}, "algorithm.stop_kl (0.0) must be greater than 0, or null"),
        ({"stop_kl": NAN}, "algorithm.stop_kl (nan)"),
        ({"score_clip": 0.0}, "algorithm.score_clip (0.0) must be greater than 0, or null"),
        ({"missing_eos_penalty": -1.0}, "algorithm.missing_eos_penalty (-1.0) must be 0 or greater"),
        ({"overlong_buffer_tokens": -1}, "algorithm.overlong_buffer_tokens (-1) must be 0 or greater"),
        ({"mask_truncated": True, "missing_eos_penalty": 1.0}, "algorithm.missing_eos_penalty is about truncated resp"),
        ({"mask_truncated": True, "bootstrap_truncated": True}, "algorithm.bootstrap_truncated is about truncated res"),
        ({"kl_coef": 0.0, "reference_refresh_every": 5}, "algorithm.reference_refresh_every (5) moves the reference"),
        (
            {"kl_coef": 0.1, "reference_refresh_every": 5, "balance_bias_rate": 0.001},
            "algorithm.reference_refresh_every (5) moves the weights of the reference, and not the bias of its routers",
        ),
        ({"reference_mixing": 0.5}, "algorithm.reference_mixing (0.5) is read when the reference moves; set"),
        ({"bootstrap_truncated": True, "missing_eos_penalty": 1.0}, "missing_eos_penalty could be subtracted; set"),
        ({"bootstrap_truncated": True, "overlong_buffer_tokens": 3}, "overlong_buffer_tokens could be subtracted"),
    ],
)
def test_ppo_settings_that_make_no_sense(settings, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        PPOConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gamma": 0.0, "gae_lambda": 0.0, "value_lambda": 0.0},
        {"gamma": 1.0, "gae_lambda": 1.0, "value_lambda": 1.0},
        {"clip_low": 1.0, "clip_high": 5.0, "dual_clip": 1.5, "value_clip": None},
        {"kl_coef": 0.0},
        {"kl_coef": 0.1, "kl_target": 6.0},
        {"bootstrap_truncated": True, "score_clip": 1.0},
    ],
)
def test_settings_at_the_edge_of_sense(settings):
    config = PPOConfig(**settings)
    assert all(getattr(config, name) == value for name, value in settings.items())


def test_v_trace_corrects_tokens():
    with pytest.raises(ValueError, match="v_trace corrects token by token"):
        PPOConfig(importance="v_trace", importance_level="sequence")
