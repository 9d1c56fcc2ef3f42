"""Rewards of a model: the same scores as plain transformers gives each response alone, frozen and normalized."""

import math

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from llmrl.batches import Rollout
from llmrl.data.chat import as_sequences
from llmrl.data.config import PromptDataConfig
from llmrl.models.config import ModelConfig
from llmrl.reports.progress import Silent
from llmrl.rewards.combine import CombinedReward
from llmrl.rewards.config import LearnedRewardConfig, RewardConfig, RewardFunctionConfig
from llmrl.rewards.functions import FunctionReward
from llmrl.rewards.learned import LearnedReward
from llmrl.wiring.rewards import load_scorer, reward_on
from tests.contexts import context_of, on_cpu
from tests.data.conftest import CHAT_TEMPLATE, EOS, make_tokenizer, spell
from tests.data.test_rerender import OTHER_EOS, make_other, make_rollout, spell_other
from tests.models.tiny import SIZES

DATA = PromptDataConfig(path="d.jsonl")
NORMALIZED = {"llmrl_score_mean": 0.75, "llmrl_score_std": 0.5}
PROMPTS = ["ab", "c", "defgh"]
RESPONSES = [([*spell("ij"), EOS], True), (spell("klmnop"), False), ([EOS], True)]


def save(folder, tokenizer, **config):
    """A reward model of random weights whose pad stands in no text."""
    torch.manual_seed(0)
    settings = SIZES | {"num_labels": 1, "pad_token_id": 39, "eos_token_id": tokenizer.eos_token_id} | config
    LlamaForSequenceClassification(LlamaConfig(**settings)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def learned(path, **settings):
    return LearnedRewardConfig(path=path, **settings)


def reward_of(config, rollout, *, policy=None, data=DATA, **loading):
    """As a run wires it, from the folder on."""
    return learned_reward(config, policy or make_tokenizer(), data, rollout.rows, **loading)


def learned_reward(config, tokenizer, data, rows, *, dtype=None):
    model = ModelConfig(path=config.path, dtype=dtype)
    scorer = load_scorer(model, normalize=config.normalize, place=on_cpu)
    return reward_on(data, rows, RewardConfig(model=config), (), scorer, tokenizer, context_of())


def rollout_of(responses=RESPONSES):
    return make_rollout(*((prompt, ids, ended) for prompt, (ids, ended) in zip(PROMPTS, responses, strict=True)))


def with_prompts(rollout, prompts):
    """The same with the prompt ids that a policy of these prompts has."""
    sequences = rollout.sequences
    responses = [row[:n] for row, n in zip(sequences.response_ids.tolist(), sequences.response_lengths, strict=True)]
    return Rollout(**{**vars(rollout), "sequences": as_sequences(prompts, responses)})


def plain_scores(path, texts):
    """Raw scores by transformers alone: each row by itself, without padding."""
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([ids])).logits[0] for ids in texts])


def own_texts():
    """Prompt and response of each row in the ids of the policy."""
    return [spell(prompt) + ids for prompt, (ids, _) in zip(PROMPTS, RESPONSES, strict=True)]


@pytest.fixture
def rollout():
    """Prompts of several lengths; one response ended, one was cut, one is empty."""
    return with_prompts(rollout_of(), [spell(prompt) for prompt in PROMPTS])


@pytest.fixture
def folder(tmp_path):
    """A reward model with the policy's tokenizer."""
    return save(tmp_path / "same", make_tokenizer(), **NORMALIZED)


@pytest.fixture
def other(tmp_path):
    """A reward model with a tokenizer and a chat template of its own."""
    return save(tmp_path / "other", make_other(), **NORMALIZED)


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("microbatch_tokens", [1, 12, 16384])
def test_scores_are_those_of_plain_transformers_normalized(folder, rollout, microbatch_tokens):
    scores = reward_of(learned(folder, microbatch_tokens=microbatch_tokens), rollout)(rollout)
    expected = (plain_scores(folder, own_texts()) - 0.75) / 0.5
    assert expected.std() > 0.1  # a random model tells them apart
    assert_close(scores.total, expected, rtol=1e-5, atol=1e-5)


