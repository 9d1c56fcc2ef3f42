"""The regression of a critic on the returns of scored responses."""

import pytest
import torch
from torch.testing import assert_close

from llmrl.batches import ScoredResponses, TokenOutputs
from llmrl.functional.statistics import Explained
from llmrl.trainers.critic import CriticObjective
from tests.models.tiny import make_sequences

ROWS = [([5], [6, 7, 8], [1, 1, 1]), ([5, 6], [7], [1]), ([4], [5, 6], [1, 1])]
SCORES = torch.tensor([8.0, -3.0, 0.0])


class Fixed:
    """A critic whose values are given."""

    def __init__(self, values):
        self.named = {"values": values}

    def values(self, sequences):
        return TokenOutputs(named=self.named)


def batch() -> ScoredResponses:
    return ScoredResponses(sequences=make_sequences(ROWS), scores=SCORES)


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_a_return_is_the_discounted_score(gamma):
    """By hand: the last token has the whole score, each one before it gamma of that."""
    returns = CriticObjective(Fixed(None), gamma=gamma).returns(batch())
    expected = [[8.0 * gamma**2, 8.0 * gamma, 8.0, 0.0], [-3.0, 0.0, 0.0, 0.0], [0.0] * 4]
    assert_close(returns, torch.tensor(expected))


def test_the_loss_is_half_the_squared_error_per_token():
    """NaN where no token stands changes nothing, in the gradient either."""
    values = torch.full((3, 4), torch.nan)
    mask = batch().sequences.response_mask
    values[mask] = torch.tensor([8.0, 6.0, 8.0, -3.0, 1.0, 0.0])  # wrong by 0, 2, 0, 0, 1, 0
    values.requires_grad_()
    objective = CriticObjective(Fixed(values), gamma=1.0)
    outputs = objective.outputs(batch())
    loss, metrics = objective.loss(outputs, batch(), objective.denominator(batch()))
    assert_close(loss, torch.tensor((4.0 + 1.0) / 2 / 6))
    loss.backward()
    expected = torch.zeros(3, 4)
    expected[0, 1], expected[2, 0] = -2.0 / 6, 1.0 / 6
    assert_close(values.grad, expected)
    assert metrics.values()["value/loss"] == pytest.approx(loss.item())


def test_the_explained_variance_is_that_of_all_tokens():
    targets = torch.tensor([8.0, 8.0, 8.0, -3.0, 0.0, 0.0], dtype=torch.float64)
    predicted = torch.tensor([8.0, 6.0, 8.0, -3.0, 1.0, 0.0], dtype=torch.float64)
    values = torch.zeros(3, 4)
    values[batch().sequences.response_mask] = predicted.float()
    objective = CriticObjective(Fixed(values), gamma=1.0)
    evaluated = objective.evaluate(values, batch())
    expected = 1 - (targets - predicted).var(correction=0) / targets.var(correction=0)
    assert evaluated["eval/explained_variance"] == pytest.approx(expected.item())
    assert evaluated["eval/loss"] == pytest.approx(5 / 12)
    _, metrics = objective.loss(values, batch(), torch.tensor(6))
    assert isinstance(metrics.statistics["value/explained_variance"], Explained)


def test_parts_of_a_batch_add_up():
    torch.manual_seed(0)
    values = torch.randn(3, 4)
    whole = batch()
    objective = CriticObjective(Fixed(values), gamma=0.9)
    loss, metrics = objective.loss(values, whole, objective.denominator(whole))
    parts = [
        objective.loss(values[i], whole.select(i), objective.denominator(whole))
        for i in (torch.tensor([0]), torch.tensor([1, 2]))
    ]
    assert_close(sum(part for part, _ in parts), loss)
    merged = parts[0][1].merge(parts[1][1]).values()
    assert merged == pytest.approx(metrics.values())
