"""Fixtures of the model tests: see `tiny` for the models."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from .tiny import FAMILIES, llama, move, save_folder


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def folder(tmp_path) -> str:
    """That of a model, ``model`` in the test's own."""
    torch.manual_seed(0)
    return save_folder(tmp_path / "model", llama())


@pytest.fixture
def adapter(folder, tmp_path):
    """The folder of an adapter that does something, with dropout in its config."""
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=0.5, task_type="CAUSAL_LM")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), lora)
    move(adapted)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    return str(tmp_path / "adapter")
