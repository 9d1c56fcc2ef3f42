import pytest

from llmrl.models.config import CriticConfig, LoraSettings


@pytest.mark.parametrize("settings", [{"rank": 0}, {"alpha": 0}])
def test_adapter_settings_are_checked(settings):
    with pytest.raises(ValueError, match=rf"model\.lora\.{next(iter(settings))} \(0\)"):
        LoraSettings(**settings)


def test_all_linear_is_another_name_for_none():
    assert LoraSettings(targets="all-linear") == LoraSettings(targets=("all-linear",)) == LoraSettings()


def test_a_layer_is_trained_whole_or_adapted():
    assert LoraSettings(targets=("q_proj",), modules_to_save=("lm_head",)).modules_to_save == ("lm_head",)
    with pytest.raises(ValueError, match=r"^model\.lora\.modules_to_save \(v_proj\) are trained whole, .* leave them"):
        LoraSettings(targets=("q_proj", "v_proj"), modules_to_save=("lm_head", "v_proj"))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"warmup_iterations": -1}, r"^critic\.warmup_iterations \(-1\) must be 0 or greater$"),
        ({"value_coef": 0.0}, r"^critic\.value_coef \(0\.0\) must be greater than 0$"),
        ({"value_coef": float("inf")}, r"^critic\.value_coef \(inf\) must be finite and greater than 0$"),
        (
            {"network": "shared", "warmup_iterations": 3},
            r"^critic\.warmup_iterations \(3\) needs a critic that can learn alone.*; set it to 0, or choose "
            r"another critic\.network$",
        ),
        (
            {"network": "mtp", "warmup_iterations": 3},
            r"^critic\.warmup_iterations \(3\) .* and critic\.network mtp is the actor's trunk; set it to 0",
        ),
        (
            {"network": "mtp", "path": "kept"},
            r"^critic\.path \(kept\) is a critic .*network mtp begins with fresh heads; leave critic\.path out, or",
        ),
    ],
)
def test_settings_of_a_critic_that_make_no_sense_are_refused(settings, told):
    with pytest.raises(ValueError, match=told):
        CriticConfig(**settings)
