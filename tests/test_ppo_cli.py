"""llmrl ppo as a user meets it: whole runs on tiny models against a learned reward, and every kind of bad input."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from tests.test_cli import ROOT, TINY, lines, llmrl, refuse_to_load, without_times, write_jsonl, write_recipe
from tests.test_reward_model_cli import CHAT_TEMPLATE, SIZES, make_pairs, without_special_tokens

WORDS = ROOT / "recipes" / "models" / "tiny_word_llama"
HEALTH = {
    "policy": ["ratio_max_deviation", "clip_fraction", "approx_kl", "entropy", "loss", "rollout_gap"],
    "value": ["explained_variance", "clip_fraction", "loss", "mean", "std"],
    "kl": ["mean", "sequence", "coef"],
    "score": ["mean", "std", "model", "unscored"],
    "reward": ["mean", "std"],
    "response": ["finished_fraction", "length", "length_max"],
    "actor": ["grad_norm", "learning_rate", "skipped_steps"],
    "critic": ["grad_norm", "learning_rate", "skipped_steps"],
}
"""What every iteration says."""


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A language model that is likely to end, and two reward models that were trained from it, one by LoRA."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=99, pad_token_id=0, eos_token_id=1, initializer_range=0.3))
    with torch.no_grad():
        base.lm_head.weight[1] *= 3
    base.save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder / "base")
    for name, settings in (("whole", []), ("lora", ["model.lora.rank=3"])):
        recipe = write_recipe(
            folder / f"{name}.yaml",
            {
                "model": {"path": str(folder / "base")},
                "data": {"path": str(write_jsonl(folder / "pairs.jsonl", make_pairs(0, 40)))},
                "evaluation_data": {"path": str(folder / "pairs.jsonl")},
                "reward_model": {"batch_size": 8},
                "optimizer": {"learning_rate": 1e-2},
                "run": {"output_dir": str(folder / name)},
            },
        )
        status, _, error = llmrl("reward-model", recipe, *settings)
        assert status == 0, error
    return SimpleNamespace(base=folder / "base", whole=folder / "whole" / "final", lora=folder / "lora" / "final")


@pytest.fixture
def recipe(models, tmp_path):
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"{n}:"} for n in range(20)])
    return write_recipe(
        tmp_path / "ppo.yaml",
        {
            "model": {"path": str(models.base)},
            "data": {"path": str(tmp_path / "prompts.jsonl")},
            "evaluation_data": {"path": str(tmp_path / "prompts.jsonl"), "num_rows": 3},
            "evaluation": {"every": 1},
            "reward": {"model": {"path": str(models.whole), "weight": 2.0}},
            "rollout": {"prompts_per_iteration": 8, "max_response_tokens": 6},
            "algorithm": {"kl_coef": 0.05, "missing_eos_penalty": 0.5},
            "update": {"minibatch_size": 4, "microbatch_tokens": 40},
            "optimizer": {"learning_rate": 1e-3},
            "critic_optimizer": {"learning_rate": 1e-2},
            "run": {"output_dir": str(tmp_path / "run"), "num_iterations": 3, "samples_per_iteration": 8},
        },
    )


@pytest.fixture
def one_base(models):
    """Overrides: four roles on one frozen base."""
    return [
        "model.lora.rank=2",
        "critic.network=adapter",
        f"reward.model.path={models.lora}",
        "reward.model.on_actor_base=true",
    ]


def scores_of(folder, conversations):
    """Raw scores by transformers alone, each list of ids by itself."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([ids])).logits[:, 0] for ids in conversations])


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def weights(folder):
    return load_file(folder / "model.safetensors")


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["own", "reward_model"])
def test_a_run_leaves_its_health_its_samples_and_a_model(recipe, models, tmp_path, network):
    status, output, error = llmrl("ppo", recipe, f"critic.network={network}", "run.best_metric=score/mean")
    assert status == 0, error
    assert "8 prompts x 1 responses = 8 responses of at most 6 tokens and learns from them in 4" in output
    run = tmp_path / "run"
    entries = lines(run / "metrics.jsonl")
    assert [entry["iteration"] for entry in entries] == [0, 1, 2, 3]
    expected = {f"{section}/{name}" for section, names in HEALTH.items() for name in names}
    for entry in entries[1:]:
        assert expected - entry.keys() == set()
        assert [name for name, value in entry.items() if value is None or not math.isfinite(value)] == []
        assert entry["policy/ratio_max_deviation"] < 1e-4
        assert entry["actor/skipped_steps"] == entry["critic/skipped_steps"] == 0
        assert not any(name.startswith("group/") for name in entry)
    assert entries[1]["kl/sequence"] == pytest.approx(0, abs=1e-4)  # nothing has moved yet
    assert abs(entries[3]["kl/sequence"]) > 0.001
    assert entries[1]["value/mean"] == entries[1]["value/std"] == 0.0  # the head begins at zero
    assert entries[2]["value/std"] > 0
    assert math.isfinite(entries[0]["eval/score"])

    assert {"config.json", "samples.jsonl", "checkpoints", "final", "best"} <= {p.name for p in run.iterdir()}
    settings = json.loads((run / "config.json").read_text())["settings"]
    assert settings["critic"] == {
        "network": network,
        "path": None,
        "warmup_iterations": 0,
        "value_coef": 0.5,
        "mtp": {"num_heads": 1, "prediction_coef": 0.1, "target_rate": 0.1, "value_grad_clamp": 1.0},
    }
    before, after = weights(models.base), weights(run / "final")
    assert before.keys() == after.keys()
    assert any(not torch.equal(p, after[name]) for name, p in before.items())
    AutoModelForCausalLM.from_pretrained(run / "final")
    assert AutoTokenizer.from_pretrained(run / "final").eos_token == "<eos>"


