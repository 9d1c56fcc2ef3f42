"""A run: iterations in order, and everything that they leave in the output folder.

config.json         every setting resolved, versions, git state
metrics.jsonl       one line an iteration
samples.jsonl       some responses of each iteration
trackers.json       which runs of trackers belong to it
checkpoints/        what resume continues from
best/               the model with the best value of `run.best_metric`
final/              the model at the end; each with its model card, README.md
"""

import json
import signal
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from llmrl.distributed.context import Context
from llmrl.distributed.stop import STOP, Interrupted, install
from llmrl.errors import Error
from llmrl.files import WriteError, replaced_folder, restore_folder, staged, writing
from llmrl.lines import LineFile, Lines
from llmrl.messages import counted, format_evaluation
from llmrl.roles import Trainer
from llmrl.trainers.alarms import Alarms, NothingLearned
from llmrl.trainers.best import BestModel
from llmrl.trainers.changes import changes_in
from llmrl.trainers.checkpoint import (
    iteration_of,
    list_checkpoints,
    newest_sound,
    not_finite,
    read_state,
    save_checkpoint,
    set_aside,
)
from llmrl.trainers.config import OutputConfig, RunConfig
from llmrl.trainers.output import RunError, check_folder, check_models, check_nothing_is_lost, is_run
from llmrl.trainers.records import Records


class Stopped(Error):
    """A signal ended the run; everything up to an iteration's end is saved."""

    def __init__(self, signal_number: int, iteration: int, output_dir: Path) -> None:
        super().__init__(
            f"stopped by {signal.Signals(signal_number).name} after iteration {iteration}; "
            f"the same command goes on from {output_dir}"
        )
        self.status = 128 + signal_number


@runtime_checkable
class MetricsSink(Protocol):
    """Receives the metrics besides metrics.jsonl: the trackers."""

    def begin(self, num_done: int, settings: Mapping[str, Any], tell: Callable[[str], None]) -> None:
        """Called once, before the first iteration of this process; `num_done` were done before a resume."""
        ...

    def log(self, iteration: int, values: Mapping[str, float]) -> None:
        """Receives the metrics of an iteration; passes over those that it has already."""
        ...


def check_output(config: OutputConfig, inputs: Mapping[str, str]) -> None:
    """See `check_folder` and `check_models`."""
    check_folder(Path(config.output_dir), resume=config.resume, inputs=inputs)
    check_models(Path(config.output_dir))


