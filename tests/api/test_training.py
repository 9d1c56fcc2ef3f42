"""A run of Python is that of the command line, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import llmrl
from tests.golden.runs import GRPO, ITERATIONS, PPO, read_metrics, train

from .conftest import without_times

SECTIONS: dict[str, dict[str, Any]] = {
    "sft": {"sft": {"batch_size": 8, "microbatch_tokens": 40}},
    "reward-model": {"reward_model": {"batch_size": 8, "microbatch_tokens": 60}},
    "grpo": {**GRPO, "reward": {"functions": [{"name": "tests.golden.rules:graded"}]}},
    "ppo": {**PPO, "reward": {"functions": [{"name": "tests.golden.rules:graded"}]}},
}
OTHERS = {"optimizer": {"learning_rate": 1e-3, "schedule": "linear", "warmup_steps": 1}, "run": {"seed": 3}}
LENGTH = {"num_iterations": ITERATIONS}


def graded(responses: list[str]) -> list[float]:
    """That of tests/golden/rules.py, as a function which only this process has."""
    from tests.golden import rules

    return rules.graded(responses)


def start(verb: str, tiny: Any, rows: list[dict[str, Any]], output: Path) -> llmrl.Run:
    settings = {name: section for name, section in SECTIONS[verb].items() if name != "reward"} | OTHERS
    held_out = rows[:5]
    common: dict[str, Any] = {"output_dir": output, "tokenizer": tiny.tokenizer, "settings": settings}
    match verb:
        case "sft":
            return llmrl.sft(tiny.model, data=rows, evaluation=held_out, **LENGTH, **common)
        case "reward-model":
            return llmrl.reward_model(tiny.model, pairs=rows, evaluation=held_out, **common)
    reward = lambda responses: graded(responses)  # noqa: E731
    make = llmrl.grpo if verb == "grpo" else llmrl.ppo
    return make(tiny.model, prompts=rows, reward={"graded": reward}, evaluation=held_out, **LENGTH, **common)


@pytest.mark.parametrize("verb", SECTIONS)
def test_the_bits_are_those_of_the_command_line(verb, tiny, rows, folder, tmp_path, monkeypatch):
    before = {name: weight.clone() for name, weight in tiny.model.state_dict().items()}
    run = start(verb, tiny, rows, tmp_path / "python")
    yielded = list(run)
    monkeypatch.chdir(Path(__file__).parents[2])
    train(verb, "llama", SECTIONS[verb], folder, output=tmp_path / "command")
    theirs = read_metrics(tmp_path / "command")
    assert without_times(run.metrics) == without_times(theirs)
    assert without_times(yielded) == without_times(theirs[1:])
    ours, final = (load_file(tmp_path / which / "final" / "model.safetensors") for which in ("python", "command"))
    assert ours.keys() == final.keys()
    assert all(weight.equal(final[name]) for name, weight in ours.items())
    assert all(weight.equal(before[name]) for name, weight in tiny.model.state_dict().items())
    contents = [llmrl.load_run(tmp_path / which).config["contents"] for which in ("python", "command")]
    for section in ("data", "evaluation_data"):
        assert contents[0][section] == contents[1][section]
