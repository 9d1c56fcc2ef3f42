"""Environments and tools that a program hands over."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import llmrl
from llmrl.api.environments import environment_section
from llmrl.api.given import Given
from llmrl.distributed.collectives import OneProcess
from tests.environments.fakes import FORGETS, FORGOTTEN
from tests.golden.runs import read_metrics, train

from .conftest import SHORT, without_times

GAME = """
import llmrl


class Count(llmrl.Environment):
    def __init__(self, bonus=0.0):
        self.bonus = bonus

    def start(self, row):
        self.wanted = row["wanted"] + self.random.randint(0, 3)
        return "1+2="

    def respond(self, message):
        digits = sum(c.isdigit() for c in message.text)
        if digits > self.wanted:
            raise RuntimeError("too many")
        observation = f"{self.random.randint(0, 9)} "
        return llmrl.Turn(observation, done=message.turn == 3, reward=digits / (1 + self.wanted))

    def close(self):
        return self.bonus
"""
"""A game whose answers, ends and failures depend on the responses and on its random numbers."""
SETTINGS: dict[str, Any] = {
    "rollout": {"prompts_per_iteration": 4, "max_response_tokens": 90},
    "algorithm": {"group_size": 4},
    "optimizer": {"learning_rate": 1e-3, "schedule": "linear", "warmup_steps": 1},
}
LIMITS = {"max_turns": 4, "max_turn_tokens": 25, "arguments": {"bonus": 0.5}}


def load(text: str, name: str) -> Any:
    """What a text of Python defines, as a program has it that no other process can import."""
    space: dict[str, Any] = {"__name__": "__main__"}
    exec(text, space)  # noqa: S102
    return space[name]


def add(number: int) -> int:
    """Adds one.

    Args:
        number: Any.
    """
    return number + 1


@pytest.fixture
def given(tmp_path):
    return Given(tmp_path / "given", OneProcess())


def test_what_is_importable_keeps_its_name_and_all_else_is_given(given):
    game = load(GAME, "Count")
    section = environment_section(game, [add, "tools.py:search"], given)
    assert section == {"environment": {"name": "given:Count", "tools": [f"{__name__}:add", "tools.py:search"]}}
    assert given.objects == {"Count": game}
    assert environment_section("game.py:Count", (), given) == {"environment": {"name": "game.py:Count"}}
    assert environment_section(None, (), given) == {}


@pytest.mark.parametrize(
    ("environment", "tools", "message"),
    [
        (llmrl.Environment(), (), "environment has a Environment, which cannot be called; hand over its class"),
        (None, [3], "tools has a int, which cannot be called; hand over functions"),
        (None, add, r"tools is a function; hand over a list of functions, such as tools=\[search\]"),
        (None, "tools.py:search", "tools is a str; hand over a list"),
    ],
)
def test_what_is_no_code_is_refused(given, environment, tools, message, production):
    with pytest.raises(llmrl.Error, match=message):
        environment_section(environment, tools, given)


def test_a_class_of_the_program_gives_the_bits_of_the_command_line(tiny, folder, tmp_path, monkeypatch):
    rows = [{"wanted": number % 2} for number in range(8)]
    settings = {**SETTINGS, "run.seed": 3, **{f"environment.{name}": value for name, value in LIMITS.items()}}
    run = llmrl.grpo(
        tiny.model,
        tokenizer=tiny.tokenizer,
        prompts=rows,
        environment=load(GAME, "Count"),
        evaluation=rows[:2],
        output_dir=tmp_path / "python",
        num_iterations=3,
        settings=settings,
    )
    run.train()

    monkeypatch.chdir(Path(__file__).parents[2])
    (tmp_path / "game.py").write_text(GAME)
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    read = {"path": str(tmp_path / "rows.jsonl")}
    sections = {
        **SETTINGS,
        "environment": {"name": f"{tmp_path / 'game.py'}:Count", **LIMITS},
        "data": read,
        "evaluation_data": {**read, "num_rows": 2},
    }
    train("grpo", "llama", sections, folder, output=tmp_path / "command")
    theirs = read_metrics(tmp_path / "command")
    assert without_times(run.metrics) == without_times(theirs)
    assert sum(row.get("environment/failed/respond", 0) for row in theirs) > 0
    assert max(row.get("turn/count", 0) for row in theirs) > 1
    assert run.evaluate(rows)["eval/turns"] > 1


def test_a_model_is_evaluated_in_an_environment(tiny):
    rows = [{"wanted": 1}, {"wanted": 2}]
    values = llmrl.evaluate(
        tiny.model,
        tokenizer=tiny.tokenizer,
        prompts=rows,
        environment=load(GAME, "Count"),
        settings={"rollout.max_response_tokens": 24, "environment.max_turn_tokens": 5},
    )
    assert values["eval/turns"] >= 1
    assert values["eval/num_prompts"] == 2


class Asks(llmrl.Environment):
    def start(self, row):
        return row["opening"]

    def respond(self, message):
        return llmrl.Turn(f"{message.turn}+", reward=1.0)


def test_a_new_context_is_what_a_fresh_conversation_is(tiny, tmp_path):
    """Likeliest turns, against responses to the conversation as the template writes it each time."""
    plain = tmp_path / "plain"
    with torch.no_grad():
        tiny.model.lm_head.weight[1] = 0  # other ids end a turn, so that it says something
    tiny.model.save_pretrained(plain)
    tiny.tokenizer.save_pretrained(plain)
    (plain / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(30, 99, 2))}))
    forgetting = shutil.copytree(plain, tmp_path / "forgetting")
    (forgetting / "chat_template.jinja").write_text(FORGETS)
    settings = {"environment.history": "branch", "environment.max_turns": 4}
    rows = [{"opening": f"{number}+{other}="} for number in range(2) for other in range(2)]
    episodes = llmrl.generate(forgetting, rows, environment=Asks, settings=settings)
    num_forgotten = 0
    for row, (episode,) in zip(rows, episodes, strict=True):
        read, lines = f">{row['opening']}<", [f"> {row['opening']}"]
        for turn in range(1, 5):
            ((said,),) = llmrl.generate(plain, read)
            lines += [said, f"> {turn}+"]
            kept = "".join(letter for letter in said if letter not in FORGOTTEN)
            num_forgotten += kept != said
            read += f"{kept}<eos>>{turn}+<"
        assert episode == "\n".join([*lines[:-1], "(4 turns; truncated by environment.max_turns, reward 4)"])
    assert num_forgotten > 0
    values = llmrl.evaluate(forgetting, prompts=rows, environment=Asks, settings=settings)
    assert values["eval/turns"] == values["eval/score"] == 4.0


def test_without_environment_there_has_to_be_a_reward(tiny, rows, tmp_path, production):
    with pytest.raises(llmrl.Error, match=r"there is nothing to learn from"):
        llmrl.grpo(
            tiny.model,
            tokenizer=tiny.tokenizer,
            prompts=rows,
            output_dir=tmp_path,
            num_iterations=1,
            settings=SHORT,
        )
