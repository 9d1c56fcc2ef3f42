import json
import shutil
from dataclasses import replace

import pytest
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import AutoTokenizer, GPT2Config, PreTrainedTokenizerFast

from llmrl.config import RewardModelRun
from llmrl.data.config import PreferenceDataConfig
from llmrl.data.files import DataError
from llmrl.models.config import ModelConfig
from llmrl.models.folders import ModelError
from llmrl.trainers.config import OutputConfig, RewardModelConfig
from llmrl.wiring import reward_model as under_test
from llmrl.wiring.checks import check_reward_run
from llmrl.wiring.reward_model import build_reward_model, load_trained_reward_model
from tests.contexts import CPU

from .conftest import TINY, messages_of, roles_of


def build(folder, model=TINY, extra="", **data_settings):
    """``(run, messages)`` of a run on two pairs, and another one that says the same twice."""
    (folder / "pairs.csv").write_text(f"prompt,chosen,rejected\n1+1=,2,3\n2+2=,4,55555\n3+3=,6,6\n{extra}")
    data = PreferenceDataConfig(path=str(folder / "pairs.csv"), **data_settings)
    config = RewardModelRun(
        model=model, data=data, evaluation_data=data, run=OutputConfig(output_dir=str(folder / "run"))
    )
    roles = roles_of(config)
    run = build_reward_model(config, check_reward_run(config, dry=False), **roles)
    return run, messages_of(roles)


def test_the_order_of_the_pairs_comes_from_the_seed(tmp_path):
    (tmp_path / "pairs.csv").write_text(
        "prompt,chosen,rejected\n" + "".join(f"{n}+1=,{n + 1},{n}\n" for n in range(12))
    )
    data = PreferenceDataConfig(path=str(tmp_path / "pairs.csv"))

    def order(seed):
        output = OutputConfig(output_dir=str(tmp_path / "run"), seed=seed)
        config = RewardModelRun(model=TINY, data=data, evaluation_data=data, run=output)
        run = build_reward_model(config, check_reward_run(config, dry=False), **roles_of(config))
        return run.trainer.source.next(12).chosen.prompt_ids.tolist()

    assert order(3) == order(3)
    assert order(3) != order(4)


def test_the_loop_is_what_the_recipe_asks_for(tmp_path):
    """Each of the settings is another one than its default; the held-out pairs have columns of their own."""
    (tmp_path / "pairs.csv").write_text("prompt,chosen,rejected\n" + "".join(f"{n}+1=,{n + 1},{n}\n" for n in range(6)))
    (tmp_path / "held_out.csv").write_text("question,good,bad\n12+3=,15,51\n")
    settings = RewardModelConfig(num_epochs=3, batch_size=2, microbatch_tokens=77, evaluate_every=4, center_coef=0.01)
    config = RewardModelRun(
        model=replace(TINY, dtype="bfloat16"),
        data=PreferenceDataConfig(path=str(tmp_path / "pairs.csv")),
        evaluation_data=PreferenceDataConfig(
            path=str(tmp_path / "held_out.csv"), prompt_column="question", chosen_column="good", rejected_column="bad"
        ),
        reward_model=settings,
        run=OutputConfig(output_dir=str(tmp_path / "run")),
    )
    run = build_reward_model(config, check_reward_run(config, dry=False), **roles_of(config))
    trainer = run.trainer
    assert (run.config.num_iterations, run.evaluate_every, trainer.objective.config) == (9, 4, settings)
    assert (trainer.batch_size, trainer.microbatcher.budget.max_tokens) == (2, 77)
    scorer = trainer.objective.scorer
    assert (scorer.microbatcher.budget.max_tokens, scorer.scorer.module.dtype) == (77, torch.bfloat16)
    tokenizer, (prompt,) = AutoTokenizer.from_pretrained(TINY.path), trainer.held_out.chosen.prompt_ids
    assert tokenizer.decode(prompt) == "12+3="


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
    assert [note for note in card["notes"] if "evaluation_data.truncate truncated some responses" in note]
    card = card_of(build(tmp_path, truncate=True)[0], tmp_path)
    assert card["checks"]["end token scored"]
    assert card["notes"] == []


@pytest.mark.parametrize("template", ["none", "auto"])
def test_how_texts_were_read_is_saved_with_the_model(tmp_path, template):
    card_of(build(tmp_path, template=template)[0], tmp_path)
    settings = json.loads((tmp_path / "final" / "config.json").read_text())
    assert (settings["llmrl_template"], settings["llmrl_system_prompt"]) == (template, None)
    assert settings["llmrl_chat_template_kwargs"] == {}


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
        load_trained_reward_model(config, RewardModelConfig(), CPU, seed=0)


def test_a_pair_with_a_token_that_has_no_embedding_is_refused(one_token_more, tmp_path):
    build(tmp_path, one_token_more)
    with pytest.raises(ModelError, match=r"pairs\.csv has tokens beyond the \d+ embeddings of the model: '§'"):
        build(tmp_path, one_token_more, "4+4=,8,§\n")
