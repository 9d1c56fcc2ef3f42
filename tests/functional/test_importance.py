import math

import pytest
import torch

from llmrl.functional.advantages import gae
from llmrl.functional.importance import (
    behaviour_ratio,
    importance_metrics,
    masked_weights,
    truncated_weights,
    v_trace,
)
from llmrl.metrics import Metrics

NAN = math.nan


def ragged(*, seed=0):
    """Rewards, values, log-ratios, mask and values after the last token; tool tokens inside, NaN off the mask."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.tensor([[1, 1, 0, 0, 1, 1], [1, 1, 1, 0, 0, 0], [1, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
    rewards, values, log_ratios = (
        torch.where(mask, torch.randn(4, 6, generator=generator, dtype=torch.double), NAN) for _ in range(3)
    )
    return rewards, values, log_ratios, mask, torch.randn(4, generator=generator, dtype=torch.double)


def v_trace_by_its_sum(rewards, values, ratios, last, gamma, lam, rho_bar, c_bar):
    """Targets of one response as the paper writes them: V_s + Σ_t γ^(t-s) (Π_i c_i) δ_t."""
    after = [*values[1:], last]
    targets = []
    for s in range(len(rewards)):
        target = values[s]
        for t in range(s, len(rewards)):
            product = math.prod(lam * min(c_bar, ratios[i]) for i in range(s, t))
            delta = min(rho_bar, ratios[t]) * (rewards[t] + gamma * after[t] - values[t])
            target += gamma ** (t - s) * product * delta
        targets.append(target)
    return targets


@pytest.mark.parametrize(("lam", "rho_bar", "c_bar"), [(1.0, 1.0, 1.0), (0.8, 2.0, 1.0), (0.5, math.inf, 3.0)])
def test_v_trace_is_the_sum_of_the_paper_over_the_tokens_that_were_chosen(lam, rho_bar, c_bar):
    rewards, values, log_ratios, mask, last = ragged()
    ratio = behaviour_ratio(log_ratios, torch.zeros_like(log_ratios), mask)
    advantages, returns = v_trace(
        rewards, values, mask, last, ratio=ratio, gamma=0.9, gae_lambda=lam, rho_bar=rho_bar, c_bar=c_bar
    )
    assert not advantages[~mask].any()
    assert not returns[~mask].any()
    for row in range(3):
        r, v = rewards[row][mask[row]].tolist(), values[row][mask[row]].tolist()
        ratios = log_ratios[row][mask[row]].exp().tolist()
        targets = v_trace_by_its_sum(r, v, ratios, last[row].item(), 0.9, lam, rho_bar, c_bar)
        assert returns[row][mask[row]].tolist() == pytest.approx(targets)
        v_next, target_next = [*v[1:], last[row].item()], [*targets[1:], last[row].item()]
        wanted = [
            r[t] + 0.9 * ((1 - lam) * v_next[t] + lam * target_next[t]) - v[t] for t in range(len(r))
        ]  # the mixture by which rlax bootstraps its advantages
        assert advantages[row][mask[row]].tolist() == pytest.approx(wanted)


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_v_trace_of_the_policy_that_sampled_is_gae(lam):
    rewards, values, _, mask, last = ragged(seed=1)
    ours = v_trace(rewards, values, mask, last, ratio=torch.ones_like(values), gamma=0.9, gae_lambda=lam, rho_bar=1.0)
    for found, wanted in zip(ours, gae(rewards, values, mask, last, gamma=0.9, gae_lambda=lam), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.usefixtures("production")
def test_v_trace_refuses_shapes_that_do_not_fit():
    rewards, values, _, mask, last = ragged()
    with pytest.raises(ValueError, match="shapes do not fit"):
        v_trace(rewards, values, mask, last, ratio=torch.ones(4, 5).double(), gamma=1.0, gae_lambda=1.0, rho_bar=1.0)


def test_ratios_of_tokens_and_of_the_response_by_hand():
    old = torch.tensor([[0.5, NAN, 0.25], [NAN, NAN, NAN]], requires_grad=True).log()
    rollout = torch.tensor([[0.25, NAN, 0.5], [NAN, NAN, NAN]]).log()
    mask = torch.tensor([[True, False, True], [False, False, False]])
    per_token = behaviour_ratio(old, rollout, mask)
    assert not per_token.requires_grad
    torch.testing.assert_close(per_token, torch.tensor([[2.0, 1.0, 0.5], [1.0, 1.0, 1.0]]))
    doubled = behaviour_ratio(old + math.log(2), rollout, mask, level="sequence")
    torch.testing.assert_close(doubled, torch.tensor([[4.0, 1.0, 4.0], [1.0, 1.0, 1.0]]))


@pytest.mark.usefixtures("production")
def test_a_level_that_is_unknown_is_refused():
    with pytest.raises(ValueError, match="must be 'token' or 'sequence'"):
        behaviour_ratio(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1).bool(), level="turn")  # type: ignore


def test_a_ratio_never_overflows():
    assert behaviour_ratio(torch.zeros(1, 1), torch.full((1, 1), -200.0), torch.ones(1, 1).bool()).isfinite().all()


def test_weights_by_hand():
    ratio = torch.tensor([[0.4, 0.5, 1.0, 2.0, 3.0]])
    torch.testing.assert_close(truncated_weights(ratio, cap=2.0), torch.tensor([[0.4, 0.5, 1.0, 2.0, 2.0]]))
    torch.testing.assert_close(masked_weights(ratio, cap=2.0), torch.tensor([[0.0, 0.5, 1.0, 2.0, 0.0]]))


def test_metrics_of_parts_pool_to_those_of_the_whole():
    ratio, mask = torch.tensor([[1.0, 3.0], [2.0, NAN]]), torch.tensor([[True, True], [True, False]])
    parts = [
        Metrics(
            importance_metrics(
                ratio[row : row + 1], truncated_weights(ratio, cap=2.0)[row : row + 1], mask[row : row + 1]
            )
        )
        for row in range(2)
    ]
    values = parts[0].merge(parts[1]).values()
    assert values["importance/ess"] == pytest.approx(6**2 / (3 * 14))
    assert values["importance/mean"] == pytest.approx(2.0)
    assert values["importance/max"] == 3.0
    assert values["importance/clipped_fraction"] == pytest.approx(1 / 3)
    assert importance_metrics(ratio, ratio, torch.zeros_like(mask)) == {}
