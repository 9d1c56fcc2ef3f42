import json
import shutil

import pytest
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import GPT2Config, PreTrainedTokenizerFast

from llmrl.build import build_reward_model, check_reward_run, load_trained_reward_model
from llmrl.build import reward_model as under_test
from llmrl.config import RewardModelRun
from llmrl.data.preferences import PreferenceDataConfig
from llmrl.data.rows import DataError
from llmrl.models.loading import ModelConfig, ModelError
from llmrl.trainers.reward_model import RewardModelConfig
from llmrl.trainers.run import OutputConfig

from .conftest import TINY, roles_of


def build(folder, model=TINY, extra="", **data_settings):
    """``(run, messages)`` of a run on two pairs, and another one that says the same twice."""
    (folder / "pairs.csv").write_text(f"prompt,chosen,rejected\n1+1=,2,3\n2+2=,4,55555\n3+3=,6,6\n{extra}")
    data = PreferenceDataConfig(path=str(folder / "pairs.csv"), **data_settings)
    config = RewardModelRun(
        model=model, data=data, evaluation_data=data, run=OutputConfig(output_dir=str(folder / "run"))
    )
    roles = roles_of(config)
    run = build_reward_model(config, check_reward_run(config, dry=False), **roles)
    return run, roles["progress"].messages


def card_of(run, folder):
    run.save_model(folder / "final")
    return json.loads((folder / "final" / "report_card.json").read_text())


@pytest.fixture
def run(tmp_path):
    return build(tmp_path)[0]


@pytest.fixture
def gpt2(tmp_path):
    """A model with 8 positions whose tokenizer pads with EOS and has no token to spare."""
    folder = str(tmp_path / "gpt2")
    GPT2Config(
        vocab_size=99, n_positions=8, n_embd=8, n_layer=1, n_head=1, architectures=["GPT2LMHeadModel"]
    ).save_pretrained(folder)
    vocabulary = {token: n for n, token in enumerate(["<eos>", "?", *"0123456789+="])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), behavior="isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    return ModelConfig(path=folder, from_scratch=True)


def test_the_counts_of_both_data_are_in_the_card(run, tmp_path):
    counts = card_of(run, tmp_path)["counts"]
    assert counts.keys() == {"data", "evaluation_data"}
    for section in counts.values():
        assert (section["rows"], section["kept"], section["identical"]) == (3, 2, 1)


def test_a_pad_that_is_eos_is_told_before_training_and_in_the_card(gpt2, run, tmp_path):
    told = "pad equals EOS and the vocabulary has no known spare token"
    other, messages = build(tmp_path, gpt2, max_tokens=8)
    assert [message for message in messages if message.startswith(told)]
    (note,) = card_of(other, tmp_path)["notes"]
    assert note.startswith(told)
    assert card_of(run, tmp_path)["notes"] == []


def test_pairs_longer_than_the_model_has_positions_are_refused(gpt2, tmp_path):
    with pytest.raises(DataError, match=r"10 tokens exceeds the 8 positions .* data\.max_tokens \(1024\) to at most 8"):
        build(tmp_path, gpt2)


def test_responses_that_truncation_cut_are_a_note_and_no_failure(tmp_path):
    """Here of the rejected side alone."""
    card = card_of(build(tmp_path, max_tokens=6, truncate=True)[0], tmp_path)
    assert card["checks"] == {"padding inert": True, "template free of today's date": True}
    assert [note for note in card["notes"] if "evaluation_data.truncate cut some responses" in note]
    card = card_of(build(tmp_path, truncate=True)[0], tmp_path)
    assert card["checks"]["end token scored"]
    assert card["notes"] == []


def test_how_texts_were_read_is_saved_with_the_model(tmp_path):
    card_of(build(tmp_path, template="none")[0], tmp_path)
    settings = json.loads((tmp_path / "final" / "config.json").read_text())
    assert (settings["llmrl_template"], settings["llmrl_system_prompt"]) == ("none", None)


def test_a_model_is_saved_with_its_card_or_not_at_all(run, tmp_path, monkeypatch):
    run.save_model(tmp_path / "final")
    assert json.loads((tmp_path / "final" / "report_card.json").read_text())["num_pairs"] == 2

    def crash(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(under_test, "make_report_card", crash)
    with pytest.raises(OSError, match="no space"):
        run.save_model(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_tokenizer_with_more_ids_than_the_model_has_embeddings_is_refused(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(TINY.path, folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "vocab_size": 50}))
    config = ModelConfig(path=str(folder), from_scratch=True)
    with pytest.raises(ModelError, match=r"has 49 tokens, such as 'J' \(id 50\), beyond the 50 embeddings"):
        load_trained_reward_model(config, RewardModelConfig(), seed=0)


def test_a_pair_with_a_token_that_has_no_embedding_is_refused(one_token_more, tmp_path):
    build(tmp_path, one_token_more)
    with pytest.raises(ModelError, match=r"pairs\.csv has tokens beyond the \d+ embeddings of the model: '§'"):
        build(tmp_path, one_token_more, "4+4=,8,§\n")
