"""One optimizer step: sums over microbatches, means over steps."""

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from llmrl.batches import Sequences
from llmrl.distributed.microbatcher import Microbatcher
from llmrl.functional.statistics import Maximum, Mean, Total
from llmrl.memory import MemoryFull
from llmrl.metrics import Metrics
from llmrl.microbatches import TokenBudget
from llmrl.optim.config import OptimizerConfig
from llmrl.optim.local import LocalTrainable
from llmrl.reports.progress import Silent
from llmrl.trainers.optimize import accumulate_and_step
from tests.contexts import context_of
from tests.distributed.threads import on_ranks

X = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.5], [-2.0, 1.0], [4.0, 0.0], [1.0, 1.0]])
Y = torch.tensor([1.0, 0.0, 2.0, -1.0, 3.0, 0.5])


class Linear(nn.Module):
    """y = w x."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.5, -0.25]))


class Counter(Silent):
    """Progress that counts."""

    done = 0

    def advance(self, amount: int = 1) -> None:
        self.done += amount


ROWS = Sequences.from_rows(
    prompt_ids=torch.zeros(6, 1, dtype=torch.long),
    prompt_mask=torch.ones(6, 1, dtype=torch.bool),
    response_ids=torch.zeros(6, 1, dtype=torch.long),
    response_mask=torch.ones(6, 1, dtype=torch.bool),
    response_lengths=torch.ones(6, dtype=torch.long),
)
"""Six rows of two tokens each."""


class AsGiven(Microbatcher):
    """Gives the parts that a test has chosen, whatever the batch."""

    def __init__(self, parts, idle, context):
        super().__init__(TokenBudget(max_tokens=1), context)
        self.parts = parts, idle

    def run(self, batch, work):
        return work(*self.parts)


def step_on(trained, losses, parts, progress=None, *, idle=(), collectives=None) -> Metrics:
    """A step on these parts of a batch, each of which `losses` takes."""
    numbers = [torch.tensor([n]) for n in range(len(parts) + len(idle))]
    given = AsGiven(numbers[: len(parts)], numbers[len(parts) :], context_of(collectives, progress))
    return accumulate_and_step(trained, lambda number: losses([*parts, *idle][int(number)]), ROWS, given)


class Problem:
    """Least squares, the losses summed over rows with weights 1 / 6."""

    def __init__(self) -> None:
        self.module = Linear()
        config = OptimizerConfig(learning_rate=0.1, schedule="linear", max_grad_norm=float("inf"))
        self.trained = {"actor": LocalTrainable(self.module, config, num_steps=10)}
        self.counter = Counter()

    def losses(self, rows: Tensor) -> Iterator[tuple[str, Tensor, Metrics]]:
        error = X[rows] @ self.module.w - Y[rows]
        loss = (error**2 / 6).sum()
        largest = error.detach().abs().max()
        counts = {"loss": Total(loss.detach()), "error": Mean(error.detach().sum(), len(rows))}
        yield "actor", loss, Metrics({**counts, "largest": Maximum(largest)})

    def step(self, *microbatches: list[int]) -> dict[str, float]:
        parts = [torch.tensor(rows) for rows in microbatches]
        return step_on(self.trained, self.losses, parts, self.counter).values()


CUTS = ([[0, 1, 2, 3, 4, 5]], [[0, 1, 2], [3, 4, 5]], [[5, 3], [0], [1, 2, 4]], [[0], [1], [2], [3], [4], [5]])


@pytest.mark.parametrize("cuts", CUTS)
def test_how_the_minibatch_is_cut_does_not_show(cuts: list[list[int]]):
    problem = Problem()
    values = problem.step(*cuts)

    error = X @ torch.tensor([0.5, -0.25]) - Y
    gradient = (2 * error[:, None] * X / 6).sum(dim=0)
    assert values["loss"] == pytest.approx((error**2).mean().item())
    assert values["error"] == pytest.approx(error.mean().item())
    assert values["largest"] == pytest.approx(error.abs().max().item())
    assert values["actor/grad_norm"] == pytest.approx(gradient.norm().item())
    assert values["actor/grad_norm_max"] == pytest.approx(gradient.norm().item())
    # The first step of Adam is the learning rate against the gradient's sign.
    assert_close(problem.module.w.detach(), torch.tensor([0.5, -0.25]) - 0.1 * gradient.sign(), rtol=0.0, atol=1e-6)
    assert problem.counter.done == len(cuts)


def test_a_total_becomes_a_mean_over_steps():
    problem = Problem()

    def step(loss: float) -> Metrics:
        def losses(part: float) -> Iterator[tuple[str, Tensor, Metrics]]:
            yield "actor", part * problem.module.w.sum(), Metrics({"loss": Total(part)})

        return step_on(problem.trained, losses, [loss / 2, loss / 2])

    values = step(1.0).merge(step(4.0)).values()
    assert values["loss"] == pytest.approx(2.5)
    assert values["actor/learning_rate"] == pytest.approx((0.1 + 0.09) / 2)  # of the steps as they were taken
    assert values["actor/grad_norm"] == pytest.approx((1.0 + 4.0) / 2 * 2**0.5)
    assert values["actor/grad_norm_max"] == pytest.approx(4.0 * 2**0.5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_is_skipped_and_told(bad: float):
    problem = Problem()

    def losses(factor: float) -> Iterator[tuple[str, Tensor, Metrics]]:
        yield "actor", factor * problem.module.w.sum(), Metrics()

    broken = step_on(problem.trained, losses, [bad])
    assert_close(problem.module.w.detach(), torch.tensor([0.5, -0.25]), rtol=0.0, atol=0.0)
    values = broken.merge(step_on(problem.trained, losses, [3.0])).values()
    assert values["actor/skipped_steps"] == 1.0
    assert values["actor/grad_norm"] == pytest.approx(3.0 * 2**0.5)  # of the step that was taken
    assert not torch.tensor(values["actor/grad_norm_max"]).isfinite()


def test_each_loss_runs_backward_before_the_next_forward_and_every_module_steps_once():
    happened: list[str] = []

    class Recorder:
        learning_rate = 0.0
        num_steps_done = 0
        device = torch.device("cpu")
        holds_all = True

        def __init__(self, name: str) -> None:
            self.name = name
            self.module = self.wrapped = nn.Identity()

        def whole(self, part: nn.Module) -> Any:
            raise AssertionError("nobody samples from it")

        def assign(self, name: str, value: Tensor) -> None:
            raise AssertionError("no reference moves")

        def backward(self, loss: Tensor) -> None:
            happened.append(f"{self.name} backward {loss:g}")

        def optimizer_step(self) -> Tensor:
            happened.append(f"{self.name} step")
            return torch.ones(())

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def losses(part: int) -> Iterator[tuple[str, Tensor, Metrics]]:
        for name, loss in (("actor", part), ("critic", part + 0.5)):
            happened.append(f"{name} forward {loss:g}")
            yield name, torch.tensor(float(loss)), Metrics({f"{name}/loss": Total(float(loss))})

    trained = {name: Recorder(name) for name in ("actor", "critic")}
    values = step_on(trained, losses, [1, 2]).values()
    assert happened == [
        "actor forward 1",
        "actor backward 1",
        "critic forward 1.5",
        "critic backward 1.5",
        "actor forward 2",
        "actor backward 2",
        "critic forward 2.5",
        "critic backward 2.5",
        "actor step",
        "critic step",
    ]
    assert (values["actor/loss"], values["critic/loss"]) == (3.0, 4.0)
    assert {"critic/learning_rate", "critic/grad_norm", "critic/skipped_steps"} <= values.keys()


def test_a_module_that_no_loss_was_for_is_left_alone():
    """Adam would move it on by its momentum, and its learning rate would go on falling."""
    networks = {"actor": Problem(), "critic": Problem()}
    trained = {name: problem.trained["actor"] for name, problem in networks.items()}

    def losses(names: tuple[str, ...]) -> Iterator[tuple[str, Tensor, Metrics]]:
        for name in names:
            yield name, 3.0 * networks[name].module.w.sum(), Metrics()

    def weights(name: str) -> Tensor:
        return networks[name].module.w.detach().clone()

    step_on(trained, losses, [("actor", "critic")])
    before = {name: weights(name) for name in trained}
    values = step_on(trained, losses, [("critic",), ("critic",)]).values()
    assert torch.equal(weights("actor"), before["actor"])
    assert not torch.equal(weights("critic"), before["critic"])
    assert {name: trainable.num_steps_done for name, trainable in trained.items()} == {"actor": 1, "critic": 2}
    assert {name.split("/")[0] for name in values} == {"critic"}

    # one microbatch is enough
    values = step_on(trained, losses, [("critic",), ("actor", "critic")]).values()
    assert {name: trainable.num_steps_done for name, trainable in trained.items()} == {"actor": 2, "critic": 3}
    assert values["actor/grad_norm"] == pytest.approx(3.0 * 2**0.5)
    assert values["critic/grad_norm"] == pytest.approx(6.0 * 2**0.5)


def test_an_idle_pass_runs_backward_and_counts_for_nothing():
    """Where weights are split over ranks, all have to make it; its gradient is 0, and nothing of it is told."""
    module, backward = nn.Linear(2, 1), []
    trained = {"actor": LocalTrainable(module, OptimizerConfig(learning_rate=0.1), num_steps=2)}
    module.weight.register_hook(lambda grad: backward.append(grad.tolist()))

    def losses(part):
        yield "actor", part * module.weight.sum(), Metrics({"loss": Total(float(part))})

    values = step_on(trained, losses, [3.0], idle=[5.0, 7.0]).values()
    assert backward == [[[3.0, 3.0]], [[0.0, 0.0]], [[0.0, 0.0]]]
    assert values["loss"] == 3.0
    assert values["actor/grad_norm"] == pytest.approx(3.0 * math.sqrt(2))


def test_a_module_that_has_a_loss_on_one_rank_only_is_stepped_on_all():
    initial = nn.Linear(2, 1)

    def step(ranks):
        module = copy.deepcopy(initial)
        trained = {"actor": LocalTrainable(module, OptimizerConfig(learning_rate=0.1), num_steps=2, collectives=ranks)}

        def losses(part):
            yield "actor", part * module.weight.sum(), Metrics({"loss": Total(float(part))})

        values = step_on(trained, losses, [3.0] if ranks.rank == 0 else [], collectives=ranks).values()
        return values, module.weight.detach().clone()

    (values, weight), (others, same) = on_ranks(2, step)
    assert values == others
    assert values["loss"] == 3.0
    assert values["actor/grad_norm"] == pytest.approx(3.0 * math.sqrt(2))
    assert torch.equal(weight, same)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_an_optimizer_step_without_memory_is_not_taken_again(error, monkeypatch):
    """Some weights may have moved."""
    problem, calls = Problem(), []

    def step():
        calls.append(problem.trained["actor"].num_steps_done)
        raise error

    monkeypatch.setattr(problem.trained["actor"].optimizer, "step", step)
    with pytest.raises(MemoryFull, match=r", in the optimizer step of actor \([CG]PU.*\): set model\.lora\.rank "):
        problem.step([0, 1, 2], [3, 4, 5])
    assert calls == [1]  # it counts as begun, so that nothing is gone back behind


def test_gradients_of_a_step_that_had_no_memory_are_dropped():
    problem, undisturbed = Problem(), Problem()
    losses, parts = problem.losses, []

    def run_out(rows):
        for loss in losses(rows):
            parts.append(rows)
            if len(parts) == 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            yield loss

    numbers = torch.arange(6)
    microbatcher = Microbatcher(TokenBudget(max_tokens=6), context_of(progress=problem.counter))
    values = accumulate_and_step(problem.trained, run_out, ROWS, microbatcher).values()
    assert [len(rows) for rows in parts] == [3, 3, 1, 1, 1, 1, 1, 1]
    theirs = undisturbed.step(*[[n] for n in numbers.tolist()])
    assert values == theirs
    assert torch.equal(problem.module.w, undisturbed.module.w)
    assert problem.trained["actor"].num_steps_done == 1
