"""Supervised fine-tuning against plain arithmetic on a tiny model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from llmrl.batches import Sequences
from llmrl.microbatches import TokenBudget
from llmrl.models.heads import LinearHead
from llmrl.models.policy import PolicyModule, TransformersPolicy
from llmrl.optim.config import OptimizerConfig
from llmrl.optim.local import LocalTrainable
from llmrl.reports.progress import Silent
from llmrl.trainers.batch import BatchTrainer
from llmrl.trainers.sft import SFTObjective
from tests.contexts import context_of

VOCAB, EOS = 10, 9
Example = tuple[list[int], list[int]]

RAGGED: list[Example] = [
    ([1, 2, 3], [4, 5, 6, 7, EOS]),
    ([4], [EOS]),
    ([5, 6, 7, 8, 1, 2], [3, EOS]),
    ([2, 2], [1, 1, 1, EOS]),
    ([0], [0, EOS]),
]
MAPPING: list[Example] = [([token], [(token + 3) % 7, EOS]) for token in range(7)]  # without a fixed point


def batch(examples: list[Example]) -> Sequences:
    """Padded left and right, as `Sequences` are."""
    width, length = (max(map(len, column)) for column in zip(*examples, strict=True))
    masks = [[[False] * (width - len(p)) + [True] * len(p) for p, _ in examples]]
    masks += [[[True] * len(r) + [False] * (length - len(r)) for _, r in examples]]
    return Sequences.from_rows(
        prompt_ids=torch.tensor([[EOS] * (width - len(p)) + p for p, _ in examples]),
        prompt_mask=torch.tensor(masks[0]),
        response_ids=torch.tensor([r + [EOS] * (length - len(r)) for _, r in examples]),
        response_mask=torch.tensor(masks[1]),
        response_lengths=torch.tensor([len(r) for _, r in examples]),
    )


class Cycle:
    """`BatchSource` that deals the examples round and round."""

    def __init__(self, examples: list[Example]) -> None:
        self.examples = examples
        self.position = 0

    def next(self, num_examples: int) -> Sequences:
        dealt = [self.examples[n % len(self.examples)] for n in range(self.position, self.position + num_examples)]
        self.position += num_examples
        return batch(dealt)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


class Keeper:
    """`Trainable` that keeps the gradient of a step instead of taking it."""

    learning_rate = 0.0
    num_steps_done = 0
    device = torch.device("cpu")
    holds_all = True

    def __init__(self, module: nn.Module) -> None:
        self.module = self.wrapped = module
        self.gradients: dict[str, Tensor] = {}

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def optimizer_step(self) -> Tensor:
        self.gradients = {name: p.grad for name, p in self.module.named_parameters() if p.grad is not None}
        self.module.zero_grad(set_to_none=True)
        return torch.zeros(())

    def whole(self, part: nn.Module) -> Any:
        raise AssertionError("nobody samples from it")

    def assign(self, name: str, value: Tensor) -> None:
        raise AssertionError("no reference moves")

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Counter(Silent):
    """Progress that counts."""

    def __init__(self) -> None:
        self.phases: list[tuple[str, int]] = []
        self.done = 0

    def phase(self, name: str, total: int) -> None:
        self.phases.append((name, total))

    def advance(self, amount: int = 1) -> None:
        self.done += amount


def tiny(**changes: Any) -> LlamaForCausalLM:
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, initializer_range=0.3, **changes))


def make_trainer(
    examples: list[Example],
    *,
    model: LlamaForCausalLM | None = None,
    trainable: Callable[[nn.Module], Any] = Keeper,
    held_out: list[Example] | None = None,
    progress: Silent | None = None,
    batch_size: int | None = None,
    microbatch_tokens: int = 64,
) -> BatchTrainer:
    module = PolicyModule(model or tiny(), LinearHead(VOCAB), temperature=1.0, dtype=torch.float32)
    return BatchTrainer(
        objective=SFTObjective(TransformersPolicy(module)),
        trained={"actor": trainable(module)},
        source=Cycle(examples),
        held_out=None if held_out is None else batch(held_out),
        batch_size=batch_size or len(examples),
        budget=TokenBudget(max_tokens=microbatch_tokens),
        context=context_of(progress=progress),
    )


def adamw(module: nn.Module) -> LocalTrainable:
    return LocalTrainable(module, OptimizerConfig(learning_rate=0.05, schedule="linear"), num_steps=60)


def plain_loss(model: nn.Module, examples: list[Example]) -> Tensor:
    """-Σ log p / number of response tokens, a row at a time, without padding."""
    losses = []
    for prompt, response in examples:
        logprobs = model(input_ids=torch.tensor([prompt + response])).logits[0].log_softmax(dim=-1)
        losses += [-logprobs[len(prompt) + t - 1, token] for t, token in enumerate(response)]
    return torch.stack(losses).mean()


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "num_parts"), [(1, 5), (10, 4), (1000, 1)])
def test_loss_and_gradient_are_the_mean_over_tokens_however_the_batch_is_cut(tokens: int, num_parts: int):
    counter = Counter()
    trainer = make_trainer(RAGGED, microbatch_tokens=tokens, progress=counter)
    values = trainer.iterate().values()

    model = tiny()
    expected = plain_loss(model, RAGGED)
    expected.backward()
    assert values["loss"] == pytest.approx(expected.item(), rel=1e-5)
    keeper = trainer.trained["actor"]
    assert isinstance(keeper, Keeper)
    assert keeper.gradients.keys() == {f"model.{name}" for name, _ in model.named_parameters()}
    for name, p in model.named_parameters():
        assert_close(keeper.gradients[f"model.{name}"], p.grad, rtol=1e-4, atol=1e-6)
    assert counter.phases == [("update", num_parts)]
    assert counter.done == num_parts


def test_prompt_tokens_carry_no_loss():
    """The gradient reaches just those last hidden states that predict a response token."""
    model, kept = tiny(), []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        output.last_hidden_state.retain_grad()
        kept.append(output.last_hidden_state)

    model.model.register_forward_hook(keep)
    make_trainer([([1, 2, 3], [4, 5, EOS]), ([6], [7])], model=model).iterate()
    (hidden,) = kept
    reached = hidden.grad.abs().sum(dim=-1) > 0
    assert reached.int().tolist() in (
        [[0, 0, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0]],
        [[1, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0]],  # rows are sorted by length
    )


def test_what_an_iteration_reports():
    values = make_trainer(RAGGED).iterate().values()
    assert values.keys() == {
        "loss",
        "actor/learning_rate",
        "actor/grad_norm",
        "actor/grad_norm_max",
        "actor/skipped_steps",
        "time/iteration_s",
        "tokens/trained_per_s",
    }
    assert values["tokens/trained_per_s"] * values["time/iteration_s"] == pytest.approx(
        13 + 14
    )  # prompts and responses


def test_it_learns_a_mapping():
    trainer = make_trainer(MAPPING, trainable=adamw, held_out=MAPPING, batch_size=7)
    before = trainer.evaluate()["eval/loss"]
    losses = [trainer.iterate().values()["loss"] for _ in range(60)]
    assert before > 1.5
    assert losses[0] == pytest.approx(before, rel=1e-5)
    assert trainer.evaluate()["eval/loss"] < 0.05
    assert trainer.iteration == 60


# --- evaluation -------------------------------------------------------------------------------------------------------


def test_the_evaluation_is_the_mean_over_held_out_tokens_and_changes_nothing():
    counter = Counter()
    trainer = make_trainer(MAPPING, held_out=RAGGED, progress=counter)
    assert trainer.evaluate() == {"eval/loss": pytest.approx(plain_loss(tiny(), RAGGED).item(), rel=1e-5)}
    assert all(p.grad is None for p in trainer.trained["actor"].module.parameters())
    assert trainer.position() == {"iteration": 0, "source": {"position": 0}}
    assert (counter.phases, counter.done) == ([("evaluation", 1)], 1)
