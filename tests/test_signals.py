"""A signal stops all processes of a launch in order."""

import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.processes import command, environment, free_port, lines, write_recipes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    write_recipes(folder)
    return folder


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
    assert output.count(b"every weight on each of 2 devices.") == 1
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
