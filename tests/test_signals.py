"""Signals stop a run in any phase, soon, and the same command goes on as if nothing had happened."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llmrl.cli import app
from llmrl.distributed.stop import SIGNALS
from tests.processes import ROOT, assert_same_run, command, environment, free_port, lines, write_recipes
from tests.signalled import Planted

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("default_signals")]

PLACES = {
    "the first evaluation": ("evaluation", 1, 1, 0),
    "rollout": ("rollout", 3, 1, 2),
    "reward": ("reward", 3, 1, 2),
    "logprobs": ("logprobs", 3, 1, 2),
    "the first update": ("update", 3, 1, 2),
    "a later update": ("update", 3, 2, 3),
    "evaluation": ("evaluation", 2, 1, 2),
    "checkpoint": ("checkpoint", 2, 1, 2),
    "saving": ("saving", 4, 1, None),
}
OF_BATCHES = {"a gradient": ("update", 2, 1, 1), "evaluation of pairs": ("evaluation", 2, 1, 2)}
"""Phase, iteration, which of the phases of that name, and the iterations that are done when the run has stopped; None
where it finishes."""
AT_ONCE = (PLACES | OF_BATCHES).keys() - {"a later update", "checkpoint", "saving"}
"""Where nothing is lost by leaving."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    write_recipes(folder)
    return folder


def llmrl(*arguments: str) -> tuple[int, str]:
    """Status and standard error of a command in this process."""
    result = CliRunner().invoke(app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stderr


@pytest.fixture(scope="module")
def quiet(folder: Path) -> dict[str, Path]:
    """Runs that no signal disturbs, by command."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for run in ("grpo", "ppo", "sft", "reward-model"):
            assert llmrl(run, f"{run}.yaml", f"run.output_dir=quiet_{run}")[0] == 0
    return {run: folder / f"quiet_{run}" for run in ("grpo", "ppo", "sft", "reward-model")}


def without_times(file: Path) -> list[dict]:
    return [{name: x for name, x in line.items() if not name.endswith(("_s", "/s"))} for line in lines(file)]


def assert_identical(left: Path, right: Path) -> None:
    """Metrics, samples and weights, bit for bit."""
    assert without_times(left / "metrics.jsonl") == without_times(right / "metrics.jsonl")
    for name in ("samples.jsonl", "final/model.safetensors"):
        assert not (right / name).exists() or (left / name).read_bytes() == (right / name).read_bytes(), name


@pytest.mark.parametrize(
    ("kind", "place", "number"),
    [
        (algorithm, place, SIGNALS[(first + count) % len(SIGNALS)])
        for first, algorithm in ((0, "grpo"), (2, "ppo"))
        for count, place in enumerate(PLACES)
    ]
    + [("sft", "a gradient", signal.SIGUSR1), ("reward-model", "evaluation of pairs", signal.SIGHUP)],
)
def test_a_run_that_is_stopped_anywhere_is_the_undisturbed_one(
    folder: Path, quiet: dict[str, Path], monkeypatch: pytest.MonkeyPatch, kind: str, place: str, number: int
):
    monkeypatch.chdir(folder)
    phase, iteration, occurrence, done = (PLACES | OF_BATCHES)[place]
    output = folder / f"{kind}_{number}_{place.replace(' ', '_')}"
    run = (kind, f"{kind}.yaml", f"run.output_dir={output}")
    planted = Planted(phase, iteration, [number], occurrence=occurrence)
    planted.install()
    try:
        status, error = llmrl(*run)
    finally:
        planted.uninstall()
    assert planted.is_sent
    if done is None:
        assert (status, error) == (0, "")
    else:
        told = (
            f"stopped by {signal.Signals(number).name} after iteration {done}; the same command goes on from {output}"
        )
        assert (status, error) == (128 + number, f"error: {told}\n")
        assert (output / "checkpoints" / f"step_{done:06d}").exists()
        assert not (output / "final").exists()
        if place in AT_ONCE:
            assert planted.num_more == 0
        assert llmrl(*run, "run.resume=true")[0] == 0
    assert_identical(output, quiet[kind])


@pytest.mark.parametrize("command", ["grpo", "ppo", "sft", "reward-model", "evaluate"])
@pytest.mark.parametrize(
    "moment", ["transformers.AutoTokenizer.from_pretrained", "llmrl.wiring.process.warn_without_gpu"]
)
def test_a_signal_before_the_first_iteration_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, command: str, moment: str
):
    """In the checks, and in the context of the ranks."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(moment, lambda *_, **__: signal.raise_signal(signal.SIGUSR1))
    recipe = "grpo.yaml" if command == "evaluate" else f"{command}.yaml"
    assert llmrl(command, recipe, "run.output_dir=loading") == (
        128 + signal.SIGUSR1,
        "error: stopped by SIGUSR1\n",
    )
    assert not (folder / "loading").exists()


def test_a_signal_while_a_class_is_made_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """As an import does: Python 3.11 raises a RuntimeError in place of what happens there."""

    class Field:
        def __set_name__(self, owner: type, name: str):
            signal.raise_signal(signal.SIGUSR1)

    def read(*_: object):
        type("Config", (), {"field": Field()})

    monkeypatch.chdir(folder)
    monkeypatch.setattr("llmrl.cli._read", read)
    assert llmrl("sft", "sft.yaml") == (128 + signal.SIGUSR1, "error: stopped by SIGUSR1\n")


def test_a_signal_to_an_evaluation_alone_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder)
    planted = Planted("evaluation", 0, [signal.SIGHUP])
    planted.install()
    try:
        assert llmrl("evaluate", "grpo.yaml") == (128 + signal.SIGHUP, "error: stopped by SIGHUP\n")
    finally:
        planted.uninstall()


