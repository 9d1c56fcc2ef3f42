"""The digests by which a run knows again what it reads."""

import shutil
from dataclasses import replace
from pathlib import Path

from llmrl import secrets
from llmrl.algorithms.config import GRPOConfig
from llmrl.config import SFTRun
from llmrl.rewards.config import RewardConfig, RewardFunctionConfig
from llmrl.secrets import without_secrets
from llmrl.settings import read_recipe
from llmrl.trainers.changes import changes_since
from llmrl.wiring.checks import check_rl
from llmrl.wiring.contents import recorded_settings


def written(file: Path, text: str) -> Path:
    file.write_text(text)
    return file


def changed(config, file: Path, text: str) -> set[str]:
    """What counts as changed after a file is written over."""
    before = check_rl(config, dry=False).contents
    before_text = file.read_text()
    file.write_text(text)
    now = check_rl(config, dry=False).contents
    file.write_text(before_text)
    assert before.keys() == now.keys()
    return {name for name in now if now[name] != before[name]}


def test_rows_and_their_order(config, tmp_path):
    file = tmp_path / "train.csv"
    first, *rows = file.read_text().splitlines(keepends=True)
    assert changed(config, file, "".join([first, *reversed(rows)])) == {"data"}
    assert changed(config, file, file.read_text() + "\n") == set()


def test_code_of_rewards_and_of_what_they_import(config, tmp_path):
    helper = written(tmp_path / "helper_of_rule.py", "value = 1\n")
    rule = written(
        tmp_path / "rule.py", "import helper_of_rule\ndef rule(responses):\n    return [0.0 for _ in responses]\n"
    )
    functions = (
        RewardFunctionConfig(name=f"{rule}:rule"),
        RewardFunctionConfig(name="llmrl.rewards.rules:right_equations"),
    )
    config = replace(config, reward=RewardConfig(functions=functions))
    assert changed(config, rule, rule.read_text() + "# more\n") == {"reward.functions.0"}
    assert changed(config, helper, "value = 2\n") == {"reward.functions.0"}


def test_code_of_a_loss(config, tmp_path):
    loss = written(
        tmp_path / "loss.py",
        "def loss(logprobs, old_logprobs, advantages, weights):\n    return (logprobs * weights).sum()\n",
    )
    config = replace(config, algorithm=GRPOConfig(loss=f"{loss}:loss"))
    assert changed(config, loss, loss.read_text() + "# more\n") == {"algorithm.loss"}


def test_files_of_the_model(config, tmp_path):
    shutil.copytree(config.model.path, tmp_path / "model")
    config = replace(config, model=replace(config.model, path=str(tmp_path / "model")))
    file = tmp_path / "model" / "config.json"
    assert changed(config, file, file.read_text() + "\n") == {"model.path"}


def test_another_choice_from_the_environment_is_a_change(tmp_path, monkeypatch):
    monkeypatch.setattr(secrets, "_known", set())
    recipe = written(
        tmp_path / "recipe.yaml",
        "model: {path: m}\ndata: {path: x.jsonl}\nrun: {num_iterations: 2, output_dir: out}\n"
        "optimizer: {schedule: '${oc.env:SCHEDULE_OF_MINE}'}\n",
    )
    recorded = []
    for schedule in ("linear", "cosine"):
        monkeypatch.setenv("SCHEDULE_OF_MINE", schedule)
        recorded.append(recorded_settings(read_recipe(SFTRun, recipe, [])))
    (change,) = changes_since({"settings": recorded[0]}, recorded[1], {})
    assert change.text == "optimizer.schedule was linear, is cosine"
    assert without_secrets("a linear layer") == "a linear layer"
