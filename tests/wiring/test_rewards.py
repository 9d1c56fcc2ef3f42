"""Which reward a run gets; what a learned one says is tested in tests/rewards/test_learned.py."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2ForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from llmrl.data.config import PromptDataConfig, SupervisedDataConfig
from llmrl.data.files import DataError
from llmrl.data.preferences import split_open_transcript
from llmrl.distributed.collectives import OneProcess
from llmrl.models.config import ModelConfig
from llmrl.models.folders import ModelError
from llmrl.rewards.combine import CombinedReward
from llmrl.rewards.config import LearnedRewardConfig, RewardConfig, RewardFunctionConfig
from llmrl.rewards.functions import FunctionReward
from llmrl.rewards.learned import LearnedReward
from llmrl.wiring import rewards as under_test
from tests.contexts import CPU, context_of, on_cpu
from tests.data.conftest import CHAT_TEMPLATE, THINKING_TEMPLATE, make_tokenizer, spell
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
    return ModelConfig(path=str(tmp_path), dtype="float32")


DATA = PromptDataConfig(path="d.jsonl")


def load_scorer(config, *, normalize=True):
    return under_test.load_scorer(config, normalize=normalize, place=on_cpu)


def score_rows(config, rows):
    return under_test.score_rows(config, rows, SupervisedDataConfig(path="d.jsonl"), CPU, normalize=True)


def learned(folder, **settings):
    return LearnedRewardConfig(path=folder.path, **settings)


def reward_on(config, functions=()):
    scorer = None if config.model is None else load_scorer(ModelConfig(path=config.model.path))
    return under_test.reward_on(DATA, ROWS, config, functions, scorer, make_tokenizer(), context_of())


def test_one_kind_of_reward_stands_by_itself_and_two_are_combined(folder):
    assert isinstance(reward_on(RewardConfig(functions=FUNCTIONS), [length]).reward, FunctionReward)
    assert isinstance(reward_on(RewardConfig(model=learned(folder))), LearnedReward)
    assert isinstance(reward_on(RewardConfig(functions=FUNCTIONS, model=learned(folder)), [length]), CombinedReward)


@pytest.mark.parametrize(("rank", "line"), [(0, ""), (1, "rank 1: told\n")])
def test_what_a_function_of_another_rank_has_to_say_is_printed_with_its_number(rank, line, capsys):
    collectives = OneProcess()
    collectives.rank = rank
    reward: Any = under_test.reward_on(
        DATA, ROWS, RewardConfig(functions=FUNCTIONS), [length], None, make_tokenizer(), context_of(collectives)
    )
    reward.reward.progress.message("told")
    assert capsys.readouterr().err == line


def test_a_reward_model_is_loaded_once_for_all_data(folder):
    scorer, config = load_scorer(folder), RewardConfig(model=learned(folder))
    first, second = (
        under_test.reward_on(DATA, rows, config, (), scorer, make_tokenizer(), context_of())
        for rows in (ROWS, ROWS[:1])
    )
    assert first.scorer.scorer is second.scorer.scorer


def test_rows_are_scored_by_their_text_and_the_eos(folder):
    model = load_scorer(folder).scorer.module.model
    expected = [
        (model(input_ids=torch.tensor([[*spell(row["prompt"] + row["response"]), 1]])).logits.item() - 0.5) / 2.0
        for row in ROWS
    ]
    scores = score_rows(folder, ROWS)
    assert scores == pytest.approx(expected, abs=1e-5)


def test_a_scorer_is_what_the_recipe_asks_for(folder):
    scorer = load_scorer(replace(folder, dtype="bfloat16"))
    reward = reward_on(RewardConfig(model=learned(folder, weight=3.0, microbatch_tokens=77)))
    assert (reward.weight, reward.scorer.microbatcher.budget.max_tokens) == (3.0, 77)
    assert scorer.scorer.module.dtype == torch.bfloat16
    x = torch.tensor([0.5, 4.5])
    assert scorer.normalize(x).tolist() == [0.0, 2.0]
    assert load_scorer(folder, normalize=False).normalize(x).tolist() == [0.5, 4.5]


def test_the_head_of_a_scorer_stays_in_float32(folder):
    model = load_scorer(replace(folder, dtype="bfloat16")).scorer.module.model
    assert model.score.weight.dtype == torch.float32
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


def change(folder, **settings):
    """Other settings in the model's config.json."""
    file = Path(folder.path) / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def raw_score(folder, text):
    model = load_scorer(folder).scorer.module.model
    return model(input_ids=torch.tensor([[*spell(text), 1]])).logits.item()


