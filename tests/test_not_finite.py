"""NaN, infinity and 1e30 in every number that a trainer reads, in one iteration of four, with each kind of trainer.

Whatever it is: weights and state are finite after every iteration, the bad iteration is reported by a metric or a
warning, and the iterations after it have sound numbers.
"""

import itertools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from llmrl.algorithms.config import PPOConfig
from llmrl.algorithms.kl_control import KLControl, StepKLControl
from llmrl.batches import TokenOutputs
from llmrl.cli import app
from llmrl.distributed.collectives import OneProcess
from llmrl.distributed.microbatcher import Microbatcher
from llmrl.functional.statistics import Maximum, Mean, Moments, Total
from llmrl.metrics import Metrics
from llmrl.models.reward_record import normalization_on
from llmrl.optim.config import OptimizerConfig
from llmrl.optim.schedule import StepSchedule
from llmrl.roles import Collectives
from llmrl.trainers.alarms import Alarms
from llmrl.trainers.best import BestModel
from llmrl.trainers.checkpoint import not_finite
from tests.contexts import context_of
from tests.distributed.threads import on_ranks
from tests.processes import TINY, lines, write_recipes
from tests.trainers import test_batch, test_rl

BAD = [math.nan, math.inf, -math.inf, 1e30]
IS_WHOLE = bool(os.environ.get("RELIABILITY"))
BAD_ITERATION, NUM_ITERATIONS = 2, 4
"""PPO trains the critic alone in the first one."""


@dataclass
class Poison:
    """A number that is put in place of another while it is active, on one rank or all."""

    number: float
    rank: int | None = None
    active: bool = False

    def into(self, x: Tensor) -> Tensor:
        """`x`, with the number in its first row or as the number itself, and with a gradient as bad."""
        if not self.active:
            return x
        factor = torch.ones_like(x)
        factor.view(-1)[0] = self.number
        return x * factor if math.isfinite(self.number) else x * factor + torch.where(factor == 1, 0.0, factor).detach()


