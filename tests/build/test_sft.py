import dataclasses
from pathlib import Path

import pytest

from llmrl.build import build_sft, check_sft
from llmrl.config import SFTRun
from llmrl.data.supervised import SupervisedDataConfig
from llmrl.models.loading import ModelError
from llmrl.trainers.run import RunConfig
from llmrl.trainers.sft import SFTConfig

from .conftest import TINY, roles_of


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
    return build_sft(config, check_sft(config, dry=False), **roles), roles["progress"].messages


def test_rows_that_are_too_long_are_told(config):
    assert build_run(config)[1] == [
        f"{section}: 1 rows are longer than {section}.max_tokens and were dropped"
        for section in ("data", "evaluation_data")
    ]


def test_the_loss_is_measured_where_there_are_held_out_examples(config):
    run, _ = build_run(config)
    assert run.evaluate()["eval/loss"] > 0
    without = dataclasses.replace(config, evaluation_data=None, sft=SFTConfig(batch_size=2))
    assert build_run(without)[0].evaluate is None


def test_the_schedule_ends_with_the_run(config):
    optimizer = dataclasses.replace(config.optimizer, schedule="linear", learning_rate=1.0)
    trained = build_run(dataclasses.replace(config, optimizer=optimizer))[0].trainer.trained["actor"]
    trained.num_steps_done = 2
    assert trained.learning_rate == pytest.approx(1 / 3)


@pytest.mark.parametrize("name", ["train.csv", "test.csv"])
def test_a_text_with_a_token_that_has_no_embedding_is_refused(config, one_token_more, name):
    file = Path(config.data.path).with_name(name)
    file.write_text(file.read_text() + "1+1=,§2\n")
    with pytest.raises(ModelError, match=rf"{name} has tokens beyond the \d+ embeddings of the model: '§'"):
        build_run(dataclasses.replace(config, model=one_token_more))