def test_normalization_can_be_off_or_missing(folder, rollout, tmp_path):
    raw = plain_scores(folder, own_texts())
    assert_close(reward_of(learned(folder, normalize=False), rollout)(rollout).total, raw, rtol=1e-5, atol=1e-5)
    without = save(tmp_path / "without", make_tokenizer())
    assert_close(reward_of(learned(without), rollout)(rollout).total, raw, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_close(folder, rollout):
    exact, rounded = (
        reward_of(learned(folder), rollout, dtype=dtype)(rollout).total for dtype in ("float32", "bfloat16")
    )
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.2


def test_the_weight_is_in_the_total_only(folder, rollout):
    plain, weighted = (reward_of(learned(folder, weight=weight), rollout)(rollout) for weight in (1.0, -2.5))
    assert_close(weighted.total, -2.5 * plain.total)
    assert list(weighted.parts) == ["model"]
    assert_close(weighted.parts["model"], plain.total)
    assert_close(weighted.per_token, torch.zeros(rollout.rollout_logprobs.shape))


def test_the_order_of_responses_makes_no_difference(folder, rollout):
    reward = reward_of(learned(folder), rollout)
    turned = torch.tensor([2, 0, 1])
    assert_close(reward(rollout.select(turned)).total, reward(rollout).total[turned])


# --- whose tokens -----------------------------------------------------------------------------------------------------


def test_the_same_tokens_are_scored_as_they_are(folder, rollout):
    """Ids that no text spells: special tokens within, and an EOS where nothing ended."""
    odd = [([2, *spell("i"), EOS, *spell("j"), EOS], True), ([*spell("k"), EOS], False), ([2], False)]
    prompts = [[0, *spell("ab")], spell("c"), spell("defgh")]
    rollout = with_prompts(rollout_of(odd), prompts)
    reward = reward_of(learned(folder, normalize=False), rollout)
    expected = plain_scores(folder, [prompt + ids for prompt, (ids, _) in zip(prompts, odd, strict=True)])
    assert_close(reward(rollout).total, expected, rtol=1e-5, atol=1e-5)


def test_a_response_that_another_id_ended_is_scored_at_the_eos_that_the_reward_model_knows(folder, rollout):
    other_end = 2
    ends = [([*ids[:-1], other_end], True) if ended else (ids, False) for ids, ended in RESPONSES]
    ended_otherwise = with_prompts(rollout_of(ends), [spell(prompt) for prompt in PROMPTS])
    reward = reward_of(learned(folder), rollout)
    assert torch.equal(reward(ended_otherwise).total, reward(rollout).total)


def test_other_tokens_are_reached_through_text(other, rollout):
    scores = reward_of(learned(other), rollout, policy=make_tokenizer(chat_template=CHAT_TEMPLATE))(rollout)
    texts = [
        [*spell_other("u|ab|a|ij"), OTHER_EOS],
        spell_other("u|c|a|klmnop"),
        [*spell_other("u|defgh|a|"), OTHER_EOS],
    ]
    assert_close(scores.total, (plain_scores(other, texts) - 0.75) / 0.5, rtol=1e-5, atol=1e-5)
    assert scores.per_token.shape == rollout.rollout_logprobs.shape


def test_the_same_alphabet_with_another_template_goes_through_text(tmp_path, rollout):
    folder = save(tmp_path / "chat", make_tokenizer("<bos> $A", CHAT_TEMPLATE))
    scores = reward_of(learned(folder), rollout)(rollout)
    texts = [
        [0, *spell("user:ab|assistant:ij"), EOS],
        [0, *spell("user:c|assistant:klmnop")],
        [0, *spell("user:defgh|assistant:"), EOS],
    ]
    assert_close(scores.total, plain_scores(folder, texts), rtol=1e-5, atol=1e-5)


def test_what_the_reward_model_cannot_read_is_told_before_any_response(tmp_path, rollout):
    folder = save(tmp_path / "plain", make_other(None))
    chat = [{"role": "user", "content": "a"}]
    with pytest.raises(ValueError, match=r"^the reward model cannot read these prompts: .* no chat template"):
        learned_reward(learned(folder), make_tokenizer(), DATA, [{"prompt": chat}])


# --- frozen -----------------------------------------------------------------------------------------------------------


def test_it_is_frozen(folder, rollout):
    reward = reward_of(learned(folder), rollout)
    module = reward.scorer.scorer.module
    before = {name: weight.clone() for name, weight in module.state_dict().items()}
    with torch.enable_grad():
        scores = reward(rollout)
    assert not scores.total.requires_grad
    assert not any(weight.requires_grad for weight in module.parameters())
    assert not any(part.training for part in module.model.modules())
    assert_close(dict(module.state_dict()), before, rtol=0, atol=0)


def test_dropout_is_off(tmp_path, rollout):
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": 40}
    config = GPT2Config(**sizes, pad_token_id=39, num_labels=1, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    scores = reward_of(learned(str(tmp_path)), rollout)(rollout).total
    assert_close(scores, plain_scores(str(tmp_path), own_texts()), rtol=1e-5, atol=1e-5)


# --- what is no score -------------------------------------------------------------------------------------------------


class Says:
    """A scorer with an answer."""

    def __init__(self, *scores):
        self.answer = torch.tensor(scores)

    def scores(self, sequences):
        return self.answer

    def pair_scores(self, pairs):
        raise AssertionError("a reward has no pairs")


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_finite_number_is_an_error_that_names_the_response(rollout, score):
    reward = LearnedReward(Says(0.0, 1.0, score), encode=lambda r: r.sequences, normalize=lambda x: x, weight=1.0)
    with pytest.raises(FloatingPointError, match=r"score of response 2 .* is not finite: .*set model\.dtype"):
        reward(rollout)


def test_a_damaged_folder_is_such_an_error_too(tmp_path, rollout):
    folder = save(tmp_path, make_tokenizer())
    model = LlamaForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight[spell("k")[0]] = math.inf
    model.save_pretrained(folder)
    reward = reward_of(learned(folder), rollout)
    with pytest.raises(FloatingPointError, match="score of response 1 "):
        reward(rollout)


# --- with functions ---------------------------------------------------------------------------------------------------


def test_functions_and_a_model_add_up_and_none_leaves_the_model_alone(folder, rollout):
    def rule(responses):
        assert responses == ["ij", "klmnop", ""]
        return [1.0, None, 2.0]

    settings = RewardConfig(functions=(RewardFunctionConfig(name="r.py:rule", weight=3.0),), model=learned(folder))
    functions = FunctionReward(
        settings,
        functions=[rule],
        tokenizer=make_tokenizer(),
        prompt_column="prompt",
        columns=["prompt"],
        progress=Silent(),
    )
    model = reward_of(learned(folder, weight=0.5), rollout)
    scores = CombinedReward([functions, model])(rollout)
    part = (plain_scores(folder, own_texts()) - 0.75) / 0.5
    expected = torch.tensor([3.0, 0.0, 6.0]) + 0.5 * part
    assert_close(scores.total, expected, rtol=1e-5, atol=1e-5)
    assert tuple(scores.parts) == settings.labels == ("rule", "model")
    assert_close(scores.parts["model"], part, rtol=1e-5, atol=1e-5)
