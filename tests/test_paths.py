"""Which settings are paths: a tilde at their front is the home folder."""

from pathlib import Path

import pytest
import yaml

from llmrl.config import PPORun, RewardModelRun, SFTRun
from llmrl.settings import describe, read_recipe


@pytest.mark.parametrize(
    ("cls", "expected"),
    [
        (SFTRun, {"model.path", "data.path", "data.mixed_with.<n>.path", "evaluation_data.path", "run.output_dir"}),
        (
            RewardModelRun,
            {"model.path", "data.path", "data.mixed_with.<n>.path", "evaluation_data.path", "run.output_dir"},
        ),
        (
            PPORun,
            {
                "model.path",
                "data.path",
                "data.mixed_with.<n>.path",
                "evaluation_data.path",
                "run.output_dir",
                "critic.path",
                "reward.model.path",
                "reward.functions.<n>.name",
                "environment.name",
            },
        ),
    ],
)
def test_these_settings_are_paths(cls: type, expected: set[str]):
    assert {setting.path for setting in describe(cls) if setting.type.startswith("path")} == expected


def test_a_tilde_in_a_recipe_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/h")
    recipe = tmp_path / "recipe.yaml"
    data = {"path": "~/train.jsonl"}
    functions = [{"name": "~/rules.py:correct"}]
    run = {"output_dir": "~/runs/x", "num_iterations": 1}
    recipe.write_text(
        yaml.safe_dump({"model": {"path": "~/m"}, "data": data, "reward": {"functions": functions}, "run": run})
    )
    config = read_recipe(PPORun, recipe, ["reward.model.path=~/judge", "evaluation_data.path=~/test.jsonl"])
    assert (config.model.path, config.data.path, config.run.output_dir) == ("/h/m", "/h/train.jsonl", "/h/runs/x")
    assert config.reward.model is not None
    assert config.reward.model.path == "/h/judge"
    assert config.reward.functions[0].name == "/h/rules.py:correct"
    assert config.evaluation_data is not None
    assert config.evaluation_data.path == "/h/test.jsonl"
