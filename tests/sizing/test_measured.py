"""The estimate beside what real runs of small models take. The longer measurement is benchmarks/memory.py."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TINY = ROOT / "recipes" / "models" / "tiny_word_llama"

pytestmark = pytest.mark.slow

LOWEST, HIGHEST = 0.85, 1.25
"""Of the estimate over what was measured, in bytes of live tensors. Where it is off, it is mostly too high: of what
passes, the sum is taken. The formulas were corrected on these very cases: this guards them and proves no more."""
OF_RESIDENT = 0.1
"""Resident size holds also what kernels and Python take."""
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
"""So that glibc keeps no block that was freed: what it keeps is a fifth of the growth and differs between machines."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers, heads that share keys, no weights."""
    return shaped(tmp_path_factory.mktemp("model"), num_hidden_layers=4, intermediate_size=384, num_key_value_heads=2)


def shaped(folder: Path, **settings: Any) -> Path:
    for file in TINY.iterdir():
        if file.suffix == ".json":
            shutil.copy(file, folder)
    config = json.loads((TINY / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    return folder


def measure(model: Path, folder: Path, *options: str) -> list[dict[str, Any]]:
    """Rows of the benchmark, with prompts of 24 and responses of 40 tokens."""
    lengths = ["--prompt-tokens=24", "--response-tokens=40", "--microbatch-tokens=512", "--responses=32"]
    output = folder / "rows.json"
    command = [sys.executable, "benchmarks/memory.py", str(model), *lengths, f"--output={output}", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(output.read_text())


def assert_close_to_measured(rows: list[dict[str, Any]]):
    ratios = {
        (row["case"], phase): row["estimated"][phase] / measured
        for row in rows
        for phase, measured in row["measured"].items()
    }
    assert ratios
    assert {name: x for name, x in ratios.items() if not LOWEST <= x <= HIGHEST} == {}


def test_one_process_takes_what_was_estimated(model, tmp_path):
    cases = [
        "SFT, bfloat16, checkpointing", "reward model", "GRPO, bfloat16, reference", "PPO", "PPO, adapters on one base",
    ]  # fmt: skip
    rows = measure(model, tmp_path, "--together", "--strategies", "one process", "--cases", *cases)
    assert [row["case"] for row in rows] == cases
    assert_close_to_measured(rows)


@pytest.mark.parametrize("strategy", ["ZeRO 2", "ZeRO 3", "FSDP2"])
def test_two_processes_take_what_was_estimated(strategy, model, tmp_path):
    if strategy != "FSDP2":
        pytest.importorskip("deepspeed")
    case = ["--cases", "GRPO, bfloat16, reference", "--bucket-elements=300000"]
    assert_close_to_measured(measure(model, tmp_path, "--strategies", strategy, *case))


def test_the_process_grows_by_as_much(model, tmp_path, monkeypatch):
    """18 million parameters beside one million: what both need, such as Python's modules, is not counted."""
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "num_attention_heads": 8}
    larger = shaped(tmp_path, **sizes, num_key_value_heads=4, head_dim=64)
    options = ["--strategies", "one process", "--cases", "SFT"]
    for name, value in GIVES_BACK.items():
        monkeypatch.setenv(name, value)
    (small,), (large,) = (measure(each, tmp_path, *options) for each in (model, larger))
    grown, expected = (large[name] - small[name] for name in ("resident", "estimated_peak"))
    assert grown == pytest.approx(expected, rel=OF_RESIDENT)
