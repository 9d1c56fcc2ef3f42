"""Training on batches: that it can be stopped and continued, whatever the objective; and what is asked of one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmrl.batches import Sequences
from llmrl.functional.statistics import Total
from llmrl.metrics import Metrics
from llmrl.microbatches import TokenBudget
from llmrl.trainers.alarms import Alarms
from llmrl.trainers.batch import BatchTrainer
from llmrl.trainers.config import RunConfig
from llmrl.trainers.run import Run
from tests.contexts import context_of

from . import test_reward_model, test_sft


class Nobody:
    """A tracker that does not listen."""

    def begin(self, *_): ...

    def log(self, iteration: int, values: Any) -> None: ...


def sft_trainer(**roles: Any) -> BatchTrainer:
    model = test_sft.tiny(tie_word_embeddings=True)
    return test_sft.make_trainer(
        test_sft.RAGGED, model=model, trainable=test_sft.adamw, held_out=test_sft.MAPPING, batch_size=3, **roles
    )


def reward_model_trainer(**roles: Any) -> BatchTrainer:
    held_out = test_reward_model.ruled_pairs(9, seed=0)
    return test_reward_model.make_trainer(
        test_reward_model.RAGGED,
        trainable=test_reward_model.adamw,
        held_out=held_out,
        batch_size=3,
        center_coef=0.01,
        **roles,
    )


KINDS = pytest.mark.parametrize("make", [sft_trainer, reward_model_trainer])
Make = Callable[..., BatchTrainer]


# --- stop and go on ---------------------------------------------------------------------------------------------------


def run(make: Make, folder: Path, num_iterations: int, **config: Any) -> Run:
    trainer = make()
    return Run(
        RunConfig(output_dir=str(folder), num_iterations=num_iterations, checkpoint_every=1, **config),
        settings={},
        contents={},
        samples=None,
        trainer=trainer,
        context=context_of(),
        save_model=lambda _: None,
        card=str,
        evaluate=trainer.evaluate,
        evaluate_every=2,
        sink=Nobody(),
        alarms=Alarms(),
        warmup_iterations=0,
    )


def metrics(folder: Path) -> list[dict[str, float]]:
    """Without what a clock says."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: x for name, x in line.items() if not name.endswith("_s")} for line in lines]


def saved(folder: Path) -> list[bytes]:
    step = folder / "checkpoints" / "step_000004"
    return [(step / name).read_bytes() for name in ("state.safetensors", "state.json")]


@KINDS
def test_a_resumed_run_is_bit_for_bit_the_undisturbed_one(make: Make, tmp_path: Path):
    run(make, tmp_path / "straight", 4).train()
    run(make, tmp_path / "resumed", 2).train()
    run(make, tmp_path / "resumed", 4, resume=True).train()
    assert metrics(tmp_path / "resumed") == metrics(tmp_path / "straight")
    assert [line["iteration"] for line in metrics(tmp_path / "straight")] == [0, 1, 2, 3, 4]
    assert saved(tmp_path / "resumed") == saved(tmp_path / "straight")


