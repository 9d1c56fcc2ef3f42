"""The metrics of a run, sent to TensorBoard, Weights & Biases or Trackio: one run there, each iteration once.

`metrics.jsonl` is what counts. trackers.json in the run's folder notes which run a tracker has, and the last iteration
that it was sent, so that a resumed run continues there: TensorBoard drops what came after the checkpoint, the other two
keep what they were sent first, which is the same unless settings have changed.
"""

import io
import json
import os
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable
from uuid import uuid4

from llmrl.errors import Error
from llmrl.files import WriteError, read_object, write_atomically
from llmrl.messages import counted

TrackerName = Literal["tensorboard", "wandb", "trackio"]

WAYS_OUT = {
    "tensorboard": "leave it out",
    "wandb": "run `wandb login`, set WANDB_MODE=offline, which sends nothing before `wandb sync`, or leave it out",
    "trackio": "leave it out",
}
"""What to do about a tracker that does not start."""

MAX_WAITING = 1000
"""Iterations that are kept for a tracker that fails. With one more it receives nothing more."""
FINISH_S = 600
"""Seconds that a tracker may take at the end of a run to send what it has."""


class TrackerError(Error, ValueError):
    """A tracker that does not start."""


@dataclass(frozen=True, kw_only=True)
class TrackerConfig:
    """Who else receives the metrics. `metrics.jsonl` has them in any case."""

    names: tuple[TrackerName, ...] = ()
    """Trackers, each from the extra of its name."""
    project: str = "llmrl"
    """Project at Weights & Biases and Trackio; the run is called by the last part of its output folder."""


@runtime_checkable
class Tracker(Protocol):
    """One tracker, open."""

    last: int
    """The last iteration that it has; -1 for none."""

    def log(self, iteration: int, values: Mapping[str, float]) -> None: ...

    def finish(self, *, failed: bool) -> None: ...


class Trackers:
    """Every tracker that the config names, as one. Made on the main process only, and used as a context manager.

    A missing package is reported when this is made; folders and remote runs are made by `begin`.

    Raises:
        TrackerError: A package is missing.
    """

    def __init__(self, config: TrackerConfig, *, output_dir: Path) -> None:
        self.project = config.project
        self.folder = output_dir.absolute()
        self.names = tuple(dict.fromkeys(config.names))
        self.open: dict[str, Tracker] = {}
        self.record: dict[str, Any] = {}
        """Per tracker: its run, and the last iteration sent to it. Kept when a tracker fails."""
        self.waiting: dict[str, dict[int, dict[str, float]]] = {}
        """Per tracker: the metrics of iterations that it could not be sent."""
        self.is_unnoted = False
        """Whether trackers.json could not be written."""
        self.failures: dict[str, list[str]] = {}
        """Per tracker: what it raised."""
        self.tell: Callable[[str], None] = print
        for name in self.names:
            spec = find_spec(name)
            if spec is None or spec.origin is None:  # a folder of that name is no package
                raise TrackerError(
                    f'trackers.names ({name}) needs a package that is missing; pip install "llmrl[{name}]"'
                )

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._send()
        for name, tracker in self.open.items():
            try:
                tracker.finish(failed=kind is not None)
            except (Exception, SystemExit) as error:  # a library's, whatever it is
                self.tell(f"warning: trackers.names ({name}) did not finish: {_first_line(error)}")
        for name, errors in self.failures.items():
            lacks = counted(len(self.waiting[name]), "iteration") if self.waiting[name] else "none of the iterations"
            self.tell(
                f"warning: trackers.names ({name}) failed {counted(len(errors), 'time')}, last: {errors[-1]}; it lacks "
                f"{lacks}, and metrics.jsonl none"
            )

    def begin(self, num_done: int, settings: Mapping[str, Any], tell: Callable[[str], None]) -> None:
        """Opens every tracker; `num_done` iterations were done before a resume. `tell` receives messages.

        Raises:
            TrackerError: One does not start.
        """
        self.tell = tell
        self.record = read_object(self.folder / "trackers.json") or {}
        for name in self.names:
            known = self.record[name] = _known(self.record.get(name)) or {"id": uuid4().hex[:8], "last": -1}
            try:
                self.open[name] = self._start(name, known["id"], known["last"], num_done, dict(settings))
            except (Exception, SystemExit) as error:  # a library's, whatever it is
                raise TrackerError(
                    f"trackers.names ({name}) does not start: {_first_line(error)}; {WAYS_OUT[name]}"
                ) from error
            if self.open[name].last > num_done:
                tell(f"{name} has iterations up to {self.open[name].last} from before: it is not sent them again")
            self.waiting[name] = {}
        if self.open:
            self._note(syncs=True)

    def log(self, iteration: int, values: Mapping[str, float]) -> None:
        """The metrics of an iteration, to the trackers that lack it. What one fails to take is sent with the next."""
        lacking = [name for name, tracker in self.open.items() if iteration > tracker.last]
        for name in lacking:
            self.waiting[name][iteration] = dict(values)
        if not lacking:
            return
        self._send()
        try:
            self._note(syncs=False)
        except WriteError as error:
            if not self.is_unnoted:
                self.tell(f"warning: {error}; a resumed run may send trackers what they have already")
            self.is_unnoted = True

    def _send(self) -> None:
        """Sends every tracker the iterations that wait for it, oldest first."""
        for name, tracker in list(self.open.items()):
            waiting = self.waiting[name]
            try:
                for iteration in list(waiting):
                    tracker.log(iteration, waiting[iteration])
                    tracker.last = iteration
                    del waiting[iteration]
            except (Exception, SystemExit) as error:  # a library's, whatever it is
                self._count_failure(name, _first_line(error))

    def _count_failure(self, name: str, problem: str) -> None:
        """Reports the first failure of a tracker, and the one after which it receives nothing more."""
        errors = self.failures.setdefault(name, [])
        errors.append(problem)
        if len(errors) == 1:
            self.tell(
                f"warning: trackers.names ({name}) failed: {problem}; it gets what it lacks with the next iteration, "
                "and metrics.jsonl has everything"
            )
        if len(self.waiting[name]) > MAX_WAITING:
            del self.open[name]
            self.tell(f"warning: trackers.names ({name}) lacks {MAX_WAITING} iterations and receives nothing more")

    def _start(self, name: str, run_id: str, last: int, num_done: int, settings: dict[str, Any]) -> Tracker:
        match name:
            case "tensorboard":
                return TensorBoard(self.folder, min(last, num_done or -1), settings)
            case "wandb":
                return WandB(self.folder, self.project, run_id, last, settings)
        return Trackio(self.folder, self.project, run_id, last, settings)

    def _note(self, *, syncs: bool) -> None:
        """Writes the record, which a resumed run continues from."""
        for name, tracker in self.open.items():
            self.record[name]["last"] = tracker.last
        write_atomically(self.folder / "trackers.json", self.record, syncs=syncs)


