"""What the settings of a run say for its model card."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from llmrl.config import PPORun
from llmrl.data.config import MixedRowsConfig, PromptDataConfig
from llmrl.models.config import LoraSettings
from llmrl.models.folders import HUB_NAME
from llmrl.optim.config import OptimizerConfig
from llmrl.wiring.cards import card_of, changed_settings
from llmrl.wiring.checks import check_rl

from .conftest import build_run


def test_what_is_at_its_default_is_left_out(config):
    assert changed_settings(config) == {
        "model.path": config.model.path,
        "model.dtype": "float32",
        "model.from_scratch": True,
        "data.path": config.data.path,
        "data.max_prompt_tokens": 6,
        "reward.functions": changed_settings(config)["reward.functions"],
        "run.num_iterations": 3,
        "rollout.max_response_tokens": 3,
        "rollout.temperature": 0.5,
        "update.minibatch_size": 32,
        "update.num_epochs": 2,
    }


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"optimizer": OptimizerConfig(learning_rate=3e-4, weight_decay=0.5)}, {"learning_rate", "weight_decay"}),
        ({"made_by": {"x": "y"}}, set()),
    ],
)
def test_what_was_changed_is_named(config, changes, names):
    before = changed_settings(config).keys()
    assert changed_settings(dataclasses.replace(config, **changes)).keys() - before == {
        f"optimizer.{name}" for name in names
    }


def test_a_section_that_takes_its_settings_from_another_is_compared_with_that(config):
    """Held-out data as the data; the critic's optimizer as the actor's, at its own learning rate."""
    held_out = dataclasses.replace(config.data, path="test.csv", max_prompt_tokens=5)
    shared = {name: getattr(config, name) for name in ("model", "data", "reward", "run")}
    linear = OptimizerConfig(learning_rate=3e-4, schedule="linear")
    ppo = PPORun(
        **shared,
        evaluation_data=held_out,
        optimizer=linear,
        critic_optimizer=dataclasses.replace(linear, learning_rate=1e-5, weight_decay=0.1),
    )
    changed = changed_settings(ppo).keys()
    assert {name for name in changed if name.startswith(("evaluation_data", "critic_optimizer"))} == {
        "evaluation_data.path",
        "evaluation_data.max_prompt_tokens",
        "critic_optimizer.weight_decay",
    }


def test_a_new_section_has_its_settings_named(config):
    lora = dataclasses.replace(config, model=dataclasses.replace(config.model, lora=LoraSettings(rank=3)))
    assert changed_settings(lora)["model.lora.rank"] == 3


def test_each_set_of_a_mixture_is_named(config, tmp_path):
    (tmp_path / "other.jsonl").write_text('{"prompt": "3+3=", "answer": "6"}\n')
    mixed = MixedRowsConfig(path=str(tmp_path / "other.jsonl"), weight=2.0)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, mixed_with=(mixed,)))
    card = card_of(config, check_rl(config, dry=False))([])
    assert "| data | `train.csv` | 3 | " in card
    assert "| data.mixed_with.0 | `other.jsonl` | 1 | " in card


def test_a_model_that_was_handed_over_goes_by_its_name_on_the_hub(config, tmp_path):
    folder = shutil.copytree(config.model.path, tmp_path / "model-1f2e")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, path=str(folder)))
    assert "base_model:" not in card_of(config, check_rl(config, dry=False))([])
    (folder / HUB_NAME).write_text("someone/tiny")
    card = card_of(config, check_rl(config, dry=False))([])
    assert "base_model: someone/tiny" in card
    assert "# someone/tiny, after `llmrl grpo`" in card


def test_the_card_of_a_run_stands_beside_its_model(config, tmp_path):
    """It says nothing of where the run was."""
    held_out = PromptDataConfig(path=config.data.path, max_prompt_tokens=6)
    run, _ = build_run(dataclasses.replace(config, evaluation_data=held_out))
    run.train()
    card = (Path(config.run.output_dir) / "final" / "README.md").read_text()
    assert str(tmp_path) not in card
    assert tmp_path.name not in card
    assert "after `llmrl grpo`" in card
    assert "| data | `train.csv` | 3 |" in card
    assert "* arithmetic.py:correct, weight 1" in card
    assert "| after iteration 0 | after iteration 3 |" in card
    assert [line.split(" | ")[0] for line in card.splitlines() if line.startswith(("| 1 |", "| 2 |", "| 3 |"))] == [
        "| 1",
        "| 2",
        "| 3",
    ]
