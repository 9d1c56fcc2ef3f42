"""llmrl reward-model and llmrl score as a user meets them, and GRPO with what they leave as its reward."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import date

import pytest
import torch
import yaml
from torch.testing import assert_close
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from tests.test_cli import ROOT, TINY, lines, llmrl, refuse_to_load, without_times, write_jsonl, write_recipe

CHAT_TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def make_pairs(first, count):
    """The side with more of the letter a is preferred."""
    return [
        {
            "prompt": f"{n}:",
            "chosen": "aab"[: 2 + n % 2] + "a" * (n % 5),
            "rejected": "b" * (1 + n % 6),
            "source": ["even", "odd"][n % 2],
        }
        for n in range(first, first + count)
    ]


def make_recipe(folder):
    train, test = make_pairs(0, 60), make_pairs(100, 20)
    write_jsonl(folder / "train.jsonl", [*train, train[0]])
    write_jsonl(folder / "test.jsonl", test)
    settings = {
        "model": {"path": str(TINY), "from_scratch": True},
        "data": {"path": str(folder / "train.jsonl")},
        "evaluation_data": {"path": str(folder / "test.jsonl")},
        "reward_model": {"batch_size": 8, "evaluate_every": 3},
        "optimizer": {"learning_rate": 1e-3},
        "run": {"output_dir": str(folder / "run"), "best_metric": "eval/accuracy"},
    }
    return write_recipe(folder / "rm.yaml", settings)


@pytest.fixture
def recipe(tmp_path):
    return make_recipe(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of `llmrl reward-model`: its folder, beside its data and its recipe; what it printed is in ``output``."""
    folder = tmp_path_factory.mktemp("trained")
    status, output, error = llmrl("reward-model", make_recipe(folder))
    assert status == 0, error
    (folder / "output").write_text(output)
    return folder / "run"


@pytest.fixture
def grpo_recipe(tmp_path):
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"{n}:"} for n in range(20)])
    rule = tmp_path / "rule.py"
    rule.write_text("def length(responses):\n    return [float(len(text)) for text in responses]\n")
    settings = {
        "model": {"path": str(TINY), "from_scratch": True},
        "data": {"path": str(tmp_path / "prompts.jsonl")},
        "evaluation_data": {"path": str(tmp_path / "prompts.jsonl"), "num_rows": 3},
        "evaluation": {"every": 1},
        "reward": {"model": {"path": "runs/none/rm/final", "weight": 2.0}},
        "rollout": {"prompts_per_iteration": 4, "max_response_tokens": 4},
        "algorithm": {"group_size": 4},
        "update": {"minibatch_size": 8},
        "run": {"output_dir": str(tmp_path / "grpo"), "num_iterations": 2, "samples_per_iteration": 16},
    }
    return write_recipe(tmp_path / "grpo.yaml", settings)


