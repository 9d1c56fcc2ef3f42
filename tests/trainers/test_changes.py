"""What has changed since a run was last started, and which of it makes another run."""

import json
from pathlib import Path
from typing import Any

import pytest

from llmrl.trainers.changes import changes_in, changes_since, check_same_run, is_finished
from llmrl.trainers.config import RunConfig
from llmrl.trainers.output import RunError
from llmrl.trainers.records import versions

SETTINGS: dict[str, Any] = {
    "run": {"num_iterations": 4, "seed": 0, "resume": "auto", "output_dir": "out"},
    "optimizer": {"learning_rate": 1e-4, "betas": [0.9, 0.99]},
    "reward": {"functions": [{"name": "a.py:rule", "weight": 1.0, "timeout_s": 600.0}], "model": None},
    "data": {"chat_template_kwargs": {}},
    "update": {"microbatch_tokens": 8192},
    "trackers": {"names": []},
}
CONTENTS = {"model.path": "1", "reward.functions.0": "2", "evaluation_data": "3"}


def altered(path: str, value: Any) -> dict[str, Any]:
    settings = json.loads(json.dumps(SETTINGS))
    place: Any = settings
    *parents, name = path.split(".")
    for parent in parents:
        place = place[int(parent) if parent.isdigit() else parent]
    place[name] = value
    return settings


def record(**other: Any) -> dict[str, Any]:
    return {"settings": SETTINGS, "contents": CONTENTS, "versions": versions(), **other}


def test_the_same_run_has_no_changes():
    assert changes_since(record(), SETTINGS, CONTENTS) == []


@pytest.mark.parametrize(
    ("path", "value", "text", "harmless"),
    [
        ("run.num_iterations", 8, "run.num_iterations was 4, is 8", True),
        ("update.microbatch_tokens", 16, "update.microbatch_tokens was 8192, is 16", True),
        ("reward.functions.0.timeout_s", 9.0, "reward.functions.0.timeout_s was 600.0, is 9.0", True),
        ("run.seed", 1, "run.seed was 0, is 1", False),
        ("optimizer.learning_rate", 1.0, "optimizer.learning_rate was 0.0001, is 1.0", False),
        ("optimizer.betas", [0.9, 0.95], "optimizer.betas.1 was 0.99, is 0.95", False),
        ("reward.functions.0.weight", 2.0, "reward.functions.0.weight was 1.0, is 2.0", False),
        ("reward.functions.0.name", "b.py:rule", "reward.functions.0.name was a.py:rule, is b.py:rule", False),
        ("trackers.names", ["wandb"], "trackers.names.0 was None, is wandb", True),
        ("reward.functions.0.on_error", "exclude", "reward.functions.0.on_error was None, is exclude", True),
        ("reward.functions.0.of_a_new_version", 7, "reward.functions.0.of_a_new_version was None, is 7", True),
        ("reward.functions.0.arguments", {"b": 7}, "reward.functions.0.arguments.b was None, is 7", False),
        (
            "data.chat_template_kwargs",
            {"enable_thinking": False},
            "data.chat_template_kwargs.enable_thinking was None, is False",
            False,
        ),
        (
            "reward.functions",
            [*SETTINGS["reward"]["functions"], {"name": "b"}],
            "reward.functions.1.name was None, is b",
            False,
        ),
        ("reward.functions", [], "reward.functions.0.name was a.py:rule, is None", False),
        ("optimizer.of_a_new_version", 7, "optimizer.of_a_new_version was None, is 7", True),
        ("reward.model", {"path": "m"}, "reward.model.path was None, is m", False),
    ],
)
def test_changed_settings(path: str, value: Any, text: str, harmless: bool):
    changes = changes_since(record(), altered(path, value), CONTENTS)
    assert (text, harmless) in [(change.text, change.harmless) for change in changes]
    assert all(change.harmless for change in changes) == harmless


