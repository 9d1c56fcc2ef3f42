"""Every command in two processes on the CPU: the same responses, numbers and weights as in one."""

import math
import signal
import subprocess
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from tests.processes import ROOT, command, environment, free_port, lines, run, write_recipes

pytestmark = pytest.mark.slow


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
    write_recipes(folder)
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


def until_it_learns(metrics: Path) -> None:
    for _ in range(600):
        if metrics.exists() and len(metrics.read_text().splitlines()) > 2:
            return
        time.sleep(0.1)


def test_a_signal_stops_both_with_a_checkpoint(folder: Path):
    settings = ["run.output_dir=stopped", "run.num_iterations=100000", "evaluation.every=0"]
    running = subprocess.Popen(
        command("grpo", "grpo.yaml", *settings, num_processes=2),
        cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    metrics = folder / "stopped" / "metrics.jsonl"
    until_it_learns(metrics)
    running.send_signal(signal.SIGTERM)
    output, _ = running.communicate(timeout=60)
    assert output.count(b"error: stopped by SIGTERM") == 1
    assert b" ends: " not in output
    last = lines(metrics)[-1]["iteration"]
    assert (folder / "stopped" / "checkpoints" / f"step_{last:06d}").exists()


def test_a_signal_to_one_rank_stops_both_with_its_status(folder: Path):
    """Here without a launcher, so that each has a status to be seen."""
    settings = ["run.output_dir=alone", "run.num_iterations=100000", "evaluation.every=0"]
    meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            command("grpo", "grpo.yaml", *settings, num_processes=1),
            cwd=folder, env=environment() | meeting | {"RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE,
        )
        for rank in ("0", "1")
    ]  # fmt: skip
    until_it_learns(folder / "alone" / "metrics.jsonl")
    ranks[1].send_signal(signal.SIGTERM)
    told = [rank.communicate(timeout=60)[1].decode() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [128 + signal.SIGTERM] * 2
    assert told[0].startswith("error: stopped by SIGTERM after iteration ")
    assert told[1] == ""


@pytest.mark.parametrize(("name", "num_processes"), [("cpu_two_processes", 2), ("gpu_eight", 8)])
def test_accelerate_reads_the_launch_files(name: str, num_processes: int):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(ROOT / "recipes" / "accelerate" / f"{name}.yaml"))
    assert (config.num_processes, config.distributed_type.value) == (num_processes, "MULTI_GPU")
    assert config.use_cpu is name.startswith("cpu")
