"""Every command in two processes on the CPU: the same responses, numbers and weights as in one."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from tests.test_cli import ROOT

pytestmark = pytest.mark.slow

TINY = str(ROOT / "recipes" / "models" / "tiny_char_llama")
WORDS = ["ok", "so so", "well", "no", "yes", "hm", "fine", "never", "a", "grand"]
RULE = "def rule(responses):\n    return [float(text.count('e') + len(text) % 3) for text in responses]\n"


def free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def command(*arguments: str, num_processes: int) -> list[str]:
    launch = ["-m", "torch.distributed.run", f"--nproc_per_node={num_processes}", f"--master_port={free_port()}"]
    return [sys.executable, *(launch if num_processes > 1 else []), "-m", "llmrl", *arguments]


def run(folder: Path, *arguments: str, num_processes: int) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command(*arguments, num_processes=num_processes),
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def assert_same_run(left: Path, right: Path):
    weights, others = (load_file(folder / "final" / "model.safetensors") for folder in (left, right))
    assert_close(weights, others, atol=1e-5, rtol=0)
    for ours, theirs in zip(lines(left / "metrics.jsonl"), lines(right / "metrics.jsonl"), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            if not name.startswith("time/") and name != "tokens/per_s":
                assert math.isclose(ours[name], theirs[name], rel_tol=1e-4, abs_tol=1e-5), name
    if (left / "samples.jsonl").exists():
        told = ("iteration", "prompt", "response", "group")
        for ours, theirs in zip(lines(left / "samples.jsonl"), lines(right / "samples.jsonl"), strict=True):
            assert [ours[name] for name in told] == [theirs[name] for name in told]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
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
        common + rate + loop + "algorithm: {kl_target: 1.0, kl_horizon: 100, normalize_scores: true, stop_kl: 1.0}\n"
        "update: {minibatch_size: 3, num_epochs: 2}\ncritic: {warmup_iterations: 1}\n"
        "critic_optimizer: {learning_rate: 2.0e-4}\n"
    )
    return folder


@pytest.mark.parametrize("algorithm", ["sft", "reward-model", "grpo", "ppo"])
def test_two_processes_do_what_one_does(algorithm: str, folder: Path):
    for number in (1, 2):
        output = f"run.output_dir={algorithm}{number}"
        done = run(folder, algorithm, f"{algorithm}.yaml", output, num_processes=number)
        assert done.stdout.count("The model is in") == 1
    assert_same_run(folder / f"{algorithm}1", folder / f"{algorithm}2")


def test_two_processes_go_on_where_one_stopped(folder: Path):
    whole, parts = "run.output_dir=ppo_whole", "run.output_dir=ppo_parts"
    run(folder, "ppo", "ppo.yaml", whole, num_processes=1)
    run(folder, "ppo", "ppo.yaml", parts, "run.num_iterations=2", num_processes=1)
    run(folder, "ppo", "ppo.yaml", parts, "run.resume=true", num_processes=2)
    assert_same_run(folder / "ppo_whole", folder / "ppo_parts")


def test_a_shared_trunk_and_an_adapter_learn_in_two_processes(folder: Path):
    for setting in ("critic.network=shared", "critic.network=adapter"):
        name = setting.rpartition("=")[2]
        settings = [setting, "critic.warmup_iterations=0", *(["model.lora.rank=2"] if name == "adapter" else [])]
        for number in (1, 2):
            run(folder, "ppo", "ppo.yaml", f"run.output_dir={name}{number}", *settings, num_processes=number)
        assert_same_run(folder / f"{name}1", folder / f"{name}2")


def test_an_error_on_one_rank_ends_both(folder: Path):
    """The launcher ends the other rank; the status is not 0, and the first error is told."""
    rule = "import os\n\n\ndef rule(responses):\n    assert os.environ['RANK'] == '0', 'planted'\n"
    (folder / "fails.py").write_text(rule + "    return [1.0] * len(responses)\n")
    started = time.monotonic()
    settings = ["run.output_dir=fails", "reward.functions=[{name: 'fails.py:rule'}]"]
    done = subprocess.run(
        command("ppo", "ppo.yaml", *settings, num_processes=2),
        cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "planted" in done.stdout + done.stderr
    assert time.monotonic() - started < 90


def test_a_signal_stops_both_with_a_checkpoint(folder: Path):
    settings = ["run.output_dir=stopped", "run.num_iterations=100000", "evaluation.every=0"]
    running = subprocess.Popen(
        command("grpo", "grpo.yaml", *settings, num_processes=2),
        cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    metrics = folder / "stopped" / "metrics.jsonl"
    for _ in range(600):
        if metrics.exists() and len(metrics.read_text().splitlines()) > 2:
            break
        time.sleep(0.1)
    running.send_signal(signal.SIGTERM)
    running.communicate(timeout=60)
    last = lines(metrics)[-1]["iteration"]
    assert (folder / "stopped" / "checkpoints" / f"step_{last:06d}").exists()


@pytest.mark.parametrize(("name", "num_processes"), [("cpu_two_processes", 2), ("gpu_eight", 8)])
def test_accelerate_reads_the_launch_files(name: str, num_processes: int):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(ROOT / "recipes" / "accelerate" / f"{name}.yaml"))
    assert (config.num_processes, config.distributed_type.value) == (num_processes, "MULTI_GPU")
    assert config.use_cpu is name.startswith("cpu")
