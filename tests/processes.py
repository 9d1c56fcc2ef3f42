"""Runs of `llmrl` in several processes on the CPU, small enough for tests."""

import json
import math
import os
import socket
import sys
from pathlib import Path

from safetensors.torch import load_file
from torch.testing import assert_close

ROOT = Path(__file__).parents[1]
TINY = str(ROOT / "recipes" / "models" / "tiny_char_llama")
WORDS = ["ok", "so so", "well", "no", "yes", "hm", "fine", "never", "a", "grand"]
RULE = "def rule(responses):\n    return [float(text.count('e') + len(text) % 3) for text in responses]\n"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def command(*arguments: str, num_processes: int, program: tuple[str, ...] = ("-m", "llmrl")) -> list[str]:
    launch = ["-m", "torch.distributed.run", f"--nproc_per_node={num_processes}", f"--master_port={free_port()}"]
    return [sys.executable, *(launch if num_processes > 1 else []), *program, *arguments]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def write_recipes(folder: Path) -> None:
    """One of each algorithm, with what it reads."""
    rows = [{"prompt": f"{a} {b}:", "response": b, "chosen": b, "rejected": a + "!"} for a in WORDS for b in WORDS[:3]]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rule.py").write_text(RULE)
    common = f"model: {{path: {TINY}, from_scratch: true}}\ndata: {{path: rows.jsonl}}\n"
    rate = "optimizer: {learning_rate: 2.0e-4}\n"
    loop = (
        "reward: {functions: [{name: 'rule.py:rule'}]}\n"
        "rollout: {prompts_per_iteration: 3, max_response_tokens: 6}\n"
        "evaluation_data: {path: rows.jsonl, num_rows: 5}\nevaluation: {every: 2}\n"
        "run: {output_dir: out, num_iterations: 4, checkpoint_every: 2, keep_checkpoints: 2}\n"
    )
    (folder / "sft.yaml").write_text(
        common + rate + "sft: {batch_size: 5, microbatch_tokens: 32}\nrun: {output_dir: out, num_iterations: 3}\n"
    )
    (folder / "reward-model.yaml").write_text(
        common + rate + "evaluation_data: {path: rows.jsonl, num_rows: 5}\n"
        "reward_model: {batch_size: 5, evaluate_every: 2}\nrun: {output_dir: out, best_metric: eval/accuracy}\n"
    )
    (folder / "grpo.yaml").write_text(
        common + rate + loop + "algorithm: {group_size: 2, max_redraws: 20, kl_coef: 0.1}\n"
        "update: {minibatch_size: 2, num_epochs: 2}\n"
    )
    (folder / "ppo.yaml").write_text(
        common + rate + loop + "algorithm: {kl_target: 1.0, normalize_scores: true, stop_kl: 1.0}\n"
        "update: {minibatch_size: 3, num_epochs: 2}\ncritic: {warmup_iterations: 1}\n"
        "critic_optimizer: {learning_rate: 2.0e-4}\n"
    )


def assert_same_run(left: Path, right: Path):
    """The same responses; weights within 3e-5, and metrics as far as float32 sums in another order allow. AdamW goes as
    far on a gradient that is next to nothing as on any other."""
    weights, others = (load_file(folder / "final" / "model.safetensors") for folder in (left, right))
    assert_close(weights, others, atol=3e-5, rtol=0)
    for ours, theirs in zip(lines(left / "metrics.jsonl"), lines(right / "metrics.jsonl"), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            if not name.endswith("_s"):
                assert math.isclose(ours[name], theirs[name], rel_tol=1e-5, abs_tol=2e-6), name
    if (left / "samples.jsonl").exists():
        told = ("iteration", "prompt", "response", "group")
        for ours, theirs in zip(lines(left / "samples.jsonl"), lines(right / "samples.jsonl"), strict=True):
            assert [ours[name] for name in told] == [theirs[name] for name in told]
