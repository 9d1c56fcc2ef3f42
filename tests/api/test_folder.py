"""What a run has left, sound or damaged."""

import json
import math

import pytest

import llmrl


@pytest.fixture
def folder(tmp_path):
    """The records of a run."""
    (tmp_path / "config.json").write_text(json.dumps({"settings": {"run": {"seed": 3}}, "versions": {}}))
    lines = [{"iteration": 1, "loss": None}, {"iteration": 0, "eval/loss": 2.0}, {"iteration": 1, "loss": 0.5}]
    lines.append({"iteration": 2, "loss": None})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"iteration": 3, "lo')
    samples = [{"iteration": 1, "response": "a"}, {"iteration": 1, "response": "b"}]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))
    return tmp_path


def test_metrics_and_samples_are_rows(folder):
    run = llmrl.load_run(folder)
    assert run.config["settings"] == {"run": {"seed": 3}}
    assert run.metrics[:2] == [{"iteration": 0, "eval/loss": 2.0}, {"iteration": 1, "loss": 0.5}]
    assert run.metrics[2]["iteration"] == 2
    assert math.isnan(run.metrics[2]["loss"])
    assert len(run.metrics) == 3
    assert [sample["response"] for sample in run.samples] == ["a", "b"]


def test_rows_are_a_frame(folder):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(llmrl.load_run(folder).metrics)
    assert list(frame["iteration"]) == [0, 1, 2]
    assert list(frame["loss"].dropna()) == [0.5]


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(llmrl.Error, match="holds no run of llmrl"):
        llmrl.load_run(tmp_path)
    with pytest.raises(llmrl.Error, match="is no folder"):
        llmrl.load_run(tmp_path / "nowhere")


def test_a_damaged_config_leaves_the_rest_to_be_read(folder):
    (folder / "config.json").write_text("{")
    run = llmrl.load_run(folder)
    assert len(run.metrics) == 3
    with pytest.raises(llmrl.Error, match=r"config\.json is missing or damaged"):
        run.config  # noqa: B018


def test_a_run_without_a_model_says_so(folder):
    for name in ("model", "tokenizer"):
        with pytest.raises(llmrl.Error, match="final holds no model: the run has not come to its end"):
            getattr(llmrl.load_run(folder), name)


def test_a_critic_is_no_language_model(folder):
    (folder / "final").mkdir()
    for name in ("config.json", "value_head.safetensors"):
        (folder / "final" / name).write_text("{}")
    with pytest.raises(llmrl.Error, match=r"final holds a critic.*critic\.path of PPO"):
        llmrl.load_run(folder).model  # noqa: B018


def test_a_run_without_samples_has_none(folder):
    (folder / "samples.jsonl").unlink()
    assert llmrl.load_run(folder).samples == []
