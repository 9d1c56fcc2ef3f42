"""One optimizer step of every trained module, from the losses of microbatches: the same for every trainer."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial

from jaxtyping import Int
from torch import Tensor

from llmrl.batches import ReadBatch
from llmrl.distributed.activity import HERE
from llmrl.distributed.microbatcher import Microbatcher, Parts
from llmrl.functional.statistics import Maximum, Mean, Total
from llmrl.memory import MemoryFull, making_room, out_of_memory
from llmrl.metrics import Metrics
from llmrl.roles import Collectives, Trainable

Losses = Iterable[tuple[str, Tensor, Metrics]]
"""``(trained module, loss, metrics)`` of one microbatch, each computed when it is asked for."""


def accumulate_and_step(
    trained: Mapping[str, Trainable],
    losses: Callable[[Int[Tensor, " part"]], Losses],
    batch: ReadBatch,
    microbatcher: Microbatcher,
) -> Metrics:
    """Adds up the gradients of all microbatches of all ranks, then steps every trained module that any loss was for.

    Args:
        trained: Modules that learn, by name.
        losses: Losses of rows of the batch. Asked about the same rows again where memory ran out.
        batch: Rows that the step learns from.
        microbatcher: Splits them.

    The losses are sums whose weights already hold the count of the whole minibatch, so nothing is divided here and how
    the minibatch was split, and how it was dealt to ranks, does not show in the result. Each loss is run backward
    before the next forward.

    Idle passes keep step with ranks that have more to do, and count for nothing.

    Raises:
        MemoryFull: One row does not fit, or the optimizer step. No weight has moved in the first case.
    """

    def accumulate(parts: Parts, idle: Parts) -> tuple[Metrics, set[str]]:
        if microbatcher.can_go_back:
            for trainable in trained.values():
                trainable.module.zero_grad(set_to_none=True)  # of a call in which memory ran out
        microbatcher.progress.phase("update", len(parts))
        metrics, learning = Metrics(), set[str]()
        for part in parts:
            for name, loss, statistics in losses(part):
                trained[name].backward(loss)
                learning.add(name)
                metrics = metrics.merge(statistics)
            microbatcher.progress.advance()
        for row in idle:
            for name, loss, _ in losses(row):
                trained[name].backward(0.0 * loss)
        return metrics, learning

    metrics, learning = _of_all_ranks(*microbatcher.run(batch, accumulate), microbatcher.collectives)
    metrics = metrics.per_step()
    for name in sorted(learning):
        trainable = trained[name]
        rate = trainable.learning_rate
        norm = making_room(trainable.optimizer_step, partial(_end_without_room, name))
        skipped = ~norm.isfinite()
        steps = {
            f"{name}/learning_rate": Mean(rate, 1.0),
            f"{name}/grad_norm": Mean(norm.where(~skipped, norm.new_zeros(())), (~skipped).double()),
            f"{name}/grad_norm_max": Maximum(norm),
            f"{name}/skipped_steps": Total(skipped.double()),
        }
        metrics = metrics.merge(Metrics(steps))
    return metrics


def _end_without_room(name: str, usage: str) -> None:
    """Raises MemoryFull: an optimizer step cannot be done again, some weights may have moved."""
    way_out = "set model.lora.rank where all weights are trained, or spread the run over devices"
    place = f", in the optimizer step of {name}"
    raise MemoryFull(out_of_memory(usage, HERE.phase, way_out, with_what=place))


def _of_all_ranks(metrics: Metrics, learning: set[str], collectives: Collectives) -> tuple[Metrics, set[str]]:
    """Statistics and names of modules with a loss; a rank without a microbatch has neither."""
    if collectives.world_size == 1:
        return metrics, learning
    pooled = Metrics()
    for part, names in collectives.gather((metrics.in_floats(), learning)):
        pooled, learning = pooled.merge(part), learning | names
    return pooled, learning
