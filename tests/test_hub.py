"""What is a name on the hub, and what is published there; what else the hub is asked is tested in test_loading.py of
models and test_rows.py of data."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmrl.hub import is_local
from llmrl.models.folders import adapters_on_folders
from llmrl.trainers.output import RunError, model_of_run
from tests.fake_hub import TOKEN, fake_hub


def test_folders_and_hub_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "here").mkdir(parents=True)
    assert all(is_local(path) for path in ("/a", "./a", "../a", "~/a", ".a", "a/b/c", "owner/here", "owner/typo"))
    assert not any(is_local(path) for path in ("gpt2", "other/model"))


def test_a_suffix_makes_a_file():
    assert is_local("x.jsonl", suffixes=(".jsonl", ".csv"))
    assert not is_local("x.jsonl")
    assert not is_local("x.bin", suffixes=(".jsonl",))


# --- publishing -------------------------------------------------------------------------------------------------------


def make_run(folder: Path, *, finished: bool = True) -> Path:
    """What a run leaves, small."""
    for name in ("final", "best", "final/critic", "final/adapter"):
        (folder / name).mkdir(parents=True)
        (folder / name / "model.safetensors").write_bytes(name.encode())
    (folder / "final" / "README.md").write_text("---\ntags: [llmrl]\n---\n# a model\n")
    (folder / "final" / "adapter" / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "/models/x"})
    )
    record = {"settings": {}, "versions": {}} | ({"finished": 3} if finished else {})
    (folder / "config.json").write_text(json.dumps(record))
    return folder


def push(*arguments: str | Path, hub: str, token: str | None = TOKEN, home: Path) -> subprocess.CompletedProcess[str]:
    """`llmrl push` in a process of its own: the endpoint is read when the hub's library is imported."""
    environment = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
    environment |= {"HF_ENDPOINT": hub, "HF_HOME": str(home)} | ({} if token is None else {"HF_TOKEN": token})
    command = [sys.executable, "-m", "llmrl", "push", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.slow
def test_what_a_run_left_is_on_the_hub(tmp_path):
    """Everything of final/ is there, byte for byte, except an adapter whose base nobody else has."""
    run = make_run(tmp_path / "run")
    with fake_hub() as hub:
        done = push(run, "me/model", "--private", hub=hub.url, home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"The model is at {hub.url}/me/model"
    assert "left out  adapter/" in done.stdout
    assert hub.repos["me/model"] == {
        str(file.relative_to(run / "final")): file.read_bytes()
        for file in (run / "final").rglob("*")
        if file.is_file() and file.parent.name != "adapter"
    }
    assert all(name in done.stdout for name in hub.repos["me/model"])
    assert hub.private["me/model"]


@pytest.mark.slow
def test_what_the_hub_refuses_is_told_in_one_line(tmp_path):
    run = make_run(tmp_path / "run")
    with fake_hub() as hub:
        for token, problem in ((None, "no token of the hub: log in with"), ("hf_" + "x" * 20, "(401): Invalid cred")):
            done = push(run, "me/model", hub=hub.url, token=token, home=tmp_path)
            assert done.returncode == 1
            assert problem in done.stderr
            assert "set HF_TOKEN to a token that may write there" in done.stderr
            assert len(done.stderr.splitlines()) == 1
        assert hub.repos == {}


def test_the_model_of_a_run_is_its_last_one_or_its_best(tmp_path):
    done, under_way = make_run(tmp_path / "done"), make_run(tmp_path / "under_way", finished=False)
    assert model_of_run(done, best=False) == done / "final"
    assert model_of_run(done, best=True) == done / "best"
    assert model_of_run(under_way, best=True) == under_way / "best"
    with pytest.raises(RunError, match="has not come to its end; let it go on"):
        model_of_run(under_way, best=False)
    with pytest.raises(RunError, match="is not the folder of a run"):
        model_of_run(tmp_path, best=False)
    (done / "best" / "model.safetensors").unlink()
    with pytest.raises(RunError, match="has no best/; leave --best out"):
        model_of_run(done, best=True)


def test_an_adapter_on_a_model_of_the_hub_is_of_use_to_others(tmp_path):
    run = make_run(tmp_path / "run")
    assert adapters_on_folders(run / "final") == ["adapter"]
    (run / "final" / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    assert adapters_on_folders(run / "final") == []