class Run:
    """Drives a trainer from its current iteration to the last one."""

    def __init__(
        self,
        config: RunConfig,
        *,
        settings: Mapping[str, Any],
        contents: Mapping[str, str],
        trainer: Trainer,
        save_model: Callable[[Path], None],
        evaluate: Callable[[], dict[str, float]] | None,
        evaluate_every: int | None,
        context: Context,
        sink: MetricsSink,
        alarms: Alarms,
        warmup_iterations: int,
        samples: LineFile | None,
        card: Callable[[Lines], str],
    ) -> None:
        self.config = config
        self.collectives = context.collectives
        self.keeps_records = self.collectives.is_first
        """Whether this rank writes the records: every rank trains, one of them writes."""
        self.settings = settings
        self.contents = contents
        """Digests of what the run reads, by what it is."""
        self.trainer = trainer
        self.save_model = save_model
        self.card = card
        """Model card from the metrics so far, as ``(iteration, values)``."""
        self.evaluate = evaluate
        self.evaluate_every = config.num_iterations if evaluate_every is None else evaluate_every
        """Iterations between evaluations; before the first and after the last one in any case, unless it is 0."""
        self.progress = context.progress
        self.sink = sink
        self.alarms = alarms
        """Warnings that a run is dead or broken."""
        self.latest_warnings: list[str] = []
        """Those printed after the last iteration of this process."""
        self.folder = config.folder
        self.records = Records(self.folder, settings, contents, self.progress, samples)
        self.best = BestModel(
            self.folder,
            metric=config.best_metric,
            warmup_iterations=warmup_iterations,
            save_model=self.save,
            collectives=self.collectives,
            report=self.progress.message,
        )
        self.stop_signal: int | None = None
        """The signal by which all ranks stop."""
        self.saved_at = time.monotonic()
        """When the last checkpoint was written, or this process began, by its own clock."""

    def train(self) -> dict[str, float]:
        """Runs every iteration that is left. Returns the metrics of the last one. See `iterations`."""
        last: dict[str, float] = {}
        self.prepare()
        with STOP.listening(raises=False):
            for values in self.iterations():
                last = values
        return last

    def iterations(self) -> Generator[dict[str, float], None, None]:
        """Runs every iteration that is left, after `prepare`, and yields the metrics of each. Each step of it belongs
        in a context of `STOP.listening`.

        Whatever ends it early, what was learned is kept: a signal or an error before an iteration's first optimizer
        step puts the trainer back to its start, a later signal waits for its end, and in all cases a checkpoint is
        written. So it is where the caller closes it between two iterations.

        Raises:
            Stopped: By a signal. One that comes when the last iteration is done does not stop the saving of the model.
            WriteError: A file cannot be written.
            NothingLearned: There is nothing to learn.
        """
        self.progress.begin(self.config.num_iterations, self.trainer.iteration)
        try:
            yield from self.run_iterations()
        except GeneratorExit:
            self.checkpoint()
            raise
        except BaseException as error:
            if self.keeps_records:
                self.records.sync_or_report()  # what had no room before may have some now
            self.rescue(error)
            raise
        if self.stop_signal is not None:
            raise Stopped(self.stop_signal, self.trainer.iteration, self.folder)
        self.progress.phase("saving", 1)
        self.save_final()
        if self.keeps_records:
            self.records.mark_finished(self.trainer.iteration)
        self.collectives.barrier()  # no rank leaves before it is saved
        self.progress.advance()
        self.conclude()

    def run_iterations(self) -> Generator[dict[str, float], None, None]:
        """Runs every iteration that is left, or until a signal stops them: then the state is saved. Yields the metrics
        of each."""
        try:
            self.catch_up()
            self.replay()
            is_over = self.is_over()
            while not is_over:
                install(STOP.handle)  # a reward function may have put another handler there
                values = self.iterate()
                is_over = self.is_over()
                if self.stop_signal is None:
                    yield from self.handed_over(values)
        except Interrupted as interrupted:
            self.stop_signal = interrupted.number
            self.trainer.rewind()
        if self.stop_signal is not None:
            if line := STOP.notice():
                self.progress.message(line)
            self.checkpoint()

    def handed_over(self, values: dict[str, float]) -> Generator[dict[str, float], None, None]:
        """Yields the metrics to the loop over the run. Collective: waits for the loop's body on every rank.

        Raises:
            RunError: Some ranks have left the loop there, and others go on.
        """
        leaving: int | None = self.collectives.rank
        try:
            yield values
            leaving = None
        finally:
            ranks = [rank for rank in self.collectives.gather(leaving) if rank is not None]
            if 0 < len(ranks) < self.collectives.world_size:
                raise RunError(
                    f"the loop over this run was left after iteration {self.trainer.iteration} on "
                    f"rank {', '.join(map(str, ranks))} of {self.collectives.world_size} alone, by an error or a break "
                    "in its body; leave it on every rank after the same iteration"
                )

    def save(self, folder: Path) -> None:
        """Writes the model, with its card. Collective; the folder may be half written after a failure."""
        self.save_model(folder)
        if self.keeps_records:
            (folder / "README.md").write_text(self.card(self.records.lines()), encoding="utf-8")

    def save_final(self) -> None:
        """Writes final/, whole or not at all. Collective."""
        final = self.folder / "final"
        if not self.keeps_records:
            self.save(staged(final))
            return
        with replaced_folder(final) as new:
            self.save(new)

    def conclude(self) -> None:
        """Repeats at the end what was wrong with the run, and names the model to use instead."""
        warnings = self.alarms.at_the_end()
        for warning in warnings:
            if warning not in self.latest_warnings:
                self.progress.message(f"warning: {warning}")
        if warnings and (record := self.best.record()):
            self.progress.message(
                f"{self.best.folder} holds the model with the best {record['metric']}, {record['value']:.4g} after "
                f"iteration {record['iteration']}: use that rather than {self.folder / 'final'}"
            )

    def is_over(self) -> bool:
        """Whether every iteration is done, or a signal stops the run."""
        return self.trainer.iteration >= self.config.num_iterations or self.is_stopped()

    def is_stopped(self) -> bool:
        """Whether any rank got a signal; then all have."""
        self.stop_signal = max(self.collectives.gather(STOP.number)) or None
        return self.stop_signal is not None

    def leaving(self) -> AbstractContextManager[None]:
        """Context in which a signal ends an iteration or an evaluation at the next unit of work, until the iteration's
        first optimizer step."""
        return STOP.leaving(lambda: not self.trainer.has_moved, alone=self.collectives.world_size == 1)

    def iterate(self) -> dict[str, float]:
        """Runs one iteration, its evaluation, its line of metrics and its checkpoint. Returns its metrics."""
        with self.leaving():
            values = self.trainer.iterate().values()
        number = self.trainer.iteration
        try:
            values |= self.evaluation(number)
        finally:
            if self.keeps_records:
                self.records.write(number, values)
        if self.keeps_records:
            self.sink.log(number, values)
        self.progress.iteration(number, values)
        self.latest_warnings = self.alarms.observe(values)
        for warning in self.latest_warnings:
            self.progress.message(f"warning: {warning}")
        self.best.update(number, values)
        if self.is_checkpoint_due(number):
            self.progress.phase("checkpoint", 1)
            self.checkpoint()
            self.progress.advance()
        self.end_where_nothing_is_learned()
        return values

    def end_where_nothing_is_learned(self) -> None:
        """Ends the run, with a checkpoint, where its alarms are certain that it learns nothing.

        Raises:
            NothingLearned: It is so.
        """
        if verdict := self.collectives.from_first(self.alarms.verdict):  # the rank that writes knows what came before
            self.checkpoint()
            raise NothingLearned(f"stopped after iteration {self.trainer.iteration}: {verdict}")

    def is_checkpoint_due(self, number: int) -> bool:
        """Whether iteration `number` ends with a checkpoint. Collective: the clock of the first rank counts."""
        every, every_s = self.config.checkpoint_every, self.config.checkpoint_every_s
        if number in (1, self.config.num_iterations) or (every and number % every == 0):
            return True
        return bool(every_s and self.collectives.from_first(time.monotonic() - self.saved_at >= every_s))

    def evaluation(self, number: int) -> dict[str, float]:
        """Metrics of the evaluation after iteration `number`; empty where none is due."""
        if self.evaluate is None or not self.evaluate_every:
            return {}
        if number % self.evaluate_every and number != self.config.num_iterations:
            return {}
        with self.leaving():
            values = self.evaluate()
        self.progress.message(f"evaluation after iteration {number}: {format_evaluation(values)}")
        return values

    def catch_up(self) -> None:
        """Does what is due after the current iteration and was not done, where a run ended in the middle of one: the
        evaluation, which the file of metrics then lacks, before the first iteration too; and keeps the best model."""
        number = self.trainer.iteration
        values = dict(self.records.lines()).get(number, {})
        is_evaluated = self.collectives.from_first(any(name.startswith("eval/") for name in values))
        measured = {} if is_evaluated else self.evaluation(number)
        values |= measured
        if measured and self.keeps_records:
            self.records.rewrite_last(number, values)
        is_judged = bool(measured) and (self.best.metric or "").startswith("eval/")
        if is_judged or self.collectives.from_first(self.best.metric in values):
            self.best.update(number, values)

    def replay(self) -> None:
        """Replays the metrics of earlier processes to trackers that lack them, and to the alarms, whose warnings are
        dropped.

        Both exist on the rank that writes. Other ranks must not read what it may be writing now.
        """
        if not self.keeps_records:
            return
        for number, values in self.records.lines():
            self.sink.log(number, values)
            self.alarms.observe(values)

    def prepare(self) -> None:
        """Makes the folder, or loads the newest checkpoint in it and removes what came after that.

        A run that stands at iteration 0 begins anew: nothing of what it left is kept.
        """
        check_output(self.config, {})
        is_new = not is_run(self.folder)
        if not list_checkpoints(self.folder / "checkpoints"):
            check_nothing_is_lost(self.folder)
        self.collectives.barrier()  # no rank writes before all have looked
        newest = self.newest_checkpoint()
        if newest is not None:
            self.report_changes()
            self.trainer.load_state_dict(read_state(newest))
            self.progress.message(f"goes on after iteration {self.trainer.iteration} from {newest}")
        if self.keeps_records:
            with writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                if is_new:  # what lies there is of a run that was removed
                    (self.folder / "trackers.json").unlink(missing_ok=True)
            self.sink.begin(self.trainer.iteration, self.settings, self.progress.message)
            self.begin_records()
        self.collectives.barrier()  # no rank reads before these are in order

    def report_changes(self) -> None:
        """Reports what differs from what the run was last started with."""
        for change in changes_in(self.folder, json.loads(json.dumps(self.settings)), self.contents):
            self.progress.message(change.notice)

    def newest_checkpoint(self) -> Path | None:
        """Newest checkpoint that is sound, the same on every rank; None where there is none. Damaged ones that are
        newer are set aside.

        Raises:
            RunError: Ranks see different checkpoints.
            CheckpointError: None of those that are there is sound.
        """
        newest, damaged = newest_sound(self.folder / "checkpoints", self.progress.message)
        seen = [] if newest is None else [newest.name]
        for rank, other in enumerate(self.collectives.gather(seen)):
            if other != seen:
                mine, its = (names[0] if names else "no checkpoint" for names in (seen, other))
                raise RunError(
                    f"run.output_dir ({self.folder}) must be one folder for all ranks, on a file system that their "
                    f"machines share: rank {rank} sees {its} there, and rank {self.collectives.rank} {mine}"
                )
        if self.keeps_records:  # and every rank has looked
            for path in damaged:
                with writing(path):
                    path.rename(set_aside(path))
        return newest

    def begin_records(self) -> None:
        """Removes what came after the checkpoint, and writes the settings of the run."""
        restore_folder(self.folder / "final")
        self.records.keep(self.trainer.iteration or -1)
        self.best.discard_after(self.trainer.iteration or -1)
        if self.trainer.iteration >= self.config.num_iterations:
            done, asked = counted(self.trainer.iteration, "iteration"), self.config.num_iterations
            self.progress.message(f"nothing is left to learn: {done} done; run.num_iterations asks for {asked}")
            return  # and these settings have had no part in it
        self.records.write_config()

    def checkpoint(self) -> None:
        """Saves the state between two iterations, unless it is saved already. Collective; one rank writes.

        Raises:
            FloatingPointError: The state is not finite, and not saved.
        """
        if self.collectives.from_first(self.next_checkpoint.exists()):
            return
        state = self.trainer.state_dict()
        if found := self.collectives.from_first(self.keeps_records and not_finite(state)):
            raise FloatingPointError(
                f"{found} is not finite after iteration {self.trainer.iteration}, and is not saved: "
                f"{self.what_is_kept()}; lower optimizer.learning_rate, or look in metrics.jsonl for where it began"
            )
        if self.keeps_records:
            self.records.sync()  # a checkpoint never knows of more than the records
            save_checkpoint(self.next_checkpoint, state, keep=self.config.keep_checkpoints)
        self.saved_at = time.monotonic()

    def rescue(self, failure: BaseException) -> None:
        """Saves the state at the start of the iteration after a failure, if this rank has all of it by itself."""
        if not self.keeps_records:
            return
        if not self.trainer.rewind():
            self.progress.message(f"the weights were being changed: {self.what_is_kept()}")
            return
        if self.trainer.holds_all and not self.next_checkpoint.exists():
            self.save_beside(failure)

    def save_beside(self, failure: BaseException) -> None:
        """Saves the state of a run that failed beside all checkpoints that are there: a failure is no reason to trust
        it more than them."""
        state = self.trainer.state_dict()
        if found := not_finite(state):
            self.progress.message(f"warning: {found} is not finite, and is not saved: {self.what_is_kept()}")
            return
        try:
            save_checkpoint(self.next_checkpoint, state, keep=None)
        except WriteError as error:
            reason = "" if isinstance(failure, WriteError) else f"{error}: "  # which the command prints
            self.progress.message(f"warning: {reason}{self.what_is_kept()}")

    def what_is_kept(self) -> str:
        """Sentence on what is kept of everything learned, where nothing more is saved."""
        steps = list_checkpoints(self.folder / "checkpoints")
        newest = iteration_of(steps[-1]) if steps else 0
        return f"what was learned after iteration {newest} is lost" if steps else "no checkpoint was written yet"

    @property
    def next_checkpoint(self) -> Path:
        """Folder of a checkpoint taken now."""
        return self.folder / "checkpoints" / f"step_{self.trainer.iteration:06d}"