def plain_scores(folder, texts):
    """Raw scores by transformers alone, each text by itself; "<eos>" in a text is the token."""
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logits = [model(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits for text in texts]
    return torch.cat(logits)[:, 0]


def without_special_tokens(text):
    for token in ("<pad>", "<eos>", "<unk>"):
        text = text.replace(token, "")
    return text


def normalization_of(folder):
    config = json.loads((folder / "config.json").read_text())
    return config["llmrl_score_mean"], config["llmrl_score_std"]


# --- training ---------------------------------------------------------------------------------------------------------


def test_a_run_leaves_models_with_a_report_card_beside_each(trained):
    entries = lines(trained / "metrics.jsonl")
    assert [entry["iteration"] for entry in entries] == list(range(8))  # 60 pairs by 8; the repeated one is dropped
    assert entries[-1]["eval/accuracy"] > 0.9
    assert entries[-1]["eval/loss"] < entries[0]["eval/loss"] - 0.1
    best = json.loads((trained / "best" / "best.json").read_text())
    assert best["value"] == max(entry.get("eval/accuracy", 0) for entry in entries)
    for name in ("final", "best"):
        model = AutoModelForSequenceClassification.from_pretrained(trained / name)
        assert model.config.num_labels == 1
        card = json.loads((trained / name / "report_card.json").read_text())
        assert card["num_pairs"] == 20
        assert card["checks"] == {
            "end token scored": True,
            "padding inert": True,
            "template free of today's date": True,
        }
        assert (card["normalization"]["mean"], card["normalization"]["std"]) == normalization_of(trained / name)
        assert [row["source"] for row in card["by_source"]] == ["even", "odd"]
    assert json.loads((trained / "final" / "report_card.json").read_text())["accuracy"] == entries[-1]["eval/accuracy"]
    output = (trained.parent / "output").read_text()
    assert "dropped 1 of 61 pairs: they repeat an earlier pair" in output
    assert "accuracy" in output
    assert "report_card.json" in output


def test_the_card_says_what_the_saved_folder_says(trained):
    pairs = make_pairs(100, 20)
    sides = [
        plain_scores(trained / "final", [row["prompt"] + row[side] + "<eos>" for row in pairs])
        for side in ("chosen", "rejected")
    ]
    card = json.loads((trained / "final" / "report_card.json").read_text())
    assert card["accuracy"] == pytest.approx(float((sides[0] > sides[1]).double().mean()))
    assert card["scores"]["chosen_mean"] == pytest.approx(float(sides[0].mean()), abs=1e-4)
    assert card["scores"]["rejected_mean"] == pytest.approx(float(sides[1].mean()), abs=1e-4)
    expected_loss = float(-torch.nn.functional.logsigmoid(sides[0] - sides[1]).mean())
    assert card["loss"] == pytest.approx(expected_loss, abs=1e-4)


def test_lora_leaves_a_folder_of_the_same_kind(recipe, tmp_path):
    status, _, error = llmrl("reward-model", recipe, "model.lora.rank=4", "run.best_metric=null")
    assert status == 0, error
    pairs = make_pairs(100, 20)
    chosen = plain_scores(tmp_path / "run" / "final", [row["prompt"] + row["chosen"] + "<eos>" for row in pairs])
    card = json.loads((tmp_path / "run" / "final" / "report_card.json").read_text())
    assert card["scores"]["chosen_mean"] == pytest.approx(float(chosen.mean()), abs=1e-4)


def test_what_is_trained_already_is_trained_on(trained, recipe):
    arguments = [f"model.path={trained / 'final'}", "model.from_scratch=false", "run.best_metric=null"]
    status, _, error = llmrl("reward-model", recipe, *arguments)
    assert status == 0, error
    before = lines(trained / "metrics.jsonl")[-1]
    first = lines(recipe.parent / "run" / "metrics.jsonl")[0]
    assert first["eval/loss"] == pytest.approx(before["eval/loss"], abs=1e-5)


def launch(*arguments):
    command = [sys.executable, "-m", "llmrl", "reward-model", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_run_that_is_stopped_goes_on_where_it_was(recipe, tmp_path):
    arguments = ["reward_model.num_epochs=10", "reward_model.evaluate_every=25"]
    process = launch(recipe, *arguments)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and len(lines(metrics)) >= 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, error
    assert "the same command goes on from" in error
    assert 3 <= len(lines(metrics)) < 76
    assert not (tmp_path / "run" / "final").exists()

    status, _, error = llmrl("reward-model", recipe, *arguments, "run.resume=true")
    assert status == 0, error
    assert llmrl("reward-model", recipe, *arguments, f"run.output_dir={tmp_path / 'straight'}")[0] == 0
    stopped, straight = (without_times(lines(tmp_path / name / "metrics.jsonl")) for name in ("run", "straight"))
    assert [entry["iteration"] for entry in stopped] == list(range(76))
    for ours, theirs in zip(stopped, straight, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    cards = [json.loads((tmp_path / name / "final" / "report_card.json").read_text()) for name in ("run", "straight")]
    assert cards[0]["accuracy"] == cards[1]["accuracy"]
    assert cards[0]["normalization"] == pytest.approx(cards[1]["normalization"], rel=1e-3, abs=1e-4)


def test_a_finished_run_says_so_and_makes_the_same_model_where_it_is_gone(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    recipe, output = trained.parent / "rm.yaml", f"run.output_dir={tmp_path / 'run'}"
    status, _, error = llmrl("reward-model", recipe, output, "run.resume=false")
    assert status == 2
    assert "leave run.resume at auto to go on with it" in error
    before = json.loads((tmp_path / "run" / "final" / "report_card.json").read_text())
    written = (tmp_path / "run" / "final" / "model.safetensors").stat().st_mtime_ns
    status, printed, error = llmrl("reward-model", recipe, output)
    assert status == 0, error
    assert "finished" in printed + error
    assert (tmp_path / "run" / "final" / "model.safetensors").stat().st_mtime_ns == written
    shutil.rmtree(tmp_path / "run" / "final")
    status, _, error = llmrl("reward-model", recipe, output, "run.resume=true")
    assert status == 0, error
    assert json.loads((tmp_path / "run" / "final" / "report_card.json").read_text()) == before
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 8


# --- scoring ----------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_plain_transformers(trained, tmp_path):
    rows = [{"prompt": row["prompt"], "response": row["rejected"], "id": n} for n, row in enumerate(make_pairs(7, 9))]
    file, out = write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "new" / "scores.jsonl"
    raw = plain_scores(trained / "final", [row["prompt"] + row["response"] + "<eos>" for row in rows])
    status, output, error = llmrl("score", trained / "final", file, "--no-normalize")
    assert status == 0, error
    printed = [json.loads(line) for line in output.splitlines()]
    assert [{name: row[name] for name in row if name != "score"} for row in printed] == rows
    assert_close(torch.tensor([row["score"] for row in printed]), raw, rtol=1e-4, atol=1e-4)
    assert error.startswith("9 responses, mean score ")

    status, output, error = llmrl("score", trained / "final", file, "--output", out)
    assert (status, output) == (0, ""), error
    mean, std = normalization_of(trained / "final")
    assert_close(torch.tensor([row["score"] for row in lines(out)]), (raw - mean) / std, rtol=1e-4, atol=1e-4)


def test_scores_of_the_reference_pairs_have_mean_0_and_standard_deviation_1(trained, tmp_path):
    rows = [{"q": row["prompt"], "a": row[side]} for row in make_pairs(0, 60) for side in ("chosen", "rejected")]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    columns = ["--prompt-column", "q", "--response-column", "a"]
    status, output, error = llmrl("score", trained / "final", file, *columns)
    assert status == 0, error
    scores = torch.tensor([json.loads(line)["score"] for line in output.splitlines()])
    assert float(scores.mean()) == pytest.approx(0, abs=1e-4)
    assert float(scores.std(correction=0)) == pytest.approx(1, abs=1e-4)


def test_a_score_that_is_no_finite_number_fails_in_one_line(trained, tmp_path):
    shutil.copytree(trained / "final", tmp_path / "broken")
    model = LlamaForSequenceClassification.from_pretrained(tmp_path / "broken")
    with torch.no_grad():
        model.score.weight.fill_(math.nan)
    model.save_pretrained(tmp_path / "broken")
    file = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "1:", "response": "a"}])
    status, output, error = llmrl("score", tmp_path / "broken", file)
    assert (status, output) == (1, "")
    assert error.startswith("error: the reward model's score of response 0 ")
    assert "model.dtype" not in error
    assert len(error.splitlines()) == 1


def test_rows_with_a_date_are_written(trained, tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"prompt": "1:", "response": "a", "day": date(2026, 1, 2)}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    status, output, error = llmrl("score", trained / "final", tmp_path / "rows.parquet")
    assert status == 0, error
    assert json.loads(output)["day"] == "2026-01-02"


def test_scores_that_could_not_be_written_are_told_before_anything_loads(trained, tmp_path, monkeypatch):
    refuse_to_load(monkeypatch)
    file = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "1:", "response": "a", "score": 1}])
    status, _, error = llmrl("score", trained / "final", file)
    assert (status, error.splitlines()) == (
        2,
        [f"error: {file} already has a column 'score', which would be lost; rename it or take it out"],
    )
    status, _, error = llmrl("score", trained / "final", file, "--output", tmp_path)
    assert (status, error) == (2, f"error: --output ({tmp_path}) is a folder; name a file in it\n")


