import dataclasses
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
from transformers import AutoTokenizer, OpenAIGPTConfig

from llmrl.config import SFTRun
from llmrl.data.config import MixedRowsConfig, PromptDataConfig, SupervisedDataConfig
from llmrl.data.files import DataError
from llmrl.data.rows import SKIP
from llmrl.models.config import ModelConfig
from llmrl.models.folders import ModelError
from llmrl.rewards.config import LearnedRewardConfig, RewardConfig, RewardFunctionConfig
from llmrl.rollout.scripted import ScriptedEngine
from llmrl.rollout.support import RolloutError
from llmrl.trainers.config import EvaluationConfig
from llmrl.trainers.run import RunError
from llmrl.wiring.checks import check_rl, check_sft, reward_model_config
from llmrl.wiring.rl import build_grpo
from tests.wiring.conftest import roles_of


def test_held_out_prompts_are_read_only_where_they_are_used(config):
    gone = PromptDataConfig(path="gone.jsonl")
    idle = dataclasses.replace(config, evaluation_data=gone, evaluation=EvaluationConfig(every=0))
    assert check_rl(idle, dry=False).evaluation_rows is None
    with pytest.raises(ValueError, match=r"gone\.jsonl"):
        check_rl(dataclasses.replace(idle, evaluation=EvaluationConfig(every=1)), dry=False)


def test_rows_that_a_reward_cannot_score_are_listed_before_anything_loads(config, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1"}\n{"prompt": "2", "answer": "2"}\n{"prompt": "3"}\n')
    ragged = dataclasses.replace(config.data, path=str(tmp_path / "rows.jsonl"))
    with pytest.raises(ValueError, match=r"rows\.jsonl: 2 bad rows") as error:
        check_rl(dataclasses.replace(config, data=ragged), dry=False)
    rule = config.reward.functions[0].name
    assert str(error.value).split("\n")[1:] == [
        f"  line 1, line 3: no column 'answer', which {rule} reads",
        SKIP,
    ]
    dropping = dataclasses.replace(ragged, skip_bad_rows=True)
    checked = check_rl(dataclasses.replace(config, data=dropping), dry=False)
    assert checked.rows == [{"prompt": "2", "answer": "2"}]
    assert checked.notes == [f"data: dropped 2 of 3 rows: line 1, line 3: no column 'answer', which {rule} reads"]


@pytest.fixture
def strict(config, tmp_path):
    """The run with a model folder whose chat template takes no system message."""
    folder = tmp_path / "strict"
    shutil.copytree(config.model.path, folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, path=str(folder)))


@pytest.mark.parametrize("dry", [False, True])
def test_prompts_are_tried_in_the_chat_template_before_anything_loads(strict, tmp_path, dry):
    (tmp_path / "rows.jsonl").write_text(
        '\n{"prompt": "1", "answer": "1"}\n'
        '{"prompt": [{"role": "system", "content": "2"}, {"role": "user", "content": "2"}], "answer": "2"}\n'
    )
    data = dataclasses.replace(strict.data, path=str(tmp_path / "rows.jsonl"))
    with pytest.raises(DataError, match=r"^.*rows\.jsonl: 1 bad row\n  line 3: the chat template .*: no system here"):
        check_rl(dataclasses.replace(strict, data=data), dry=dry)
    evaluated = dataclasses.replace(strict, evaluation_data=data, evaluation=EvaluationConfig(every=1))
    with pytest.raises(DataError, match=r"^.*rows\.jsonl: 1 bad row"):
        check_rl(evaluated, dry=dry)


def test_a_dry_run_tries_no_template_of_a_model_that_is_still_to_be_made(config):
    model = dataclasses.replace(config.model, path="gone")
    run = dataclasses.replace(config, model=model, made_by={"gone": "make model"})
    assert len(check_rl(run, dry=True).rows) == 3
    with pytest.raises(ModelError, match=r"^model\.path \(gone\) is no folder; make it with `make model`$"):
        check_rl(run, dry=False)


@pytest.mark.parametrize("dry", [True, False])
def test_a_model_without_a_cache_is_refused_before_it_loads_unless_another_engine_samples(config, tmp_path, dry):
    folder = tmp_path / "gpt"
    OpenAIGPTConfig(vocab_size=99, n_positions=64, n_embd=8, n_layer=1, n_head=2).save_pretrained(folder)
    AutoTokenizer.from_pretrained(config.model.path).save_pretrained(folder)
    run = dataclasses.replace(config, model=ModelConfig(path=str(folder), from_scratch=True))
    with pytest.raises(RolloutError, match=r"openai-gpt: its forward takes no cache .*rollout\.engine=transformers"):
        check_rl(run, dry=dry)
    check_rl(dataclasses.replace(run, rollout=dataclasses.replace(run.rollout, engine="transformers")), dry=dry)
    engine = ScriptedEngine(lambda *_: ([], None, 0))
    assert check_rl(run, dry=dry, engine=engine).engine is engine


