"""Short runs by the command line whose every number is stored: a change of structure must change none of them.

`python -m tests.golden` compares each run with what is stored, to the bit. `python -m tests.golden write` stores what
it is now, which is right only where numbers are meant to change.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from typer.testing import CliRunner

from llmrl.cli import app

ROOT = Path(__file__).parents[2]
TINY = ROOT / "recipes" / "models" / "tiny_char_llama"
STORED = Path(__file__).parent / "trajectories"
ITERATIONS = 3
VOCABULARY = 99

RULES = "tests/golden/rules.py"
ROLLOUT = {"prompts_per_iteration": 4, "max_response_tokens": 6, "max_rows": 5}
UPDATE = {"num_epochs": 2, "microbatch_tokens": 40}
EVALUATION = {"every": 2, "num_responses": 2}
GRPO: dict[str, Any] = {
    "reward": {"functions": [{"name": f"{RULES}:graded"}]},
    "rollout": ROLLOUT,
    "algorithm": {"group_size": 4},
    "update": UPDATE | {"minibatch_size": 8},
    "evaluation": EVALUATION,
}
PPO: dict[str, Any] = {
    "reward": {"functions": [{"name": f"{RULES}:graded"}]},
    "rollout": ROLLOUT | {"prompts_per_iteration": 8},
    "algorithm": {"missing_eos_penalty": 0.5},
    "update": UPDATE | {"minibatch_size": 4},
    "evaluation": EVALUATION,
    "critic_optimizer": {"learning_rate": 1e-2, "schedule": "constant", "warmup_steps": 0},
}
PAIRS = {"batch_size": 8, "microbatch_tokens": 60}
LORA = {"model": {"lora": {"rank": 2}}}

RUNS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sft": ("sft", "llama", {"sft": {"batch_size": 8, "microbatch_tokens": 40}}),
    "sft_absolute": ("sft", "gpt2", {"sft": {"batch_size": 8, "microbatch_tokens": 40}}),
    "reward_model_shared_prompts": (
        "reward-model",
        "llama",
        {"reward_model": {"batch_size": 8, "microbatch_tokens": 60}},
    ),
    "reward_model_own_prompts": (
        "reward-model",
        "sliding",
        {"reward_model": {"batch_size": 8, "microbatch_tokens": 60, "center_coef": 0.1}},
    ),
    "grpo_token": ("grpo", "llama", GRPO),
    "grpo_absolute": ("grpo", "gpt2", GRPO),
    "grpo_sequence_ratio": (
        "grpo",
        "llama",
        {**GRPO, "algorithm": {"group_size": 4, "ratio": "sequence", "aggregation": "sequence", "clip_low": 3e-4}},
    ),
    "grpo_lora": ("grpo", "llama", {**GRPO, **LORA}),
    "grpo_redraws": (
        "grpo",
        "llama",
        {**GRPO, "reward": {"functions": [{"name": f"{RULES}:odd"}]}, "algorithm": {"group_size": 2, "max_redraws": 8}},
    ),
    "grpo_kl": (
        "grpo",
        "llama",
        {**GRPO, "algorithm": {"group_size": 4, "scale": "none", "kl_coef": 0.1, "overlong_buffer_tokens": 3}},
    ),
    "ppo_own": ("ppo", "llama", PPO),
    "ppo_absolute": ("ppo", "gpt2", PPO),
    "ppo_shared": ("ppo", "llama", {**PPO, "critic": {"network": "shared"}, "critic_optimizer": None}),
    "ppo_adapter": ("ppo", "llama", {**PPO, **LORA, "critic": {"network": "adapter"}}),
    "ppo_learned_reward": ("ppo", "llama", {**PPO, "reward": {"model": {"path": "REWARD_MODEL", "weight": 2.0}}}),
    "ppo_per_token_reward": ("ppo", "llama", {**PPO, "reward": {"functions": [{"name": f"{RULES}:letters"}]}}),
}
"""By name: the verb, the model that it begins with, and the sections of its recipe."""


def make_models(folder: Path) -> None:
    """Tiny models that are likely to end, with random weights; the attention of one of them sees four tokens only."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 1, "initializer_range": 0.3}
    torch.manual_seed(0)
    models: dict[str, PreTrainedModel] = {
        "llama": LlamaForCausalLM(LlamaConfig(**sizes, **special, num_key_value_heads=1)),
        "gpt2": GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, **special)),
        "sliding": Gemma2ForCausalLM(
            Gemma2Config(**sizes, **special, num_key_value_heads=1, head_dim=8, sliding_window=4)
        ),
    }
    for name, model in models.items():
        head = model.get_output_embeddings()
        assert head is not None
        with torch.no_grad():
            head.weight[1] *= 3
        model.save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(TINY).save_pretrained(folder / name)