def test_code_of_a_model_runs_only_where_it_is_allowed(trained, tmp_path):
    shutil.copytree(trained / "final", tmp_path / "code")
    config = json.loads((tmp_path / "code" / "config.json").read_text())
    (tmp_path / "code" / "config.json").write_text(json.dumps({**config, "auto_map": {}}))
    file = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "1:", "response": "a"}])
    status, _, error = llmrl("score", tmp_path / "code", file)
    assert status == 2
    assert "read it, then add --trust-remote-code" in error
    status, _, error = llmrl("score", tmp_path / "code", file, "--trust-remote-code")
    assert status == 0, error


# --- in the loop ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["native", "transformers"])
def test_grpo_with_the_folder_as_its_reward(trained, grpo_recipe, tmp_path, engine):
    model = f"reward.model.path={trained / 'final'}"
    status, _, error = llmrl("grpo", grpo_recipe, model, f"rollout.engine={engine}")
    assert status == 0, error
    entries = lines(tmp_path / "grpo" / "metrics.jsonl")
    assert [entry["iteration"] for entry in entries] == [0, 1, 2]
    assert all(math.isfinite(entry["eval/score"]) for entry in entries)
    samples = [sample for sample in lines(tmp_path / "grpo" / "samples.jsonl") if sample["iteration"] == 1]
    assert len(samples) == 16
    mean, std = normalization_of(trained / "final")
    raw = plain_scores(trained / "final", [sample["prompt"] + sample["response"] for sample in samples])
    assert raw.std() > 0.01
    assert_close(
        torch.tensor([sample["parts"]["model"] for sample in samples]), (raw - mean) / std, rtol=1e-3, atol=1e-4
    )
    for sample in samples:
        assert sample["score"] == pytest.approx(2.0 * sample["parts"]["model"], rel=1e-4, abs=1e-5)
    assert entries[1]["score/mean"] == pytest.approx(sum(sample["score"] for sample in samples) / 16, abs=1e-4)


