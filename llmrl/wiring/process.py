"""What a process does around its part of a run, whoever starts it: it joins the other ranks, shows progress, holds the
lock of the folder."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from transformers.utils.logging import disable_progress_bar

from llmrl.config import AnyRun
from llmrl.distributed import launch
from llmrl.distributed.activity import FollowedProgress
from llmrl.distributed.collectives import join_ranks, make_context
from llmrl.distributed.config import DistributedConfig
from llmrl.distributed.context import Context
from llmrl.distributed.device import pick_device
from llmrl.distributed.heartbeat import watched
from llmrl.reports.progress import Silent, make_progress
from llmrl.reports.trackers import TrackerConfig, Trackers
from llmrl.sizing import launched_strategy
from llmrl.trainers.output import locked
from llmrl.trainers.run import Run, Stopped
from llmrl.wiring.checks import Checked
from llmrl.wiring.precision import with_dtypes


@contextmanager
def joined(config: DistributedConfig) -> Iterator[Context]:
    """Context of all that the ranks of a launch do together; the first one prints and writes.

    Raises:
        Stopped: By a signal, which is no failure: all ranks stop together.
    """
    collectives = join_ranks()
    stopped = None
    with watched(collectives, config):
        try:
            quieten()
            with make_progress() if collectives.is_first else nullcontext(Silent()) as progress:
                yield make_context(collectives, FollowedProgress(progress))
        except Stopped as error:
            stopped = error
    if stopped is not None:
        raise stopped


@contextmanager
def opened(config: AnyRun, checked: Checked, build: Callable[..., Run], context: Context) -> Iterator[Run]:
    """Context of a run that is built from its settings, in whose folder no other process writes meanwhile."""
    context.progress.message(config.plan(None if checked.rows is None else len(checked.rows)))
    dtype, strategy = with_dtypes(config).model.dtype, launched_strategy(context.launch).name
    context.progress.message(f"Computes on {context.device.type} in {dtype}, {strategy}.")
    warn_without_gpu(context)
    settings = config.trackers if context.collectives.is_first else TrackerConfig()
    trackers = Trackers(settings, output_dir=config.run.folder)
    with locked(config.run.folder, context.collectives):
        run = build(config, checked, context, trackers)
        with trackers:
            yield run


@contextmanager
def private_files() -> Iterator[None]:
    """Context in which the files that are made are their owner's alone."""
    before = os.umask(0o077)
    os.umask(before | 0o077)
    try:
        yield
    finally:
        os.umask(before)


def warn_without_gpu(context: Context) -> None:
    """Reports a launch that is meant for GPUs, on a machine that has none."""
    if warning := launch.gpu_warning(has_gpu=context.device.type != "cpu"):
        context.progress.message(f"warning: {warning}")


def quieten() -> None:
    """Keeps the output to lines of our own: no bars of transformers, no line of DeepSpeed, which announces what it
    computes on as soon as something asks whether it is installed."""
    disable_progress_bar()
    os.environ.setdefault("DS_ACCELERATOR", pick_device().type)