@pytest.mark.parametrize(
    ("form", "row", "read"),
    [
        ({}, {"prompt": "a"}, "user:a|assistant:x"),
        ({"llmrl_system_prompt": "s"}, {"prompt": "a"}, "system:s|user:a|assistant:x"),
        ({"llmrl_template": "none"}, {"prompt": "a"}, "ax"),
        ({"llmrl_chat_template_kwargs": {"enable_thinking": False}}, {"prompt": "a"}, "user:a|assistant:nothought|x"),
        ({"llmrl_chat_template_kwargs": [7]}, {"prompt": "a"}, "user:a|assistant:x"),  # of another program
    ],
)
def test_rows_are_read_as_in_training(folder, form, row, read):
    """Whatever else the data says."""
    make_tokenizer(chat_template=THINKING_TEMPLATE.replace("{{ bos_token }}", "")).save_pretrained(folder.path)
    change(folder, **form)
    scores = score_rows(folder, [{**row, "response": "x"}])
    assert scores == pytest.approx([(raw_score(folder, read) - 0.5) / 2.0], abs=1e-5)


def test_an_open_transcript_is_read_as_the_pairs_of_training_are(folder):
    make_tokenizer(chat_template=CHAT_TEMPLATE.replace("{{ bos_token }}", "")).save_pretrained(folder.path)
    rows = [
        {"prompt": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: ", "response": " x"},
        {"prompt": [{"role": "user", "content": "a"}], "response": "x"},
    ]
    scores = score_rows(folder, rows)
    read = "user:a|assistant:b|user:c|assistant:x", "user:a|assistant:x"
    assert scores == pytest.approx([(raw_score(folder, text) - 0.5) / 2.0 for text in read], abs=1e-5)


def test_an_open_transcript_stays_a_text_without_a_template():
    prompt = "\n\nHuman: a\n\nAssistant:"
    assert split_open_transcript(prompt + " ", "x", as_messages=False) == (prompt, " x")
    assert split_open_transcript("a ", " x", as_messages=True) == ("a ", " x")


def test_a_row_longer_than_the_model_has_positions_is_named(tmp_path):
    config = GPT2Config(vocab_size=40, n_positions=8, n_embd=8, n_layer=1, n_head=1, num_labels=1, pad_token_id=39)
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    rows = [{"prompt": "ab", "response": "c" * n} for n in (5, 6)]
    model = ModelConfig(path=str(tmp_path))
    assert len(score_rows(model, rows[:1])) == 1
    with pytest.raises(DataError, match=r"row 2: it has 9 tokens, and the model has 8 positions"):
        score_rows(model, rows)


def test_a_tokenizer_with_ids_that_have_no_embedding_is_refused(folder):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<{n}>" for n in range(20)])
    tokenizer.save_pretrained(folder.path)
    told = r"^reward\.model\.path .* its tokenizer has 11 tokens, such as '<9>' \(id 40\), beyond the 40 embeddings"
    with pytest.raises(ModelError, match=told):
        load_scorer(folder)


def test_one_long_row_that_changes_the_scores_of_all_is_told(folder, capsys):
    """Dynamic NTK switches its frequencies beyond the positions of the model."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    change(folder, max_position_embeddings=8, rope_parameters=rope)
    rows = [{"prompt": "ab", "response": "c" * n} for n in (3, 9)]
    short = score_rows(folder, rows[:1])
    assert "rope" not in capsys.readouterr().err
    assert score_rows(folder, rows)[0] != short[0]
    assert "sequences here may have 12: every row, short ones too" in capsys.readouterr().err
