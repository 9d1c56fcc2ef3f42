"""The command line as a user meets it: whole runs of a tiny model, and every kind of bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config
from transformers.utils.logging import enable_progress_bar
from typer.testing import CliRunner

from llmrl.cli import app

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
    timed = ("time/", "tokens/per_s")
    return [{name: x for name, x in entry.items() if not name.startswith(timed)} for entry in entries]


# --- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_every_recipe_of_the_repository_dry_runs(recipe, monkeypatch, tmp_path):
    refuse_to_load(monkeypatch)
    (command,) = [name for name in ("sft", "reward_model", "grpo", "ppo") if recipe.stem.endswith(name)]
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
    started = time.monotonic()
    status, _, error = llmrl("grpo", grpo_recipe, *overrides)
    assert status == 2
    assert time.monotonic() - started < 10
    assert "Traceback" not in error
    for words in told:
        assert words in error


def test_a_missing_recipe(tmp_path):
    status, _, error = llmrl("grpo", "recipes/quickstart_gpro.yaml")
    assert status == 2
    assert "quickstart_grpo.yaml" in error


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
    (data / "grpo").mkdir()
    (data / "grpo" / "config.json").write_text("{}")
    status, _, error = llmrl("grpo", grpo_recipe)
    assert status == 2
    assert "run.resume=true" in error


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


def test_a_run_that_is_stopped_goes_on_where_it_was(grpo_recipe, data):
    arguments = ["run.num_iterations=30", "algorithm.kl_coef=0.01", "algorithm.scale=none"]
    process = launch(grpo_recipe, *arguments)
    metrics = data / "grpo" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and len(lines(metrics)) >= 2):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, error
    assert "run.resume=true" in error
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
