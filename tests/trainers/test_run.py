"""A run in miniature: the trainer is a number, and everything around it is real."""

import errno
import json
import math
import os
import platform
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import llmrl
from llmrl.distributed.activity import Activity, FollowedProgress
from llmrl.distributed.collectives import OneProcess
from llmrl.distributed.stop import SIGNALS, STOP
from llmrl.files import WriteError
from llmrl.functional.statistics import Mean, Moments, Total
from llmrl.lines import LineFile
from llmrl.metrics import Metrics
from llmrl.reports.progress import Silent
from llmrl.roles import Collectives, Progress
from llmrl.trainers.alarms import NEVER_SCORED, Alarms, NothingLearned
from llmrl.trainers.checkpoint import CheckpointError, save_checkpoint
from llmrl.trainers.config import RunConfig
from llmrl.trainers.run import Run, RunError, Stopped, check_output
from tests.contexts import context_of
from tests.distributed.threads import on_ranks

Hooks = dict[tuple[int, str], Callable[[], object]]


class Failure(Exception):
    """What the tests let go wrong."""


def fail() -> None:
    raise Failure


def terminate() -> None:
    signal.raise_signal(signal.SIGTERM)


class Numbers:
    """`Trainer` of one number: iteration n turns w into 3w + p, where p counts what was dealt, as a data source does.

    Hooks are called by iteration and moment: after the dealing ("early"), and after the weight moved ("late"). A unit
    of work ends after each.
    """

    def __init__(self, hooks: Hooks, losses: list[float] | None, progress: Progress) -> None:
        self.hooks = hooks
        self.losses = losses
        self.progress = progress
        self.iteration = 0
        self.dealt = 0
        self.weight = torch.zeros(())
        self.has_moved = False
        self.holds_all = True

    def iterate(self) -> Metrics:
        self.dealt += 1
        self.call("early")
        self.has_moved = True
        self.weight = 3 * self.weight + self.dealt
        self.call("late")
        self.iteration += 1
        self.has_moved = False
        values: dict[str, Any] = {"weight": Total(self.weight)}
        if self.losses is not None:
            values["loss"] = Total(self.losses[self.iteration - 1])
        return Metrics(values)

    def call(self, moment: str) -> None:
        self.hooks.get((self.iteration + 1, moment), lambda: None)()
        self.progress.advance()

    def rewind(self) -> bool:
        if not self.has_moved:
            self.dealt = self.iteration
        return not self.has_moved

    def state_dict(self) -> dict[str, Any]:
        return {"iteration": self.iteration, "dealt": self.dealt, "weight": self.weight}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.iteration, self.dealt, self.weight = state["iteration"], state["dealt"], state["weight"]


WEIGHTS = [1.0, 5.0, 18.0, 58.0, 179.0, 543.0]  # 3w + n by hand


class Said(Silent):
    """Progress that remembers."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.iterations: list[int] = []
        self.begun: list[tuple[int, int]] = []
        self.phases: list[str] = []

    def begin(self, num_iterations: int, num_done: int = 0) -> None:
        self.begun.append((num_iterations, num_done))

    def phase(self, name: str, total: int) -> None:
        self.phases.append(name)

    def message(self, text: str) -> None:
        self.messages.append(text)

    def iteration(self, number: int, values: Any) -> None:
        self.iterations.append(number)


class Sink:
    """A tracker that remembers."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.begun: list[tuple[int, Any]] = []

    def begin(self, num_done: int, settings: Any, tell: Any) -> None:
        self.begun.append((num_done, settings))

    def log(self, iteration: int, values: Any) -> None:
        self.logged.append((iteration, dict(values)))


