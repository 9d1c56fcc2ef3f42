"""The examples do what they say, and the loop by hand is that of the framework."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.testing import assert_close

from llmrl.algorithms.config import GRPOConfig
from llmrl.algorithms.grpo import GRPO
from llmrl.batches import Rollout, Scores, StopReason
from llmrl.functional.losses import token_weights
from llmrl.models.heads import choose_head
from llmrl.models.policy import PolicyModule, TransformersPolicy
from tests.models.tiny import llama, make_sequences

ROOT = Path(__file__).parents[1]
ROWS = [
    ([7, 8, 9], [10, 11, 2], [1, 1, 1]),
    ([7, 8, 9], [12], [1]),
    ([3, 4], [13, 14], [1, 1]),
    ([3, 4], [15, 2], [1, 1]),
]


@pytest.fixture
def by_hand(monkeypatch) -> ModuleType:
    monkeypatch.chdir(ROOT)
    spec = importlib.util.spec_from_file_location("grpo_by_hand", ROOT / "examples" / "grpo_by_hand.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_is_short():
    assert len((ROOT / "examples" / "grpo_by_hand.py").read_text().splitlines()) < 100


def test_its_step_is_that_of_the_framework(by_hand):
    """Loss and gradient on a rollout of ragged lengths, against GRPO's own."""
    torch.manual_seed(0)
    model = llama()
    module = PolicyModule(model, choose_head(model, model.config.vocab_size), temperature=1.0, dtype=torch.float32)
    sequences = make_sequences(ROWS)
    scores = torch.tensor([1.0, 0.0, 0.0, 3.0])
    rollout = Rollout(
        sequences=sequences,
        rollout_logprobs=torch.zeros(sequences.response_ids.shape),
        stop_reason=torch.full((4,), int(StopReason.EOS)),
        group_ids=torch.tensor([0, 0, 1, 1]),
        rows=({},) * 4,
    )
    grpo = GRPO(
        GRPOConfig(kl_coef=0.0, group_size=2),
        actor=TransformersPolicy(module),
        reference=None,
        max_response_tokens=3,
        one_step=True,
    )
    per_token = torch.zeros(sequences.response_ids.shape)
    experience, _ = grpo.experience(rollout, Scores(total=scores, per_token=per_token, parts={}))
    mask = sequences.response_mask
    weights = token_weights(
        mask, aggregation=grpo.aggregation, num_tokens=mask.sum(), num_responses=4, max_response_tokens=3
    )
    ((_, expected, _),) = grpo.losses(experience, weights)
    ours = by_hand.grpo_loss(model, rollout, scores)
    parameters = list(model.parameters())
    assert_close(ours, expected)
    gradients = [torch.autograd.grad(loss, parameters) for loss in (ours, expected)]
    assert any(g.abs().max() > 1e-3 for g in gradients[1])
    for mine, theirs in zip(*gradients, strict=True):
        assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_the_loop_runs(by_hand, capsys):
    assert len(by_hand.main(num_imitated=2, num_iterations=2)) == 2
    assert capsys.readouterr().out.startswith("iteration 1  score ")


@pytest.mark.slow
def test_the_loop_learns(by_hand):
    means = by_hand.main()
    assert sum(means[-5:]) / 5 > sum(means[:5]) / 5 + 0.2
