"""Loaded models with what belongs to them."""

import torch
from torch.testing import assert_close

from llmrl.batches import PreferencePairs
from llmrl.models.loaded import LoadedRewardModel
from llmrl.models.reward_record import saved_normalization

from .rewards import pairs, reward_model, scorer_of
from .tiny import make_tokenizer


class TwoScores:
    """Chosen 1 and 3, rejected 0 and 4: mean 2, and as the variance of all four (1 + 1 + 4 + 4) / 4."""

    def scores(self, sequences): ...

    def pair_scores(self, pairs: PreferencePairs):
        assert not torch.is_grad_enabled()
        return torch.tensor([1.0, 3.0]), torch.tensor([0.0, 4.0])


def test_a_reward_model_stores_the_mean_and_the_spread_of_both_sides():
    scorer = scorer_of(reward_model("gpt2"))
    loaded = LoadedRewardModel(
        model=scorer.module.model,
        adapted=None,
        tokenizer=make_tokenizer(),
        module=scorer.module,
        scorer=scorer,
        has_own_pad=True,
        warnings=(),
    )
    normalization = loaded.normalize(pairs(), TwoScores())
    assert_close(normalization(torch.tensor([2.0, 2.0 + 2.5**0.5])), torch.tensor([0.0, 1.0]))
    assert saved_normalization(loaded.model.config) == normalization
