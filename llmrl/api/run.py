"""A run that a program drives."""

import atexit
import dataclasses
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from llmrl.api.folder import RunFolder, load_model
from llmrl.api.given import Given, Rows
from llmrl.api.guest import checking, computing, errors_of_users, handlers_kept, own_random_numbers, quiet
from llmrl.config import AnyRun, RLRun
from llmrl.data.mixture import sets_of
from llmrl.distributed.collectives import leave_ranks
from llmrl.distributed.context import Context
from llmrl.roles import RolloutEngine
from llmrl.trainers import run as trainers
from llmrl.trainers.changes import changes_in, is_finished
from llmrl.trainers.comparison import Evaluation, paired_differences
from llmrl.trainers.output import RunError, finished_iterations
from llmrl.user_code import handed_over
from llmrl.wiring.checks import Checked
from llmrl.wiring.contents import recorded_settings
from llmrl.wiring.process import joined, opened, private_files
from llmrl.wiring.runs import Kind

if TYPE_CHECKING:
    from transformers import PreTrainedModel


atexit.register(leave_ranks)  # a program joins them once, and shares them until its end


class Run(RunFolder):
    """A run: what `sft`, `reward_model`, `grpo` and `ppo` return, checked and ready to train.

    ``for iteration in run`` trains, and yields the metrics of each iteration once it is done; `train` does it without a
    loop. Where the folder holds a part of the run already, it goes on there. A loop may be left between two iterations:
    by break, by an exception or by Ctrl-C. All that was learned is then in a checkpoint, and the next loop over this
    run, or over one that the same call makes in another process, goes on as if nothing had happened, bit for bit.
    """

    def __init__(
        self,
        kind: Kind,
        config: AnyRun,
        given: Given,
        *,
        engine: RolloutEngine | None = None,
    ) -> None:
        super().__init__(config.run.folder)
        self._kind = kind
        self._config = config
        self._given = given
        self._engine = engine
        self._under_way: trainers.Run | None = None
        """The run in memory, while a loop is over it."""
        self._context: Context | None = None
        """Context of this process, meanwhile."""
        self._before: dict[str, Evaluation] = {}
        """Evaluations of the model before the training, by their data."""
        self._checked: Checked | None = self._check()
        """What the next loop begins with; None: it checks again."""

    def __iter__(self) -> Iterator[dict[str, int | float]]:
        """Runs the iterations that are left, and yields the metrics of each, its number as ``iteration``.

        Raises:
            Error: See `train`.
        """
        checked, self._checked = self._checked or self._check(), None
        if self._is_finished(checked):
            return
        with ExitStack() as stack:
            run = self._open(checked, stack)
            steps = run.iterations()
            try:
                while (values := self._step(steps)) is not None:
                    yield {"iteration": run.trainer.iteration, **values}
            except GeneratorExit:  # the loop was left
                pass
            finally:
                with self._computing(raises=False), private_files():
                    steps.close()

    def train(self) -> dict[str, int | float]:
        """Runs the iterations that are left. Returns the metrics of the last one, empty where none is left.

        Raises:
            Error: The run failed, or a signal stopped it. What was learned is in a checkpoint.
        """
        last: dict[str, int | float] = {}
        for values in self:
            last = values
        return last

    def evaluate(self, rows: Rows | None = None) -> dict[str, float]:
        """Accuracy of the model as it is now, and what else `llmrl.evaluate` returns; beside it ``difference/accuracy``
        and ``difference/score``, each with ``_low`` and ``_high`` of its 95 % interval: what has changed since before
        the training, prompt by prompt. For runs of `grpo` and `ppo`.

        Without ``difference/...`` where the run began with random weights, or has an engine of one's own.

        Args:
            rows: Held-out prompts, read as those of the run; None: those that the run was given as `evaluation`.

        Raises:
            Error: There are no prompts, or they cannot be used.
        """
        from llmrl.api.inference import measure

        start = self._to_evaluate(rows)
        with self._weights() as folder:
            trained = {"path": str(folder), "lora": None, "quantization": None, "from_scratch": False}
            model = dataclasses.replace(start.model, **trained)
            now = dataclasses.replace(start, model=model)
            after = measure(now, self._given.objects, self._engine, self._context)
        if start.model.from_scratch or self._engine is not None:
            return after.values
        data = str(start.evaluation_data)
        if data not in self._before:
            self._before[data] = measure(start, self._given.objects, None, self._context)
        return after.values | _differences(after, self._before[data])

    def _to_evaluate(self, rows: Rows | None) -> RLRun:
        """Settings of the run with these held-out prompts."""
        config = self._config
        if not isinstance(config, RLRun):
            raise RunError("run.evaluate is for grpo and ppo; the metrics of other runs have eval/...")
        if rows is None and config.evaluation_data is None:
            raise RunError("run.evaluate has no prompts: hand them over, or evaluation to the call that made the run")
        if rows is None:
            return config
        path = self._given.rows(rows, argument="evaluation")
        read_like = config.evaluation_data or sets_of(config.data)[0]
        data = dataclasses.replace(read_like, path=path, num_rows=None)
        return dataclasses.replace(config, evaluation_data=data)

    @property
    def model(self) -> "PreTrainedModel":
        """The model as it is now, loaded anew: that of final/ once the run is done; in a loop over the run, and after
        one that was left, that of the last iteration."""
        with self._weights() as folder:
            return load_model(folder)

    def _check(self) -> Checked:
        with checking(), handed_over(self._given.objects):
            engine = {"engine": self._engine} if self._kind.samples else {}
            return self._kind.checker()(self._config, dry=False, **engine)

    def _is_finished(self, checked: Checked) -> bool:
        """Whether nothing is left to learn, which is then printed."""
        changes = changes_in(self.folder, recorded_settings(self._config), checked.contents)
        is_over = is_finished(self._config.run, changes)
        if is_over and self._given.collectives.is_first:
            print(
                *(change.notice for change in changes),
                "Nothing is left to learn: this run has come to its end.",
                sep="\n",
            )
        return is_over

    def _open(self, checked: Checked, stack: ExitStack) -> trainers.Run:
        """The run in memory, at its newest checkpoint, until the stack is closed."""
        stack.callback(self._forget)
        with errors_of_users(), quiet(), handlers_kept():  # in the body of a loop they are the program's
            context = stack.enter_context(joined(self._config.distributed))
        with self._computing(raises=True):
            with own_random_numbers(), handed_over(self._given.objects):
                run = stack.enter_context(opened(self._config, checked, self._kind.builder(), context))
            with private_files():
                run.prepare()
        self._under_way, self._context = run, context
        return run

    def _forget(self) -> None:
        self._under_way = self._context = None

    def _step(self, steps: Generator[dict[str, float], None, None]) -> dict[str, float] | None:
        """Metrics of the next iteration; None where the run has come to its end."""
        with self._computing(raises=False), private_files():
            return next(steps, None)

    @contextmanager
    def _computing(self, *, raises: bool) -> Iterator[None]:
        with computing(deterministic=self._config.run.deterministic, raises=raises):
            yield

    @contextmanager
    def _weights(self) -> Iterator[Path]:
        """Context of a folder with the model as it is now."""
        if self._under_way is None and finished_iterations(self.folder) is not None:
            yield self._final
            return
        with ExitStack() as stack:
            run = self._under_way or self._open(self._check(), stack)
            place = stack.enter_context(TemporaryDirectory(dir=self.folder, prefix=".model-"))
            folder = Path(run.collectives.from_first(place)) / "model"
            with self._computing(raises=True):
                run.save_model(folder)
            run.collectives.barrier()  # no rank reads before it is there
            yield folder
            run.collectives.barrier()  # nor is it removed before


def _differences(after: Evaluation, before: Evaluation) -> dict[str, float]:
    """What `paired_differences` gives, as ``difference/...`` with ``_low`` and ``_high``."""
    values: dict[str, float] = {}
    for name, interval in paired_differences(after, before).items():
        kind = name.removeprefix("eval/")
        values |= dict(zip((f"difference/{kind}{end}" for end in ("", "_low", "_high")), interval, strict=True))
    return values