@KINDS
def test_a_run_that_failed_on_its_data_goes_on_as_if_it_had_not(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run(make, tmp_path / "straight", 4).train()
    broken = run(make, tmp_path / "failed", 4)
    source = broken.trainer.source  # type: ignore[attr-defined]
    deal = source.next

    def fail_after_dealing(num_rows: int) -> Any:
        dealt = deal(num_rows)
        if source.position > 6:
            raise OSError("the disk is gone")
        return dealt

    monkeypatch.setattr(source, "next", fail_after_dealing)
    with pytest.raises(OSError, match="disk"):
        broken.train()
    run(make, tmp_path / "failed", 4, resume=True).train()
    assert metrics(tmp_path / "failed") == metrics(tmp_path / "straight")
    assert saved(tmp_path / "failed") == saved(tmp_path / "straight")


@KINDS
def test_the_way_back_leads_to_where_the_iteration_began(make: Make):
    trainer = make()
    trainer.iterate()
    trainer.source.next(2)
    assert trainer.rewind()
    assert trainer.position() == {"iteration": 1, "source": {"position": 3}}


@KINDS
def test_there_is_no_way_back_once_the_update_has_begun(make: Make, monkeypatch: pytest.MonkeyPatch):
    trainer = make()
    assert trainer.rewind()

    def fail(*_: object) -> None:
        raise ArithmeticError

    (trainable,) = trainer.trained.values()
    monkeypatch.setattr(trainable.optimizer, "step", fail)  # type: ignore[attr-defined]
    with pytest.raises(ArithmeticError):
        trainer.iterate()
    assert not trainer.rewind()


# --- what is asked of an objective ------------------------------------------------------------------------------------


class OneWeight:
    """`Objective` that pulls a weight to 1 at every response token, and notes what it is asked."""

    def __init__(self, module: nn.Linear) -> None:
        self.module = module
        self.passes: list[tuple[int, bool]] = []
        """Rows of each forward pass, and whether with gradient."""
        self.shares: list[tuple[int, int]] = []
        """Response tokens of each microbatch, and of its batch."""

    def denominator(self, batch: Sequences) -> Tensor:
        return batch.response_mask.sum()

    def outputs(self, batch: Sequences) -> Tensor:
        self.passes.append((len(batch.response_lengths), torch.is_grad_enabled()))
        return self.module.weight * batch.response_mask

    def loss(self, outputs: Tensor, batch: Sequences, denominator: Tensor) -> tuple[Tensor, Metrics]:
        self.shares.append((int(batch.response_mask.sum()), int(denominator)))
        loss = (outputs - 1)[batch.response_mask].square().sum() / denominator
        return loss, Metrics({"loss": Total(loss.detach())})

    def evaluate(self, outputs: Tensor, batch: Sequences) -> dict[str, float]:
        return {"eval/weight": float(outputs[batch.response_mask].mean())}


def one_weight(held_out: Sequences | None = None) -> tuple[BatchTrainer, OneWeight]:
    """Microbatches of at most two rows, 16 tokens with padding; the weight begins at 0."""
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    objective = OneWeight(module)
    trainer = BatchTrainer(
        objective=objective,
        trained={"line": test_sft.Keeper(module)},
        source=test_sft.Cycle(test_sft.RAGGED),
        held_out=held_out,
        batch_size=5,
        budget=TokenBudget(max_tokens=16),
        context=context_of(),
    )
    return trainer, objective


def test_an_iteration_is_one_step_on_the_microbatches_of_a_batch():
    trainer, objective = one_weight()
    values = trainer.iterate().values()
    assert sorted(objective.passes) == [(1, True), (2, True), (2, True)]
    assert sum(part for part, _ in objective.shares) == 14
    assert {whole for _, whole in objective.shares} == {14}
    assert values["loss"] == pytest.approx(1.0)  # the mean of (0 - 1)²
    assert "line/grad_norm" in values
    (gradient,) = trainer.trained["line"].gradients.values()  # type: ignore[attr-defined]
    assert gradient.item() == pytest.approx(-2.0)
    assert trainer.iteration == 1


def test_held_out_data_takes_one_pass_without_gradient_an_iteration():
    held_out = test_sft.batch(test_sft.MAPPING)
    trainer, objective = one_weight(held_out)
    assert trainer.evaluate() == trainer.evaluate() == {"eval/weight": 0.0}
    outputs, data = trainer.held_out_outputs()
    assert (outputs.shape, data) == (held_out.response_mask.shape, held_out)
    assert objective.passes == [(7, False)]
    trainer.iterate()
    nn.init.ones_(objective.module.weight)
    assert trainer.evaluate() == {"eval/weight": 1.0}
    assert objective.passes[-1] == (7, False)


def test_a_trainer_without_held_out_data_cannot_evaluate():
    trainer, _ = one_weight()
    with pytest.raises(AssertionError, match="without held-out data"):
        trainer.evaluate()
