"""The recipes with environments, each for a few iterations."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llmrl.cli import app

ROOT = Path(__file__).parents[1]
CALL = '<tool_call>{"name": "calculate", "arguments": {"expression": "47*85"}}</tool_call>'
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def llmrl(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_game_that_a_model_without_practice_plays(tmp_path):
    """Every turn of every sample is answered and rewarded as the game has it."""
    games = write(tmp_path / "games.jsonl", *({"secret": secret} for secret in (3, 9)))
    llmrl(
        "grpo", "recipes/guessing_tiny_grpo.yaml", "model.path=recipes/models/tiny_chat_llama",
        "model.from_scratch=true", f"data.path={games}", f"evaluation_data.path={games}",
        "rollout.prompts_per_iteration=2", "algorithm.group_size=4", "update.minibatch_size=8",
        f"run.output_dir={tmp_path / 'run'}", "run.num_iterations=2",
    )  # fmt: skip
    for metrics in lines(tmp_path / "run" / "metrics.jsonl")[1:]:
        assert metrics["environment/failed"] == 0
        assert 1 <= metrics["turn/count"] <= 5
    samples = lines(tmp_path / "run" / "samples.jsonl")
    assert samples
    for sample in samples:
        for (said, answer), reward in zip(pairwise(sample["messages"]), sample["turn_rewards"] * 2, strict=False):
            if said["role"] == "assistant" and not said["content"].strip().isdigit():
                assert (answer["content"], reward) == ("a number", pytest.approx(-0.2))


def test_a_model_that_knows_one_call_by_heart(tmp_path):
    """With the calculator a right answer is two turns; without an environment it is one, and nothing is called."""
    asked = [{"role": "system", "content": "calculate(expression)"}, {"role": "user", "content": "47*85="}]
    answered = [*asked, {"role": "assistant", "content": CALL}, {"role": "tool", "content": "3995"}]
    turns = write(tmp_path / "sft.jsonl", {"prompt": asked, "response": CALL}, {"prompt": answered, "response": "3995"})
    llmrl(
        "sft", "recipes/products_tiny_sft.yaml", f"data.path={turns}", f"run.output_dir={tmp_path / 'sft'}",
        "run.num_iterations=60", "sft.batch_size=2",
    )  # fmt: skip
    problems = write(tmp_path / "problems.jsonl", {"prompt": "47*85=", "answer": "3995"})
    common = (
        "recipes/products_tiny_grpo.yaml", f"model.path={tmp_path / 'sft' / 'final'}", f"data.path={problems}",
        f"evaluation_data.path={problems}", "rollout.prompts_per_iteration=1", "update.minibatch_size=8",
        "run.num_iterations=1",
    )  # fmt: skip
    llmrl("grpo", *common, f"run.output_dir={tmp_path / 'with'}")
    llmrl("grpo", *common, f"run.output_dir={tmp_path / 'without'}", "environment=null")
    before, iteration, *_ = lines(tmp_path / "with" / "metrics.jsonl")
    assert (before["eval/accuracy"], before["eval/turns"], before["eval/tool_calls"]) == (1.0, 2.0, 1.0)
    assert iteration["tool/calls"] > 0.5
    assert iteration["environment/failed"] == 0
    assert "eval/tool_calls" not in lines(tmp_path / "without" / "metrics.jsonl")[0]