def test_scores_are_those_of_plain_transformers(recipe, models, tmp_path):
    status, _, error = llmrl("ppo", recipe, "run.num_iterations=1")
    assert status == 0, error
    samples = [sample for sample in lines(tmp_path / "run" / "samples.jsonl") if sample["iteration"] == 1]
    assert len(samples) == 8
    assert {"prompt", "response", "score", "parts", "advantage"} <= samples[0].keys()
    tokenizer = AutoTokenizer.from_pretrained(models.base)
    texts = [sample["prompt"] + sample["response"] for sample in samples]
    raw = scores_of(models.whole, [ids_of(tokenizer, text) for text in texts])
    config = json.loads((models.whole / "config.json").read_text())
    expected = (raw - config["llmrl_score_mean"]) / config["llmrl_score_std"]
    assert_close(torch.tensor([sample["parts"]["model"] for sample in samples]), expected, rtol=1e-3, atol=1e-4)
    assert_close(torch.tensor([sample["score"] for sample in samples]), 2.0 * expected, rtol=1e-3, atol=1e-4)
    assert expected.std() > 0.01


def test_a_reward_model_of_another_tokenizer_reads_the_text(recipe, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(WORDS)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(tmp_path / "other")
    config = LlamaConfig(**SIZES, vocab_size=len(tokenizer), num_labels=1, pad_token_id=0, initializer_range=0.3)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "other")
    status, _, error = llmrl("ppo", recipe, f"reward.model.path={tmp_path / 'other'}", "run.num_iterations=2")
    assert status == 0, error
    samples = [sample for sample in lines(tmp_path / "run" / "samples.jsonl") if sample["iteration"] > 0]
    ended = [sample["response"].endswith("<eos>") for sample in samples]
    assert any(ended)
    assert not all(ended)
    conversations = []
    for sample, end in zip(samples, ended, strict=True):
        response = ids_of(tokenizer, without_special_tokens(sample["response"]))
        prompt = ids_of(tokenizer, f"[user] {sample['prompt']}\n[assistant] ")
        conversations.append(prompt + response + [tokenizer.eos_token_id] * (end or not response))
    raw = scores_of(tmp_path / "other", conversations)
    assert_close(torch.tensor([sample["parts"]["model"] for sample in samples]), raw, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "overrides",
    [
        ["algorithm.score_clip=1.0", "algorithm.normalize_scores=true", "algorithm.aggregation=sequence"],
        ["algorithm.kl_target=1.0", "algorithm.step_kl_target=0.01", "algorithm.stop_kl=0.1"],
        ["algorithm.missing_eos_penalty=0", "algorithm.bootstrap_truncated=true", "algorithm.value_lambda=1"],
        ["algorithm.entropy_coef=0.01", "algorithm.dual_clip=3.0", "algorithm.value_clip=null"],
        ["algorithm.kl_coef=0", "algorithm.overlong_buffer_tokens=2", "algorithm.gamma=0.9"],
        ["model.dtype=bfloat16", "critic.network=reward_model"],
        ["model.gradient_checkpointing=true", "critic.network=shared", "critic.value_coef=0.1"],
        ["rollout.engine=transformers", "model.lora.rank=2"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_options_run(recipe, tmp_path, overrides):
    status, _, error = llmrl("ppo", recipe, *overrides, "evaluation.every=0", "run.num_iterations=2")
    assert status == 0, error
    for entry in lines(tmp_path / "run" / "metrics.jsonl"):
        assert entry["policy/ratio_max_deviation"] < (0.05 if "bfloat16" in overrides[0] else 1e-4)
        assert [name for name, value in entry.items() if value is None] == []
        assert ("kl/sequence" in entry) == ("algorithm.kl_coef=0" not in overrides)


def test_the_warm_up_is_the_critics(recipe, models, tmp_path):
    status, _, error = llmrl("ppo", recipe, "critic.warmup_iterations=2", "evaluation.every=0")
    assert status == 0, error
    entries = lines(tmp_path / "run" / "metrics.jsonl")
    assert ["actor/grad_norm" in entry for entry in entries] == [False, False, True]
    assert ["critic/grad_norm" in entry for entry in entries] == [True, True, True]
    assert [entry["kl/sequence"] == pytest.approx(0, abs=1e-4) for entry in entries] == [True, True, True]
    assert any(not torch.equal(p, weights(tmp_path / "run" / "final")[n]) for n, p in weights(models.base).items())


# --- stopping and going on --------------------------------------------------------------------------------------------

STATEFUL = [
    "algorithm.normalize_scores=true",
    "algorithm.kl_target=0.01",
    "algorithm.step_kl_target=1e-4",
]


NETWORKS = ["own", "warm-up", "one base", "one base bfloat16", "shared", "shared lora", "auxiliary", "mtp", "mtp lora"]


@pytest.mark.parametrize("networks", NETWORKS)
def test_a_run_goes_on_bit_for_bit(recipe, one_base, tmp_path, networks):
    overrides = {
        "own": ["critic.network=reward_model"],
        "warm-up": ["critic.warmup_iterations=3"],
        "one base": one_base,
        "one base bfloat16": [*one_base, "model.dtype=bfloat16", "model.gradient_checkpointing=true"],
        "shared": ["critic.network=shared"],
        "shared lora": [*one_base, "critic.network=shared"],
        "auxiliary": [*one_base, "algorithm.auxiliary_every=3", "algorithm.auxiliary_epochs=2"],
        "mtp": ["critic.network=mtp", "critic.mtp.num_heads=2"],
        "mtp lora": [*one_base, "critic.network=mtp", "model.dtype=bfloat16"],
    }[networks]
    arguments = ["ppo", recipe, *STATEFUL, *overrides]
    assert llmrl(*arguments, "run.num_iterations=4", f"run.output_dir={tmp_path / 'straight'}")[0] == 0
    first = 4 if networks == "warm-up" else 2
    assert llmrl(*arguments, f"run.num_iterations={first}", "run.checkpoint_every=2", "run.keep_checkpoints=9")[0] == 0
    if first == 4:  # as if it had been killed
        for name in ("final", "checkpoints/step_000004"):
            shutil.rmtree(tmp_path / "run" / name)
    status, _, error = llmrl(*arguments, "run.num_iterations=4", "run.resume=true")
    assert status == 0, error

    stopped, straight = (without_times(lines(tmp_path / name / "metrics.jsonl")) for name in ("run", "straight"))
    assert [entry["iteration"] for entry in straight] == [0, 1, 2, 3, 4]
    assert stopped == straight
    steered = len({entry["kl/coef"] for entry in straight[1:]}) > 1
    assert steered == (networks != "warm-up")  # until the actor has moved, there is nothing to steer by
    ours, theirs = (weights(tmp_path / name / "final") for name in ("run", "straight"))
    assert all(torch.equal(p, theirs[name]) for name, p in ours.items())

    states = [
        load_file(tmp_path / name / "checkpoints" / "step_000004" / "state.safetensors") for name in ("run", "straight")
    ]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(p, states[1][name]) for name, p in states[0].items())
    module, head = "critic", "head.weight"
    if shares_trunk := "shared" in networks or "mtp" in networks:
        module, head = "actor", "heads.values.0.weight" if "mtp" in networks else "head.weight"
    of_critic = f"trained/{module}/{{}}/{head}"
    assert states[0][of_critic.format("parameters")].any()
    assert states[0][of_critic.format("optimizer") + "/exp_avg"].any()
    trunk = {name for name in states[0] if name.startswith("trained/critic/parameters/trunk.")}
    assert bool(trunk) != shares_trunk
    assert all("lora_" in name for name in trunk) == (networks not in ("own", "warm-up"))
    targets = {name for name in states[0] if name.startswith("cursor/algorithm/targets/")}
    assert bool(targets) == ("mtp" in networks)
    assert all(states[0][name].any() for name in targets)
    assert (tmp_path / "run" / "final" / "critic").exists() == ("mtp" not in networks)


@pytest.mark.parametrize(
    ("began", "resumed"),
    [
        (["critic.network=own"], ["critic.network=shared"]),
        (["critic.network=shared"], ["critic.network=own"]),
        (["critic.network=shared"], ["critic.network=mtp"]),
        (["critic.network=mtp"], ["critic.network=mtp", "critic.mtp.num_heads=2"]),
        (["model.lora.rank=2", "critic.network=own"], ["model.lora.rank=2", "critic.network=adapter"]),
    ],
)
def test_a_run_is_not_resumed_with_another_critic(recipe, began, resumed):
    assert llmrl("ppo", recipe, *began, "run.num_iterations=1")[0] == 0
    status, _, error = llmrl("ppo", recipe, *resumed, "run.resume=true")
    assert status == 2
    assert "error: the saved state is of other weights" in error
    assert "Traceback" not in error


def test_a_run_of_another_algorithm_is_not_resumed(recipe, tmp_path):
    status, _, error = llmrl("ppo", recipe, "run.num_iterations=1")
    assert status == 0, error
    settings = yaml.safe_load(recipe.read_text())
    del settings["critic_optimizer"], settings["algorithm"]["missing_eos_penalty"]
    settings["update"]["minibatch_size"] = 8
    grpo = write_recipe(tmp_path / "grpo.yaml", settings)
    status, _, error = llmrl("grpo", grpo, "run.resume=true")
    assert status == 2
    assert "that run trained actor and critic, this one trains actor; resume with the algorithm" in error
    assert llmrl("grpo", grpo, f"run.output_dir={tmp_path / 'grpo'}", "run.num_iterations=1")[0] == 0
    status, _, error = llmrl("ppo", recipe, f"run.output_dir={tmp_path / 'grpo'}", "run.resume=true")
    assert status == 2
    assert "that run trained actor, this one trains actor and critic; resume with the algorithm" in error


# --- one base, shared trunk -------------------------------------------------------------------------------------------


def test_four_roles_on_one_base_leave_an_ordinary_model_and_the_actors_adapter(recipe, one_base, models, tmp_path):
    status, _, error = llmrl("ppo", recipe, *one_base)
    assert status == 0, error
    final = tmp_path / "run" / "final"
    assert weights(final).keys() == weights(models.base).keys()
    names = load_file(final / "adapter" / "adapter_model.safetensors").keys()
    assert names
    assert all("lora_" in name and name.startswith("base_model.model.") for name in names)
    config = json.loads((final / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["task_type"], config["modules_to_save"]) == (2, "CAUSAL_LM", None)
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    apart = ["reward.model.on_actor_base=false", f"run.output_dir={tmp_path / 'apart'}"]
    assert llmrl("ppo", recipe, *one_base, *apart)[0] == 0
    for ours, theirs in zip(metrics[:2], lines(tmp_path / "apart" / "metrics.jsonl"), strict=False):
        assert {n: x for n, x in ours.items() if not n.endswith("_s")} == pytest.approx(
            {n: x for n, x in theirs.items() if not n.endswith("_s")}, rel=1e-3, abs=1e-4
        )


# --- evaluation, settings, dry runs -----------------------------------------------------------------------------------


def test_evaluate_takes_a_ppo_recipe(recipe, tmp_path):
    assert llmrl("ppo", recipe)[0] == 0
    last = lines(tmp_path / "run" / "metrics.jsonl")[-1]
    final = [f"model.path={tmp_path / 'run' / 'final'}", "--output", tmp_path / "e.json"]
    status, output, error = llmrl("evaluate", recipe, *final)
    assert status == 0, error
    assert "score" in output
    values = json.loads((tmp_path / "e.json").read_text())
    assert values["eval/score"] == pytest.approx(last["eval/score"], rel=1e-5, abs=1e-6)  # the same weights, reloaded


@pytest.mark.parametrize(
    "overrides",
    [
        ["critic.network=reward_model"],
        ["model.lora.rank=2", "critic.network=adapter", "reward.model.on_actor_base=true"],
        ["update.minibatch_size=2"],
    ],
)
def test_evaluate_needs_no_critic_and_no_base_of_the_actor(recipe, tmp_path, overrides):
    """And a reward model of whatever kind: nothing is trained."""
    status, _, error = llmrl("evaluate", recipe, *overrides, "--output", tmp_path / "e.json")
    assert status == 0, error
    assert math.isfinite(json.loads((tmp_path / "e.json").read_text())["eval/score"])


def test_what_is_wrong_with_a_ppo_recipe_is_told_of_ppo(recipe):
    status, _, error = llmrl("evaluate", recipe, "critic.wramup_iterations=3")
    assert status == 2
    assert "critic.wramup_iterations is not a setting; did you mean critic.warmup_iterations?" in error


def test_settings_of_ppo():
    status, output, _ = llmrl("settings", "ppo")
    assert status == 0
    listed = {line.split("\t")[0]: line.split("\t") for line in output.splitlines()}
    assert {"critic.network", "critic.warmup_iterations", "algorithm.kl_target", "reward.model.path"} <= listed.keys()
    assert "algorithm.group_size" not in listed
    assert listed["critic_optimizer.learning_rate"][2] == "1e-05"
    assert listed["optimizer.learning_rate"][2] == "1e-06"
    assert all(len(line) == 4 and line[3] for line in listed.values())


def test_a_dry_run_prints_the_recipe_and_loads_nothing(recipe, one_base, monkeypatch, tmp_path):
    refuse_to_load(monkeypatch)
    for overrides in ([], one_base, ["critic.network=reward_model"]):
        status, output, error = llmrl("ppo", recipe, *overrides, "--dry-run")
        assert status == 0, error
        settings, _, sentence = output.partition("\nEach of 3 iterations samples 8 prompts x 1 responses")
        assert yaml.safe_load(settings)["critic_optimizer"]["learning_rate"] == 1e-2
        assert "2 epochs of minibatches of 4 responses; 24 prompts in all, " in sentence
        assert "not checked" not in output
    assert not (tmp_path / "run").exists()


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dry", [False, True], ids=["", "dry"])
@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["algorithm.group_size=4"], ["algorithm.group_size cannot be set: PPO has no groups"]),
        (["algorithm.baseline=mean"], ["algorithm.baseline is not a setting"]),
        (["update.minibatch_size=3"], ["update.minibatch_size (3) must divide the 8 responses", "try 2 or 4"]),
        (["critic.network=adapter"], ["critic.network adapter needs model.lora"]),
        (
            ["critic.network=other"],
            ["critic.network: 'other' is not one of 'own', 'reward_model', 'adapter', 'shared' or 'mtp'"],
        ),
        (
            ["critic.network=reward_model", "reward={model: null, functions: [{name: 'r.py:length'}]}"],
            ["critic.network reward_model needs reward.model; name one, or set critic.network to own"],
        ),
        (["critic.network=shared", "critic.warmup_iterations=1"], ["critic.warmup_iterations (1) needs a critic that"]),
        (["critic.body=reward_model"], ["critic.body is not a setting any more; set critic.network to reward_model"]),
        (["critic.warmup_iterations=3"], ["critic.warmup_iterations (3) must be less than run.num_iterations (3)"]),
        (["reward.model.on_actor_base=true"], ["reward.model.on_actor_base needs model.lora"]),
        (
            ["reward.model.on_actor_base=true", "model.lora.rank=2"],
            ["holds no adapter/", "leave reward.model.on_actor"],
        ),
        (
            ["reward.model.on_actor_base=true", "model.lora.rank=2", "model.from_scratch=true"],
            ["reward.model.on_actor_base needs the base that the reward model was trained on"],
        ),
        (["critic_optimizer.learning_rate=-1"], ["critic_optimizer.learning_rate (-1.0) must be 0 or greater"]),
        (["algorithm.kl_coef=0", "algorithm.kl_target=1"], ["algorithm.kl_target steers algorithm.kl_coef by factors"]),
        (["algorithm.auxiliary_epochs=3"], ["algorithm.auxiliary_epochs (3) is read in auxiliary phases; set"]),
        (
            ["algorithm.auxiliary_every=2", "critic.network=shared"],
            ["algorithm.auxiliary_every (2) distils the values of a critic with a trunk of its own"],
        ),
        (["algorithm.bootstrap_truncated=true"], ["algorithm.missing_eos_penalty could be subtracted; set that to 0"]),
        (["reward.model.path=/nowhere/rm"], ["reward.model.path (/nowhere/rm) is no folder"]),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else None,
)
def test_bad_input_is_told_before_anything_loads(recipe, monkeypatch, overrides, told, dry):
    refuse_to_load(monkeypatch)
    status, output, error = llmrl("ppo", recipe, *overrides, *["--dry-run"] * dry)
    assert (status, output) == (2, "")
    assert "Traceback" not in error
    assert error.startswith("error: ")
    assert len(error.splitlines()) <= 2
    for words in told:
        assert words in error


@pytest.mark.parametrize("dry", [False, True], ids=["", "dry"])
def test_a_body_of_another_tokenizer_is_told_before_anything_loads(recipe, models, monkeypatch, tmp_path, dry):
    shutil.copytree(models.whole, tmp_path / "foreign")
    tokenizer = AutoTokenizer.from_pretrained(models.base)
    tokenizer.eos_token = next(token for token in tokenizer.get_vocab() if token.isalpha())
    tokenizer.save_pretrained(tmp_path / "foreign")
    refuse_to_load(monkeypatch)
    overrides = ["critic.network=reward_model", f"reward.model.path={tmp_path / 'foreign'}"]
    status, output, error = llmrl("ppo", recipe, *overrides, *["--dry-run"] * dry)
    assert (status, output) == (2, "")
    assert error.startswith("error: critic.network reward_model: reward.model.path (")
    assert "set critic.network to own" in error
    assert len(error.splitlines()) == 1


def test_a_reward_model_from_another_base_is_told_before_anything_loads(
    recipe, one_base, models, monkeypatch, tmp_path
):
    shutil.copytree(models.base, tmp_path / "other")
    refuse_to_load(monkeypatch)
    status, _, error = llmrl("ppo", recipe, *one_base, f"model.path={tmp_path / 'other'}")
    assert status == 2
    assert error.startswith(f"error: reward.model.path ({models.lora}) is an adapter on {models.base}, and the actor's")
    assert len(error.splitlines()) == 1
