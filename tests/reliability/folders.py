"""Starts in folders that are another's, or are written by another process: refused, and not a byte is changed."""

import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.processes import TINY
from tests.reliability.commands import Command, run
from tests.reliability.runs import TRAINERS, difference, has_traceback, new_folder, undisturbed


@dataclass(frozen=True, kw_only=True)
class Case:
    """What lies in the output folder, and what the command then says."""

    says: str
    prepare: Callable[[Path], object] = lambda folder: None
    """Called with the working folder, in which `out` is the output folder."""
    overrides: tuple[str, ...] = ()
    after_run: bool = False
    """Whether `out` is that of a run that has come to its end."""
    status: int = 2


def put(name: str, content: str = "{}") -> Callable[[Path], None]:
    """Writes a file."""

    def prepare(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)

    return prepare


def drop(*names: str) -> Callable[[Path], None]:
    """Removes folders of the output folder."""
    return lambda folder: [shutil.rmtree(folder / "out" / name) for name in names]


def with_model(place: str) -> Callable[[Path], object]:
    """Copies a model to a place."""
    return lambda folder: shutil.copytree(TINY, folder / place)


def edit(name: str, change: Callable[[str], str]) -> Callable[[Path], None]:
    """Changes a file."""
    return lambda folder: (folder / name).write_text(change((folder / name).read_text())) and None


def reverse(text: str) -> str:
    return "".join(reversed(text.splitlines(keepends=True)))


def of_another_torch(text: str) -> str:
    record = json.loads(text)
    return json.dumps(record | {"versions": record["versions"] | {"torch": "1.0"}})


def own_model(folder: Path) -> None:
    """Runs on a model of its own, which then changes."""
    shutil.copytree(TINY, folder / "model")
    assert run(folder, "grpo", "grpo.yaml", "model.path=model").status == 0
    with (folder / "model" / "config.json").open("a") as file:
        file.write("\n")


CASES: dict[str, Case] = {
    "the model that is read": Case(
        prepare=with_model("out"), overrides=("model.path=out",), says="which the run reads; choose another folder"
    ),
    "inside the model that is read": Case(
        prepare=with_model("m"), overrides=("model.path=m", "run.output_dir=m/out"), says="is inside model.path"
    ),
    "another model": Case(prepare=with_model("out"), says="which no run of llmrl wrote there"),
    "an adapter": Case(prepare=put("out/adapter_config.json"), says="holds adapter_config.json"),
    "weights": Case(prepare=put("out/w.safetensors"), says="holds w.safetensors"),
    "another's final/": Case(prepare=put("out/final/notes"), says="holds final"),
    "another's best/": Case(prepare=put("out/best/notes"), says="holds best"),
    "another's metrics": Case(prepare=put("out/metrics.jsonl", '{"step": 3}\n'), says="holds metrics.jsonl"),
    "another's checkpoint": Case(prepare=put("out/checkpoints/step_000100/pytorch_model.bin"), says="cannot be read"),
    "another's config": Case(prepare=put("out/config.json", '{"lr": 1}'), says="holds config.json"),
    "a file": Case(prepare=put("out", "text"), says="is a file; name a folder"),
    "a finished run": Case(after_run=True, status=0, says="Nothing is left to learn"),
    "a finished run without checkpoints": Case(
        after_run=True, prepare=drop("checkpoints"), status=0, says="Nothing is left to learn"
    ),
    "a finished run without checkpoints, to go on": Case(
        after_run=True, prepare=drop("checkpoints"), overrides=("run.num_iterations=6",), says="no checkpoint"
    ),
    "a run without checkpoints and final/": Case(
        after_run=True, prepare=drop("checkpoints", "final"), says="no checkpoint to go on from"
    ),
    "a run, to begin anew": Case(after_run=True, overrides=("run.resume=false",), says="already holds a run"),
    "no run, to go on": Case(overrides=("run.resume=true",), says="holds no run"),
    "another learning rate": Case(
        after_run=True, overrides=("optimizer.learning_rate=0.1",), says="optimizer.learning_rate was 0.0002, is 0.1"
    ),
    "another reward": Case(
        after_run=True,
        prepare=edit("rule.py", lambda text: text + "# more\n"),
        status=0,
        says="changed since the run was last started: the content of reward.functions.0 is another",
    ),
    "one more reward": Case(
        after_run=True,
        overrides=("reward.functions=[{name: 'rule.py:rule'}, {name: 'rule.py:rule2', weight: 5}]",),
        prepare=edit("rule.py", lambda text: text + text.replace("rule", "rule2")),
        says="reward.functions.1.name was None, is rule.py:rule2",
    ),
    "no record": Case(
        after_run=True,
        prepare=lambda folder: (folder / "out" / "config.json").unlink(),
        says="its config.json, by which a run is known again, cannot be read",
    ),
    "another order of the data": Case(
        after_run=True, prepare=edit("rows.jsonl", reverse), says="the content of data is another"
    ),
    "other data, all the same": Case(
        after_run=True,
        prepare=edit("rows.jsonl", reverse),
        overrides=("run.resume=true", "run.num_iterations=6"),
        says="content or their order has changed",
    ),
    "another base model": Case(
        prepare=own_model, overrides=("model.path=model",), says="the content of model.path is another"
    ),
    "another torch": Case(
        after_run=True,
        prepare=edit("out/config.json", of_another_torch),
        status=0,
        says="the version of torch was 1.0, is ",
    ),
}