PLANTED = (str(ROOT / "tests" / "signalled.py"),)


def planted(*arguments: object, folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command(*map(str, arguments), num_processes=1, program=PLANTED),
        cwd=folder, env=environment() | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.parametrize("phase", ["update", "checkpoint"])
def test_a_second_signal_leaves_at_once_and_harms_nothing(folder: Path, quiet: dict[str, Path], phase: str):
    iteration = 2 if phase == "checkpoint" else 3
    output = folder / f"twice_{phase}"
    run = ("grpo", "grpo.yaml", f"run.output_dir={output}")
    numbers = f"{int(signal.SIGINT)},{int(signal.SIGTERM)}"
    running = planted(phase, iteration, numbers, 2.1, *run, folder=folder)
    _, error = running.communicate()
    assert (running.returncode, error) == (128 + signal.SIGTERM, b"")
    assert json.loads((folder / "signalled.json").read_text())["sent"] == 2
    assert not (output / "final").exists()
    running = planted("none", 0, "0", 0, *run, "run.resume=true", folder=folder)
    assert running.communicate()[1] == b""
    assert without_times(output / "metrics.jsonl") == without_times(quiet["grpo"] / "metrics.jsonl")


# --- several processes ------------------------------------------------------------------------------------------------


def until_it_learns(metrics: Path) -> None:
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 2):
        time.sleep(0.1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_both_with_a_checkpoint(folder: Path, number: int):
    settings = [f"run.output_dir=stopped_{number}", "run.num_iterations=100000", "evaluation.every=0"]
    running = subprocess.Popen(
        command("grpo", "grpo.yaml", *settings, num_processes=2),
        cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    metrics = folder / f"stopped_{number}" / "metrics.jsonl"
    until_it_learns(metrics)
    running.send_signal(number)
    output, _ = running.communicate(timeout=600)
    assert output.count(b"error: stopped by " + signal.Signals(number).name.encode()) == 1
    assert b" ends: " not in output
    assert output.count(b"every weight on each of 2 devices.") == 1
    last = lines(metrics)[-1]["iteration"]
    assert (metrics.parent / "checkpoints" / f"step_{last:06d}").exists()


def ranks(folder: Path, *arguments: str, program: tuple[str, ...] = ("-m", "llmrl")) -> list[subprocess.Popen[bytes]]:
    """Two ranks without a launcher, so that each has a status to be seen."""
    meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return [
        subprocess.Popen(
            command(*arguments, num_processes=1, program=program),
            cwd=folder, env=environment() | meeting | {"PYTHONPATH": str(ROOT), "RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
        )
        for rank in ("0", "1")
    ]  # fmt: skip


def test_a_signal_to_one_rank_stops_both_with_its_status(folder: Path):
    both = ranks(folder, "grpo", "grpo.yaml", "run.output_dir=alone", "run.num_iterations=100000", "evaluation.every=0")
    until_it_learns(folder / "alone" / "metrics.jsonl")
    both[1].send_signal(signal.SIGUSR1)
    told = [rank.communicate(timeout=600)[1].decode() for rank in both]
    assert [rank.returncode for rank in both] == [128 + signal.SIGUSR1] * 2
    assert told[0].startswith("error: stopped by SIGUSR1 after iteration ")
    assert told[1] == ""


@pytest.mark.parametrize("phase", ["rollout", "logprobs"])
def test_ranks_leave_at_the_same_point_and_the_run_is_the_undisturbed_one(
    folder: Path, quiet: dict[str, Path], phase: str
):
    output = folder / f"both_{phase}"
    run = ("grpo", "grpo.yaml", f"run.output_dir={output}")
    both = ranks(folder, phase, "3", str(int(signal.SIGTERM)), "0", *run, program=PLANTED)
    told = [rank.communicate(timeout=600)[1].decode() for rank in both]
    assert [rank.returncode for rank in both] == [128 + signal.SIGTERM] * 2
    assert told == [f"error: stopped by SIGTERM after iteration 2; the same command goes on from {output}\n", ""]
    both = ranks(folder, *run, "run.resume=true")
    assert [rank.communicate(timeout=600)[1] for rank in both] == [b"", b""]
    assert_same_run(output, quiet["grpo"])
