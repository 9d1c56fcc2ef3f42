"""The metrics of a run, sent to TensorBoard, Weights & Biases or Trackio through accelerate's trackers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker, get_available_trackers
from accelerate.utils import LoggerType

TrackerName = Literal["tensorboard", "wandb", "trackio"]


@dataclass(frozen=True, kw_only=True)
class TrackerConfig:
    """Who else is told the metrics. `metrics.jsonl` has them in any case."""

    names: tuple[TrackerName, ...] = ()
    """Trackers, each from the extra of its name."""
    project: str = "llmrl"
    """Project at Weights & Biases and Trackio; the run is called by the last part of its output folder."""


class Trackers:
    """Every tracker that the config names, as one. Made on the main process only, and used as a context manager.

    What is missing is said when this is made; folders and remote runs are made on entering.
    """

    def __init__(self, config: TrackerConfig, *, output_dir: Path) -> None:
        self.trackers = [_tracker(name, config.project, output_dir) for name in config.names]

    def __enter__(self) -> "Trackers":
        for tracker in self.trackers:
            tracker.start()
        return self

    def __exit__(self, *exception: object) -> None:
        for tracker in self.trackers:
            tracker.finish()

    def log(self, iteration: int, values: Mapping[str, float]) -> None:
        """The metrics of an iteration."""
        for tracker in self.trackers:
            tracker.log(dict(values), step=iteration)


def _tracker(name: TrackerName, project: str, output_dir: Path) -> GeneralTracker:
    if LoggerType(name) not in get_available_trackers():
        raise ValueError(f'trackers.names ({name}) needs a package that is missing; pip install "llmrl[{name}]"')
    match name:
        case "tensorboard":
            return TensorBoardTracker(name, output_dir)
        case "wandb":
            return WandBTracker(project, name=output_dir.name, dir=str(output_dir))
        case "trackio":
            return TrackioTracker(project, name=output_dir.name)