def test_how_it_is_resumed_is_no_change():
    assert changes_since(record(), altered("run.resume", True), CONTENTS) == []


@pytest.mark.parametrize(
    ("what", "harmless"),
    [("model.path", False), ("reward.functions.0", True), ("reward.functions.1", True), ("evaluation_data", True)],
)
def test_changed_contents(what: str, harmless: bool):
    (change,) = changes_since(record(), SETTINGS, CONTENTS | {what: "other"})
    assert (change.text, change.harmless) == (f"the content of {what} is another", harmless)


def test_another_version_is_told():
    (change,) = changes_since(record(versions=versions() | {"torch": "1.0"}), SETTINGS, CONTENTS)
    assert change.text == f"the version of torch was 1.0, is {versions()['torch']}"
    assert change.harmless


@pytest.mark.parametrize("odd", [None, [], "x", {}])
def test_an_odd_record_is_compared_as_far_as_it_goes(odd: Any):
    changes_since({"settings": odd, "contents": odd, "versions": odd}, SETTINGS, CONTENTS)


# --- by the folder ----------------------------------------------------------------------------------------------------


def config(folder: Path, **settings: Any) -> RunConfig:
    return RunConfig(output_dir=str(folder), num_iterations=4, **settings)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "checkpoints" / "step_000002").mkdir(parents=True)
    (tmp_path / "config.json").write_text(json.dumps(record()))
    return tmp_path


def test_another_run_is_refused_with_every_reason(run: Path):
    check_same_run(config(run), SETTINGS, CONTENTS)
    other = altered("optimizer.learning_rate", 1.0)
    with pytest.raises(RunError) as refused:
        check_same_run(config(run), other, CONTENTS | {"model.path": "9"})
    assert str(refused.value) == (
        f"run.output_dir ({run}) holds another run than this one: optimizer.learning_rate was 0.0001, is 1.0; "
        "the content of model.path is another. run.resume=true goes on with it all the same, another folder begins a "
        "new one"
    )
    check_same_run(config(run, resume=True), other, CONTENTS)
    check_same_run(config(run), altered("run.num_iterations", 9), CONTENTS)


def test_a_run_that_has_learned_nothing_is_compared_with_nothing(run: Path):
    (run / "checkpoints" / "step_000002").rmdir()
    assert changes_in(run, altered("run.seed", 9), CONTENTS) == []
    check_same_run(config(run), altered("run.seed", 9), CONTENTS)


@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
def test_a_run_without_a_record_is_not_known_again(run: Path, content: str):
    (run / "config.json").write_text(content)
    with pytest.raises(RunError, match=r"its config\.json, by which a run is known again, cannot be read"):
        check_same_run(config(run), SETTINGS, CONTENTS)
    check_same_run(config(run, resume=True), SETTINGS, CONTENTS)


def test_a_run_that_failed_in_its_first_iteration_has_learned_nothing(run: Path):
    (run / "checkpoints" / "step_000002").rename(run / "checkpoints" / "step_000000")
    check_same_run(config(run), altered("optimizer.learning_rate", 1.0), CONTENTS)


def test_a_run_is_finished_when_it_has_done_what_is_asked(run: Path):
    def finished(settings: Any = SETTINGS, num_iterations: int = 4) -> bool:
        asked = RunConfig(output_dir=str(run), num_iterations=num_iterations)
        return is_finished(asked, changes_in(run, settings, CONTENTS))

    (run / "config.json").write_text(json.dumps(record(finished=4)))
    assert not finished()  # final/ is gone
    (run / "final").mkdir()
    assert not finished()  # and here empty
    (run / "final" / "model.safetensors").touch()
    assert finished()
    assert finished(altered("trackers.names", ["wandb"]))
    assert not finished(altered("run.seed", 1))
    assert not finished(num_iterations=5)
    (run / "config.json").write_text(json.dumps(record()))
    assert not finished()