class TensorBoard:
    """Event files in tensorboard/, on disk after every iteration."""

    def __init__(self, folder: Path, last: int, settings: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        events = folder / "tensorboard"
        self.last = last if events.exists() else -1
        self.writer = SummaryWriter(str(events), purge_step=self.last + 1)
        indented = json.dumps(settings, indent=1).replace("\n", "\n    ")
        self.writer.add_text("settings", f"    {indented}", global_step=self.last + 1)
        self.writer.flush()

    def log(self, iteration: int, values: Mapping[str, float]) -> None:
        """Scalars."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, global_step=iteration)
        self.writer.flush()

    def finish(self, *, failed: bool) -> None:
        """Closes the file."""
        self.writer.close()


class WandB:
    """A run at Weights & Biases, with the id that trackers.json holds."""

    def __init__(self, folder: Path, project: str, run_id: str, last: int, settings: dict[str, Any]) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")  # else it may ask for a key, under the live display
        os.environ.setdefault("WANDB__TRANSACTION_LOG_FLUSH_INTERVAL", "0.1")  # 15 s of an offline run could be lost
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", str(FINISH_S))  # else it waits for a network for ever
        os.environ.setdefault("WANDB_FINISH_TIMEOUT_RAISES", "true")
        import wandb

        self.last = last
        self.run = wandb.init(
            project=project, name=folder.name, id=run_id, resume="allow", dir=str(folder), config=settings
        )

    def log(self, iteration: int, values: Mapping[str, float]) -> None:
        """Committed at once, so that a crash does not lose it."""
        self.run.log(dict(values), step=iteration, commit=True)

    def finish(self, *, failed: bool) -> None:
        """Waits until everything is sent."""
        if failed:
            self.run.finish(exit_code=1)
        else:
            self.run.finish()


class Trackio:
    """A run at Trackio. It is found by its name, so the id is a part of that."""

    def __init__(self, folder: Path, project: str, run_id: str, last: int, settings: dict[str, Any]) -> None:
        import trackio

        with redirect_stdout(io.StringIO()):
            self.run = trackio.init(project=project, name=f"{folder.name}-{run_id}", resume="allow", config=settings)
        # It writes twice a second: after a crash it may have less than it was sent, and knows.
        self.last = getattr(self.run, "_next_step", last + 1) - 1 if last >= 0 else -1

    def log(self, iteration: int, values: Mapping[str, float]) -> None:
        """Queued, and written soon."""
        self.run.log(dict(values), step=iteration)

    def finish(self, *, failed: bool) -> None:
        """Writes what is queued."""
        import trackio

        with redirect_stdout(io.StringIO()):
            trackio.finish()  # the run's own method would be called again, and heard, as the process ends


def _known(entry: Any) -> dict[str, Any] | None:
    """The entry of a tracker in trackers.json; None where it is none."""
    is_known = isinstance(entry, dict) and isinstance(entry.get("id"), str) and isinstance(entry.get("last"), int)
    return entry if is_known else None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
