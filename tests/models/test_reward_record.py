"""What a reward model's config.json keeps."""

import json
import math

import pytest
import torch
from torch.testing import assert_close

from llmrl.models.config import ModelConfig
from llmrl.models.reward_loading import load_reward_model
from llmrl.models.reward_record import Normalization, normalization_on, saved_normalization
from tests.models.rewards import reward_model, scorer_of, sequences

from .tiny import save_folder


def test_normalized_scores_have_mean_0_and_standard_deviation_1():
    scores = torch.tensor([1.0, 2.0, 4.0, 9.0])
    assert normalization_on(scores) == Normalization(mean=4.0, std=9.5**0.5)
    normalized = normalization_on(scores)(scores)
    assert_close(normalized.mean(), torch.tensor(0.0))
    assert_close(normalized.square().mean(), torch.tensor(1.0))
    assert_close(normalization_on(scores)(torch.tensor([4.0 + 9.5**0.5])), torch.tensor([1.0]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_no_measure(bad):
    with pytest.raises(FloatingPointError, match="1 of 3 scores of the trained reward model are not finite"):
        normalization_on(torch.tensor([1.0, bad, 2.0]))


def test_scores_that_are_all_equal_keep_their_spread():
    constant = torch.full((7,), 0.1)
    assert normalization_on(constant).std == 1.0
    assert normalization_on(constant)(constant).tolist() == [0.0] * 7


def test_scores_far_from_0_keep_their_spread():
    """Sums in float32 would lose it."""
    scores = 10_000 + torch.tensor([0.0, 0.25]).repeat(500)
    assert normalization_on(scores) == Normalization(mean=10_000.125, std=0.125)


def test_normalization_is_stored_with_the_model_and_not_applied_by_it(tmp_path):
    model = reward_model("llama")
    assert saved_normalization(model.config) is None
    before = scorer_of(model).scores(sequences())
    written = Normalization(mean=-1 / 3, std=0.7)
    written.write(model.config)
    path = save_folder(tmp_path, model)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["llmrl_score_mean"], config["llmrl_score_std"]) == (-1 / 3, 0.7)
    loaded = load_reward_model(ModelConfig(path=path), head_init=None)
    assert saved_normalization(loaded.config) == written
    assert torch.equal(scorer_of(loaded).scores(sequences()), before)
