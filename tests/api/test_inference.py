"""Evaluation, generation and scores of models without training, as the commands do them."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import llmrl
from llmrl.cli import app
from tests.golden.runs import run as golden_run

from .conftest import digits


def command(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_responses_are_those_of_the_command(tiny, folder):
    common = {"num_responses": 2, "temperature": 0.7, "max_response_tokens": 5, "seed": 3}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in common.items()]
    prompts = ["1+1=", "2+3="]
    ours = llmrl.generate(tiny.model, prompts, tokenizer=tiny.tokenizer, **common)
    assert ours == llmrl.generate(folder / "llama", prompts, **common)
    assert [len(texts) for texts in ours] == [2, 2]
    printed = command("generate", folder / "llama", *prompts, *options)
    expected = [f"> {prompt}\n{text}\n\n" for prompt, texts in zip(prompts, ours, strict=True) for text in texts]
    assert printed == "".join(expected)
    assert llmrl.generate(folder / "llama", "1+1=") == llmrl.generate(folder / "llama", ["1+1="])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -1.0}, r"temperature \(-1.0\) must be a number of at least 0"),
        ({"num_responses": 0}, r"num_responses \(0\) must be at least 1"),
        ({"max_response_tokens": 0}, r"max_response_tokens \(0\) must be at least 1"),
        ({"seed": -1}, r"seed \(-1\) must be at least 0"),
        ({"seed": 2**32}, r"seed \(4294967296\) must be at least 0 and less than 4294967296"),
        ({"system_prompt": "\ud800"}, "is no Unicode text"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "need a chat template, but the tokenizer has none"),
    ],
)
def test_arguments_out_of_their_bounds_are_refused(folder, arguments, message):
    with pytest.raises(llmrl.Error, match=message):
        llmrl.generate(folder / "llama", ["1+1="], **arguments)


def test_arguments_of_the_chat_template_reach_it(tiny):
    """Greedy responses to the same tokens are the same."""
    tiny.tokenizer.chat_template = "{{ letter }}{{ messages[0]['content'] }}"
    in_template = llmrl.generate(
        tiny.model, "+1=", tokenizer=tiny.tokenizer, chat_template_kwargs={"letter": "1"}, max_response_tokens=4
    )
    other = llmrl.generate(
        tiny.model, "+1=", tokenizer=tiny.tokenizer, chat_template_kwargs={"letter": "7"}, max_response_tokens=4
    )
    tiny.tokenizer.chat_template = None
    plain = llmrl.generate(tiny.model, "1+1=", tokenizer=tiny.tokenizer, max_response_tokens=4)
    assert in_template == plain
    assert in_template != other


def test_nothing_to_respond_to_is_refused(folder):
    with pytest.raises(llmrl.Error, match="prompts is empty; hand over at least one"):
        llmrl.generate(folder / "llama", [])


def test_a_folder_that_is_missing_is_named():
    with pytest.raises(llmrl.Error, match=r"model\.path"):
        llmrl.generate("./nowhere", ["1+1="])


def test_scores_are_those_of_the_command(folder, rows, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    golden_run("reward_model_shared_prompts", folder, output=tmp_path)
    final = tmp_path / "reward_model_shared_prompts" / "final"
    rows = [{name: value for name, value in row.items() if name != "score"} for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command("score", final, tmp_path / "rows.jsonl", "--output", tmp_path / "scored.jsonl")
    theirs = [json.loads(line)["score"] for line in (tmp_path / "scored.jsonl").read_text().splitlines()]
    assert llmrl.score(final, rows) == theirs
    trained = llmrl.load_run(final.parent)
    assert llmrl.score(trained, rows[:3]) == pytest.approx(theirs[:3], abs=1e-5)
    assert llmrl.score(trained.model, rows[:3], tokenizer=trained.tokenizer) == pytest.approx(theirs[:3], abs=1e-5)
    assert type(trained.model).__name__ == "LlamaForSequenceClassification"


def test_an_evaluation_is_that_of_the_command(folder, rows, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    recipe = tmp_path / "recipe.yaml"
    data = f"{{path: {folder / 'rows.jsonl'}}}"
    recipe.write_text(
        f"model: {{path: {folder / 'llama'}}}\ndata: {data}\nevaluation_data: {data}\n"
        "reward: {functions: [{name: tests.golden.rules:graded}]}\nrollout: {max_response_tokens: 5}\n"
        f"evaluation: {{num_responses: 4, pass_at: [2]}}\nrun: {{output_dir: {tmp_path}/run, num_iterations: 1}}\n"
    )
    command("evaluate", recipe, "--output", tmp_path / "numbers.json")
    theirs = json.loads((tmp_path / "numbers.json").read_text())
    settings = {"rollout.max_response_tokens": 5, "evaluation.num_responses": 4, "evaluation.pass_at": [2]}
    ours = llmrl.evaluate(folder / "llama", prompts=rows, reward="tests.golden.rules:graded", settings=settings)
    assert ours == {name: x for name, x in theirs.items() if name not in ("model", "per_prompt")}


def test_settings_have_the_checks_of_recipes(folder, rows):
    message = r"evaluation\.num_response is not a setting; did you mean evaluation\.num_responses"
    with pytest.raises(llmrl.Error, match=message):
        llmrl.evaluate(folder / "llama", prompts=rows, reward=digits, settings={"evaluation.num_response": 2})


GAME = """
import llmrl


