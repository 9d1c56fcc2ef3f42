"""Loaded models with what belongs to them."""

from types import SimpleNamespace

import torch
from torch.testing import assert_close
from transformers import LlamaConfig

from llmrl.models.loaded import LoadedRewardModel
from llmrl.models.reward_record import saved_normalization


class TwoScores:
    """Chosen 1 and 3, rejected 0 and 4: mean 2, and with 4 scores the population variance (1 + 1 + 4 + 4) / 4."""

    def pair_scores(self, pairs):
        assert not torch.is_grad_enabled()
        return torch.tensor([1.0, 3.0]), torch.tensor([0.0, 4.0])


def test_a_reward_model_stores_the_mean_and_the_spread_of_both_sides():
    config = LlamaConfig()
    model = SimpleNamespace(config=config)
    parts = {name: None for name in ("adapted", "tokenizer", "module", "scorer", "has_own_pad", "warnings")}
    normalization = LoadedRewardModel.normalize(SimpleNamespace(model=model, **parts), None, TwoScores())
    assert_close(normalization(torch.tensor([2.0, 2.0 + 2.5**0.5])), torch.tensor([0.0, 1.0]))
    assert saved_normalization(config) == normalization