def make_data(folder: Path) -> None:
    """Sums of digits: prompts of three to six characters, the answers to them, and pairs of a right and a wrong one."""
    rows = []
    for number in range(24):
        first, second = number * 7 % 40, number * 11 % 13
        answer = str(first + second)
        wrong = str(first + second + 1 + number % 3)
        rows.append(
            {
                "prompt": f"{first}+{second}=",
                "response": answer,
                "score": number % 3 - 1,
                "chosen": answer,
                "rejected": wrong * (1 + number % 2),
            }
        )
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def prepare(folder: Path) -> None:
    """What the runs read: models, data, and a reward model."""
    make_models(folder)
    make_data(folder)
    run("reward_model_shared_prompts", folder, output=folder)


def run(name: str, folder: Path, *, output: Path) -> dict[str, Any]:
    """What one of the runs leaves: the metrics of each iteration except times, and of each weight a few numbers."""
    verb, model, sections = RUNS[name]
    train(verb, model, sections, folder, output=output / name)
    metrics = [{key: x for key, x in line.items() if not key.endswith("_s")} for line in read_metrics(output / name)]
    return {"metrics": metrics, "weights": _weights(output / name / "final")}


def train(verb: str, model: str, sections: dict[str, Any], folder: Path, *, output: Path) -> None:
    """Trains one of the models that lie in a folder, by a recipe with these sections."""
    settings: dict[str, Any] = {
        "data": {"path": str(folder / "rows.jsonl")},
        "evaluation_data": {"path": str(folder / "rows.jsonl"), "num_rows": 5},
        "optimizer": {"learning_rate": 1e-3, "schedule": "linear", "warmup_steps": 1},
        "run": {"output_dir": str(output), "seed": 3},
        **sections,
    }
    settings["model"] = {"path": str(folder / model), **settings.get("model", {})}
    settings = {key: value for key, value in settings.items() if value is not None}
    if verb != "reward-model":
        settings["run"]["num_iterations"] = ITERATIONS
    recipe = output.with_name(f"{output.name}.yaml")
    recipe.write_text(
        yaml.safe_dump(settings).replace("REWARD_MODEL", str(folder / "reward_model_shared_prompts" / "final"))
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        result = CliRunner().invoke(app, [verb, str(recipe)])
    finally:
        torch.set_num_threads(threads)
    if result.exit_code:
        raise RuntimeError(f"{output.name} ended with status {result.exit_code}: {result.stderr}") from result.exception


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _weights(folder: Path) -> dict[str, Any]:
    """Of each weight its sum and its norm in float64; and a hash of them all."""
    weights = load_file(folder / "model.safetensors")
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode() + weights[name].contiguous().numpy().tobytes())
    numbers = {name: [float(w.double().sum()), float(w.double().norm())] for name, w in sorted(weights.items())}
    return {"sha256": digest.hexdigest(), "numbers": numbers}


def stored(name: str) -> dict[str, Any]:
    """What the run left when it was stored."""
    return json.loads((STORED / f"{name}.json").read_text())


def differences(now: Any, before: Any, *, tolerance: float, place: str = "") -> list[str]:
    """Where two records differ: in names, or in numbers by more than the tolerance, absolute and relative."""
    match now, before:
        case dict(), dict():
            odd = [f"{place}/{key}: {'new' if key in now else 'gone'}" for key in sorted(now.keys() ^ before.keys())]
            both = sorted(now.keys() & before.keys())
            return odd + [
                told
                for key in both
                for told in differences(now[key], before[key], tolerance=tolerance, place=f"{place}/{key}")
            ]
        case list(), list():
            if len(now) != len(before):
                return [f"{place}: {len(now)} in place of {len(before)}"]
            return [
                told
                for index, pair in enumerate(zip(now, before, strict=True))
                for told in differences(*pair, tolerance=tolerance, place=f"{place}/{index}")
            ]
        case int() | float(), int() | float():
            same = math.isclose(now, before, rel_tol=tolerance, abs_tol=tolerance)
            return [] if same else [f"{place}: {now!r} in place of {before!r}"]
    return [] if now == before else [f"{place}: {now!r} in place of {before!r}"]