def test_a_run_may_not_write_into_anything_that_it_reads(config, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.csv").write_text("prompt,answer\n1+1=,2\n")
    inside = dataclasses.replace(config.run, output_dir=str(data / "run"), resume=True)
    for section in ("data", "evaluation_data"):
        sections = {section: PromptDataConfig(path=str(data))}
        with pytest.raises(RunError, match=rf"inside {section}\.path"):
            check_rl(dataclasses.replace(config, run=inside, **sections), dry=True)
    model = dataclasses.replace(config.model, path=str(data))
    with pytest.raises(RunError, match=r"inside model\.path"):
        check_sft(SFTRun(model=model, data=SupervisedDataConfig(path="d.jsonl"), run=inside), dry=True)
    judged = dataclasses.replace(config.reward, model=LearnedRewardConfig(path=str(data)))
    with monkeypatched_checks(), pytest.raises(RunError, match=r"inside reward\.model\.path"):
        check_rl(dataclasses.replace(config, run=inside, reward=judged), dry=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("trusts", [False, True])
def test_trust_and_precision_hold_for_the_reward_model_too(config, trusts, dtype):
    model = dataclasses.replace(config.model, trust_remote_code=trusts, dtype=dtype)
    scored = dataclasses.replace(config.reward, model=LearnedRewardConfig(path="judge"))
    scorer = reward_model_config(dataclasses.replace(config, model=model, reward=scored))
    assert scorer == ModelConfig(path="judge", dtype=dtype, trust_remote_code=trusts)


@contextmanager
def monkeypatched_checks():
    """The folder of the reward model is looked at first, and this one is empty."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmrl.wiring.checks.check_scorer", lambda *_, **__: [])
        yield


def test_a_file_of_rules_does_not_move_the_run(config, tmp_path, monkeypatch):
    """It changes the working directory as it is imported."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "moving.py").write_text(
        "import os\nos.chdir('elsewhere')\n\ndef rule(responses):\n    return [0.0] * len(responses)\n"
    )
    monkeypatch.chdir(tmp_path)
    rule = RewardFunctionConfig(name=f"{tmp_path}/moving.py:rule")
    check_rl(dataclasses.replace(config, reward=RewardConfig(functions=(rule,))), dry=False)
    assert Path.cwd() == tmp_path


def test_a_mixture_is_read_set_by_set(config, tmp_path):
    """Each by settings of its own, checked for the rewards, and part of what the run is known again by."""
    other = tmp_path / "other.jsonl"
    other.write_text('{"task": "3+3=", "answer": "6", "dataset": "sums"}\n{"task": "4+4="}\n')
    mixed = MixedRowsConfig(path=str(other), weight=2.0, rename_columns={"task": "prompt"})
    data = dataclasses.replace(config.data, mixed_with=(mixed,))
    with pytest.raises(DataError, match=r"other\.jsonl: 1 bad row\n  line 2: no column 'answer'"):
        check_rl(dataclasses.replace(config, data=data), dry=False)
    dropping = dataclasses.replace(config, data=dataclasses.replace(data, skip_bad_rows=True))
    checked = check_rl(dropping, dry=False)
    assert [row["dataset"] for row in checked.rows] == [config.data.path] * 3 + ["sums"]
    assert checked.contents["data"] != check_rl(config, dry=False).contents["data"]
    assert checked.notes[-1].startswith(f"data: {other}: dropped 1 of 2 rows: line 2: no column 'answer'")
    run = build_grpo(dropping, checked, **roles_of(dropping))
    dealt = [row["dataset"] for row in run.trainer.prompts.next(9).rows]
    assert dealt.count("sums") == 6


def test_a_set_of_a_mixture_that_is_still_to_be_made(config):
    mixed = MixedRowsConfig(path="gone.jsonl", weight=2.0)
    run = dataclasses.replace(
        config, data=dataclasses.replace(config.data, mixed_with=(mixed,)), made_by={"gone.jsonl": "make it"}
    )
    checked = check_rl(run, dry=True)
    assert checked.rows is None
    assert "data.mixed_with.0.path (gone.jsonl) does not exist yet; `make it` makes it" in checked.unchecked


def test_a_run_does_not_write_over_a_set_of_its_mixture(config, tmp_path):
    (tmp_path / "run" / "final").mkdir(parents=True)
    (tmp_path / "run" / "final" / "more.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    mixed = MixedRowsConfig(path=str(tmp_path / "run" / "final" / "more.jsonl"), weight=2.0)
    with pytest.raises(RunError, match=r"data\.mixed_with\.0\.path"):
        check_rl(dataclasses.replace(config, data=dataclasses.replace(config.data, mixed_with=(mixed,))), dry=False)
