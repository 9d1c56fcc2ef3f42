"""Models made ready to train: no dropout, no noise."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from llmrl.models.config import ModelConfig
from llmrl.models.loading import load_model
from llmrl.models.training import turn_dropout_off
from tests.models.tiny import logits

from .tiny import gpt2, llama, save_folder


@pytest.mark.parametrize("make", [gpt2, lambda: llama(attention_dropout=0.5)], ids=["gpt2", "llama"])
def test_dropout_is_off_in_train_mode(make, tmp_path):
    torch.manual_seed(0)
    model = make().train()
    assert not torch.equal(logits(model), logits(model))  # it was on
    turn_dropout_off(model)
    assert torch.equal(logits(model), logits(model))
    loaded = load_model(ModelConfig(path=save_folder(tmp_path, make()))).train()
    assert torch.equal(logits(loaded), logits(loaded))


def test_dropout_stays_in_the_config(tmp_path):
    """The folder that a run leaves is a model with the dropout that its maker gave it."""
    model = load_model(ModelConfig(path=save_folder(tmp_path / "before", gpt2())))
    model.save_pretrained(tmp_path / "after")
    assert AutoConfig.from_pretrained(tmp_path / "after").resid_pdrop == 0.1


def test_no_module_loses_what_is_not_dropout():
    module = nn.Module()
    module.drop_path, module.dropout_layers, module.scale = 0.3, 2, 0.5
    turn_dropout_off(module)
    assert (module.drop_path, module.dropout_layers, module.scale) == (0.0, 2, 0.5)