class Bench:
    """Makes runs in one folder, one after another, as commands would."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.said = Said()
        self.sink = Sink()
        self.progress = FollowedProgress(self.said, Activity())
        self.trainer = Numbers({}, None, self.progress)

    def make(
        self,
        num_iterations: int = 4,
        *,
        hooks: Hooks | None = None,
        losses: list[float] | None = None,
        evaluate: Callable[[], dict[str, float]] | None = None,
        evaluate_every: int | None = 0,
        settings: dict[str, Any] | None = None,
        collectives: Collectives | None = None,
        save: Callable[[Path], object] | None = None,
        warmup_iterations: int = 0,
        samples: LineFile | None = None,
        **config: Any,
    ) -> Run:
        self.trainer = trainer = Numbers(hooks or {}, losses, self.progress)

        def save_model(folder: Path) -> None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "weight").write_text(str(trainer.weight.item()))

        return Run(
            RunConfig(output_dir=str(self.folder), num_iterations=num_iterations, **config),
            settings=settings or {},
            contents={},
            card=str,
            trainer=trainer,
            save_model=save or save_model,
            evaluate=evaluate,
            evaluate_every=evaluate_every,
            context=context_of(collectives, self.progress),
            sink=self.sink,
            alarms=Alarms(),
            warmup_iterations=warmup_iterations,
            samples=samples,
        )

    def lines(self, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]

    def iterations(self) -> list[int]:
        return [line["iteration"] for line in self.lines()]

    def damage(self, step: str) -> None:
        (self.folder / "checkpoints" / step / "state.json").write_text("{}")

    def model(self, name: str = "final") -> float:
        return float((self.folder / name / "weight").read_text())

    def steps(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "checkpoints").glob("*"))

    def best(self) -> dict[str, Any]:
        return json.loads((self.folder / "best" / "best.json").read_text())


@pytest.fixture
def bench(tmp_path: Path, default_signals: None) -> Bench:
    return Bench(tmp_path / "run")


# --- a run that nothing disturbs --------------------------------------------------------------------------------------


def test_iterations_come_in_order_and_each_leaves_a_line(bench: Bench):
    last = bench.make(3).train()
    assert bench.lines() == [{"iteration": n, "weight": WEIGHTS[n - 1]} for n in (1, 2, 3)]
    assert bench.sink.logged == [(n, {"weight": WEIGHTS[n - 1]}) for n in (1, 2, 3)]
    assert bench.said.iterations == [1, 2, 3]
    assert last == {"weight": 18.0}
    assert bench.model() == 18.0


def test_progress_is_told_of_checkpoints_and_of_what_is_done_already(bench: Bench):
    bench.make(4, checkpoint_every=2).train()
    bench.make(5, checkpoint_every=2, resume=True).train()
    assert bench.said.begun == [(4, 0), (5, 4)]
    assert bench.said.phases == ["checkpoint", "checkpoint", "checkpoint", "saving", "checkpoint", "saving"]


def test_a_failure_stays_in_the_phase_in_which_it_happened(bench: Bench):
    """Though a checkpoint is written."""
    with pytest.raises(Failure):
        bench.make(hooks={(3, "early"): fail}).train()
    assert bench.steps() == ["step_000001", "step_000002"]
    assert bench.said.phases == ["checkpoint"]


def test_a_failure_saves_nothing_that_other_ranks_would_have_to_bring(bench: Bench):
    """They may be the ones that failed."""
    run = bench.make(hooks={(3, "early"): fail})
    bench.trainer.holds_all = False
    with pytest.raises(Failure):
        run.train()
    assert bench.steps() == ["step_000001"]


def test_the_best_is_what_the_writing_rank_has_seen(bench: Bench):
    """Another may look before it is written."""

    seen_by_the_first = {"metric": "loss", "value": 5.0, "iteration": 1}

    class Second(OneProcess):
        rank, world_size = 1, 2

        def gather(self, x: Any) -> list[Any]:
            return [(seen_by_the_first, x[1]) if isinstance(x, tuple) else x, x]

    saved: list[str] = []

    def save(folder: Path) -> None:
        saved.append(folder.name)

    bench.make(2, losses=[4.0, 6.0], best_metric="loss", collectives=Second(), save=save).train()
    assert saved == [".best.new", ".final.new"]  # 6 beats 5, 4 did not


def test_ranks_that_see_different_checkpoints_are_refused(bench: Bench):
    """A folder that their machines do not share."""
    bench.make(2, checkpoint_every=1).train()

    class First(OneProcess):
        rank, world_size = 0, 2

        def gather(self, x: Any) -> list[Any]:
            return [x, [] if isinstance(x, list) else x]

    run = bench.make(4, resume=True, collectives=First())
    with pytest.raises(
        RunError, match=r"one folder for all ranks.*: rank 1 sees no checkpoint there, and rank 0 step_"
    ):
        run.train()


def test_the_best_goes_by_the_number_of_the_writing_rank(bench: Bench):
    """Others may have measured another, such as a time."""

    class Second(OneProcess):
        rank, world_size = 1, 2

        def gather(self, x: Any) -> list[Any]:
            return [(x[0], math.nan) if isinstance(x, tuple) else x, x]

    saved: list[Path] = []
    bench.make(1, losses=[4.0], best_metric="loss", collectives=Second(), save=saved.append).train()
    assert [folder.name for folder in saved] == [".final.new"]  # 4 is better than none, what is not finite never is


def test_a_rank_that_is_not_the_first_trains_and_writes_nothing(bench: Bench):

    class Second(OneProcess):
        rank, world_size = 1, 2

    saved: list[Path] = []  # whose weights the first rank may need
    run = bench.make(3, best_metric="weight", checkpoint_every=1, collectives=Second(), save=saved.append)
    assert run.train() == {"weight": 18.0}
    assert [folder.name for folder in saved] == [".best.new", ".best.new", ".best.new", ".final.new"]
    assert not bench.folder.exists()
    assert bench.sink.logged == []


def test_a_rank_that_is_not_the_first_does_not_read_what_the_first_is_writing(bench: Bench):
    bench.make(1).train()

    class Second(OneProcess):
        rank, world_size = 1, 2

    def evaluate() -> dict[str, float]:
        with (bench.folder / "metrics.jsonl").open("a") as file:
            file.write('{"iterat')  # as the first rank is about to
        return {"eval/x": 1.0}

    run = bench.make(3, evaluate=evaluate, evaluate_every=1, resume=True, collectives=Second())
    assert run.train()["weight"] == 18.0


def test_what_is_done_already_leaves_the_record_of_its_settings(bench: Bench):
    bench.make(3, settings={"rate": 1.0}).train()
    bench.make(3, settings={"rate": 2.0}, resume=True).train()
    assert json.loads((bench.folder / "config.json").read_text())["settings"] == {"rate": 1.0}
    assert any(
        "nothing is left to learn: 3 iterations done; run.num_iterations asks for 3" in text
        for text in bench.said.messages
    )


def test_numbers_that_json_cannot_hold_become_null(bench: Bench):
    bench.make(3, losses=[float("nan"), float("inf"), -float("inf")]).train()
    text = (bench.folder / "metrics.jsonl").read_text()
    assert [line["loss"] for line in bench.lines()] == [None, None, None]
    assert "NaN" not in text
    assert "Infinity" not in text


@pytest.mark.parametrize(("every", "measured"), [(2, [0, 2, 4, 5]), (9, [0, 5]), (None, [0, 5]), (0, [])])
def test_evaluation_before_the_first_every_so_many_and_after_the_last(
    bench: Bench, every: int | None, measured: list[int]
):
    run = bench.make(5, evaluate=lambda: {"eval/x": float(bench.trainer.iteration)}, evaluate_every=every)
    run.train()
    assert [line["iteration"] for line in bench.lines() if "eval/x" in line] == measured
    assert [line["eval/x"] for line in bench.lines() if "eval/x" in line] == measured
    assert bench.iterations() == [*measured[:1], 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("every", "keep", "steps"),
    [
        (2, 9, ["step_000001", "step_000002", "step_000004", "step_000005"]),
        (2, 1, ["step_000005"]),
        (1, 2, ["step_000004", "step_000005"]),
        (0, 9, ["step_000001", "step_000005"]),
    ],
)
def test_checkpoints_after_the_first_every_so_many_and_at_the_end(
    bench: Bench, every: int, keep: int, steps: list[str]
):
    bench.make(5, checkpoint_every=every, keep_checkpoints=keep).train()
    assert bench.steps() == steps


def test_config_json_says_what_ran(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def git(*arguments: str) -> str:
        name = ("-c", "user.name=n", "-c", "user.email=e")
        return subprocess.run(["git", *name, *arguments], capture_output=True, text=True, check=True).stdout.strip()

    monkeypatch.chdir(tmp_path)
    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "--message", "x")
    (tmp_path / "new").touch()
    bench.make(1, settings={"run": {"seed": 0}}).train()
    said = json.loads((bench.folder / "config.json").read_text())
    assert said["settings"] == {"run": {"seed": 0}}
    assert said["git"] == {"commit": git("rev-parse", "HEAD"), "dirty": True}
    assert said["python"] == platform.python_version()
    assert (
        said["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    )  # "+cu130" is in one alone
    assert said["versions"].keys() >= {"llmrl", "transformers", "accelerate", "peft", "datasets", "safetensors"}
    assert said["versions"]["llmrl"] in (llmrl.__version__, None)


def test_config_json_without_a_repository(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    bench.make(1).train()
    assert json.loads((bench.folder / "config.json").read_text())["git"] == {"commit": None, "dirty": None}


def test_nothing_is_left_half_written(bench: Bench):
    bench.make(2, best_metric="weight").train()
    expected = ["best", "checkpoints", "config.json", "final", "metrics.jsonl"]
    assert sorted(path.name for path in bench.folder.iterdir()) == expected


# --- the best model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "losses", "iteration"),
    [
        ("loss", [1.0, 3.0, 2.0, 3.0], 2),  # the earlier one of two equals
        ("-loss", [3.0, 1.0, 2.0, 1.0], 2),
        ("loss", [-4.0, -3.0, -2.0, -1.0], 4),
        ("-loss", [1.0, 2.0, 3.0, 4.0], 1),
        ("loss", [float("nan"), 1.0, float("nan"), float("inf")], 2),
        ("-loss", [float("nan"), 1.0, float("nan"), -float("inf")], 2),
    ],
)
def test_the_best_model_is_kept(bench: Bench, metric: str, losses: list[float], iteration: int):
    bench.make(4, losses=losses, best_metric=metric).train()
    assert bench.best() == {"metric": "loss", "value": losses[iteration - 1], "iteration": iteration}
    assert bench.model("best") == WEIGHTS[iteration - 1]


@pytest.mark.parametrize(
    ("metric", "first", "best"),
    [("eval/x", 0.1, (0.5, 2)), ("eval/x", 0.9, (0.9, 0)), ("-eval/x", 0.1, (0.1, 0)), ("-eval/x", 0.9, (0.4, 4))],
)
def test_a_metric_of_the_evaluation_can_be_the_best(bench: Bench, metric: str, first: float, best: tuple[float, int]):
    scores = iter([first, 0.5, 0.4])  # before the first iteration, after 2, after 4
    bench.make(4, evaluate=lambda: {"eval/x": next(scores)}, evaluate_every=2, best_metric=metric).train()
    assert bench.best() == {"metric": "eval/x", "value": best[0], "iteration": best[1]}
    assert bench.model("best") == [0.0, *WEIGHTS][best[1]]


@pytest.mark.parametrize(
    ("name", "iteration", "nearest"), [("los", 1, "; did you mean loss?"), ("eval/y", 0, "; did you mean eval/x?")]
)
def test_a_best_metric_that_is_not_measured_ends_the_run_at_once(bench: Bench, name: str, iteration: int, nearest: str):
    run = bench.make(9, losses=[1.0] * 9, evaluate=lambda: {"eval/x": 1.0}, evaluate_every=2, best_metric=name)
    with pytest.raises(RunError) as refused:
        run.train()
    assert str(refused.value).startswith(f"run.best_metric ({name}) is not measured{nearest}; measured are ")
    assert bench.trainer.iteration == iteration
    assert not (bench.folder / "best").exists()


@pytest.mark.parametrize(("name", "warmup_iterations", "iteration"), [("los", 2, 3), ("eval/y", 2, 0)])
def test_a_best_metric_may_be_one_that_a_warm_up_lacks(bench: Bench, name: str, warmup_iterations: int, iteration: int):
    """Of evaluations there is none, so their names are judged at once."""
    run = bench.make(
        9,
        losses=[1.0] * 9,
        evaluate=lambda: {"eval/x": 1.0},
        evaluate_every=1,
        best_metric=name,
        warmup_iterations=warmup_iterations,
    )
    with pytest.raises(RunError, match="is not measured"):
        run.train()
    assert bench.trainer.iteration == iteration


def test_the_best_is_swapped_whole_with_its_record(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    run = bench.make(3, losses=[1.0, 2.0, 3.0], best_metric="loss")
    save = run.save_model

    def fail_at_the_second(folder: Path) -> None:
        save(folder)
        if bench.trainer.iteration == 2:
            raise Failure

    monkeypatch.setattr(run.best, "save_model", fail_at_the_second)
    with pytest.raises(Failure):
        run.train()
    assert bench.best()["iteration"] == 1
    assert bench.model("best") == WEIGHTS[0]


def test_a_best_metric_that_was_measured_once_is_not_told(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    run = bench.make(2, losses=[1.0, 2.0], best_metric="loss")
    statistics = iter([Total(1.0), Mean(0.0, 0.0)])  # a mean over nothing is left out
    real = bench.trainer.iterate
    monkeypatch.setattr(bench.trainer, "iterate", lambda: real() and Metrics({"loss": next(statistics)}))
    run.train()
    assert bench.said.messages == []
    assert bench.best()["iteration"] == 1


def test_the_best_of_iterations_that_are_done_again_counts_no_more(bench: Bench):
    with pytest.raises(Failure):
        bench.make(4, losses=[1.0, 2.0, 9.0], best_metric="loss", checkpoint_every=2, hooks={(4, "late"): fail}).train()
    assert bench.best()["iteration"] == 3
    run = bench.make(4, losses=[1.0, 2.0, 3.0, 4.0], best_metric="loss", resume=True)
    run.prepare()
    assert not (bench.folder / "best").exists()
    run.train()
    assert bench.best() == {"metric": "loss", "value": 4.0, "iteration": 4}


def test_a_resumed_run_remembers_the_best(bench: Bench):
    bench.make(2, losses=[9.0, 1.0], best_metric="loss").train()
    bench.make(4, losses=[0.0, 0.0, 3.0, 4.0], best_metric="loss", resume=True).train()
    assert bench.best() == {"metric": "loss", "value": 9.0, "iteration": 1}
    assert bench.model("best") == 1.0


# --- resume -----------------------------------------------------------------------------------------------------------


def test_a_folder_that_holds_a_run_is_refused_where_none_is_to_go_on(bench: Bench):
    bench.make(2).train()
    before = (bench.folder / "metrics.jsonl").read_text()
    with pytest.raises(RunError, match=r"run\.output_dir \(.*\) already holds a run; leave run\.resume at auto"):
        bench.make(4, resume=False).train()
    assert (bench.folder / "metrics.jsonl").read_text() == before
    (bench.folder / "config.json").unlink()
    with pytest.raises(RunError, match="already holds a run"):
        check_output(RunConfig(output_dir=str(bench.folder), num_iterations=1, resume=False), {})


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path):
    (tmp_path / "run").touch()
    with pytest.raises(RunError, match=r"run\.output_dir \(.*run\) is a file; name a folder"):
        check_output(RunConfig(output_dir=str(tmp_path / "run"), num_iterations=1), {})


def test_resume_goes_on_where_the_run_ended(bench: Bench):
    bench.make(2, checkpoint_every=1, keep_checkpoints=2).train()
    bench.make(4, resume=True).train()
    assert bench.lines() == [{"iteration": n, "weight": WEIGHTS[n - 1]} for n in (1, 2, 3, 4)]
    assert bench.model() == 58.0
    assert any("goes on after iteration 2" in message for message in bench.said.messages)


def test_resume_of_a_run_that_is_done_writes_the_model_and_nothing_else(bench: Bench):
    bench.make(2).train()
    (bench.folder / "final" / "weight").unlink()
    assert bench.make(2, resume=True).train() == {}
    assert bench.model() == 5.0
    assert bench.iterations() == [1, 2]


def test_resume_without_a_checkpoint_starts_anew(bench: Bench):
    with pytest.raises(Failure):
        bench.make(3, hooks={(1, "late"): fail}).train()
    (bench.folder / "samples.jsonl").write_text('{"iteration": 1}\n')
    bench.make(3).train()
    assert bench.iterations() == [1, 2, 3]
    assert bench.lines("samples.jsonl") == []
    assert bench.model() == 18.0


def test_a_run_that_is_to_go_on_where_there_is_none_is_refused(bench: Bench):
    with pytest.raises(RunError, match=r"holds no run; run\.resume=auto begins one"):
        bench.make(2, resume=True).train()
    with pytest.raises(Failure):
        bench.make(2, hooks={(1, "late"): fail}).train()
    with pytest.raises(RunError, match=r"holds no checkpoint; run\.resume=auto begins anew"):
        bench.make(2, resume=True).train()


def test_the_same_command_goes_on(bench: Bench):
    with pytest.raises(Failure):
        bench.make(4, checkpoint_every=2, hooks={(4, "late"): fail}).train()
    bench.make(4, checkpoint_every=2).train()
    assert [line["weight"] for line in bench.lines()] == WEIGHTS[:4]


@pytest.mark.parametrize("resume", ["auto", True])
def test_nothing_is_begun_anew_where_something_was_learned(bench: Bench, resume: Any):
    """Whoever removes checkpoints/ keeps what else the run left."""
    bench.make(3, best_metric="weight").train()
    shutil.rmtree(bench.folder / "checkpoints")
    left = {path: path.read_bytes() for path in bench.folder.rglob("*") if path.is_file()}
    with pytest.raises(
        RunError, match=r"holds final/, best/, metrics\.jsonl of a run, and no checkpoint to go on from"
    ):
        bench.make(5, resume=resume).train()
    shutil.rmtree(bench.folder / "final")
    with pytest.raises(RunError, match=r"holds best/, metrics\.jsonl of a run"):
        check_output(RunConfig(output_dir=str(bench.folder), num_iterations=5, resume=resume), {})
    kept = {path: path.read_bytes() for path in bench.folder.rglob("*") if path.is_file()}
    assert kept == {path: content for path, content in left.items() if path.parent.name != "final"}


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("llmrl.trainers.run.save_checkpoint", lambda *_, **__: fail())
    with pytest.raises(Failure):
        bench.make(3, best_metric="weight").train()
    monkeypatch.undo()
    assert bench.iterations() == [1]
    assert bench.best()["iteration"] == 1
    bench.make(3, best_metric="weight").train()
    assert [line["weight"] for line in bench.lines()] == WEIGHTS[:3]


def test_the_end_of_a_run_is_recorded_until_it_goes_on(bench: Bench):
    def finished() -> int | None:
        return json.loads((bench.folder / "config.json").read_text()).get("finished")

    bench.make(2, settings={"rate": 1.0}).train()
    assert finished() == 2
    with pytest.raises(Failure):
        bench.make(3, settings={"rate": 2.0}, hooks={(3, "late"): fail}).train()
    assert finished() is None


def test_a_checkpoint_is_written_when_the_last_one_is_old(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    """Four seconds an iteration: 4 after the first, then 12 after the fourth."""
    monkeypatch.setattr("llmrl.trainers.run.time.monotonic", lambda: 4.0 * bench.trainer.iteration)
    bench.make(6, checkpoint_every=0, checkpoint_every_s=10.0, keep_checkpoints=9).train()
    assert bench.steps() == ["step_000001", "step_000004", "step_000006"]


def test_of_several_ranks_the_first_one_says_what_is_old(bench: Bench):
    class Second(OneProcess):
        rank, world_size = 1, 2

        def gather(self, x: Any) -> list[Any]:
            asked.append(x)
            return [x is False or x, x]  # it says yes where this one says no

    asked: list[Any] = []
    bench.make(3, checkpoint_every=0, collectives=Second()).train()
    assert bench.said.phases == ["checkpoint", "checkpoint", "checkpoint", "saving"]
    assert False in asked


def test_lines_after_the_checkpoint_are_removed(bench: Bench):
    with pytest.raises(Failure):
        bench.make(6, checkpoint_every=2, hooks={(6, "late"): fail}).train()
    assert bench.iterations() == [1, 2, 3, 4, 5]
    (bench.folder / "samples.jsonl").write_text("".join(f'{{"iteration": {n}, "row": {n}}}\n' for n in (3, 4, 4, 5, 6)))
    with pytest.raises(Failure):
        bench.make(6, resume=True, hooks={(5, "early"): fail}).train()
    assert bench.iterations() == [1, 2, 3, 4]
    assert [line["iteration"] for line in bench.lines("samples.jsonl")] == [3, 4, 4]
    bench.make(6, resume=True).train()
    assert [line["weight"] for line in bench.lines()] == WEIGHTS


def test_changed_settings_are_told(bench: Bench):
    before = {"run": {"seed": 0, "resume": False, "name": None}, "kl": 0.1, "only": {"before": 1}, "pass_at": (1, 2)}
    now = {"run": {"seed": 1, "resume": True, "name": None}, "kl": 0.1, "also": 2, "pass_at": (1, 2)}
    bench.make(1, settings=before).train()
    bench.make(2, settings=now, resume=True).train()
    assert bench.said.messages[:-1] == [
        "changed since the run was last started: also was None, is 2",
        "changed since the run was last started: only.before was 1, is None",
        "changed since the run was last started: run.seed was 0, is 1",
    ]
    assert json.loads((bench.folder / "config.json").read_text())["settings"]["run"]["seed"] == 1


def test_settings_that_cannot_be_compared_are_told(bench: Bench):
    bench.make(1).train()
    (bench.folder / "config.json").unlink()
    bench.make(2, resume=True).train()
    assert "its config.json, by which a run is known again, cannot be read" in bench.said.messages[0]
    assert bench.iterations() == [1, 2]


def test_checkpoints_that_are_all_damaged_stop_the_run_before_it_removes_anything(bench: Bench):
    with pytest.raises(Failure):
        bench.make(4, checkpoint_every=2, hooks={(4, "late"): fail}).train()
    for step in bench.steps():
        bench.damage(step)
    with pytest.raises(CheckpointError, match="is not what was saved"):
        bench.make(4, resume=True).train()
    assert bench.iterations() == [1, 2, 3]
    assert bench.steps() == ["step_000001", "step_000002"]


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(bench: Bench):
    with pytest.raises(Failure):
        bench.make(4, checkpoint_every=1, hooks={(4, "late"): fail}).train()
    assert bench.steps() == ["step_000002", "step_000003"]
    bench.damage("step_000003")
    bench.make(4, checkpoint_every=1, resume=True).train()
    assert any("step_000003 is passed over, and kept as step_000003.damaged" in text for text in bench.said.messages)
    assert [line["weight"] for line in bench.lines()] == WEIGHTS[:4]
    assert bench.steps() == ["step_000003", "step_000003.damaged", "step_000004"]


def test_a_checkpoint_of_the_same_number_may_be_damaged_again(bench: Bench):
    with pytest.raises(Failure):
        bench.make(4, checkpoint_every=1, hooks={(4, "late"): fail}).train()
    for _ in range(2):
        bench.damage("step_000003")
        with pytest.raises(Failure):
            bench.make(4, checkpoint_every=1, hooks={(4, "late"): fail}).train()
    assert bench.steps() == ["step_000002", "step_000003", "step_000003.damaged", "step_000003.damaged2"]
    assert any("kept as step_000003.damaged2" in text for text in bench.said.messages)


def test_the_best_before_the_first_iteration_is_not_that_of_a_run_that_begins_anew(bench: Bench):
    def make(value: float, hooks: Hooks) -> Run:
        return bench.make(2, evaluate=lambda: {"eval/x": value}, evaluate_every=1, best_metric="eval/x", hooks=hooks)

    with pytest.raises(Failure):
        make(9.0, {(1, "late"): fail}).train()
    assert bench.best()["value"] == 9.0
    make(2.0, {}).train()
    assert bench.best() == {"metric": "eval/x", "value": 2.0, "iteration": 0}


def diverge(bench: Bench) -> None:
    bench.trainer.weight = torch.tensor(math.nan)


def test_weights_that_are_not_finite_are_never_saved(bench: Bench):
    run = bench.make(4, checkpoint_every=1, keep_checkpoints=1, hooks={(3, "late"): lambda: diverge(bench)})
    with pytest.raises(
        FloatingPointError, match=r"weight is not finite after iteration 3, and is not saved: .*after iteration 2"
    ):
        run.train()
    assert bench.steps() == ["step_000002"]
    assert not (bench.folder / "final").exists()
    bench.make(4, resume=True).train()
    assert [line["weight"] for line in bench.lines()] == WEIGHTS[:4]


def test_a_rescue_removes_no_checkpoint(bench: Bench):
    with pytest.raises(Failure):
        bench.make(6, checkpoint_every=2, keep_checkpoints=1, hooks={(4, "early"): fail}).train()
    assert bench.steps() == ["step_000002", "step_000003"]


def test_a_rescue_saves_nothing_that_is_not_finite(bench: Bench):
    def fail_diverged() -> None:
        diverge(bench)
        fail()

    with pytest.raises(Failure):
        bench.make(6, checkpoint_every=2, hooks={(4, "early"): fail_diverged}).train()
    assert bench.steps() == ["step_000001", "step_000002"]
    assert (
        "warning: weight is not finite, and is not saved: what was learned after iteration 2 is lost"
        in bench.said.messages
    )


# --- failures ---------------------------------------------------------------------------------------------------------


def test_a_failure_before_the_weights_move_costs_nothing(bench: Bench):
    with pytest.raises(Failure):
        bench.make(4, hooks={(3, "early"): fail}).train()
    assert bench.steps() == ["step_000001", "step_000002"]
    bench.make(4, resume=True).train()
    assert [line["weight"] for line in bench.lines()] == WEIGHTS[:4]
    assert bench.model() == 58.0


def test_a_failure_after_the_weights_moved_saves_nothing(bench: Bench):
    with pytest.raises(Failure):
        bench.make(4, hooks={(3, "late"): fail}).train()
    assert bench.steps() == ["step_000001"]
    with pytest.raises(Failure):
        bench.make(4, checkpoint_every=2, resume=True, hooks={(4, "late"): fail}).train()
    assert bench.steps() == ["step_000001", "step_000002"]
    bench.make(4, resume=True).train()
    assert [line["weight"] for line in bench.lines()] == WEIGHTS[:4]


def test_a_failing_evaluation_loses_neither_the_iteration_nor_its_line(bench: Bench):
    def evaluate() -> dict[str, float]:
        return fail() or {} if bench.trainer.iteration == 2 else {"eval/x": 1.0}

    with pytest.raises(Failure):
        bench.make(4, evaluate=evaluate, evaluate_every=2).train()
    assert bench.steps() == ["step_000001", "step_000002"]
    bench.make(4, evaluate=lambda: {"eval/x": 1.0}, evaluate_every=2, resume=True).train()
    assert [line.get("weight") for line in bench.lines()] == [None, *WEIGHTS[:4]]
    assert [line["iteration"] for line in bench.lines() if "eval/x" in line] == [0, 2, 4]


def test_an_evaluation_that_is_done_is_not_made_again(bench: Bench):
    measured = iter([0.0, 2.0, 4.0])
    bench.make(2, evaluate=lambda: {"eval/x": next(measured)}, evaluate_every=2).train()
    bench.make(4, evaluate=lambda: {"eval/x": next(measured)}, evaluate_every=2, resume=True).train()
    assert [line["eval/x"] for line in bench.lines() if "eval/x" in line] == [0, 2, 4]


def test_a_first_evaluation_that_failed_is_made_again(bench: Bench):
    with pytest.raises(Failure):
        bench.make(2, evaluate=lambda: fail() or {}, evaluate_every=2).train()
    bench.make(2, evaluate=lambda: {"eval/x": 1.0}, evaluate_every=2, resume=True).train()
    assert bench.lines() == [
        {"iteration": 0, "eval/x": 1.0},
        {"iteration": 1, "weight": 1.0},
        {"iteration": 2, "weight": 5.0, "eval/x": 1.0},
    ]


def test_a_checkpoint_that_is_there_is_not_written_again(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(Failure):
        bench.make(4, checkpoint_every=2, hooks={(3, "early"): fail}).train()
    monkeypatch.setattr("llmrl.trainers.run.save_checkpoint", lambda *_, **__: pytest.fail("written twice"))
    with pytest.raises(Failure):
        bench.make(4, resume=True, hooks={(3, "early"): fail}).train()


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(("moment", "done"), [("early", 1), ("late", 2)])
def test_a_signal_ends_the_run_at_once_unless_weights_have_moved(bench: Bench, number: int, moment: str, done: int):
    name = signal.Signals(number).name
    with pytest.raises(Stopped) as stopped:
        bench.make(4, hooks={(2, moment): lambda: signal.raise_signal(number)}).train()
    assert str(stopped.value) == (
        f"stopped by {name} after iteration {done}; the same command goes on from {bench.folder}"
    )
    assert stopped.value.status == 128 + number
    assert bench.said.messages == [f"{name}: stops as soon as everything is saved; a second signal stops at once"]
    assert bench.iterations() == [1, 2][:done]
    assert bench.steps() == [f"step_{number:06d}" for number in range(1, done + 1)]
    assert not (bench.folder / "final").exists()
    bench.make(4, resume=True).train()
    assert [line["weight"] for line in bench.lines()] == WEIGHTS[:4]


def test_code_that_catches_every_exception_does_not_keep_the_run(bench: Bench):
    def catches() -> None:
        terminate()
        try:
            bench.progress.advance(0)
        except Exception:
            pytest.fail("caught")

    with pytest.raises(Stopped, match="SIGTERM after iteration 1"):
        bench.make(4, hooks={(2, "early"): catches}).train()


@pytest.mark.parametrize("iteration", [0, 2, 4])
def test_a_signal_in_an_evaluation_ends_the_run_there_and_it_is_made_again(bench: Bench, iteration: int):
    def evaluate() -> dict[str, float]:
        if bench.trainer.iteration == iteration:
            terminate()
            bench.progress.advance(0)
            pytest.fail("went on")
        return {"eval/x": 1.0}

    with pytest.raises(Stopped, match=f"SIGTERM after iteration {iteration};"):
        bench.make(4, evaluate=evaluate, evaluate_every=2, checkpoint_every=50).train()
    assert bench.steps() == [f"step_{number:06d}" for number in sorted({min(iteration, 1), iteration})]
    bench.make(4, evaluate=lambda: {"eval/x": 1.0}, evaluate_every=2, resume=True).train()
    assert bench.lines() == [
        {"iteration": 0, "eval/x": 1.0},
        {"iteration": 1, "weight": 1.0},
        {"iteration": 2, "weight": 5.0, "eval/x": 1.0},
        {"iteration": 3, "weight": 18.0},
        {"iteration": 4, "weight": 58.0, "eval/x": 1.0},
    ]


def test_a_signal_while_the_model_is_saved_lets_the_run_finish(bench: Bench):
    run = bench.make(2)
    save = run.save_model

    def slowly(folder: Path) -> None:
        terminate()
        bench.progress.advance(0)
        save(folder)

    run.save_model = slowly
    run.train()
    assert bench.model() == 5.0


def test_a_signal_while_a_checkpoint_is_written_ends_the_run_after_it(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    def slowly(*arguments: Any, **options: Any) -> None:
        if bench.trainer.iteration == 2:
            terminate()
        bench.progress.advance(0)
        save_checkpoint(*arguments, **options)

    monkeypatch.setattr("llmrl.trainers.run.save_checkpoint", slowly)
    with pytest.raises(Stopped, match="SIGTERM after iteration 2;"):
        bench.make(4, checkpoint_every=2).train()
    assert bench.steps() == ["step_000001", "step_000002"]


def test_signals_of_a_launcher_that_follow_the_first_count_as_that_one(bench: Bench):
    def thrice() -> None:
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)

    with pytest.raises(Stopped, match="SIGINT after iteration 3;"):
        bench.make(4, hooks={(3, "late"): thrice}).train()


class OtherRank(OneProcess):
    """Collectives with a rank that notes the signal, told like this one at `gather`."""

    world_size = 2

    def gather(self, x: Any) -> list[Any]:
        return [x, x]


def test_ranks_do_not_leave_by_themselves(bench: Bench):
    """One that is not at the same point would wait for ever."""
    with pytest.raises(Stopped, match="SIGTERM after iteration 2;"):
        bench.make(4, hooks={(2, "early"): terminate}, collectives=OtherRank()).train()
    assert bench.iterations() == [1, 2]


def test_ranks_leave_after_the_same_collective(bench: Bench):
    def gather() -> None:
        STOP.look_together([0, signal.SIGUSR1])  # which only another rank has noted

    with pytest.raises(Stopped, match="SIGUSR1 after iteration 1;") as stopped:
        bench.make(4, hooks={(2, "early"): gather}, collectives=OtherRank()).train()
    assert stopped.value.status == 128 + signal.SIGUSR1
    assert bench.steps() == ["step_000001"]


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.mark.parametrize("hooks", [{}, {(1, "early"): fail}, {(1, "early"): terminate}])
def test_the_handlers_are_given_back(bench: Bench, hooks: Hooks):
    before, during = handlers(), []
    run = bench.make(2, hooks={(2, "early"): lambda: during.extend(handlers()), **hooks})
    try:
        run.train()
    except (Failure, Stopped):
        assert hooks
    else:
        assert not set(map(id, during)) & set(map(id, before))
    assert handlers() == before


def test_a_handler_of_user_code_is_replaced_at_the_next_iteration(bench: Bench):
    def ignore() -> None:
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)

    with pytest.raises(Stopped, match="SIGTERM after iteration 1;"):
        bench.make(4, hooks={(1, "late"): ignore, (2, "early"): terminate}).train()


# --- a file system that refuses ---------------------------------------------------------------------------------------


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_model_that_cannot_be_written_is_one_line_and_is_written_after_a_resume(bench: Bench):
    run = bench.make(2)
    run.save_model = full
    with pytest.raises(WriteError, match=r"run/final cannot be written: No space left on device$"):
        run.train()
    assert bench.steps() == ["step_000001", "step_000002"]
    bench.make(2, resume=True).train()
    assert bench.model() == 5.0


def test_the_best_model_is_kept_after_a_failure_to_save_it(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    run = bench.make(4, losses=[1.0, 2.0, 9.0, 3.0], best_metric="loss", checkpoint_every=1)
    save = run.save_model
    monkeypatch.setattr(run.best, "save_model", lambda folder: save(folder) if bench.trainer.iteration < 3 else full())
    with pytest.raises(WriteError, match=r"run/best cannot be written"):
        run.train()
    assert bench.best()["iteration"] == 2
    bench.make(4, losses=[1.0, 2.0, 9.0, 3.0], best_metric="loss", resume=True).train()
    assert bench.best() == {"metric": "loss", "value": 9.0, "iteration": 3}
    assert bench.model("best") == WEIGHTS[2]


def test_a_line_that_a_full_disk_refused_is_no_hole(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    """Nor where the run ends for another reason before the next one."""
    run = bench.make(4, checkpoint_every=0, hooks={(3, "early"): fail})
    with monkeypatch.context() as patch:
        opened, real = [], Path.open

        def refuse_once(path: Path, mode: str = "r", *rest: Any, **named: Any) -> Any:
            if mode == "ab" and bench.trainer.iteration == 2 and not opened:
                opened.append(path)
                full()
            return real(path, mode, *rest, **named)

        patch.setattr(Path, "open", refuse_once)
        with pytest.raises(Failure):
            run.train()
    assert [path.name for path in opened] == ["metrics.jsonl"]
    assert bench.iterations() == [1, 2]
    bench.make(4, resume=True).train()
    assert [line["weight"] for line in bench.lines()] == WEIGHTS[:4]


def test_the_records_are_on_disk_before_the_checkpoint_that_knows_of_them(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
):
    from llmrl.trainers import run as module

    real, seen = module.save_checkpoint, []

    def look(*arguments: Any, **named: Any) -> None:
        seen.append((bench.iterations(), list(run.records.metrics.unsynced)))
        real(*arguments, **named)

    monkeypatch.setattr(module, "save_checkpoint", look)
    run = bench.make(4, checkpoint_every=2)
    run.train()
    assert seen[-2:] == [([1, 2], []), ([1, 2, 3, 4], [])]


@pytest.mark.parametrize("name", ["best", "final"])
def test_a_file_in_the_place_of_a_model_is_refused_before_anything_is_learned(bench: Bench, name: str):
    bench.make(1).train()
    shutil.rmtree(bench.folder / name, ignore_errors=True)
    (bench.folder / name).touch()
    with pytest.raises(RunError, match=f"{name} is a file"):
        bench.make(2, resume=True).train()
    assert bench.iterations() == [1]


def test_what_a_kill_left_of_the_model_at_the_end_is_put_right(bench: Bench):
    bench.make(2).train()
    (bench.folder / "final").rename(bench.folder / ".final.old")
    (bench.folder / ".final.new").mkdir()
    run = bench.make(2, resume=True)
    run.prepare()
    assert bench.model() == 5.0
    assert not list(bench.folder.glob(".final.*"))


def test_a_failure_is_not_hidden_by_a_checkpoint_that_cannot_be_written(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("llmrl.trainers.checkpoint.flush_to_disk", full)
    with pytest.raises(Failure):
        bench.make(2, hooks={(1, "early"): fail}).train()
    (said,) = bench.said.messages
    assert said.startswith("warning: ")
    assert "step_000000 cannot be written: No space left on device (4 B needed, " in said
    assert said.endswith(" free): no checkpoint was written yet")
    assert bench.steps() == []


def test_a_line_that_cannot_be_written_is_one_line(bench: Bench):
    run = bench.make(2, hooks={(1, "late"): lambda: (bench.folder / "metrics.jsonl").mkdir()})
    with pytest.raises(WriteError, match=r"metrics\.jsonl cannot be written: Is a directory"):
        run.train()


def test_lines_that_cannot_be_read_are_told_before_a_resume(bench: Bench):
    bench.make(2).train()
    file = bench.folder / "metrics.jsonl"
    file.write_bytes(b"\xff\n[]\n" + file.read_bytes())
    bench.make(3, resume=True).train()
    assert f"{file}: 2 lines that could not be read removed: 1 to 2" in bench.said.messages
    assert bench.iterations() == [1, 2, 3]


def test_the_record_of_a_run_that_is_torn_is_told(bench: Bench):
    bench.make(2).train()
    (bench.folder / "config.json").write_text("{")
    bench.make(3, resume=True).train()
    assert "its config.json, by which a run is known again, cannot be read" in bench.said.messages[0]


def test_the_folder_stays_the_same_when_a_reward_changes_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    bench = Bench(Path("run"))
    run = bench.make(3, checkpoint_every=1, hooks={(2, "early"): lambda: os.chdir("elsewhere")})
    run.train()
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert (tmp_path / "run" / "final").is_dir()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3


# --- trackers ---------------------------------------------------------------------------------------------------------


def test_a_tracker_begins_where_the_run_stands_and_sees_all_that_was_before(bench: Bench):
    bench.make(2, settings={"rate": 1.0}, evaluate=lambda: {"eval/x": 0.5}, evaluate_every=2).train()
    bench.sink.logged.clear()
    bench.make(3, settings={"rate": 2.0}, resume=True).train()
    assert bench.sink.begun == [(0, {"rate": 1.0}), (2, {"rate": 2.0})]
    assert [number for number, _ in bench.sink.logged] == [0, 1, 2, 3]
    assert bench.sink.logged[2] == (2, {"weight": 5.0, "eval/x": 0.5})


def test_a_tracker_is_sent_an_iteration_with_its_evaluation_though_that_failed_at_first(bench: Bench):
    def evaluate() -> dict[str, float]:
        return fail() or {} if bench.trainer.iteration == 2 else {"eval/x": 1.0}

    with pytest.raises(Failure):
        bench.make(4, evaluate=evaluate, evaluate_every=2).train()
    assert [number for number, _ in bench.sink.logged] == [0, 1]
    bench.make(2, evaluate=lambda: {"eval/x": 1.0}, evaluate_every=2, resume=True).train()
    assert bench.sink.logged[-1] == (2, {"weight": 5.0, "eval/x": 1.0})


def test_a_tracker_that_does_not_start_leaves_no_run_behind(bench: Bench):
    run = bench.make(2)
    run.sink.begin = lambda *_: fail()  # type: ignore[method-assign]
    with pytest.raises(Failure):
        run.train()
    bench.sink = Sink()
    bench.make(2).train()


def test_a_new_run_takes_nothing_from_the_trackers_of_one_that_was_removed(bench: Bench):
    bench.folder.mkdir()
    (bench.folder / "trackers.json").write_text("{}")
    bench.make(1).train()
    assert not (bench.folder / "trackers.json").exists()
    (bench.folder / "trackers.json").write_text("{}")
    bench.make(2, resume=True).train()
    assert (bench.folder / "trackers.json").exists()


# --- warnings ---------------------------------------------------------------------------------------------------------


def test_a_run_that_broke_says_so_once_and_at_its_end_and_names_the_best_model(bench: Bench):
    bench.make(6, losses=[2.0, 1.0, 90.0, 91.0, 92.0, 93.0], best_metric="-loss").train()
    warnings = [text for text in bench.said.messages if text.startswith("warning: the loss has exploded")]
    assert [text.split(",")[0] for text in warnings] == [
        "warning: the loss has exploded: 92",
        "warning: the loss has exploded: 93",
    ]
    assert bench.said.messages[-1] == (
        f"{bench.folder / 'best'} holds the model with the best loss, 1 after iteration 2: use that rather than "
        f"{bench.folder / 'final'}"
    )


def test_a_resumed_run_does_not_warn_again_before_its_end(bench: Bench):
    losses = [2.0, 90.0, 91.0, 92.0, 93.0, 94.0]
    bench.make(5, losses=losses, checkpoint_every=5).train()
    bench.said.messages.clear()
    bench.make(6, losses=losses, resume=True).train()
    assert len([text for text in bench.said.messages if "exploded: 94, 2 at the start" in text]) == 1


def unscored(bench: Bench, num_iterations: int, *, until: int = 1000, **config: Any) -> Run:
    """A run whose rewards score nothing in iterations up to one."""
    run, iterate = bench.make(num_iterations, **config), bench.trainer.iterate

    def without_scores() -> Metrics:
        metrics = iterate()
        if bench.trainer.iteration > until:
            return metrics.merge(Metrics({"score": Moments(1.0, 0.5, 0.25)}))
        return metrics.merge(Metrics({"score/unscored": Total(3.0)}))

    bench.trainer.iterate = without_scores  # type: ignore[method-assign]
    return run


def test_a_run_in_which_nothing_can_be_learned_ends_with_all_it_has(bench: Bench):
    with pytest.raises(NothingLearned, match=r"^stopped after iteration 10: no response could be scored in 10 iterat"):
        unscored(bench, 30).train()
    assert bench.iterations() == list(range(1, NEVER_SCORED + 1))
    assert bench.steps() == ["step_000001", "step_000010"]
    assert not (bench.folder / "final").exists()


def test_it_gets_as_many_iterations_again_when_it_goes_on(bench: Bench):
    for ends in (10, 20):
        with pytest.raises(NothingLearned, match=f"after iteration {ends}: "):
            unscored(bench, 30).train()
    unscored(bench, 30, until=25, resume=True).train()
    assert bench.iterations() == list(range(1, 31))
    assert (bench.folder / "final").exists()


def test_iterations_before_a_failure_count_as_well(bench: Bench):
    with pytest.raises(Failure):
        unscored(bench, 30, hooks={(7, "early"): fail}).train()
    with pytest.raises(NothingLearned, match="after iteration 10: "):
        unscored(bench, 30, resume=True).train()


def test_what_the_last_iteration_warned_of_is_not_repeated_at_once(bench: Bench):
    unscored(bench, 1).train()
    assert len([text for text in bench.said.messages if "could be scored in 1 iteration," in text]) == 1


def test_what_an_earlier_iteration_warned_of_is_repeated_at_the_end(bench: Bench):
    unscored(bench, 2).train()
    texts = [text for text in bench.said.messages if "could be scored" in text]
    assert ["1 iteration," in text for text in texts] == [True, False]


def test_iterations_that_are_left_between_two_are_saved(bench):
    """By hand: 3w + n after one and after two iterations."""
    run = bench.make(checkpoint_every=0)
    run.prepare()
    steps = run.iterations()
    assert [next(steps)["weight"], next(steps)["weight"]] == WEIGHTS[:2]
    assert not (bench.folder / "checkpoints" / "step_000002").exists()
    steps.close()
    assert (bench.folder / "checkpoints" / "step_000002").exists()
    assert not (bench.folder / "final").exists()
    bench.make().train()
    assert bench.model() == WEIGHTS[3]


@pytest.mark.parametrize("leaves", [{0}, {1}, {0, 1}])
def test_a_loop_that_some_ranks_leave_ends_on_all_and_what_was_learned_is_kept(tmp_path, default_signals, leaves):
    """The others would wait for them in their next iteration."""

    def drive(collectives: Collectives) -> str:
        run = Bench(tmp_path / "run").make(collectives=collectives, checkpoint_every=0)
        run.prepare()
        steps = run.iterations()
        next(steps), next(steps)
        try:
            steps.close() if collectives.rank in leaves else next(steps)
        except RunError as error:
            return str(error)
        return "left"

    said = on_ranks(2, drive)
    assert Bench(tmp_path / "run").steps() == ["step_000001", "step_000002"]
    if leaves == {0, 1}:
        assert said == ["left", "left"]
    else:
        assert (
            said
            == [
                f"the loop over this run was left after iteration 2 on rank {min(leaves)} of 2 alone, by an error or a "
                "break in its body; leave it on every rank after the same iteration"
            ]
            * 2
        )


def test_a_signal_in_an_iteration_comes_before_its_metrics(bench):
    """The caller of `iterations` is not asked for more work first."""
    run = bench.make(hooks={(2, "late"): terminate})
    run.prepare()
    steps = run.iterations()
    with STOP.listening(raises=False):
        assert next(steps)["weight"] == WEIGHTS[0]
        with pytest.raises(Stopped):
            next(steps)
    assert (bench.folder / "checkpoints" / "step_000002").exists()
