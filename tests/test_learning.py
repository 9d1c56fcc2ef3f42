"""llmrl and TRL learn the same from the same rollouts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[1]
TINY = ROOT / "recipes" / "models" / "tiny_word_llama"
TRL = ROOT / ".peers" / "trl-1.16.0"


@pytest.mark.slow
@pytest.mark.skipif(not TRL.is_dir(), reason="TRL 1.16.0 is not in .peers: make .peers/trl-1.16.0")
def test_first_losses_and_gradients_are_those_of_trl(tmp_path: Path):
    torch.manual_seed(0)
    model = tmp_path / "model"
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(TINY)).save_pretrained(model)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(model)
    program, output = ROOT / "benchmarks" / "learning.py", tmp_path / "learning.json"
    command = [sys.executable, program, model, "--dtype", "float32", "--output", output]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(output.read_text())
    assert record["steps"]["llmrl"]["first_loss"] != 0
    assert record["loss_difference"] < 1e-5
    assert record["grad_norm_difference"] < 1e-4
