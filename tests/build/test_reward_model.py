import json
import shutil

import pytest

from llmrl.build import build_reward_model, check_reward_run, load_trained_reward_model
from llmrl.build import reward_model as under_test
from llmrl.config import RewardModelRun
from llmrl.data.preferences import PreferenceDataConfig
from llmrl.models.loading import ModelConfig, ModelError
from llmrl.trainers.reward_model import RewardModelConfig
from llmrl.trainers.run import OutputConfig

from .conftest import TINY, roles_of


@pytest.fixture
def run(tmp_path):
    (tmp_path / "pairs.csv").write_text("prompt,chosen,rejected\n1+1=,2,3\n2+2=,4,5\n")
    data = PreferenceDataConfig(path=str(tmp_path / "pairs.csv"))
    config = RewardModelRun(
        model=TINY, data=data, evaluation_data=data, run=OutputConfig(output_dir=str(tmp_path / "run"))
    )
    return build_reward_model(config, check_reward_run(config, dry=False), **roles_of(config))


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
    with pytest.raises(ModelError, match=r"its tokenizer has ids up to \d+, but the model has 50 embeddings"):
        load_trained_reward_model(config, RewardModelConfig(), seed=0)
