import pytest

from llmrl.config import SFTRun
from llmrl.data.config import DataConfig, PreferenceDataConfig, PromptDataConfig, SupervisedDataConfig
from llmrl.settings import SettingError, read_recipe


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": ""}, r"data\.path"),
        ({"path": "a", "num_rows": 0}, r"data\.num_rows \(0\) must be at least 1, or null; leave it out"),
        ({"path": "a", "template": "none", "system_prompt": "x"}, r"data\.system_prompt needs a chat template"),
        ({"path": "a", "system_prompt": "x \udcff"}, r"data\.system_prompt \('x \\udcff'\) is no Unicode text"),
    ],
)
def test_settings_of_data_that_cannot_be(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        DataConfig(**settings)


def test_settings_of_prompts_that_cannot_be():
    with pytest.raises(ValueError, match=r"data\.max_prompt_tokens \(0\) must be at least 1"):
        PromptDataConfig(path="a", max_prompt_tokens=0)
    with pytest.raises(ValueError, match=r"data\.num_rows \(-1\)"):
        PromptDataConfig(path="a", num_rows=-1)


def test_settings_of_examples_that_cannot_be():
    with pytest.raises(ValueError, match=r"data\.max_tokens \(1\) must be at least 2"):
        SupervisedDataConfig(path="a", max_tokens=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 1}, r"data\.max_tokens \(1\) must be at least 2"),
        ({"chosen_column": "x", "rejected_column": "x"}, r"data\.rejected_column \(x\) must be two different columns"),
    ],
)
def test_settings_of_pairs_that_cannot_be(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        PreferenceDataConfig(**({"path": "pairs.jsonl"} | settings))


@pytest.mark.parametrize("place", ["data", "evaluation_data", "data.mixed_with.0"])
def test_nothing_streams_from_the_hub(place, tmp_path):
    """Rows of a stream could not be checked, shuffled and known again."""
    recipe = tmp_path / "sft.yaml"
    recipe.write_text(
        "model: {path: m}\ndata: {path: d, mixed_with: [{path: e, weight: 1.0}]}\nevaluation_data: {path: f}\n"
    )
    with pytest.raises(
        SettingError, match=rf"{place}\.streaming cannot be set: Every row is read before .*train\[:10000\]"
    ):
        read_recipe(SFTRun, recipe, [f"{place}.streaming=true"])
