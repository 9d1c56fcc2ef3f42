import dataclasses
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from llmrl.config import SFTRun
from llmrl.data.config import SupervisedDataConfig
from llmrl.models.folders import ModelError
from llmrl.trainers.config import RunConfig, SFTConfig
from llmrl.wiring.checks import check_sft
from llmrl.wiring.sft import build_sft

from .conftest import TINY, messages_of, roles_of


@pytest.fixture
def config(tmp_path):
    (tmp_path / "train.csv").write_text("prompt,response\n1+1=,2\n2+2=,4\n123456789+1=,123456790\n")
    (tmp_path / "test.csv").write_text("prompt,response\n3+3=,6\n123456789+1=,123456790\n")
    return SFTRun(
        model=TINY,
        data=SupervisedDataConfig(path=str(tmp_path / "train.csv"), max_tokens=8),
        evaluation_data=SupervisedDataConfig(path=str(tmp_path / "test.csv"), max_tokens=8),
        sft=SFTConfig(batch_size=2, evaluate_every=1),
        run=RunConfig(output_dir=str(tmp_path / "run"), num_iterations=3),
    )


def build_run(config):
    roles = roles_of(config)
    return build_sft(config, check_sft(config, dry=False), **roles), messages_of(roles)


def test_rows_that_are_too_long_are_told(config):
    assert build_run(config)[1] == [
        "data: dropped 1 row longer than data.max_tokens: line 4",
        "evaluation_data: dropped 1 row longer than evaluation_data.max_tokens: line 3",
    ]


def test_rows_that_were_dropped_for_another_reason_are_told(config, tmp_path):
    (tmp_path / "train.csv").write_text("prompt,response\n1+1=,2\n2+2=,\n3+3=,6\n")
    data = dataclasses.replace(config.data, skip_bad_rows=True)
    _, told = build_run(dataclasses.replace(config, data=data, evaluation_data=None, sft=SFTConfig(batch_size=2)))
    assert told == ["data: dropped 1 of 3 rows: line 3: its response is an empty text"]


def test_the_loss_is_measured_where_there_are_held_out_examples(config):
    run, _ = build_run(config)
    assert run.evaluate()["eval/loss"] > 0
    without = dataclasses.replace(config, evaluation_data=None, sft=SFTConfig(batch_size=2))
    assert build_run(without)[0].evaluate is None


def test_the_order_of_the_examples_comes_from_the_seed(config, tmp_path):
    rows = "".join(f"{n}+1=,{n + 1}\n" for n in range(12))
    (tmp_path / "train.csv").write_text("prompt,response\n" + rows)

    def order(seed):
        run, _ = build_run(dataclasses.replace(config, run=dataclasses.replace(config.run, seed=seed)))
        return run.trainer.source.next(12).prompt_ids.tolist()

    assert order(3) == order(3)
    assert order(3) != order(4)


def test_the_schedule_ends_with_the_run(config):
    optimizer = dataclasses.replace(config.optimizer, schedule="linear", learning_rate=1.0)
    trained = build_run(dataclasses.replace(config, optimizer=optimizer))[0].trainer.trained["actor"]
    trained.num_steps_done = 2
    assert trained.learning_rate == pytest.approx(1 / 3)


def test_the_loop_is_what_the_recipe_asks_for(config, tmp_path):
    """Held out are rows of another file with columns of their own; log-probabilities are those of temperature 1."""
    (tmp_path / "test.csv").write_text("question,response\n3+3=,6\n")
    held_out = dataclasses.replace(config.evaluation_data, prompt_column="question")
    settings = SFTConfig(batch_size=2, microbatch_tokens=77, evaluate_every=2)
    run, _ = build_run(dataclasses.replace(config, sft=settings, evaluation_data=held_out))
    trainer = run.trainer
    assert (trainer.batch_size, run.evaluate_every) == (settings.batch_size, 2)
    assert trainer.microbatcher.budget.max_tokens == 77
    assert trainer.objective.actor.microbatcher.budget.max_tokens == 77
    assert trainer.trained["actor"].module.temperature == 1.0
    tokenizer = AutoTokenizer.from_pretrained(TINY.path)
    held_out = trainer.held_out
    assert [
        tokenizer.decode(ids[mask]) for ids, mask in zip(held_out.prompt_ids, held_out.prompt_mask, strict=True)
    ] == ["3+3="]


@pytest.mark.parametrize("name", ["train.csv", "test.csv"])
def test_a_text_with_a_token_that_has_no_embedding_is_refused(config, one_token_more, name):
    file = Path(config.data.path).with_name(name)
    file.write_text(file.read_text() + "1+1=,§2\n")
    with pytest.raises(ModelError, match=rf"{name} has tokens beyond the \d+ embeddings of the model: '§'"):
        build_run(dataclasses.replace(config, model=one_token_more))