class Twice(llmrl.Environment):
    def start(self, row):
        return row["opening"]

    def respond(self, message):
        return llmrl.Turn(f"{message.turn}+2=", done=message.turn == 2, reward=0.5)
"""


def test_a_model_plays(folder, tmp_path):
    (tmp_path / "game.py").write_text(GAME)
    (tmp_path / "game.yaml").write_text(
        f"model: {{path: {folder / 'llama'}}}\ndata: {{path: rows.jsonl}}\nrun: {{output_dir: x, num_iterations: 1}}\n"
        f"environment: {{name: '{tmp_path / 'game.py'}:Twice', max_turns: 1}}\n"
    )
    row = json.dumps({"opening": "1+2="})
    play = ("generate", folder / "llama", row, "--max-response-tokens=60", "--temperature=1", "--num-responses=4")
    episodes = command(*play, "--environment", f"{tmp_path / 'game.py'}:Twice").split("\n\n")
    (first_turns,) = llmrl.generate(folder / "llama", "1+2=", max_response_tokens=60, temperature=1.0, num_responses=4)
    done = [index for index, episode in enumerate(episodes) if "(2 turns; done, reward 1)" in episode]
    assert done
    for index in done:
        assert episodes[index].startswith(f"> 1+2=\n{first_turns[index]}\n> 1+2=\n")
    once = command(*play, "--environment", tmp_path / "game.yaml")
    assert once.count("(1 turn; truncated by environment.max_turns, reward 0.5)") >= len(done)


def test_an_environment_that_fails_is_reported(folder, tmp_path):
    (tmp_path / "game.py").write_text(GAME)
    arguments = ["generate", str(folder / "llama"), "1+2=", "--environment", f"{tmp_path / 'game.py'}:Twice"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    failed = f"start raised KeyError: 'opening' at {tmp_path / 'game.py'}:"
    assert result.stdout.startswith(f"({failed}")
    assert result.stdout.endswith(": no reward)\n\n")
    assert f"every episode failed: {failed}" in result.stderr


def test_episodes_are_those_of_the_command(tiny, folder, tmp_path):
    (tmp_path / "game.py").write_text(GAME)
    rows = [{"opening": "1+2="}, {"opening": "4+4="}]
    arguments = ("--max-response-tokens=60", "--temperature=1", "--num-responses=3", "--seed=2")
    name = f"{tmp_path / 'game.py'}:Twice"
    printed = command("generate", folder / "llama", *map(json.dumps, rows), *arguments, "--environment", name)
    common = {"max_response_tokens": 60, "temperature": 1.0, "num_responses": 3, "seed": 2}
    given: dict[str, Any] = {"__name__": "__main__"}
    exec(GAME, given)  # noqa: S102
    for environment in (name, given["Twice"]):
        played = llmrl.generate(tiny.model, rows, environment=environment, tokenizer=tiny.tokenizer, **common)
        assert [len(episodes) for episodes in played] == [3, 3]
        assert printed == "".join(f"{text}\n\n" for episodes in played for text in episodes)
        assert all(
            text.startswith(f"> {row['opening']}\n") for row, each in zip(rows, played, strict=True) for text in each
        )


def test_limits_of_episodes_are_settings_and_rows_need_an_environment(folder, tmp_path):
    (tmp_path / "game.py").write_text(GAME)
    name = f"{tmp_path / 'game.py'}:Twice"
    (episodes,) = llmrl.generate(
        folder / "llama",
        [{"opening": "1+2="}],
        environment=name,
        temperature=1.0,
        num_responses=4,
        max_response_tokens=60,
        settings={"environment.max_turns": 1},
    )
    assert any(text.endswith("\n(1 turn; truncated by environment.max_turns, reward 0.5)") for text in episodes)
    with pytest.raises(llmrl.Error, match=f"every episode failed: start raised KeyError: 'opening' at {tmp_path}"):
        llmrl.generate(folder / "llama", "1+2=", environment=name)
    with pytest.raises(llmrl.Error, match="rollout is not a setting"):
        llmrl.generate(folder / "llama", "1+2=", environment=name, settings={"rollout.max_response_tokens": 3})
    with pytest.raises(llmrl.Error, match="prompts has a dict; hand over texts, or environment or tools, which take"):
        llmrl.generate(folder / "llama", [{"prompt": "1+2="}])


def calculate(expression: str) -> str:
    """Computes.

    Args:
        expression: Of two numbers.
    """
    return expression


def test_tools_open_with_the_text(folder):
    settings = {"environment.tool_format": "hermes"}
    ((text,),) = llmrl.generate(folder / "llama", "1+2=", tools=[calculate], max_response_tokens=4, settings=settings)
    assert text.startswith("> 1+2=\n")
