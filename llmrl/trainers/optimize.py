"""One optimizer step of every trained module, from the losses of microbatches: the same for every trainer."""

from collections.abc import Iterable, Mapping

from torch import Tensor

from llmrl.functional.statistics import Maximum, Mean, Total
from llmrl.metrics import Metrics
from llmrl.roles import Collectives, Progress, Trainable

Losses = Iterable[tuple[str, Tensor, Metrics]]
"""``(trained module, loss, metrics)`` of one microbatch, each computed when it is asked for."""


def accumulate_and_step(
    trained: Mapping[str, Trainable],
    microbatches: Iterable[Losses],
    collectives: Collectives,
    progress: Progress,
    *,
    idle: Iterable[Losses] = (),
) -> Metrics:
    """Adds up the gradients of all microbatches of all ranks, then steps every trained module that any loss was for.

    The losses are sums whose weights already hold the count of the whole minibatch, so nothing is divided here and how
    the minibatch was split, and how it was dealt to ranks, does not show in the result. Each loss is run backward
    before the next forward.

    Passes on what is `idle` keep step with ranks that have more to do, and count for nothing.
    """
    metrics, learning = Metrics(), set[str]()
    for losses in microbatches:
        for name, loss, statistics in losses:
            trained[name].backward(loss)
            learning.add(name)
            metrics = metrics.merge(statistics)
        progress.advance()
    for losses in idle:
        for name, loss, _ in losses:
            trained[name].backward(0.0 * loss)
    metrics, learning = _of_all_ranks(metrics, learning, collectives)
    metrics = metrics.per_step()
    for name in sorted(learning):
        trainable = trained[name]
        rate = trainable.learning_rate
        norm = trainable.optimizer_step()
        skipped = ~norm.isfinite()
        steps = {
            f"{name}/learning_rate": Mean(rate, 1.0),
            f"{name}/grad_norm": Mean(norm.where(~skipped, norm.new_zeros(())), (~skipped).double()),
            f"{name}/grad_norm_max": Maximum(norm),
            f"{name}/skipped_steps": Total(skipped.double()),
        }
        metrics = metrics.merge(Metrics(steps))
    return metrics


def _of_all_ranks(metrics: Metrics, learning: set[str], collectives: Collectives) -> tuple[Metrics, set[str]]:
    """Statistics and names of modules with a loss; a rank without a microbatch has neither."""
    if collectives.world_size == 1:
        return metrics, learning
    pooled = Metrics()
    for part, names in collectives.gather((metrics.in_floats(), learning)):
        pooled, learning = pooled.merge(part), learning | names
    return pooled, learning