def test_grpo_with_a_model_and_a_function(trained, grpo_recipe, tmp_path):
    function = f"{{functions: [{{name: '{tmp_path}/rule.py:length', weight: 0.5}}], model: {{path: {trained}/final}}}}"
    status, _, error = llmrl("grpo", grpo_recipe, f"reward={function}", "run.num_iterations=1")
    assert status == 0, error
    for sample in lines(tmp_path / "grpo" / "samples.jsonl"):
        assert set(sample["parts"]) == {"length", "model"}
        assert sample["parts"]["length"] == len(without_special_tokens(sample["response"]))
        expected = 0.5 * sample["parts"]["length"] + 2.0 * sample["parts"]["model"]
        assert sample["score"] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_grpo_with_a_reward_model_of_another_template(grpo_recipe, tmp_path):
    """And without a stored normalization: the raw scores count."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(tmp_path / "other")
    config = LlamaConfig(**SIZES, vocab_size=99, num_labels=1, pad_token_id=0, initializer_range=0.3)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "other")
    # a policy that is likely to end
    shutil.copytree(TINY, tmp_path / "policy")
    policy = LlamaForCausalLM(LlamaConfig.from_pretrained(TINY))
    with torch.no_grad():
        policy.lm_head.weight[1] *= 20
    policy.save_pretrained(tmp_path / "policy")
    paths = [f"model.path={tmp_path / 'policy'}", "model.from_scratch=false", f"reward.model.path={tmp_path / 'other'}"]
    status, _, error = llmrl("grpo", grpo_recipe, *paths, "run.num_iterations=1")
    assert status == 0, error
    samples = lines(tmp_path / "grpo" / "samples.jsonl")
    ended = [sample["response"].endswith("<eos>") for sample in samples]
    assert any(ended)
    assert not all(ended)
    texts = []
    for sample, end in zip(samples, ended, strict=True):
        response = without_special_tokens(sample["response"])
        texts.append(f"[user] {sample['prompt']}\n[assistant] {response}" + "<eos>" * (end or not response))
    raw = plain_scores(tmp_path / "other", texts)
    assert_close(torch.tensor([sample["parts"]["model"] for sample in samples]), raw, rtol=1e-3, atol=1e-4)


def test_evaluate_scores_by_the_model_too(trained, grpo_recipe, tmp_path):
    status, _, error = llmrl(
        "evaluate", grpo_recipe, f"reward.model.path={trained / 'final'}", "--output", tmp_path / "e.json"
    )
    assert status == 0, error
    assert math.isfinite(json.loads((tmp_path / "e.json").read_text())["eval/score"])


# --- dry runs and settings --------------------------------------------------------------------------------------------


def test_a_dry_run_prints_the_recipe_and_loads_nothing(recipe, monkeypatch, tmp_path):
    refuse_to_load(monkeypatch)
    status, output, error = llmrl("reward-model", recipe, "--dry-run")
    assert status == 0, error
    settings, _, sentence = output.partition("\nEach iteration is one optimizer step on 8 pairs")
    assert yaml.safe_load(settings)["reward_model"]["num_epochs"] == 1
    assert "61 rows" in sentence
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_what_it_could_not_check(grpo_recipe, recipe, monkeypatch):
    refuse_to_load(monkeypatch)
    status, output, error = llmrl("grpo", grpo_recipe, "reward.model.path=nobody/nosuchreward", "--dry-run")
    assert status == 0, error
    told = output.split("not checked: ")[1:]
    assert told == ["reward.model.path (nobody/nosuchreward) is a hub name that is not in the local cache\n"]
    made_by = "made_by={runs/none/rm/final: llmrl reward-model r.yaml}"
    status, output, error = llmrl("grpo", grpo_recipe, made_by, "--dry-run")
    assert status == 0, error
    assert "reward.model.path (runs/none/rm/final) does not exist yet; `llmrl reward-model r.yaml` makes it" in output
    missing = [
        "model.path=runs/none/sft/final",
        "made_by={runs/none/sft/final: llmrl sft s.yaml}",
        "model.from_scratch=false",
    ]
    data = ["evaluation_data.path=gone.jsonl", "made_by={gone.jsonl: python make.py}"]
    status, output, error = llmrl("reward-model", recipe, *missing, *data, "--dry-run")
    assert status == 0, error
    assert "not checked: model.path (runs/none/sft/final) does not exist yet" in output
    assert "data.path (gone.jsonl) does not exist yet; `python make.py` makes it" in output


def test_settings_of_reward_models():
    status, output, _ = llmrl("settings", "reward-model")
    assert status == 0
    assert "reward_model.center_coef" in "".join(output.split())
    assert "run.num_iterations" not in output
    assert "reward-model" in llmrl("settings", "reward")[2]


def test_what_is_correct_is_said_for_a_reward_model_too(trained, grpo_recipe, tmp_path):
    """The normalized score decides, whatever its weight."""
    (told,) = [
        line for line in llmrl("settings", "grpo")[1].splitlines() if line.startswith("evaluation.correct_above")
    ]
    assert "from the reward model, whose normalized scores" in told
    settings = [f"reward.model.path={trained / 'final'}", "reward.model.weight=-100"]
    shares = []
    for threshold in (-50, 50):
        out = tmp_path / "e.json"
        status, _, error = llmrl(
            "evaluate", grpo_recipe, *settings, f"evaluation.correct_above={threshold}", "--output", out
        )
        assert status == 0, error
        shares.append(json.loads(out.read_text())["eval/accuracy"])
    assert shares == [1.0, 0.0]


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path):
    """Folders that are no reward model, by what is wrong with them."""
    sizes = LlamaConfig(**SIZES, vocab_size=99)
    LlamaForCausalLM(sizes).save_pretrained(tmp_path / "headless")
    LlamaForSequenceClassification(LlamaConfig(**SIZES, vocab_size=99, num_labels=2)).save_pretrained(tmp_path / "two")
    shutil.copytree(tmp_path / "two", tmp_path / "code")
    config = json.loads((tmp_path / "code" / "config.json").read_text())
    (tmp_path / "code" / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "code.X"}}))
    (tmp_path / "empty").mkdir()
    LlamaConfig(**SIZES, vocab_size=99, num_labels=1).save_pretrained(tmp_path / "weightless")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("gone", "is no folder"),
        ("empty", "holds no config.json"),
        (
            "weightless",
            "holds no weights (model.safetensors or model.safetensors.index.json); save them as safetensors",
        ),
        ("headless", "has no score head; train one with `llmrl reward-model`"),
        ("two", "has 2 labels; a reward model has exactly one"),
        ("code", "brings its own Python code"),
    ],
)
@pytest.mark.parametrize("command", ["grpo", "grpo dry", "evaluate", "score"])
def test_what_is_no_reward_model_is_refused_before_anything_loads(
    folders, grpo_recipe, monkeypatch, command, name, told
):
    refuse_to_load(monkeypatch)
    arguments = {
        "grpo": ["grpo", grpo_recipe, f"reward.model.path={folders / name}"],
        "grpo dry": ["grpo", grpo_recipe, f"reward.model.path={folders / name}", "--dry-run"],
        "evaluate": ["evaluate", grpo_recipe, f"reward.model.path={folders / name}"],
        "score": ["score", folders / name, folders / "prompts.jsonl"],
    }
    status, output, error = llmrl(*arguments[command])
    assert (status, output) == (2, "")
    named = "MODEL" if command == "score" else "reward.model.path"
    assert error.startswith(f"error: {named} ({folders / name}) ")
    assert told in error
    assert "from_scratch" not in error  # which reward.model does not have
    assert ("then set model.trust_remote_code=true" in error) == (name == "code" and command != "score")
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("command", ["grpo", "score"])
def test_a_name_that_neither_this_machine_nor_the_hub_knows(grpo_recipe, monkeypatch, tmp_path, command):
    def unreachable(*_, **__):
        raise TimeoutError("no answer")

    monkeypatch.setattr("huggingface_hub.HfApi.get_hf_file_metadata", unreachable)
    file = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "1:", "response": "a"}])
    grpo = ["grpo", grpo_recipe, "reward.model.path=nosuchreward"]
    status, _, error = llmrl(*grpo) if command == "grpo" else llmrl("score", "nosuchreward", file)
    assert status == 2
    last = error.splitlines()[-1]
    named = "MODEL" if command == "score" else "reward.model.path"
    assert last.startswith(f"error: {named} (nosuchreward) is neither a folder here nor a model on the hub")


def test_prompts_that_the_reward_model_cannot_read_end_with_status_2(trained, grpo_recipe, tmp_path):
    shutil.copytree(TINY, tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(tmp_path / "chat")
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": [{"role": "user", "content": f"{n}"}]} for n in range(8)])
    paths = [f"model.path={tmp_path / 'chat'}", f"reward.model.path={trained / 'final'}"]
    status, _, error = llmrl("grpo", grpo_recipe, *paths)
    assert status == 2
    assert "error: the reward model cannot read these prompts: " in error
    assert not (tmp_path / "grpo" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["reward=null"], ["reward"]),
        (["reward.model=null"], ["there is nothing to learn from"]),
        (["reward.model.weight=0"], ["reward.model.weight (0", "other than 0"]),
        (["reward.model.microbatch_tokens=0"], ["reward.model.microbatch_tokens (0) must be at least 1"]),
        (["reward.model.wieght=1"], ["reward.model.wieght", "did you mean", "weight"]),
        (["model.dtype=float16"], ["model.dtype", "float16", "bfloat16"]),
    ],
)
def test_bad_settings_of_the_reward(grpo_recipe, monkeypatch, overrides, told):
    refuse_to_load(monkeypatch)
    status, _, error = llmrl("grpo", grpo_recipe, *overrides)
    assert status == 2
    for words in told:
        assert words in error


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["model.path=/nowhere/model"], ["model.path (/nowhere/model) is no folder"]),
        (["data.path=/nowhere/pairs.jsonl"], ["/nowhere/pairs.jsonl"]),
        (["evaluation_data.path=/nowhere/pairs.jsonl"], ["/nowhere/pairs.jsonl"]),
        (["evaluation_data=null"], ["evaluation_data"]),
        (["data.chosen_column=chose"], ["no column 'chose'", "did you mean 'chosen'"]),
        (["data.rejected_column=chosen"], ["must be two different columns"]),
        (["data.margin_column=margn"], ["data.margin_column"]),
        (["reward_model.batch_size=0"], ["reward_model.batch_size (0) must be at least 1"]),
        (["reward_model.center_coef=-1"], ["reward_model.center_coef (-1", "0 or greater"]),
        (["reward_model.evaluate_every=0"], ["run.best_metric (eval/accuracy) is never measured", "evaluate_every"]),
        (["run.num_iterations=5"], ["run.num_iterations"]),
        (["reward_model.head_init=ones"], ["reward_model.head_init", "ones", "zero"]),
    ],
)
def test_bad_input_to_training_is_told_before_anything_loads(recipe, monkeypatch, overrides, told):
    refuse_to_load(monkeypatch)
    status, _, error = llmrl("reward-model", recipe, *overrides)
    assert status == 2
    assert "Traceback" not in error
    for words in told:
        assert words in error


def test_a_classifier_of_two_labels_is_no_start(folders, recipe, monkeypatch):
    refuse_to_load(monkeypatch)
    status, _, error = llmrl("reward-model", recipe, f"model.path={folders / 'two'}", "model.from_scratch=false")
    assert status == 2
    assert error == f"error: model.path ({folders / 'two'}) has 2 labels; a reward model has exactly one\n"


def test_bad_rows_are_listed_with_their_lines(recipe, tmp_path, monkeypatch):
    refuse_to_load(monkeypatch)
    rows = make_pairs(0, 3)
    rows[1]["chosen"], rows[2]["rejected"] = None, 7
    write_jsonl(tmp_path / "train.jsonl", rows)
    status, _, error = llmrl("reward-model", recipe)
    assert status == 2
    assert "train.jsonl: 2 bad rows" in error
    assert "line 2: 'chosen' must be a text or a list of messages, not null" in error
    assert "line 3: 'rejected' must be a text or a list of messages, not an int" in error


def test_rows_that_cannot_be_scored_are_listed(trained, tmp_path, monkeypatch):
    refuse_to_load(monkeypatch)
    file = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "1:", "response": "a"}, {"prompt": "1:", "response": ""}])
    status, _, error = llmrl("score", trained / "final", file)
    assert status == 2
    assert "line 2" in error
    status, _, error = llmrl("score", trained / "final", "gone.jsonl")
    assert status == 2
    assert error.startswith("error: gone.jsonl does not exist")
