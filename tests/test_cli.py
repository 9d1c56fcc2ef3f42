"""The command line as a user meets it: whole runs of a tiny model, and every kind of bad input."""

import errno
import gc
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import ANY

import pytest
import torch
import typer
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config
from transformers.utils.logging import enable_progress_bar
from typer.testing import CliRunner

from llmrl import cli
from llmrl.batches import Episodes
from llmrl.cli import (
    _named_as_given,
    _print_evaluation,
    _print_responses,
    _write,
    app,
    bad_input_ends_with_status_2,
    settings,
)
from llmrl.data.files import DataError
from llmrl.distributed.activity import HERE
from llmrl.distributed.collectives import OneProcess
from llmrl.distributed.heartbeat import AnotherRankFailed
from llmrl.distributed.watchdog import PhaseTimeout
from llmrl.files import WriteError
from llmrl.memory import MemoryFull
from llmrl.models.folders import ModelError
from llmrl.rewards.calls import RewardError
from llmrl.roles import StateMismatch
from llmrl.trainers.output import locked
from llmrl.trainers.run import Stopped
from llmrl.user_code import UserCodeFailure
from llmrl.wiring.runs import RUNS
from tests.hybrids import HYBRIDS

ROOT = Path(__file__).parents[1]
TINY = ROOT / "recipes" / "models" / "tiny_char_llama"
RECIPES = sorted(p.relative_to(ROOT) for p in (ROOT / "recipes").glob("*.yaml"))


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def llmrl(*arguments):
    """Exit status, standard output, standard error."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def data(tmp_path):
    """Sums of digits: demonstrations, prompts and held-out prompts."""
    sums = [(a, b) for a in range(10) for b in range(10)]
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in sums]
    write_jsonl(tmp_path / "sft.jsonl", [{**row, "response": row["answer"]} for row in rows])
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "test.jsonl", rows[::9])
    return tmp_path


def write_recipe(path, settings):
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture
def sft_recipe(data):
    return write_recipe(
        data / "sft.yaml",
        {
            "model": {"path": str(TINY), "from_scratch": True},
            "data": {"path": str(data / "sft.jsonl")},
            "evaluation_data": {"path": str(data / "sft.jsonl"), "num_rows": 10},
            "sft": {"batch_size": 20, "evaluate_every": 2},
            "optimizer": {"learning_rate": 1e-3},
            "run": {"output_dir": str(data / "sft"), "num_iterations": 3},
        },
    )


@pytest.fixture
def grpo_recipe(data):
    return write_recipe(
        data / "grpo.yaml",
        {
            "model": {"path": str(TINY), "from_scratch": True},
            "data": {"path": str(data / "train.jsonl")},
            "evaluation_data": {"path": str(data / "test.jsonl")},
            "reward": {"functions": [{"name": "reward_models/arithmetic.py:correct"}]},
            "rollout": {"prompts_per_iteration": 4, "max_response_tokens": 4},
            "algorithm": {"group_size": 4},
            "update": {"minibatch_size": 8},
            "optimizer": {"learning_rate": 1e-3},
            "evaluation": {"every": 0},
            "run": {"output_dir": str(data / "grpo"), "num_iterations": 2},
        },
    )


def refuse_to_load(monkeypatch):
    """A shape without weights is no model."""
    for kind in (AutoModelForCausalLM, AutoModelForSequenceClassification):
        monkeypatch.setattr(kind, "from_pretrained", without_weights(kind.from_pretrained))
        monkeypatch.setattr(kind, "from_config", without_weights(kind.from_config))


def without_weights(make):
    def make_shape(*arguments, **settings):
        device = settings.get("device_map", torch.get_default_device())
        assert device == torch.device("meta"), "a model was loaded"
        return make(*arguments, **settings)

    return make_shape


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def without_times(entries):
    return [{name: x for name, x in entry.items() if not name.endswith("_s")} for entry in entries]


# --- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_every_recipe_of_the_repository_dry_runs(recipe, monkeypatch, tmp_path):
    refuse_to_load(monkeypatch)
    (command,) = [name for name in ("sft", "reward_model", "critic", "grpo", "ppo") if recipe.stem.endswith(name)]
    status, output, error = llmrl(command.replace("_", "-"), recipe, f"run.output_dir={tmp_path / 'run'}", "--dry-run")
    assert status == 0, error
    settings, _, sentence = output.partition("\nEach ")
    assert yaml.safe_load(settings)["run"]["output_dir"] == str(tmp_path / "run")
    assert "iteration" in sentence
    assert "Memory, estimated with every weight on 1 device:" in sentence or "Memory is not estimated" in sentence
    assert not (tmp_path / "run").exists()


def test_a_dry_run_tells_the_memory_of_the_launch(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "8")
    new = f"run.output_dir={tmp_path / 'run'}"
    recipe = (ROOT / "recipes" / "quickstart_grpo.yaml", f"model.path={TINY}", "model.from_scratch=true", new)
    status, output, _ = llmrl("grpo", *recipe, "--dry-run")
    assert status == 0
    assert "Memory, estimated with every weight on each of 8 devices:" in output
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    status, output, error = llmrl("grpo", *recipe, "--dry-run")
    assert (status, output) == (2, "")
    assert "mixed_precision (bf16)" in error
    assert "model.dtype (float32)" in error
    assert llmrl("grpo", *recipe, "model.dtype=bfloat16", "--dry-run")[0] == 0


def test_a_dry_run_says_what_it_could_not_check(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reward_models").symlink_to(ROOT / "reward_models")
    status, output, _ = llmrl("grpo", ROOT / "recipes" / "quickstart_grpo.yaml", "--dry-run")
    assert status == 0
    assert "not checked: model.path (runs/quickstart/sft/final) does not exist yet; `llmrl sft" in output
    assert "not checked: data.path (data/arithmetic/train.jsonl) does not exist yet; `python data/" in output


def test_a_dry_run_refuses_a_missing_path_that_the_user_gave(tmp_path):
    new = f"run.output_dir={tmp_path / 'run'}"
    status, _, error = llmrl("grpo", "recipes/quickstart_grpo.yaml", "data.path=gone.jsonl", new, "--dry-run")
    assert status == 2
    assert "gone.jsonl" in error


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["update.minibach_size=8"], ["update.minibach_size", "minibatch_size"]),
        (["optimizer.learning_rate=fast"], ["optimizer.learning_rate", "fast", "number"]),
        (["optimizer.learning_rate=-1"], ["optimizer.learning_rate (-1", "0 or greater"]),
        (["update.minibatch_size=12"], ["update.minibatch_size (12)", "divide", "try"]),
        (["update.minibatch_size=6"], ["update.minibatch_size (6)", "multiple of algorithm.group_size (4)"]),
        (["data.path=/nowhere/train.jsonl"], ["/nowhere/train.jsonl"]),
        (["data.prompt_column=promt"], ["promt", "prompt"]),
        (["model.path=/nowhere/model"], ["model.path (/nowhere/model)"]),
        (["model.path=recipes/typo"], ["model.path (recipes/typo) is no folder"]),
        (["reward.functions.0.name=reward_models/gone.py:correct"], ["reward_models/gone.py"]),
        (["reward.functions.0.name=reward_models/arithmetic.py:corect"], ["corect", "correct"]),
        (["rollout.temperature=0"], ["rollout.temperature (0", "greater than 0"]),
        (["evaluation.every=1", "evaluation_data=null"], ["evaluation.every (1) needs evaluation_data"]),
        (["nonsense"], ["nonsense"]),
    ],
)
def test_bad_input_is_one_clear_line_before_anything_loads(grpo_recipe, overrides, told, monkeypatch):
    refuse_to_load(monkeypatch)
    status, _, error = llmrl("grpo", grpo_recipe, *overrides)
    assert status == 2
    assert "Traceback" not in error
    for words in told:
        assert words in error


def test_a_missing_recipe(tmp_path):
    status, _, error = llmrl("grpo", "recipes/quickstart_gpro.yaml")
    assert status == 2
    assert "quickstart_grpo.yaml" in error
    status, _, error = llmrl("grpo", tmp_path / "mine.yaml")
    assert status == 2
    assert "`llmrl recipes` lists" in error


def test_a_model_that_brings_code_is_refused(grpo_recipe, data):
    folder = data / "remote"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "x", "auto_map": {"AutoConfig": "code.X"}}))
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "code.py").write_text("raise SystemExit('the code ran')")
    status, _, error = llmrl("grpo", grpo_recipe, f"model.path={folder}", "model.from_scratch=false")
    assert status == 2
    assert "model.trust_remote_code=true" in error


def test_a_name_that_neither_this_machine_nor_the_hub_knows(grpo_recipe, monkeypatch):
    def unreachable(*_, **__):
        raise TimeoutError("no answer")

    monkeypatch.setattr("huggingface_hub.HfApi.get_hf_file_metadata", unreachable)
    status, _, error = llmrl("grpo", grpo_recipe, "model.path=nosuchmodel", "model.from_scratch=false")
    assert status == 2
    assert "model.path (nosuchmodel) is neither a folder here nor a model on the hub" in error
    assert len(error.splitlines()) == 1


def test_a_rollout_that_the_engine_cannot_make(grpo_recipe, data):
    folder = data / "gpt2"
    shutil.copytree(TINY, folder)
    sizes = {"n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 1, "vocab_size": 99}
    GPT2Config(bos_token_id=0, eos_token_id=0, **sizes).save_pretrained(folder)
    status, _, error = llmrl("grpo", grpo_recipe, f"model.path={folder}", "rollout.max_response_tokens=13")
    assert status == 2
    assert error.startswith(
        "error: rollout.max_response_tokens (13) with a prompt of 4 tokens exceeds the 16 positions"
    )


@pytest.mark.parametrize("resumed", ["model.lora.rank=4", "model.lora=null"])
def test_a_run_is_not_resumed_with_other_weights(grpo_recipe, resumed):
    assert llmrl("grpo", grpo_recipe, "model.lora.rank=2", "run.num_iterations=1")[0] == 0
    status, _, error = llmrl("grpo", grpo_recipe, resumed, "run.resume=true")
    assert status == 2
    assert "error: the saved state is of other weights" in error


def test_a_seed_beyond_the_random_streams(data):
    status, _, error = llmrl("generate", data, "1+1=", "--seed", 2**32)
    assert status == 2
    assert "--seed" in error


def test_a_folder_that_holds_a_run_is_not_written_over(grpo_recipe, data):
    (data / "grpo" / "checkpoints" / "step_000002").mkdir(parents=True)
    (data / "grpo" / "config.json").write_text('{"settings": {"run": {"seed": 9}}, "versions": {"llmrl": "0"}}')
    status, _, error = llmrl("grpo", grpo_recipe, "run.resume=false")
    assert status == 2
    assert "leave run.resume at auto to go on with it" in error
    status, _, error = llmrl("grpo", grpo_recipe)
    assert status == 2
    assert "holds another run than this one: run.seed was 9, is 0. run.resume=true goes on with it" in error


@pytest.mark.slow
def test_the_same_command_goes_on_and_says_when_it_is_finished(grpo_recipe, data, monkeypatch):
    other = f"run.output_dir={data / 'again'}"
    assert llmrl("grpo", grpo_recipe, other, "run.num_iterations=2")[0] == 0
    status, output, _ = llmrl("grpo", grpo_recipe, other, "run.num_iterations=3")
    assert status == 0
    assert "goes on after iteration 2 from" in output
    written = {path: path.stat().st_mtime_ns for path in (data / "again").rglob("*")}
    monkeypatch.setattr("llmrl.wiring.rl.build_grpo", lambda *_: pytest.fail("a model is loaded"))
    status, output, _ = llmrl("grpo", grpo_recipe, other, "run.num_iterations=3")
    assert status == 0
    assert output.startswith("Nothing is left to learn: this run has come to its end.\nThe model is in ")
    assert {path: path.stat().st_mtime_ns for path in (data / "again").rglob("*")} == written


def test_a_second_start_in_the_same_folder_is_refused(grpo_recipe, data):
    with locked(data / "grpo", OneProcess()):
        status, _, error = llmrl("grpo", grpo_recipe)
    assert status == 2
    assert f"error: run.output_dir ({data / 'grpo'}) is being written by another process" in error
    assert [path.name for path in (data / "grpo").iterdir()] == [".lock"]


def test_a_reward_that_raises_names_itself_and_the_row_and_everything_is_saved(grpo_recipe, data):
    rule = data / "rule.py"
    rule.write_text(
        "def odd(responses, answer):\n"
        "    odd.calls = getattr(odd, 'calls', 0) + 1\n"
        "    if odd.calls >= 2:\n"
        "        raise KeyError('no verifier')\n"
        "    return [0.0] * len(responses)\n"
    )
    status, _, error = llmrl("grpo", grpo_recipe, f"reward.functions.0.name={rule}:odd", "run.num_iterations=3")
    assert status == 1
    assert f"{rule}:odd" in error
    assert f"KeyError: 'no verifier' at {rule}:4 for row 0; expected a list of 16 numbers" in error
    assert "The row: prompt=" in error
    assert [entry["iteration"] for entry in lines(data / "grpo" / "metrics.jsonl")] == [1]
    assert [p.name for p in (data / "grpo" / "checkpoints").iterdir()] == ["step_000001"]


def refused(*arguments):
    """Standard error of a command that refuses its input in lines of our own, before anything loads."""
    status, output, error = llmrl(*arguments)
    assert (status, output) == (2, ""), error
    assert error.startswith("error: ")
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize(
    "override",
    [
        *(
            "a..b=1",
            "=x",
            "x",
            ".=1",
            "run.seed.x=1",
            "run.seed[0]=1",
            "run.seed",
            "run. seed=1",
            "null=1",
            "1=1",
            "${x}=1",
        ),
        *("reward.functions.5.weight=1", "reward.functions.x=1", "reward.functions={a: 1}", "reward.functions=x"),
        *("reward.functions.0=", "reward.functions=[]", "reward.functions=[{name: 5}]", "reward.functions.0.name=x"),
        *(
            "reward=null",
            "run=[]",
            "data=5",
            "model=",
            "model.lora=x",
            "model.lora.targets=[1]",
            "model.lora.rank=1e400",
        ),
        *("run.seed=99999999999999999999", "run.seed=1:30", "run.seed=[", "run.seed=*a", "run.seed=${run}", "run={a"),
        *("run={seed: 1, seed: 2}", "run.num_iterations=1e3", "run.resume=maybe", "run.output_dir=${run.output_dir}"),
        *("optimizer.learning_rate=1e400", "optimizer.learning_rate=inf", "optimizer.learning_rate=nan"),
        *("optimizer=${optimizer}", "run.seed=" + "9" * 5000, "evaluation.pass_at=3", "distributed.silent_after_s=nan"),
        *("run.output_dir=\udcff", "run.output_dir=" + "x" * 300, "model.path=" + "x" * 300, "data.path=/dev/null"),
        *("trackers.names=[x]", "trackers.names=wandb", "reward.functions.0.arguments=x"),
    ],
    ids=ascii,
)
def test_an_override_never_ends_in_a_traceback(grpo_recipe, override):
    refused("grpo", grpo_recipe, override, "--dry-run")


@pytest.mark.parametrize(
    "content",
    [
        *(
            b"",
            b"- 1",
            b"hi",
            b"null",
            b"\x00\x01\xff",
            b"run: {seed: 1} # \xe9",
            b"run:\n\tseed: 1",
            b"a: " + b"{a: " * 3000,
        ),
        *(b"run: {seed: 1}\nrun: {seed: 2}", b"run: &a {x: *a}", b"run: !!python/object:os.system x", b"run: !x y"),
        *(b"run: {seed: 1}\n---\nrun: {seed: 2}", b"run: {<<: [1]}", b"run: {seed: .inf}", b"run: !!set {x}", b"1: 1"),
        *(b"run: !!binary aGk=", b"null: 1", b"[1]: 1", b"run: {seed: '${'}", b"run: ${run}", b"run: 5\nmodel: [1]"),
        *("run: {seed: 1}".encode("utf-16"), b"run: {seed: " + b"9" * 5000 + b"}", b'run: {output_dir: "\\ud800"}'),
    ],
    ids=lambda content: ascii(content[:20]),
)
def test_a_recipe_never_ends_in_a_traceback(tmp_path, content):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(content)
    gc.disable()  # a finalizer that happens to run where the recursion ends would fail there, and pytest with it
    try:
        for command in (*RUNS, "evaluate"):
            assert str(recipe) in refused(command, recipe)
    finally:
        gc.enable()


@pytest.mark.parametrize("recipe", ["", "/nowhere/r.yaml", "recipes", "README.md/r.yaml", "x" * 300, "\udcff.yaml"])
def test_a_path_of_a_recipe_never_ends_in_a_traceback(recipe):
    refused("grpo", recipe)


@pytest.mark.parametrize("command", [*RUNS, "evaluate"])
@pytest.mark.parametrize("recipe", [r for r in RECIPES if "tiny" in r.stem or "quick" in r.stem], ids=str)
def test_a_recipe_of_another_command_is_told_whose_it_is(recipe, command):
    whose = recipe.stem.rpartition("reward_model")[1].replace("_", "-") or recipe.stem.rpartition("_")[2]
    if command == whose or (command == "evaluate" and RUNS[whose].samples):
        return
    error = refused(command, recipe)
    assert error.startswith(f"error: {recipe} is a recipe of `llmrl {whose}`, not of `llmrl ")
    assert len(error.splitlines()) == 1


def test_the_settings_that_make_a_recipe_another_commands_are_named(tmp_path):
    (tmp_path / "walk.yaml").write_text(
        "model: {path: m}\ndata: {path: d.jsonl}\nenvironment: {name: 'a.py:A'}\nrun: {output_dir: o}\n"
        "algorithm: {group_size: 4, credit: turn}\n"
    )
    error = refused("ppo", tmp_path / "walk.yaml")
    assert "not of `llmrl ppo`, which has no algorithm.group_size, algorithm.credit; run that, leave these out" in error


@pytest.mark.parametrize(("failures", "status"), [((None, "start"), None), (("start", "start"), 1)])
def test_generate_fails_where_every_episode_failed(monkeypatch, capsys, failures, status):
    from llmrl.environments.config import EnvironmentConfig

    none = torch.zeros(2, dtype=torch.long)
    episodes = Episodes(
        turn_ends=none[:, None],
        turn_rewards=torch.zeros(2, 1),
        end_reward=torch.zeros(2),
        num_calls=none,
        num_bad_calls=none,
        failures=failures,
        reasons=("raised KeyError: 'x'",) * 2,
        openings=("",) * 2,
        messages=((),) * 2,
    )
    rollout = SimpleNamespace(rows=({},) * 2, episodes=episodes)
    monkeypatch.setattr("llmrl.wiring.engines.play", lambda *_, **__: rollout)
    monkeypatch.setattr("llmrl.models.checking.check_model", lambda *_, **__: None)
    monkeypatch.setattr("llmrl.models.loading.load_tokenizer", lambda *_: None)
    monkeypatch.setattr("llmrl.wiring.environments.check_environment", lambda *_: EnvironmentConfig(name="a.py:A"))
    monkeypatch.setattr("llmrl.cli._prepare_process", lambda: None)
    monkeypatch.setattr("llmrl.cli._print_episodes", lambda rollout: None)
    run = partial(cli.generate, "m", ["{}"], environment="a.py:A")
    if status is None:
        run()
        return
    with pytest.raises(typer.Exit) as ended:
        run()
    assert ended.value.exit_code == status
    assert capsys.readouterr().err == "error: every episode failed: start raised KeyError: 'x'\n"


def test_a_recipe_with_a_slip_is_not_taken_for_another_s(grpo_recipe):
    assert "did you mean update.minibatch_size?" in refused("grpo", grpo_recipe, "update.minibach_size=8")
    assert "critic is not a setting" in refused("grpo", grpo_recipe, "critic.body=actor")


@pytest.mark.parametrize(
    ("content", "is_taken"),
    [
        ('{"model": "m", "eval/accuracy": 0.5}', True),  # as version 0.1 wrote it
        ('{"model": "m", "per_prompt": {"num_responses": 1, "prompts": ["a"], "means": {"eval/score": [null]}}}', True),
        ('{"model": "m", "per_prompt": {"num_responses": 1, "prompts": ["a"], "means": {"eval/score": []}}}', False),
        ('{"model": "m", "per_prompt": []}', False),
        *[(text, False) for text in ("[]", "{}", "{", '{"model": 1}', '{"model": "m", "eval/x": null}', "[" * 99999)],
    ],
)
def test_what_is_compared_with_is_an_evaluation(grpo_recipe, data, content, is_taken):
    file = data / "before.json"
    file.write_text(content)
    error = refused("evaluate", grpo_recipe, "--compare", file, "data.path=x.jsonl", "model.path=recipes/typo")
    assert error.startswith("error: model.path" if is_taken else f"error: --compare ({file}) does not hold what")


@pytest.mark.parametrize("command", ["evaluate", "score"])
def test_an_output_that_cannot_be_written_is_refused_at_the_start(grpo_recipe, data, command, monkeypatch):
    first = {"evaluate": ("evaluate", grpo_recipe), "score": ("score", "nowhere/model", data / "sft.jsonl")}[command]
    file = data / "sft.jsonl"
    assert f"--output ({data}) is a folder" in refused(*first, "--output", data)
    assert f"--output ({file}/x) would be in {file}, which is a file" in refused(*first, "--output", f"{file}/x")
    monkeypatch.setattr(os, "access", lambda _, mode, **__: mode != os.W_OK)
    assert f"{data} allows no writing" in refused(*first, "--output", data / "new" / "x.json")


def test_what_was_computed_is_printed_where_it_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(typer.Exit):
        _write(tmp_path / "file" / "x.json", "the numbers")
    assert capsys.readouterr().out == "the numbers\n"


def test_scores_never_replace_their_rows(data):
    assert "is the file that is scored" in refused("score", "m", data / "sft.jsonl", "--output", data / "sft.jsonl")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("generate", "recipes/typo", "hi"), "MODEL (recipes/typo) is no folder"),
        (("generate", TINY, "hi"), f"MODEL ({TINY}) holds no weights"),
        (("generate", "recipes/quickstart_sft.yaml", "hi"), "MODEL (recipes/quickstart_sft.yaml) is a recipe"),
        (("generate", TINY, "\udcff"), "is no UTF-8 text"),
        (("generate", TINY, "hi", "--temperature", "nan"), "--temperature (nan)"),
        (("generate", TINY, "hi", "--chat-template-kwargs", "[1]"), "--chat-template-kwargs ([1]) must be a JSON obj"),
        (("generate", TINY, "hi", "--chat-template-kwargs", "{a"), "--chat-template-kwargs ({a) must be a JSON obj"),
        (("score", "recipes/typo", "x.jsonl"), "MODEL (recipes/typo) is no folder"),
        (("score", "recipes/quickstart_sft.yaml", "x.jsonl"), "MODEL (recipes/quickstart_sft.yaml) is a recipe"),
    ],
)
def test_a_command_without_a_recipe_blames_what_it_was_given(arguments, told):
    error = refused(*arguments)
    assert told in error
    assert not any(word in error for word in ("model.path", "reward.", "data.", "from_scratch"))


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (
            "model.path (x) is no folder; did you mean model.path=x/final?",
            "MODEL (x) is no folder; did you mean x/final?",
        ),
        ("read it, then set model.trust_remote_code=true, or", "read it, then add --trust-remote-code, or"),
        ("set data.prompt_column", "set --prompt-column"),
    ],
)
def test_settings_are_named_as_they_were_given(told, expected):
    with pytest.raises(ModelError) as raised, _named_as_given({"data.prompt_column": "--prompt-column"}):
        raise ModelError(told)
    assert str(raised.value) == expected


def test_a_wrong_column_is_blamed_on_its_option(data, monkeypatch):
    monkeypatch.setattr("llmrl.wiring.checks.check_scorer", lambda _: [])
    error = refused("score", "m", data / "sft.jsonl", "--response-column", "reply")
    assert "no column 'reply'" in error


def test_a_tilde_is_the_home_folder_in_every_path(grpo_recipe, data, monkeypatch):
    monkeypatch.setenv("HOME", str(data))
    recipe = f"~/{grpo_recipe.name}"
    paths = ["data.path=~/train.jsonl", "evaluation_data.path=~/test.jsonl", "run.output_dir=~/out"]
    status, output, error = llmrl("grpo", recipe, *paths, "--dry-run")
    assert status == 0, error
    assert f"output_dir: {data}/out" in output
    assert f"--compare ({data}/gone.json) is no file" in refused("evaluate", recipe, "--compare=~/gone.json")
    assert f"--output ({data}) is a folder" in refused("evaluate", recipe, "--output=~")


def test_an_interruption_is_one_line(grpo_recipe, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("llmrl.wiring.checks.check_rl", interrupt)
    assert llmrl("grpo", grpo_recipe) == (130, "", "error: interrupted\n")


@pytest.mark.parametrize(("number", "status"), [(errno.EACCES, 2), (errno.ENOSPC, 2), (None, None)])
def test_what_the_file_system_refuses_is_one_line_and_a_bug_is_not(grpo_recipe, monkeypatch, number, status):
    def fail(*_, **__):
        raise OSError(number, "not now", "some/file") if number else OSError("a bug")

    monkeypatch.setattr("llmrl.wiring.checks.check_rl", fail)
    if status is None:
        with pytest.raises(OSError, match="a bug"):
            llmrl("grpo", grpo_recipe)
    else:
        assert llmrl("grpo", grpo_recipe) == (status, "", "error: some/file: not now\n")


def test_a_pipe_that_is_closed_early_is_no_error():
    command = f"{sys.executable} -m llmrl settings ppo | {sys.executable} -c ''"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_under_a_launcher_its_own_report_is_announced(grpo_recipe, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    error = refused("grpo", grpo_recipe, "run.seed=x")
    assert error.splitlines()[-1] == "(What the launcher prints below says only that this process ended.)"


@pytest.mark.parametrize("variables", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "two"}, {"LOCAL_RANK": "first"}])
def test_variables_of_a_launcher_that_make_no_sense_are_refused(sft_recipe, monkeypatch, variables):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    status, _, error = llmrl("sft", sft_recipe)
    assert "LOCAL_RANK" in variables or (status == 2 and "error: WORLD_SIZE (" in error)


# --- whole runs -------------------------------------------------------------------------------------------------------


def test_sft_grpo_evaluate_generate(sft_recipe, grpo_recipe, data):
    status, output, error = llmrl("sft", sft_recipe)
    assert status == 0, error
    assert "iteration 3/3" in output
    assert [entry["iteration"] for entry in lines(data / "sft" / "metrics.jsonl")] == [0, 1, 2, 3]
    assert (
        lines(data / "sft" / "metrics.jsonl")[-1]["eval/loss"] < lines(data / "sft" / "metrics.jsonl")[0]["eval/loss"]
    )

    model = [f"model.path={data / 'sft' / 'final'}", "model.from_scratch=false"]
    status, output, error = llmrl("grpo", grpo_recipe, *model, "evaluation.every=1", "run.best_metric=score/mean")
    assert status == 0, error
    run = data / "grpo"
    entries = lines(run / "metrics.jsonl")
    assert [entry["iteration"] for entry in entries] == [0, 1, 2]
    assert entries[1]["policy/ratio_max_deviation"] < 1e-4
    assert "eval/accuracy" in entries[2]
    assert {"config.json", "samples.jsonl", "checkpoints", "final", "best"} <= {p.name for p in run.iterdir()}
    assert json.loads((run / "config.json").read_text())["settings"]["algorithm"]["group_size"] == 4
    sample = lines(run / "samples.jsonl")[0]
    assert {"iteration", "prompt", "response", "score", "parts", "advantage"} <= sample.keys()

    final = [f"model.path={run / 'final'}", "model.from_scratch=false"]
    before, after = data / "before.json", data / "after.json"
    assert llmrl("evaluate", grpo_recipe, *model, "--output", before)[0] == 0
    status, output, error = llmrl("evaluate", grpo_recipe, *final, "--output", after, "--compare", before)
    assert status == 0, error
    assert "accuracy" in output
    assert "Accuracy is the share of responses with" in output
    assert "difference" in output
    assert "with the 95 % interval of paired differences" in output
    other = llmrl("evaluate", grpo_recipe, *final, "--compare", before, "evaluation_data.num_rows=2")[1]
    assert "Not compared prompt by prompt: the evaluations are of other prompts" in other
    assert json.loads(after.read_text())["eval/accuracy"] == entries[2]["eval/accuracy"]  # the same weights, reloaded

    enable_progress_bar()  # as in a fresh process
    status, output, error = llmrl("generate", run / "final", "1+1=", "2+3=")
    assert status == 0, error
    assert "Loading weights" not in error
    plain = (
        "import sys, torch; from transformers import AutoModelForCausalLM, AutoTokenizer as T\n"
        "m, t = AutoModelForCausalLM.from_pretrained(sys.argv[1]), T.from_pretrained(sys.argv[1])\n"
        "ids = t('1+1=', return_tensors='pt').input_ids\n"
        "out = m.generate(ids, do_sample=False, max_new_tokens=256)[0, ids.shape[1]:]\n"
        "print('> 1+1=\\n' + t.decode(out, skip_special_tokens=True))"
    )
    fresh = subprocess.run([sys.executable, "-c", plain, run / "final"], capture_output=True, text=True, check=True)
    assert output.startswith(fresh.stdout)


@pytest.mark.parametrize(
    "overrides",
    [
        ["algorithm.kl_coef=0.05", "algorithm.scale=none"],
        ["algorithm.aggregation=sequence", "algorithm.kl_coef=0.04", "algorithm.kl_form=k3_paper"],
        ["algorithm.baseline=leave_one_out", "algorithm.scale=none", "algorithm.aggregation=constant"],
        ["algorithm.clip_high=0.28", "algorithm.overlong_buffer_tokens=2"],
        ["algorithm.ratio=sequence", "algorithm.aggregation=sequence", "algorithm.clip_low=0.0003"],
        ["model.lora.rank=4", "algorithm.kl_coef=0.05", "algorithm.scale=none", "algorithm.kl_form=k3"],
        ["model.dtype=bfloat16", "algorithm.kl_coef=0.05", "algorithm.scale=none"],
        ["model.gradient_checkpointing=true", "update.num_epochs=2"],
        ["rollout.engine=transformers", "algorithm.dual_clip=3.0"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_kin_and_options_run(grpo_recipe, data, overrides):
    status, _, error = llmrl("grpo", grpo_recipe, *overrides, "run.num_iterations=1")
    assert status == 0, error
    (entry,) = lines(data / "grpo" / "metrics.jsonl")
    assert entry["policy/ratio_max_deviation"] < (0.05 if "bfloat16" in overrides[0] else 1e-4)
    assert ("kl/sequence" in entry) == any("kl_coef" in override for override in overrides)
    if "kl/sequence" in entry:
        assert entry["kl/sequence"] == pytest.approx(0, abs=1e-4)  # nothing has moved yet


def launch(recipe, *arguments):
    command = [sys.executable, "-m", "llmrl", "grpo", recipe, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("family", ["qwen3_5_text", "lfm2"])
def test_a_hybrid_is_trained_and_goes_on_bit_for_bit(grpo_recipe, data, family):
    """With the native engine, refilled twice in a rollout; prompts of two lengths."""
    folder = data / family
    shutil.copytree(TINY, folder)
    config = HYBRIDS[family]()
    config.vocab_size, config.pad_token_id, config.eos_token_id = 99, 0, 1
    config.save_pretrained(folder)
    write_jsonl(data / "train.jsonl", [{"prompt": f"{a}+{7 * a}=", "answer": str(8 * a)} for a in range(1, 10)])
    (data / "rule.py").write_text(
        "def spread(responses):\n    return [float(sum(map(ord, r)) % 7) for r in responses]\n"
    )
    rule = f"reward.functions=[{{name: {data}/rule.py:spread}}]"
    arguments = (rule, f"model.path={folder}", "rollout.engine=native", "rollout.max_rows=8", "run.checkpoint_every=1")
    straight = data / "straight"
    assert llmrl("grpo", grpo_recipe, *arguments, f"run.output_dir={straight}") == (0, ANY, ANY)
    assert llmrl("grpo", grpo_recipe, *arguments, "run.num_iterations=1")[0] == 0
    assert llmrl("grpo", grpo_recipe, *arguments, "run.resume=true")[0] == 0
    ours, theirs = (load_file(run / "final" / "model.safetensors") for run in (data / "grpo", straight))
    assert all(weight.equal(theirs[name]) for name, weight in ours.items())
    entries = without_times(lines(data / "grpo" / "metrics.jsonl"))
    assert entries == without_times(lines(straight / "metrics.jsonl"))
    assert [entry["iteration"] for entry in entries] == [1, 2]
    assert max(entry["policy/rollout_gap"] for entry in entries) < 1e-5
    assert min(entry["actor/grad_norm"] for entry in entries) > 0


def test_a_run_that_is_stopped_goes_on_where_it_was(grpo_recipe, data):
    arguments = ["run.num_iterations=30", "algorithm.kl_coef=0.01", "algorithm.scale=none"]
    process = launch(grpo_recipe, *arguments)
    metrics = data / "grpo" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and len(lines(metrics)) >= 2):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, error
    assert "the same command goes on from" in error
    done = len(lines(metrics))
    assert 2 <= done < 30

    assert llmrl("grpo", grpo_recipe, *arguments, "run.resume=true")[0] == 0
    stopped = without_times(lines(metrics))
    assert llmrl("grpo", grpo_recipe, *arguments, f"run.output_dir={data / 'straight'}")[0] == 0
    straight = without_times(lines(data / "straight" / "metrics.jsonl"))
    assert [entry["iteration"] for entry in stopped] == list(range(1, 31))
    for ours, theirs in zip(stopped, straight, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


def test_settings_lists_every_setting_with_its_help():
    status, output, _ = llmrl("settings", "grpo")
    assert status == 0
    assert "kl_coef" in output
    assert llmrl("settings", "gpro")[0] == 2


def test_python_m_llmrl_works():
    process = subprocess.run(
        [sys.executable, "-m", "llmrl", "--help"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert "grpo" in process.stdout


def test_an_evaluation_is_written_where_it_was_asked_for(grpo_recipe, data, monkeypatch):
    """Though its reward goes elsewhere."""
    (data / "elsewhere").mkdir()
    rule = "import os\ndef score(responses):\n    os.chdir('elsewhere')\n    return [1.0 for _ in responses]\n"
    (data / "moving.py").write_text(rule)
    monkeypatch.chdir(data)
    rules = f"reward.functions=[{{name: '{data}/moving.py:score'}}]"
    status, _, error = llmrl("evaluate", grpo_recipe, rules, "--output", "numbers.json")
    assert status == 0, error
    assert (data / "numbers.json").is_file()


@pytest.mark.parametrize("command", ["grpo", "evaluate"])
def test_a_launch_for_gpus_without_one_is_said_before_anything_is_built(grpo_recipe, monkeypatch, command):
    def stop(config, checked, context, *_):
        raise KeyboardInterrupt

    monkeypatch.setattr("llmrl.distributed.launch.gpu_warning", lambda *, has_gpu: None if has_gpu else "no GPU here")
    monkeypatch.setattr("llmrl.wiring.rl.build_grpo", stop)
    monkeypatch.setattr("llmrl.wiring.rl.build_evaluator", stop)
    _, output, error = llmrl(command, grpo_recipe)
    assert "warning: no GPU here" in output + error


def test_checks_say_nothing_to_the_authors_of_libraries():
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with bad_input_ends_with_status_2():
            warnings.warn_explicit("soon", FutureWarning, "theirs.py", 7, module="transformers.modeling_utils")
            warnings.warn_explicit("soon", FutureWarning, "mine.py", 7, module="mine")
    assert [warning.filename for warning in told] == ["mine.py"]


# --- the device -------------------------------------------------------------------------------------------------------


class Prepared(Exception):
    """The device was set up before anything was loaded."""


@pytest.mark.parametrize("command", ["grpo", "evaluate", "score", "generate"])
def test_every_command_sets_the_device_up_before_it_loads(command, grpo_recipe, data, monkeypatch):
    def prepare(*, deterministic=False):
        raise Prepared(deterministic)

    monkeypatch.setattr("llmrl.distributed.device.prepare_device", prepare)
    monkeypatch.setattr("llmrl.wiring.checks.check_scorer", lambda config: [])
    monkeypatch.setattr("llmrl.models.checking.check_model", lambda config, **_: [])
    recipe = (grpo_recipe, "run.deterministic=true")
    arguments = {"grpo": recipe, "evaluate": recipe, "score": (TINY, data / "sft.jsonl"), "generate": (TINY, "1+1=")}
    with pytest.raises(Prepared, match=str(command in ("grpo", "evaluate"))):
        llmrl(command, *arguments[command])


def test_full_memory_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(HERE, "phase", "rollout")
    with pytest.raises(cli.typer.Exit) as ended, cli.failures_in_one_line():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
    assert ended.value.exit_code == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: out of memory in rollout (GPU): lower rollout.max_rows")
    assert len(printed.splitlines()) == 1
    code = "raised RuntimeError: DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes"
    with pytest.raises(cli.typer.Exit), cli.failures_in_one_line():
        raise UserCodeFailure(f"algorithm.loss mine.py:loss {code}")
    assert "error: out of memory in rollout (CPU, 4 KiB more asked for, peak " in capsys.readouterr().err
    for error, line in (
        (MemoryError(), "error: out of memory in rollout (CPU, peak "),
        (MemoryFull("full"), "error: full"),
    ):
        with pytest.raises(cli.typer.Exit), cli.failures_in_one_line():
            raise error
        assert line in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="a bug of ours"), cli.failures_in_one_line():
        raise RuntimeError("a bug of ours")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (DataError("no rows"), 2),
        (StateMismatch("another state"), 2),
        (RewardError("the rule failed"), 1),
        (WriteError("the disk is full"), 1),
        (FloatingPointError("not finite"), 1),
        (PhaseTimeout("too long"), 1),
        (Stopped(15, 3, Path("runs/mine")), 143),
    ],
    ids=lambda given: type(given).__name__,
)
def test_a_failure_ends_with_its_message_and_the_status_of_its_kind(error, status, tmp_path, capsys):
    """Input that cannot be used needs no hint how to resume."""
    (tmp_path / "checkpoints" / "step_000003").mkdir(parents=True)
    with pytest.raises(cli.typer.Exit) as ended, cli.failures_in_one_line(tmp_path):
        raise error
    first, *more = capsys.readouterr().err.splitlines()
    assert ended.value.exit_code == status
    assert first == f"error: {error}"
    assert bool(more) == (status == 1)


def test_a_rank_that_another_one_ended_prints_nothing(capsys):
    with pytest.raises(cli.typer.Exit) as ended, cli.failures_in_one_line():
        raise AnotherRankFailed("rank 1")
    assert ended.value.exit_code == 1
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("has_checkpoint", [False, True])
def test_the_way_to_resume_is_printed_where_there_is_a_checkpoint(tmp_path, capsys, has_checkpoint):
    if has_checkpoint:
        (tmp_path / "checkpoints" / "step_000003").mkdir(parents=True)
    for error in (UserCodeFailure("mine.py:loss"), PermissionError(errno.EACCES, "denied", "a.json")):
        with pytest.raises(cli.typer.Exit), cli.failures_in_one_line(tmp_path):
            raise error
        _, *more = capsys.readouterr().err.splitlines()
        hint = f"mend it; the same command, with run.resume=true if settings have changed, goes on from {tmp_path}"
        assert more == [hint] * has_checkpoint


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "backend:cudaMallocAsync"}, "backend:cudaMallocAsync"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}, None),
    ],
)
def test_the_memory_of_a_gpu_grows_in_segments_unless_the_user_says_otherwise(given, expected, monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    seen = []
    monkeypatch.setattr(cli, "app", lambda: seen.append(os.environ.get("PYTORCH_ALLOC_CONF")))
    cli.main()
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    assert seen == [expected]


def test_that_is_said_before_torch_is_there_to_read_it():
    command = "import sys; import llmrl.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], timeout=60).returncode == 0


def test_a_dry_run_prints_the_dtype_that_the_device_gets(grpo_recipe, monkeypatch):
    monkeypatch.setattr("llmrl.wiring.precision.pick_device", lambda: torch.device("cuda"))
    status, printed, _ = llmrl("grpo", grpo_recipe, "--dry-run")
    assert status == 0
    assert "  dtype: bfloat16\n" in printed


def test_held_out_prompts_that_are_named_are_measured_before_and_after(grpo_recipe, data):
    settings = yaml.safe_load(grpo_recipe.read_text())
    del settings["evaluation"]
    status, _, error = llmrl("grpo", write_recipe(data / "named.yaml", settings))
    assert status == 0, error
    entries = lines(data / "grpo" / "metrics.jsonl")
    assert [entry["iteration"] for entry in entries if "eval/accuracy" in entry] == [0, 2]
    assert [entry["iteration"] for entry in entries] == [0, 1, 2]


def test_a_minibatch_follows_a_smaller_rollout(grpo_recipe, data):
    settings = yaml.safe_load(grpo_recipe.read_text())
    del settings["update"]
    status, output, error = llmrl("grpo", write_recipe(data / "small.yaml", settings), "--dry-run")
    assert status == 0, error
    assert yaml.safe_load(output.partition("\nEach ")[0])["update"]["minibatch_size"] == 16


def test_recipes_are_listed_and_printed(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    status, listed, _ = llmrl("recipes")
    assert status == 0
    rows = [line.split("\t") for line in listed.splitlines()]
    assert ["quickstart_grpo", "llmrl grpo"] in [row[:2] for row in rows]
    assert {len(row) for row in rows} == {3}
    status, printed, _ = llmrl("recipes", "gsm8k_smollm2_grpo")
    assert status == 0
    (tmp_path / "mine.yaml").write_text(printed)
    assert llmrl("grpo", "mine.yaml", f"model.path={TINY}", "model.from_scratch=true", "--dry-run")[0] == 0


def test_a_recipe_that_does_not_come_with_llmrl():
    status, output, error = llmrl("recipes", "quickstart_gpro")
    assert (status, output) == (2, "")
    assert error.startswith("error: no recipe 'quickstart_gpro' comes with llmrl; did you mean 'quickstart_grpo'?")


def test_a_new_folder_is_written_and_made(monkeypatch, tmp_path):
    ran = []
    monkeypatch.setattr(cli, "run_in", lambda folder, command: ran.append((folder, command)) or 0)
    folder = tmp_path / "demo"
    status, output, _ = llmrl("new", "math", folder)
    assert status == 0
    assert (folder / "recipe.yaml").is_file()
    assert ran == [(folder, "python data/generate.py"), (folder, "llmrl sft sft.yaml")]
    assert output.endswith(f"Go on with\n    cd {folder}\n    llmrl grpo recipe.yaml\n")


def test_a_new_folder_whose_command_fails(monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "run_in", lambda *_: 7)
    status, output, error = llmrl("new", "rlhf", tmp_path / "demo")
    assert status == 1
    assert "is ready" not in output
    assert error.startswith(f"error: `python data/generate.py` in {tmp_path / 'demo'} ended with status 7")


@pytest.mark.parametrize(
    ("name", "place", "told"),
    [("toys", "demo", "no starter 'toys', only math, rlhf, pairs, tools"), ("math", ".", "mine.txt is in the way")],
)
def test_a_new_folder_that_is_refused(name, place, told, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    status, _, error = llmrl("new", name, tmp_path / place)
    assert status == 2
    assert told in error
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.txt"]


def test_the_version_and_the_short_help():
    assert llmrl("--version")[:2] == (0, f"llmrl {version('llmrl')}\n")
    for command in ([], ["grpo"], ["generate"]):
        assert llmrl(*command, "-h") == llmrl(*command, "--help")


def test_the_help_says_how_overrides_are_read():
    words = " ".join(llmrl("grpo", "-h")[1].replace("│", "").split())
    assert "model.lora.targets=[q_proj,v_proj]. A text is what the shell hands over" in words
    assert r"\${ the two characters ${" in words


@pytest.mark.parametrize("algorithm", ["sft", "grpo"])
def test_settings_lose_nothing_in_a_narrow_terminal(algorithm, monkeypatch, capsys):
    piped = llmrl("settings", algorithm)[1]
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    settings(algorithm)
    shown = capsys.readouterr().out
    for path, kind, default, text in (line.split("\t") for line in piped.splitlines()):
        assert f"{path}  ({kind}{', ' if default else ''}{default})\n    {text}\n" in shown


def test_an_evaluation_loses_nothing_in_a_narrow_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    model, earlier = "runs/" + "long_" * 12 + "after", "runs/" + "long_" * 12 + "before"
    values = {"eval/accuracy": 0.25, "eval/accuracy_low": 0.1875, "eval/accuracy_high": 0.3125}
    _print_evaluation(model, values, {"model": earlier, **values})
    columns = [
        [cell.strip() for cell in line.split(side)] for line in capsys.readouterr().out.splitlines() for side in "│┃"
    ]
    rows = [cells for cells in columns if len(cells) == 5]
    joined = ["".join(row[n] for row in rows) for n in (2, 3)]
    assert earlier in joined[0]
    assert model in joined[1]
    assert all("0.25[0.1875,0.3125]" in column.replace(" ", "") for column in joined)


def test_a_table_in_a_file_folds_nothing(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    models = ["runs/" + "long_" * 30 + name for name in ("before", "after")]
    _print_evaluation(models[1], {"eval/accuracy": 0.25}, {"model": models[0], "eval/accuracy": 0.5})
    lines = capsys.readouterr().out.splitlines()
    assert [cell.strip() for cell in lines[1].split("┃")] == ["", "", *models, ""]
    assert len(lines) == 5


# --- what reaches the terminal ----------------------------------------------------------------------------------------


class Screen(io.StringIO):
    """Standard output that is a terminal, or is not."""

    def __init__(self, *, is_terminal):
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self):
        return self.is_terminal


@pytest.mark.parametrize(
    ("is_terminal", "seen"), [(True, r"\x1b]0;title\x07\u202e"), (False, "\x1b]0;title\x07\u202e")]
)
def test_a_response_gives_a_terminal_no_commands(monkeypatch, is_terminal, seen):
    monkeypatch.setattr(sys, "stdout", Screen(is_terminal=is_terminal))
    _print_responses(["ask\nme"], [["\x1b]0;title\x07\u202e"]])
    assert sys.stdout.getvalue() == f"> ask\nme\n{seen}\n\n"


def test_an_error_gives_a_terminal_no_commands_and_no_secrets(capsys):
    with pytest.raises(typer.Exit):
        cli._fail("row \x1b[2J of api_key='swordfish'", 2)
    assert capsys.readouterr().err.splitlines()[0] == r"error: row \x1b[2J of api_key='***'"


def test_so_does_a_traceback(monkeypatch, capsys):
    def fail():
        raise LookupError("\x1b[2J of hf_abcdefghijklmnopqrstuvwx")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    told = capsys.readouterr().err
    assert told.startswith("Traceback")
    assert told.endswith("LookupError: \\x1b[2J of ***\n")


def test_a_difference_stands_beside_what_it_is_of(capsys):
    values = {"eval/accuracy": 0.5, "eval/num_prompts": 4.0}
    _print_evaluation("after", values, {"model": "before", **values}, {"eval/accuracy": (0.25, -0.125, 0.625)})
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "accuracy" in line]
    assert [cell.strip() for cell in line.split("│")[1:-1]] == ["accuracy", "0.5", "0.5", "+0.25  [-0.125, 0.625]"]


def test_a_table_gives_a_terminal_no_commands(capsys):
    _print_evaluation("m\x1b[2J", {"eval/a\x1b]0;x\x07": 1.0}, None)
    assert "\x1b" not in capsys.readouterr().out
