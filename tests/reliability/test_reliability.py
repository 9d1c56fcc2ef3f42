"""A sample of `make test-reliability`, in a process of its own, which forks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT, environment

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("kind", "seed", "num"),
    [
        ("kills", 1, 12),
        ("damage by function", 1, 100),
        ("damage by command", 1, 4),
        ("folders", 1, 100),
        ("signals", 1, 6),
    ],
)
def test_a_sample_comes_out_right(kind: str, seed: int, num: int, tmp_path: Path):
    table = tmp_path / "table.jsonl"
    done = subprocess.run(
        [sys.executable, "-m", "tests.reliability", kind, "--trials", str(num), "--seed", str(seed), "--table", table],
        cwd=ROOT, env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = [json.loads(line) for line in table.read_text().splitlines()]
    assert [line for line in lines if line["wrong"] is not None] == []
    assert done.returncode == 0, done.stderr
    assert len(lines) == min(num, {"folders": 29}.get(kind, num))


def test_a_trial_that_comes_out_wrong_is_told(tmp_path: Path):
    """With a checkpoint whose manifest is not compared, damage goes unseen."""
    program = (
        "import sys; from tests.reliability import __main__ as table; from llmrl.trainers import checkpoint\n"
        "checkpoint.verify_checkpoint = lambda folder: None\n"
        "sys.argv[1:] = ['damage by function', '--trials', '3']\n"
        "table.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stdout.count("WRONG") == 3