def trials(seed: int, num: int, work: Path) -> Iterator[dict[str, Any]]:
    """Second starts with each trainer, then every case; the seed has no part in them."""
    yield from list(_all(work))[:num]


def _all(work: Path) -> Iterator[dict[str, Any]]:
    yield from (_second_start(trainer, work) for trainer in TRAINERS)
    for name, case in CASES.items():
        folder = new_folder(work, "foreign")
        if case.after_run:
            shutil.copytree(undisturbed("grpo", work).folder / "out", folder / "out", symlinks=True)
        case.prepare(folder)
        before = tree(folder / "out")
        ended = run(folder, "grpo", "grpo.yaml", *case.overrides)
        wrong = None if ended.status == case.status and case.says in ended.told else f"{ended.status}: {ended.told}"
        if has_traceback(ended.told):
            wrong = ended.told
        if tree(folder / "out") != before:
            wrong = f"changed: {tree(folder / 'out').keys() ^ before.keys()}"
        yield {"case": name, "wrong": wrong}


def _second_start(trainer: str, work: Path) -> dict[str, Any]:
    """A start while another process writes the folder, which is stopped there for as long."""
    folder = new_folder(work, "twice")
    first = Command(folder, trainer, f"{trainer}.yaml")
    while not first.is_over and not (folder / "out" / "metrics.jsonl").exists():
        time.sleep(0.002)
    first.send(signal.SIGSTOP)
    (folder / "output.txt").rename(folder / "first.txt")
    before = tree(folder / "out")
    second = run(folder, trainer, f"{trainer}.yaml")
    is_untouched = tree(folder / "out") == before
    first.send(signal.SIGCONT)
    first.output = folder / "first.txt"
    ended = first.wait()
    wrong = difference(folder / "out", undisturbed(trainer, work).left)
    if second.status != 2 or "is being written by another process" not in second.told or not is_untouched:
        wrong = f"{second.status}: {second.told}"
    if ended.status:
        wrong = f"the first ended with {ended.status}: {ended.told}"
    return {"case": f"a second start of {trainer}", "wrong": wrong}


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder, or the file that it is, with a digest; folders with none."""
    paths = [folder, *sorted(folder.rglob("*"))] if os.path.lexists(folder) else []
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in paths
        if path.name != ".lock"
    }
