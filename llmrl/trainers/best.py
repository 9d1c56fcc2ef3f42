"""The model with the best value of a metric, kept in best/ with a record of why."""

import math
import shutil
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from llmrl.files import read_object, replaced_folder, restore_folder, staged, write_atomically, writing
from llmrl.roles import Collectives
from llmrl.trainers.alarms import is_comparable
from llmrl.trainers.output import RunError

RECORD = "best.json"
"""File in best/ that says why its model is the best."""


class BestModel:
    """Keeps the model with the best value of a metric.

    Args:
        output: The output folder.
        metric: Name of the metric, after a minus if less is better; None keeps no model.
        warmup_iterations: Number of iterations at the start that lack metrics of later ones.
        save_model: Writes the current model to a folder. Collective.
        collectives: Collectives of the run; the first rank writes the record.
        report: Receives what is odd about a model of earlier processes.
    """

    def __init__(
        self,
        output: Path,
        *,
        metric: str | None,
        warmup_iterations: int,
        save_model: Callable[[Path], None],
        collectives: Collectives,
        report: Callable[[str], None],
    ) -> None:
        self.folder = output / "best"
        self.metric = metric and metric.removeprefix("-")
        self.sign = -1 if metric and metric.startswith("-") else 1
        self.warmup_iterations = warmup_iterations
        self.save_model = save_model
        self.collectives = collectives
        self.report = report

    def discard_after(self, iteration: int) -> None:
        """Removes the model if it is of a later iteration, which a resume goes back before, and what a kill left beside
        it. One without a record that can be read is set aside.

        Raises:
            WriteError: The file system refused.
        """
        place = self.folder.resolve()
        restore_folder(staged(place))
        restore_folder(place)
        record = self.record()
        with writing(self.folder):
            if record is None and place.is_dir() and any(place.iterdir()):
                aside = place.with_name(f"{place.name}.damaged")
                shutil.rmtree(aside, ignore_errors=True)
                place.rename(aside)
                self.report(f"warning: {self.folder / RECORD} cannot be read: the model is kept as {aside}")
            elif record is not None and record["iteration"] > iteration:
                shutil.rmtree(place.rename(staged(place)))

    def update(self, iteration: int, values: Mapping[str, float]) -> None:
        """Saves the model, with a record of why, if it is the best so far.

        Raises:
            RunError: There is no such metric.
        """
        name = self.metric
        if name is None:
            return
        record, value = self.collectives.from_first((self.record(), values.get(name)))
        if value is None:
            if name.startswith("eval/") or iteration > self.warmup_iterations:
                self._check_measured(name, values, record)
        elif is_comparable(name, values) and self._is_better(value, record["value"] if record else None):
            if not self.collectives.is_first:
                self.save_model(staged(self.folder))
                return
            with replaced_folder(self.folder) as new:
                self.save_model(new)
                write_atomically(new / RECORD, {"metric": name, "value": value, "iteration": iteration})

    def record(self) -> dict[str, Any] | None:
        """Record of the model in best/: metric, value and iteration; None where there is none that can be read."""
        match read_object(self.folder / RECORD):
            case {"metric": str(), "value": int() | float() as value, "iteration": int()} as record:
                return record if -math.inf < value < math.inf else None
        return None

    def _check_measured(self, name: str, values: Mapping[str, float], record: dict[str, Any] | None) -> None:
        """Refuses the name of a metric that is not measured, once it would have been."""
        is_due = not name.startswith("eval/") or any(other.startswith("eval/") for other in values)
        if record is None and is_due:
            nearest = "".join(f"; did you mean {near}?" for near in get_close_matches(name, values, n=1))
            raise RunError(
                f"run.best_metric ({name}) is not measured{nearest}; measured are {', '.join(sorted(values))}"
            )

    def _is_better(self, value: float, best: float | None) -> bool:
        """Whether a value beats the best so far; one that is not finite never does."""
        if not math.isfinite(value):
            return False
        return best is None or self.sign * value > self.sign * best
