"""Which reward a run gets; what a learned one says is tested in tests/rewards/test_learned.py."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from llmrl.build import load_scorer, score_rows
from llmrl.build.rewards import Rewards
from llmrl.data.prompts import PromptDataConfig
from llmrl.data.supervised import SupervisedDataConfig
from llmrl.rewards.combine import CombinedReward
from llmrl.rewards.config import LearnedRewardConfig, RewardConfig, RewardFunctionConfig
from llmrl.rewards.functions import FunctionReward
from llmrl.rewards.learned import LearnedReward
from tests.data.conftest import make_tokenizer, spell
from tests.models.tiny import SIZES

ROWS = [{"prompt": "ab", "response": "cd"}, {"prompt": "e", "response": "f"}]
FUNCTIONS = (RewardFunctionConfig(name="r.py:length"),)


def length(responses):
    return [float(len(text)) for text in responses]


@pytest.fixture
def folder(tmp_path):
    """A reward model of random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(**(SIZES | {"num_labels": 1, "pad_token_id": 39}), llmrl_score_mean=0.5, llmrl_score_std=2.0)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    return LearnedRewardConfig(path=str(tmp_path))


def reward_on(config, functions=()):
    return Rewards(config, functions, make_tokenizer()).on(PromptDataConfig(path="d.jsonl"), ROWS)


def test_one_kind_of_reward_stands_by_itself_and_two_are_combined(folder):
    assert isinstance(reward_on(RewardConfig(functions=FUNCTIONS), [length]), FunctionReward)
    assert isinstance(reward_on(RewardConfig(model=folder)), LearnedReward)
    assert isinstance(reward_on(RewardConfig(functions=FUNCTIONS, model=folder), [length]), CombinedReward)


def test_a_reward_model_is_loaded_once_for_all_data(folder):
    rewards = Rewards(RewardConfig(model=folder), (), make_tokenizer())
    first, second = (rewards.on(PromptDataConfig(path="d.jsonl"), rows) for rows in (ROWS, ROWS[:1]))
    assert first.scorer is second.scorer


def test_rows_are_scored_by_their_text_and_the_eos(folder):
    model = load_scorer(folder).scorer.module.model
    expected = [
        (model(input_ids=torch.tensor([[*spell(row["prompt"] + row["response"]), 1]])).logits.item() - 0.5) / 2.0
        for row in ROWS
    ]
    scores = score_rows(folder, ROWS, SupervisedDataConfig(path="d.jsonl"))
    assert scores == pytest.approx(expected, abs=1e-5)
