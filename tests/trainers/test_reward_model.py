"""The training of reward models against plain arithmetic on a tiny model."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForSequenceClassification

from llmrl.batches import PreferencePairs, Sequences
from llmrl.microbatches import TokenBudget
from llmrl.models.reward_model import RewardModule, TransformersRewardModel
from llmrl.optim.config import OptimizerConfig
from llmrl.optim.local import LocalTrainable
from llmrl.reports.progress import Silent
from llmrl.roles import Collectives
from llmrl.trainers.batch import BatchTrainer
from llmrl.trainers.config import RewardModelConfig
from llmrl.trainers.reward_model import RewardModelObjective
from tests import oracles
from tests.contexts import context_of
from tests.distributed.threads import on_ranks
from tests.models.tiny import packing

from .test_sft import Counter, Keeper, batch

VOCAB, EOS = 10, 9
Pair = tuple[list[int], list[int], list[int], float]

RAGGED: list[Pair] = [
    ([1, 2, 3], [4, 5, 6, 7, EOS], [8, EOS], 0.5),
    ([4], [EOS], [1, 2, EOS], 0.0),
    ([5, 6, 7, 8, 1, 2], [3, EOS], [2, 2, 2, EOS], 2.0),
    ([2, EOS], [1, 1, EOS], [1, EOS, 1], -0.25),
    ([0], [0, EOS], [7, EOS], 1.0),
]


def as_pairs(rows: list[Pair]) -> PreferencePairs:
    sides = [batch([(row[0], row[side]) for row in rows]) for side in (1, 2)]
    return PreferencePairs(chosen=sides[0], rejected=sides[1], margin=torch.tensor([row[3] for row in rows]))


class Cycle:
    """`BatchSource` that deals the pairs round and round."""

    def __init__(self, rows: list[Pair]) -> None:
        self.rows = rows
        self.position = 0

    def next(self, num_pairs: int) -> PreferencePairs:
        dealt = [self.rows[n % len(self.rows)] for n in range(self.position, self.position + num_pairs)]
        self.position += num_pairs
        return as_pairs(dealt)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def tiny() -> Any:
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, num_attention_heads=2, initializer_range=0.3, num_labels=1)
    return LlamaForSequenceClassification(config)


def make_trainer(
    rows: list[Pair],
    *,
    model: Any = None,
    trainable: Callable[[nn.Module], Any] = Keeper,
    held_out: list[Pair] | None = None,
    progress: Silent | None = None,
    packed: bool = True,
    shift: float = 0.0,
    batch_size: int | None = None,
    microbatch_tokens: int = 1000,
    **config: Any,
) -> BatchTrainer:
    model = model or tiny()
    module = RewardModule(packing(model) if packed else model, dtype=torch.float32)
    module.register_forward_hook(lambda _, __, scores: scores + shift)
    scorer = TransformersRewardModel(module)
    return BatchTrainer(
        objective=RewardModelObjective(RewardModelConfig(**config), scorer=scorer),
        trained={"reward_model": trainable(module)},
        source=Cycle(rows),
        held_out=as_pairs(held_out or rows),
        batch_size=batch_size or len(rows),
        budget=TokenBudget(max_tokens=microbatch_tokens, packed=packed),
        context=context_of(progress=progress),
    )


def adamw(module: nn.Module) -> LocalTrainable:
    return LocalTrainable(module, OptimizerConfig(learning_rate=0.02, schedule="linear"), num_steps=60)


def plain_scores(model: Any, rows: list[Pair]) -> list[tuple[Tensor, Tensor]]:
    """``(chosen, rejected)`` a sequence at a time, without padding."""

    def score(ids: list[int]) -> Tensor:
        hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state
        return hidden[0, -1] @ model.score.weight[0]

    return [(score(prompt + chosen), score(prompt + rejected)) for prompt, chosen, rejected, _ in rows]


def plain_loss(model: Any, rows: list[Pair], *, use_margin: bool = True, center_coef: float = 0.0) -> Tensor:
    """Mean of log(1 + exp(-(chosen - rejected - margin))) + center_coef (chosen + rejected)²."""
    losses = []
    for (chosen, rejected), (*_, margin) in zip(plain_scores(model, rows), rows, strict=True):
        lead = chosen - rejected - (margin if use_margin else 0.0)
        losses.append(torch.log(1 + torch.exp(-lead)) + center_coef * (chosen + rejected) ** 2)
    return torch.stack(losses).mean()


def gradients(trainer: BatchTrainer) -> dict[str, Tensor]:
    keeper = trainer.trained["reward_model"]
    assert isinstance(keeper, Keeper)
    return keeper.gradients


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert_close(ours[name], theirs[name], rtol=1e-3, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "packed", "num_parts"),
    [(1, True, 5), (20, True, 3), (1000, True, 1), (1, False, 5), (30, False, 3), (1000, False, 1)],
)
@pytest.mark.parametrize(("use_margin", "center_coef"), [(True, 0.0), (False, 0.0), (True, 0.3)])
def test_a_step_is_the_gradient_of_bradley_terry_however_the_batch_is_cut(
    tokens: int, packed: bool, num_parts: int, use_margin: bool, center_coef: float
):
    counter = Counter()
    settings = {"use_margin": use_margin, "center_coef": center_coef}
    trainer = make_trainer(RAGGED, microbatch_tokens=tokens, packed=packed, progress=counter, **settings)
    values = trainer.iterate().values()

    model = tiny()
    expected = plain_loss(model, RAGGED, **settings)
    expected.backward()
    assert values["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(gradients(trainer), {f"model.{name}": p.grad for name, p in model.named_parameters()})
    assert counter.phases == [("update", num_parts)]
    assert counter.done == num_parts


@pytest.mark.parametrize("center_coef", [0.0, 0.01])
def test_a_constant_added_to_all_scores_changes_no_gradient_without_centring(center_coef: float):
    one, other = (make_trainer(RAGGED, shift=shift, center_coef=center_coef) for shift in (0.0, 3.0))
    losses = [trainer.iterate().values()["loss"] for trainer in (one, other)]
    if center_coef == 0.0:
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
        assert_same_gradients(gradients(other), gradients(one))
    else:
        assert losses[1] > losses[0] + 0.1
        assert not torch.allclose(
            gradients(other)["model.score.weight"], gradients(one)["model.score.weight"], atol=0.1
        )


def test_the_loss_of_a_head_of_zeros_by_hand():
    """Every probability is sigmoid(-margin)."""
    model = tiny()
    model.score.weight.data.zero_()
    expected = sum(math.log(1 + math.exp(row[3])) for row in RAGGED) / 5
    values = make_trainer(RAGGED, model=model).iterate().values()
    assert values["loss"] == pytest.approx(expected, rel=1e-6)
    assert (values["pairs/accuracy"], values["pairs/margin"]) == (0.5, 0.0)  # of the scores, whatever was asked for
    values = make_trainer(RAGGED, model=model, use_margin=False).iterate().values()
    assert values["loss"] == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.usefixtures("production")
@pytest.mark.parametrize("packed", [True, False])
def test_margins_are_one_a_pair(packed: bool):
    """Of shape (B,), as both scores are: a column of them would make a square of differences."""
    objective = make_trainer(RAGGED, packed=packed).objective
    pairs = as_pairs(RAGGED)
    chosen, rejected = objective.outputs(pairs)
    assert chosen.shape == rejected.shape == pairs.margin.shape == (5,)
    with pytest.raises(ValueError, match=r"margin \(5, 1\)"):
        objective.loss((chosen, rejected), replace(pairs, margin=pairs.margin[:, None]), torch.tensor(5))


def test_an_iteration_takes_the_next_pairs():
    trainer = make_trainer(RAGGED, batch_size=2)
    for first in (0, 2):
        loss = trainer.iterate().values()["loss"]
        assert loss == pytest.approx(plain_loss(tiny(), RAGGED[first : first + 2]).item(), rel=1e-5)
    assert trainer.position() == {"iteration": 2, "source": {"position": 4}}


def test_what_ranks_learn_together_is_what_one_process_learns():
    models = [tiny(), tiny()]

    def learn(ranks: Collectives) -> float:
        trainer = make_trainer(RAGGED, model=models[ranks.rank], microbatch_tokens=25)
        trainer.microbatcher.collectives = ranks
        return trainer.iterate().values()["loss"]

    for loss in on_ranks(2, learn):
        assert loss == pytest.approx(plain_loss(tiny(), RAGGED).item(), rel=1e-5)


def test_what_an_iteration_reports():
    values = make_trainer(RAGGED, microbatch_tokens=25).iterate().values()
    assert values.keys() == {
        "loss",
        "pairs/accuracy",
        "pairs/margin",
        "reward_model/learning_rate",
        "reward_model/grad_norm",
        "reward_model/grad_norm_max",
        "reward_model/skipped_steps",
        "time/iteration_s",
        "tokens/trained_per_s",
    }
    differences = [(chosen - rejected).item() for chosen, rejected in plain_scores(tiny(), RAGGED)]
    assert values["pairs/accuracy"] == pytest.approx(sum(x > 0 for x in differences) / 5)
    assert values["pairs/margin"] == pytest.approx(sum(differences) / 5, rel=1e-4)
    tokens = 2 * 13 + 13 + 14  # prompts in both sequences, chosen, rejected
    assert values["tokens/trained_per_s"] * values["time/iteration_s"] == pytest.approx(tokens)


# --- evaluation -------------------------------------------------------------------------------------------------------


class Fixed:
    """`Scorer` that gives what it was told."""

    def __init__(self, chosen: list[float], rejected: list[float]) -> None:
        self.both = torch.tensor(chosen), torch.tensor(rejected)

    def scores(self, sequences: Sequences) -> Tensor:
        raise AssertionError("pairs are scored as pairs")

    def pair_scores(self, pairs: PreferencePairs) -> tuple[Tensor, Tensor]:
        assert len(pairs.margin) == len(self.both[0])
        assert not torch.is_grad_enabled()
        return self.both


def test_an_evaluation_by_hand_counts_a_tie_as_half():
    trainer = make_trainer(RAGGED[:1], held_out=RAGGED)  # margins 0.5, 0, 2, -0.25, 1
    assert isinstance(trainer.objective, RewardModelObjective)
    trainer.objective.scorer = Fixed([1.0, 2.0, 0.5, 0.0, 3.0], [0.0, 2.0, 1.0, -1.0, 2.0])
    leads = [0.5, 0.0, -2.5, 1.25, 0.0]
    assert trainer.evaluate() == {
        "eval/accuracy": pytest.approx(3.5 / 5),
        "eval/accuracy_low": pytest.approx(oracles.wilson_bound(3.5, 5, 1.959964, upper=False), abs=1e-6),  # type: ignore[arg-type]
        "eval/accuracy_high": pytest.approx(oracles.wilson_bound(3.5, 5, 1.959964, upper=True), abs=1e-6),  # type: ignore[arg-type]
        "eval/loss": pytest.approx(sum(math.log(1 + math.exp(-lead)) for lead in leads) / 5),
    }


@pytest.mark.parametrize("packed", [True, False])
def test_an_evaluation_is_the_mean_over_held_out_pairs_and_changes_nothing(packed: bool):
    counter = Counter()
    trainer = make_trainer(RAGGED[:2], held_out=RAGGED, progress=counter, packed=packed)
    values = trainer.evaluate()
    wins = sum(float(chosen > rejected) for chosen, rejected in plain_scores(tiny(), RAGGED))
    assert values["eval/loss"] == pytest.approx(plain_loss(tiny(), RAGGED).item(), rel=1e-5)
    assert values["eval/accuracy"] == pytest.approx(wins / 5)
    assert all(type(value) is float for value in values.values())
    assert all(p.grad is None for p in trainer.trained["reward_model"].module.parameters())
    assert trainer.position() == {"iteration": 0, "source": {"position": 0}}
    assert (counter.phases, counter.done) == ([("evaluation", 1)], 1)


# --- learning ---------------------------------------------------------------------------------------------------------


def ruled_pairs(num_pairs: int, seed: int) -> list[Pair]:
    """The chosen response has more threes than fours, the rejected one fewer; the rest is noise, the length too."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, count: int) -> list[int]:
        return torch.randint(low, high, (count,), generator=generator).tolist()

    def response(favoured: int) -> list[int]:
        (length,) = draw(1, 5, 1)
        body = [*draw(5, 9, length), favoured]
        order = torch.randperm(len(body), generator=generator).tolist()
        return [*(body[n] for n in order), EOS]

    return [(draw(0, 3, 1 + n % 3), response(3), response(4), 0.0) for n in range(num_pairs)]


@pytest.mark.parametrize("packed", [True, False])
def test_it_learns_a_separable_rule(packed: bool):
    model = tiny()
    model.score.weight.data.zero_()
    trainer = make_trainer(
        ruled_pairs(960, seed=0),
        model=model,
        trainable=adamw,
        held_out=ruled_pairs(200, seed=1),
        packed=packed,
        batch_size=16,
    )
    assert trainer.evaluate()["eval/accuracy"] == 0.5  # a new head says nothing
    for _ in range(60):
        trainer.iterate()
    values = trainer.evaluate()
    assert values["eval/accuracy"] >= 0.98
    assert values["eval/accuracy_low"] > 0.9
    assert trainer.iteration == 60