class PoisonedOutputs:
    """A model, some of whose outputs are poisoned: with gradient, or without."""

    def __init__(self, model: Any, poison: Poison, name: str, *, with_grad: bool) -> None:
        self.model = model
        self.poison = poison
        self.name = name
        self.with_grad = with_grad

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.model, name)
        return self.poisoned(found) if callable(found) else found

    def poisoned(self, ask: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def answer(batch: Any) -> Any:
            outputs = ask(batch)
            if torch.is_grad_enabled() != self.with_grad or self.name not in outputs.named:
                return outputs
            return outputs.merge(TokenOutputs(named={self.name: self.poison.into(outputs.named[self.name])}))

        return answer


# --- places -----------------------------------------------------------------------------------------------------------


def in_losses(trainer: Any, poison: Poison, *, only_first: bool = False) -> None:
    """In the loss of every microbatch, or of the first one of an iteration."""
    owner, name = (trainer.algorithm, "losses") if hasattr(trainer, "algorithm") else (trainer.objective, "loss")
    make, seen = getattr(owner, name), set[int]()

    def poisoned(loss: Tensor) -> Tensor:
        is_first = trainer.iteration not in seen
        seen.add(trainer.iteration)
        return poison.into(loss) if is_first or not only_first else loss

    def losses(*arguments: Any) -> Iterator[Any]:
        for module, loss, metrics in make(*arguments):
            yield module, poisoned(loss), metrics

    def single_loss(*arguments: Any) -> Any:
        loss, metrics = make(*arguments)
        return (poisoned(loss) if loss.requires_grad else loss), metrics

    setattr(owner, name, losses if name == "losses" else single_loss)


def in_gradient(trainer: Any, poison: Poison) -> None:
    for trained in trainer.trained.values():
        next(iter(trained.parameters.values())).register_hook(poison.into)


def in_outputs(name: str, *, with_grad: bool) -> Callable[[Any, Poison], None]:
    """In what a policy or a critic gives, before the update or in it."""

    def place(trainer: Any, poison: Poison) -> None:
        algorithm = trainer.algorithm
        role = "networks" if hasattr(algorithm, "networks") else "actor"
        setattr(algorithm, role, PoisonedOutputs(getattr(algorithm, role), poison, name, with_grad=with_grad))

    return place


def in_reference(trainer: Any, poison: Poison) -> None:
    trainer.algorithm.reference = PoisonedOutputs(trainer.algorithm.reference, poison, "logprobs", with_grad=False)


def in_scores(name: str) -> Callable[[Any, Poison], None]:
    def place(trainer: Any, poison: Poison) -> None:
        reward = trainer.reward

        def poisoned(rollout: Any) -> Any:
            scores = reward(rollout)
            return replace(scores, **{name: poison.into(1.0 + getattr(scores, name))}) if poison.active else scores

        trainer.reward = poisoned

    return place


def in_rollout(trainer: Any, poison: Poison) -> None:
    generate = trainer.engine.generate

    def poisoned(*arguments: Any) -> Any:
        rollout = generate(*arguments)
        return replace(rollout, rollout_logprobs=poison.into(rollout.rollout_logprobs))

    trainer.engine.generate = poisoned


def in_batch_outputs(trainer: Any, poison: Poison) -> None:
    outputs = trainer.objective.outputs

    def poisoned(batch: Any) -> Any:
        given = outputs(batch)
        return poison.into(given) if isinstance(given, Tensor) else (poison.into(given[0]), given[1])

    trainer.objective.outputs = poisoned


def in_first_loss(trainer: Any, poison: Poison) -> None:
    in_losses(trainer, poison, only_first=True)


def make_grpo() -> Any:
    """With a KL in the loss."""
    trainer = test_rl.make_trainer(config=test_rl.GRPOConfig(group_size=4, kl_coef=0.1), microbatch_tokens=250)
    other = test_rl.make_trainer()
    trainer.algorithm.reference = other.algorithm.actor
    return trainer


def make_ppo() -> Any:
    """With every state that PPO has."""
    settings = {"normalize_scores": True, "kl_coef": 0.1, "kl_target": 0.5, "step_kl_target": 0.01}
    return test_rl.make_ppo_trainer(config=PPOConfig(**settings))


LOSSES = {"loss": in_losses, "first loss": in_first_loss, "gradient": in_gradient}
RL = {
    **LOSSES,
    "logprobs before the update": in_outputs("logprobs", with_grad=False),
    "logprobs in the update": in_outputs("logprobs", with_grad=True),
    "reference": in_reference,
    "score": in_scores("total"),
    "token score": in_scores("per_token"),
    "rollout": in_rollout,
}
CRITIC = {
    "values before the update": in_outputs("values", with_grad=False),
    "values in the update": in_outputs("values", with_grad=True),
}
PLACES: dict[str, dict[str, Callable[[Any, Poison], None]]] = {
    "grpo": RL,
    "ppo": RL | CRITIC,
    "sft": LOSSES | {"outputs": in_batch_outputs},
    "reward-model": LOSSES | {"outputs": in_batch_outputs},
}
MAKE: dict[str, Callable[[], Any]] = {
    "grpo": make_grpo,
    "ppo": make_ppo,
    "sft": test_batch.sft_trainer,
    "reward-model": test_batch.reward_model_trainer,
}
HARMLESS = {("rollout", 1e30), ("loss", 1e30), ("first loss", 1e30), ("gradient", 1e30), ("outputs", 1e30)}
"""Finite, and clipped with the gradient where that does not overflow: the step is as long as any other."""


STEPPED = ("loss", "gradient", "outputs")
"""Places that spoil every step of the iteration: no weight may change in it."""


QUICK = ("gradient", "score")
"""Places that are tested with a transformer in every test run."""


def weights_of(trainer: Any) -> dict[str, list[float]]:
    return {
        f"{name}/{key}": p.flatten().tolist()
        for name, trained in trainer.trained.items()
        for key, p in trained.parameters.items()
    }


def is_reported(values: dict[str, float], warnings: list[str]) -> bool:
    """Whether something says that an iteration was not as others are."""
    counts = [x for name, x in values.items() if name.endswith(("/skipped_steps", "score/unscored", "score/extreme"))]
    return any(counts) or bool(warnings) or not all(map(math.isfinite, values.values()))


def check(trainer: Any, poison: Poison, case: tuple[str, float]) -> None:
    """Runs the iterations, of which one is poisoned."""
    alarms, place, number = Alarms(steps_per_iteration=4), *case
    for iteration in range(1, NUM_ITERATIONS + 1):
        poison.active = iteration == BAD_ITERATION and poison.rank in (None, trainer.microbatcher.collectives.rank)
        before = weights_of(trainer)
        values = trainer.iterate().values()
        if iteration == BAD_ITERATION and place in STEPPED and not math.isfinite(number):
            assert weights_of(trainer) == before
        warnings = alarms.observe(values)
        assert not_finite(trainer.state_dict()) is None, f"after iteration {iteration}"
        if iteration == BAD_ITERATION:
            assert is_reported(values, warnings) or case in HARMLESS
        else:
            assert not is_reported({k: x for k, x in values.items() if k != "score/unscored"}, []), values
            assert all(abs(x) < 1e6 for name, x in values.items() if not name.endswith("per_s")), values
    assert all(map(math.isfinite, alarms.start.values()))


def cases() -> list[Any]:
    """Every place with every number; those that are quick in every test run. With a transformer, a place has NaN and
    one of the other numbers, in turn, unless RELIABILITY=1."""
    return [
        pytest.param(kind, place, number, id=f"{kind}-{place}-{number}", marks=[] if is_quick else [pytest.mark.slow])
        for kind, places in PLACES.items()
        for (turn, place), number in itertools.product(enumerate(places), BAD)
        if kind != "grpo" or IS_WHOLE or number in (BAD[0], BAD[1 + turn % 3])
        for is_quick in [math.isnan(number) and (kind != "grpo" or place in QUICK)]
    ]


@pytest.mark.parametrize(("kind", "place", "number"), cases())
def test_a_bad_number_leaves_weights_and_state_finite_and_is_reported(kind: str, place: str, number: float):
    trainer, poison = MAKE[kind](), Poison(number)
    PLACES[kind][place](trainer, poison)
    check(trainer, poison, (place, number))


@pytest.mark.parametrize("number", [math.nan, pytest.param(math.inf, marks=pytest.mark.slow)])
@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("place", ["first loss", "gradient"])
@pytest.mark.parametrize("kind", [pytest.param("grpo", marks=pytest.mark.slow), "ppo", "sft", "reward-model"])
def test_a_bad_number_on_one_rank_of_two_is_skipped_on_both(kind: str, place: str, rank: int, number: float):
    trainers = [MAKE[kind]() for _ in range(2)]

    def work(collectives: Collectives) -> None:
        trainer, poison = trainers[collectives.rank], Poison(number, rank=rank)
        trainer.collectives = collectives
        trainer.microbatcher = Microbatcher(trainer.microbatcher.budget, context_of(collectives))
        for trained in trainer.trained.values():
            trained.collectives = collectives
        PLACES[kind][place](trainer, poison)
        check(trainer, poison, (place, number))

    on_ranks(2, work)
    for name, trained in trainers[0].trained.items():
        for left, right in zip(trained.parameters.values(), trainers[1].trained[name].parameters.values(), strict=True):
            assert torch.equal(left, right)


# --- what lasts -------------------------------------------------------------------------------------------------------


def best_of(folder: Path, numbers: list[dict[str, float]], metric: str) -> float | None:
    def save(place: Path) -> None:
        place.mkdir(parents=True, exist_ok=True)

    best = BestModel(
        folder, metric=metric, warmup_iterations=0, save_model=save, collectives=OneProcess(), report=print
    )
    for iteration, values in enumerate(numbers, start=1):
        best.update(iteration, values)
    record = best.record()
    return record and record["value"]


@pytest.mark.parametrize("number", BAD)
class TestWhatLasts:
    """Everything that keeps a number from one iteration to the next; alarms have a test of their own."""

    def test_kl_control(self, number: float):
        control, undisturbed = (KLControl(coef=0.1, target=2.0) for _ in range(2))
        for kl in (number, 1.0, 3.0):
            control.update(kl, 1000)
        for kl in (1.0, 3.0):
            undisturbed.update(kl, 1000)
        assert control.coef == pytest.approx(undisturbed.coef, rel=0.021)  # a fifth in ten thousand responses

    def test_step_kl_control(self, number: float):
        control = StepKLControl(target=0.1)
        for kl in (number, 0.1, 0.1):
            control.update(kl)
        assert 1 / 1.5 <= control.coef <= 1.5

    def test_moments_of_scores(self, number: float):
        trainer, poison = make_ppo(), Poison(number)
        in_scores("total")(trainer, poison)
        undisturbed = make_ppo()
        for iteration in range(1, 5):
            poison.active = iteration == 2
            trainer.iterate()
            undisturbed.iterate()
        (count, total, square), (full, *_) = trainer.algorithm.score_moments, undisturbed.algorithm.score_moments
        assert full - 1 <= count <= full
        assert square / count - (total / count) ** 2 < 10  # lengths of 1 to 6

    @pytest.mark.parametrize("sign", ["", "-"])
    def test_best_model(self, tmp_path: Path, number: float, sign: str):
        extreme = {"score/extreme": 1.0} if math.isfinite(number) else {}
        numbers = [{"score/mean": number} | extreme, {"score/mean": 0.5}, {"score/mean": number} | extreme]
        assert best_of(tmp_path, numbers, f"{sign}score/mean") == 0.5

    def test_schedule(self, number: float):
        schedule = StepSchedule(OptimizerConfig(schedule="linear"), 10)
        for norm in (number, 1.0, number):
            schedule.begin_step([])
            schedule.accept(torch.tensor(norm))
        assert schedule.steps() == {"num_steps_done": 3, "num_skipped": int(not math.isfinite(number))}

    def test_normalization_of_a_reward_model(self, number: float):
        scores = torch.tensor([1.0, number, 2.0])
        if math.isfinite(number):
            assert normalization_on(scores)(scores).isfinite().all()
        else:
            with pytest.raises(FloatingPointError):
                normalization_on(scores)

    def test_metrics(self, number: float):
        """One iteration's are not pooled with another's; what is pooled within one stays a number or becomes none."""
        kinds = Mean(number, 1.0), Total(number), Maximum(number), Moments(1.0, number, number * number)
        pooled = Metrics(dict(zip("abcd", kinds, strict=True)))
        sound = Metrics({"a": Mean(1.0, 1.0), "b": Total(1.0), "c": Maximum(1.0), "d": Moments(1.0, 1.0, 1.0)})
        for both in (pooled.merge(sound), sound.merge(pooled)):
            assert both.values().keys() == {"a", "b", "c", "d/mean", "d/std"}
        assert sound.values() == {"a": 1.0, "b": 1.0, "c": 1.0, "d/mean": 1.0, "d/std": 0.0}


# --- runs that end ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_that_nothing_scores_ends_with_a_line_and_a_checkpoint(tmp_path: Path):
    """And goes on, with as many iterations again, once the reward scores."""
    write_recipes(tmp_path)
    (tmp_path / "rule.py").write_text("def rule(responses):\n    return [None] * len(responses)\n")
    settings = [
        *(f"model.path={TINY}", f"data.path={tmp_path / 'rows.jsonl'}", f"run.output_dir={tmp_path / 'out'}"),
        *(
            f"reward.functions.0.name={tmp_path / 'rule.py'}:rule",
            f"evaluation_data.path={tmp_path / 'rows.jsonl'}",
            "algorithm.max_redraws=0",
        ),
        *("run.num_iterations=12", "run.checkpoint_every=100"),
    ]
    done = CliRunner().invoke(app, ["grpo", str(tmp_path / "grpo.yaml"), *settings])
    assert done.exit_code == 1, done.stderr
    (error, *_) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: stopped after iteration 10: no response could be scored in 10 iterations in a row")
    steps = sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir())
    assert steps == ["step_000001", "step_000010"]
    (tmp_path / "rule.py").write_text("def rule(responses):\n    return [float(len(text)) for text in responses]\n")
    done = CliRunner().invoke(app, ["grpo", str(tmp_path / "grpo.yaml"), *settings, "run.resume=true"])
    assert done.exit_code == 0, done.stderr
    assert [line["iteration"] for line in lines(tmp_path / "out" / "metrics.jsonl")] == list(range(13))


@pytest.mark.parametrize("one_step", [True, False])
def test_a_constant_reward_is_seen_by_its_gradient(monkeypatch: pytest.MonkeyPatch, one_step: bool):
    monkeypatch.setattr("llmrl.trainers.alarms.NEVER_LEARNED", 2)
    settings: dict[str, Any] = {"one_step": True, "minibatch_size": 24} if one_step else {}
    trainer = test_rl.make_trainer(reward=lambda rollout: test_rl.scored(rollout, torch.ones(24)), **settings)
    alarms = Alarms()
    for is_over in (False, True):
        alarms.observe(trainer.iterate().values())
        assert bool(alarms.verdict) == is_over
