import math

import pytest
import torch
from torch.testing import assert_close

from llmrl.functional.advantages import (
    decoupled_group_relative,
    discounted_returns,
    flat_groups,
    gae,
    group_relative,
    leave_one_out,
    n_step_returns,
    rewards_to_go,
)
from tests import oracles

GROUPED = {
    "std": lambda s, g: group_relative(s, g, scale="std"),
    "none": lambda s, g: group_relative(s, g, scale="none"),
}
ALL_GROUPED = {
    **GROUPED,
    "leave_one_out": leave_one_out,
    "weighted": lambda s, g: leave_one_out(s, g, weights=torch.full_like(s, 3.0)),
}


def row(*x):
    return torch.tensor([x])


ALL, ZERO = torch.ones(1, 3, dtype=torch.bool), torch.zeros(1)


@pytest.fixture
def ragged(mask):
    b, t = mask.shape
    return {
        "rewards": torch.randn(b, t, dtype=torch.float64),
        "values": torch.randn(b, t, dtype=torch.float64),
        "response_mask": mask,
        "bootstrap_values": torch.randn(b, dtype=torch.float64),
    }


def as_lists(tensors):
    return {name: x.tolist() for name, x in tensors.items()}


def test_gae_by_hand():
    # deltas 0, 0, 0.5; halved once per step back
    advantages, returns = gae(row(0.0, 0, 1), row(0.5, 0.5, 0.5), ALL, ZERO, gamma=1.0, gae_lambda=0.5)
    assert_close(advantages, row(0.125, 0.25, 0.5))
    assert_close(returns, row(0.625, 0.75, 1.0))


def test_gae_reads_the_bootstrap_value_after_the_last_token():
    mask = torch.tensor([[True, True, False]])
    advantages, _ = gae(row(0.0, 0, 0), row(0.0, 0, 0), mask, torch.tensor([8.0]), gamma=0.5, gae_lambda=0.5)
    assert_close(advantages, row(1.0, 4.0, 0.0))


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("gae_lambda", [0.0, 0.8, 1.0])
def test_gae_is_the_sum_in_the_paper(ragged, gamma, gae_lambda):
    ours, _ = gae(**ragged, gamma=gamma, gae_lambda=gae_lambda)
    assert_close(ours.tolist(), oracles.gae_double_sum(**as_lists(ragged), gamma=gamma, gae_lambda=gae_lambda))


def test_gae_of_a_long_row_is_the_sum_in_the_paper():
    mask = torch.rand(2, 301) < 0.8
    long = {
        "rewards": torch.randn(2, 301, dtype=torch.float64),
        "values": torch.randn(2, 301, dtype=torch.float64),
        "response_mask": mask,
        "bootstrap_values": torch.randn(2, dtype=torch.float64),
    }
    ours, _ = gae(**long, gamma=0.99, gae_lambda=0.95)
    assert_close(ours.tolist(), oracles.gae_double_sum(**as_lists(long), gamma=0.99, gae_lambda=0.95))


def test_gae_with_lambda_1_is_monte_carlo_minus_the_value(ragged):
    ragged["bootstrap_values"] = torch.zeros(5, dtype=torch.float64)
    advantages, returns = gae(**ragged, gamma=0.9, gae_lambda=1.0)
    monte_carlo = torch.tensor(
        oracles.discounted_returns(ragged["rewards"].tolist(), ragged["response_mask"].tolist(), gamma=0.9)
    ).double()
    assert_close(returns, monte_carlo)
    assert_close(advantages, torch.where(ragged["response_mask"], monte_carlo - ragged["values"], 0.0))


def test_gae_of_a_perfect_critic_is_0():
    rewards = row(1.0, -2.0, 5.0)
    advantages, _ = gae(rewards, row(4.0, 3.0, 5.0), ALL, ZERO, gamma=1.0, gae_lambda=0.7)
    assert (advantages == 0).all()


def test_gae_never_reads_outside_the_mask(ragged, poison):
    clean = gae(**ragged, gamma=0.9, gae_lambda=0.8)
    ragged["bootstrap_values"][4] = torch.nan  # that row has no token
    assert_close(gae(**poison(ragged), gamma=0.9, gae_lambda=0.8), clean, rtol=0, atol=0)


def test_gradients_never_read_outside_the_mask(ragged, poison):
    gradients = []
    for tensors in (ragged, poison(ragged)):
        rewards, values = tensors["rewards"].clone().requires_grad_(), tensors["values"].clone().requires_grad_()
        advantages, returns = gae(**{**tensors, "rewards": rewards, "values": values}, gamma=0.9, gae_lambda=0.8)
        (advantages.square().sum() + returns.sum()).backward()
        gradients.append((rewards.grad, values.grad))
    assert_close(gradients[1], gradients[0], rtol=0, atol=0)


def test_gae_steps_over_a_gap_as_if_it_were_not_there(ragged):
    mask = ragged["response_mask"]
    packed = torch.zeros_like(mask)
    squeezed = {"rewards": torch.zeros_like(ragged["rewards"]), "values": torch.zeros_like(ragged["values"])}
    for b, counts in enumerate(mask):
        n = int(counts.sum())
        packed[b, :n] = True
        for name, x in squeezed.items():
            x[b, :n] = ragged[name][b, counts]
    ours, _ = gae(**ragged, gamma=0.9, gae_lambda=0.8)
    close, _ = gae(**{**ragged, **squeezed, "response_mask": packed}, gamma=0.9, gae_lambda=0.8)
    assert_close(ours[mask], close[packed])


def test_more_padding_changes_nothing(ragged):
    widened = {name: x if x.dim() == 1 else torch.cat([x, torch.zeros_like(x)], dim=1) for name, x in ragged.items()}
    clean, wide = gae(**ragged, gamma=0.9, gae_lambda=0.8), gae(**widened, gamma=0.9, gae_lambda=0.8)
    assert_close(tuple(x[:, :7] for x in wide), clean, rtol=0, atol=0)


def test_rows_do_not_see_each_other(ragged):
    order = torch.tensor([3, 0, 4, 1, 2])
    advantages, _ = gae(**ragged, gamma=0.9, gae_lambda=0.8)
    shuffled, _ = gae(**{name: x[order] for name, x in ragged.items()}, gamma=0.9, gae_lambda=0.8)
    assert_close(shuffled, advantages[order], rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (2, 1)])
def test_gae_of_next_to_nothing(shape):
    mask, x = torch.ones(shape, dtype=torch.bool), torch.ones(shape)
    advantages, returns = gae(x, 2 * x, mask, torch.full(shape[:1], 4.0), gamma=0.5, gae_lambda=0.5)
    assert_close(advantages, x)  # 1 + 0.5 * 4 - 2
    assert_close(returns, 3 * x)


def test_n_step_returns_by_hand():
    # two steps: 1 + 0.5 * 2 + 0.25 * 8; then 2 + 0.5 * 3 and 3, to the end
    rewards, values = row(1.0, 2, 3), row(0.0, 4, 8)
    advantages, returns = n_step_returns(rewards, values, ALL, ZERO, gamma=0.5, num_steps=2)
    assert_close(returns, row(4.0, 3.5, 3.0))
    assert_close(advantages, row(4.0, -0.5, -5.0))


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 100])
def test_n_step_returns_are_the_sums_in_the_paper(ragged, gamma, num_steps):
    advantages, returns = n_step_returns(**ragged, gamma=gamma, num_steps=num_steps)
    expected = oracles.n_step_advantages(**as_lists(ragged), gamma=gamma, num_steps=num_steps)
    assert_close(advantages.tolist(), expected)
    assert_close(returns, torch.where(ragged["response_mask"], advantages + ragged["values"], 0.0))


@pytest.mark.parametrize(("num_steps", "gae_lambda"), [(1, 0.0), (7, 1.0)])
def test_n_step_returns_end_where_gae_does(ragged, num_steps, gae_lambda):
    assert_close(
        n_step_returns(**ragged, gamma=0.9, num_steps=num_steps), gae(**ragged, gamma=0.9, gae_lambda=gae_lambda)
    )


def test_gae_is_the_mean_of_n_step_advantages_with_weights_that_fall_by_lambda(ragged):
    """(1 - λ) Σ_n λ^{n-1} A^(n), and all the weight that is left on the longest (arXiv:1506.02438, eq. 16)."""
    width, decay = ragged["rewards"].shape[1], 0.8
    weights = [(1 - decay) * decay ** (n - 1) for n in range(1, width)] + [decay ** (width - 1)]
    advantages = [n_step_returns(**ragged, gamma=0.9, num_steps=n)[0] for n in range(1, width + 1)]
    mean = sum(weight * x for weight, x in zip(weights, advantages, strict=True))
    assert_close(mean, gae(**ragged, gamma=0.9, gae_lambda=decay)[0])


def test_n_step_returns_never_read_outside_the_mask(ragged, poison):
    clean, poisoned = (n_step_returns(**tensors, gamma=0.9, num_steps=2) for tensors in (ragged, poison(ragged)))
    assert_close(poisoned, clean, rtol=0, atol=0)


def test_less_than_one_step_is_refused(ragged):
    with pytest.raises(ValueError, match=r"num_steps \(0\) must be at least 1"):
        n_step_returns(**ragged, gamma=0.9, num_steps=0)


def test_returns_by_hand():
    assert_close(discounted_returns(row(1.0, 2.0, 4.0), ALL, gamma=0.5), row(3.0, 4.0, 4.0))


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_returns_by_definition_and_blind_outside_the_mask(ragged, poison, mask, gamma):
    rewards = poison(ragged)["rewards"]
    expected = oracles.discounted_returns(rewards.tolist(), mask.tolist(), gamma=gamma)
    assert_close(discounted_returns(rewards, mask, gamma=gamma).tolist(), expected)


def test_undiscounted_returns_are_what_is_left_of_the_sum(ragged):
    rewards, everything = ragged["rewards"], torch.ones(5, 7, dtype=torch.bool)
    before = torch.cat([torch.zeros(5, 1), rewards.cumsum(1)[:, :-1]], dim=1)
    assert_close(discounted_returns(rewards, everything, gamma=1.0), rewards.sum(1, keepdim=True) - before)


@pytest.mark.usefixtures("production")
def test_shapes_are_checked_at_the_door():
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"bootstrap_values \(3,\)"):
        gae(x, x, mask, torch.zeros(3), gamma=1.0, gae_lambda=1.0)
    with pytest.raises(ValueError, match=r"values \(1, 3\)"):
        gae(x, x[:1], mask, torch.zeros(2), gamma=1.0, gae_lambda=1.0)
    with pytest.raises(ValueError, match=r"rewards \(2, 3\), response_mask \(2, 1\)"):
        discounted_returns(x, mask[:, :1], gamma=1.0)
    for grouped in ALL_GROUPED.values():
        with pytest.raises(ValueError, match=r"scores \(2,\), group_ids \(3,\)"):
            grouped(torch.zeros(2), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="'max'"):
        group_relative(torch.zeros(2), torch.zeros(2, dtype=torch.long), scale="max")


GROUPS = torch.tensor([7, 3, 7, 3, 7, 3, 12, 12])


def test_group_relative_by_hand():
    scores = torch.tensor([1.0, 0.0, 1.0, 0.0, 4.0, 6.0, 5.0, 5.0])
    # group 7: mean 2, variance 2; group 3: mean 2, variance 8; group 12 is flat
    expected = torch.tensor([-1.0, -2.0, -1.0, -2.0, 2.0, 4.0, 0.0, 0.0], dtype=torch.float64)
    std = torch.where(GROUPS == 7, 2.0, 8.0).double().sqrt()
    assert_close(group_relative(scores, GROUPS, scale="none"), expected.float())
    assert_close(group_relative(scores, GROUPS, scale="std"), (expected / (std + 1e-6)).float())
    assert_close(group_relative(scores, GROUPS), group_relative(scores, GROUPS, scale="std"))


def test_leave_one_out_by_hand():
    scores = torch.tensor([1.0, 0.0, 2.0, 0.0, 6.0, 6.0, 5.0, 5.0])
    assert_close(leave_one_out(scores, GROUPS), torch.tensor([-3.0, -3.0, -1.5, -3.0, 4.5, 6.0, 0.0, 0.0]))


def test_weights_of_leave_one_out_by_hand():
    scores, weights = torch.tensor([1.0, 4.0, 7.0, 3.0, torch.nan, 5.0]), torch.tensor([1, 2, 0, 3, 9, 0])
    # the others of each: (2 * 4) / 2, 1 / 1, (1 + 2 * 4) / 3; 5 has no weight, and beside it nothing is scored
    expected = torch.tensor([1 - 4.0, 4 - 1.0, 7 - 3.0, 0.0, 0.0, 5 - 3.0])
    assert_close(leave_one_out(scores, torch.tensor([0, 0, 0, 1, 1, 1]), weights=weights), expected)


def test_weights_of_leave_one_out_by_definition():
    scores, group_ids = random_groups()
    weights = torch.randint(1, 9, scores.shape)
    ours = leave_one_out(scores, group_ids, weights=weights)
    known = ~scores.isnan()
    for i in range(len(scores)):
        others = known & (group_ids == group_ids[i])
        others[i] = False
        expected = 0.0
        if known[i] and others.any():
            expected = (scores[i] - (weights * scores)[others].sum() / weights[others].sum()).item()
        assert ours[i].item() == pytest.approx(expected, abs=1e-12)


def test_by_the_squared_gradient_the_baseline_is_the_one_of_least_variance():
    """Of a response drawn from many: the b of the least Σ |g|^2 (s - b)^2, in which each counts 1/n at most."""
    norms, scores = torch.rand(4000, dtype=torch.float64), torch.randn(4000, dtype=torch.float64)
    scores = scores + 2 * norms
    baseline = scores - leave_one_out(scores, torch.zeros(4000, dtype=torch.long), weights=norms)
    least = min(torch.linspace(-1, 3, 4001).tolist(), key=lambda b: float((norms * (scores - b) ** 2).sum()))
    assert_close(baseline, torch.full_like(baseline, least), rtol=0, atol=5e-3)
    assert abs(scores.mean() - least) > 0.1


def random_groups():
    """Shuffled groups of 2 to 9 with one unscored response in six, one group without any score, one flat."""
    group_ids = torch.cat([torch.full((size,), 100 - size) for size in range(2, 10)])
    scores = torch.randn(len(group_ids), dtype=torch.float64)
    scores[torch.rand(len(scores)) < 1 / 6] = torch.nan
    scores[group_ids == 95] = torch.nan
    scores[group_ids == 93] = 0.1
    order = torch.randperm(len(scores))
    return scores[order], group_ids[order]


def test_groups_by_definition():
    scores, group_ids = random_groups()
    for scale, grouped in GROUPED.items():
        expected = oracles.group_relative(scores.tolist(), group_ids.tolist(), scale=scale)
        assert_close(grouped(scores, group_ids).tolist(), expected)
    assert_close(leave_one_out(scores, group_ids).tolist(), oracles.leave_one_out(scores.tolist(), group_ids.tolist()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.1, 1 / 3, -7.7e9, 1e-30])
@pytest.mark.parametrize("name", ALL_GROUPED)
def test_flat_groups_give_exactly_0(name, value, dtype):
    scores = torch.full((7,), value, dtype=dtype)
    advantages = ALL_GROUPED[name](scores, torch.zeros(7, dtype=torch.long))
    assert advantages.tolist() == [0.0] * 7
    assert advantages.dtype == dtype


@pytest.mark.parametrize("name", ALL_GROUPED)
def test_one_scored_response_and_none_give_0(name):
    scores = torch.tensor([torch.nan, 3.0, torch.nan, torch.nan])
    assert ALL_GROUPED[name](scores, torch.tensor([0, 0, 1, 1])).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("name", ALL_GROUPED)
def test_an_unscored_response_might_as_well_not_be_there(name):
    scores, ids = torch.tensor([1.0, torch.nan, 4.0, 2.0]), torch.zeros(4, dtype=torch.long)
    kept = torch.tensor([0, 2, 3])
    advantages = ALL_GROUPED[name](scores, ids)
    assert_close(advantages[kept], ALL_GROUPED[name](scores[kept], ids[kept]))
    assert advantages[1] == 0


@pytest.mark.parametrize("name", ALL_GROUPED)
def test_a_group_of_one_is_refused(name):
    with pytest.raises(ValueError, match="group 4 has one response"):
        ALL_GROUPED[name](torch.zeros(3), torch.tensor([2, 4, 2]))


@pytest.mark.parametrize("name", ALL_GROUPED)
def test_groups_ignore_order_names_and_a_common_shift(name):
    scores, group_ids = random_groups()
    advantages, order = ALL_GROUPED[name](scores, group_ids), torch.randperm(len(scores))
    assert_close(ALL_GROUPED[name](scores[order], group_ids[order]), advantages[order])
    assert_close(ALL_GROUPED[name](scores, -3 * group_ids), advantages)
    assert_close(ALL_GROUPED[name](scores + 10 * group_ids, group_ids), advantages)


def test_advantages_of_a_group_sum_to_0_and_have_unit_spread():
    scores = torch.randn(6, dtype=torch.float64)
    advantages = group_relative(scores, torch.zeros(6, dtype=torch.long), scale="std")
    assert abs(advantages.sum()) < 1e-12
    assert_close(advantages.square().mean().item(), 1.0, rtol=1e-5, atol=0)


def test_leave_one_out_is_the_mean_baseline_times_g_over_g_minus_1():
    scores, ids = torch.randn(6, dtype=torch.float64), torch.zeros(6, dtype=torch.long)
    assert_close(leave_one_out(scores, ids), group_relative(scores, ids, scale="none") * 6 / 5)


def test_group_means_are_taken_in_float64():
    # In float32 the mean of these is off by more than their differences.
    scores = torch.tensor([16777216.0, 16777218.0, 16777220.0])
    assert group_relative(scores, torch.zeros(3, dtype=torch.long), scale="none").tolist() == [-2, 0, 2]


def test_flat_groups_by_hand():
    scores = torch.tensor([0.1, 0.2, 0.1, 0.2, torch.nan, 0.3, torch.nan, torch.nan])
    # group 7: 0.1 twice and one unscored; group 3: two scores; group 12: none
    assert flat_groups(scores, GROUPS).tolist() == [True, False, True, False, True, False, True, True]


def test_flat_groups_are_those_without_any_advantage():
    scores, group_ids = random_groups()
    flat = flat_groups(scores, group_ids)
    for group in group_ids.unique():
        members = group_ids == group
        assert flat[members].all() == (group_relative(scores, group_ids)[members] == 0).all()


# --- several rewards --------------------------------------------------------------------------------------------------

PAIRS = torch.tensor([0, 0, 1, 1, 2, 2])


def test_decoupled_rewards_by_hand():
    # one reward differs in each of groups 0 and 1, both do in group 2: sums 1, -1, 1, -1, 2, -2 of variance 2
    parts = torch.tensor([[1.0, 0, 5, 5, 1, 0], [3.0, 3, 70, 20, 9, 8]], dtype=torch.float64)
    advantages = decoupled_group_relative(parts, torch.ones(2), PAIRS)
    assert_close(advantages, torch.tensor([1.0, -1, 1, -1, 2, -2]).double() / 2**0.5, rtol=1e-4, atol=0)


def test_decoupled_rewards_keep_apart_what_the_sum_does_not():
    """The paper's example: (0, 1) and (0, 2) in a group of two have the same advantages once they are standardized."""
    first, second = torch.tensor([[0.0, 0, 0, 1, 0, 0], [0.0, 1, 0, 1, 0, 0]])
    summed = group_relative(first + second, PAIRS)
    assert_close(summed[1], summed[3], rtol=1e-5, atol=0)
    decoupled = decoupled_group_relative(torch.stack([first, second]), torch.ones(2), PAIRS)
    assert decoupled[3].item() == pytest.approx(2 * decoupled[1].item(), rel=1e-5)


def several_rewards():
    """Three rewards of very different scales, each with unscored responses of its own, on shuffled groups."""
    scores, group_ids = random_groups()
    parts = torch.stack([scores, 1000 * torch.randn_like(scores), torch.rand_like(scores).round()])
    parts[1:, torch.rand(len(scores)) < 0.2] = torch.nan
    return parts, torch.tensor([1.0, 0.5, -2.0]), group_ids


def test_decoupled_rewards_by_definition():
    parts, weights, group_ids = several_rewards()
    expected = oracles.decoupled_group_relative(parts.tolist(), weights.tolist(), group_ids.tolist())
    ours = decoupled_group_relative(parts, weights, group_ids)
    assert_close(ours.tolist(), expected)
    assert ours[parts.isnan().all(dim=0)].tolist() == [0.0] * int(parts.isnan().all(dim=0).sum())
    assert parts.isnan().all(dim=0).any()


def test_decoupled_rewards_have_neither_mean_nor_scale():
    parts, weights, group_ids = several_rewards()
    advantages = decoupled_group_relative(parts, weights, group_ids)
    scored = ~parts.isnan().all(dim=0)
    assert abs(advantages.mean()) < 1e-12
    assert_close(advantages[scored].square().mean().item(), 1.0, rtol=1e-5, atol=0)
    scaled = decoupled_group_relative(parts * torch.tensor([[0.25], [300.0], [8.0]]), weights, group_ids)
    assert_close(scaled, advantages, rtol=1e-4, atol=1e-5)


def test_a_single_decoupled_reward_is_the_usual_one_over_the_spread_of_the_batch():
    scores, group_ids = random_groups()
    alone, usual = (
        decoupled_group_relative(scores[None], torch.tensor([3.0]), group_ids),
        group_relative(scores, group_ids),
    )
    std = usual.square().sum().div((~scores.isnan()).sum()).sqrt()
    assert_close(alone, usual / std, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_flat_decoupled_rewards_give_exactly_0(dtype):
    parts = torch.tensor([[0.1] * 6, [0.3, 0.3, 0.2, 0.2, 0.7, 0.9]], dtype=dtype)
    advantages = decoupled_group_relative(parts, torch.tensor([0.3, 0.7]), PAIRS)
    assert advantages.dtype == dtype
    assert advantages[:4].tolist() == [0.0] * 4
    assert advantages[4] == -advantages[5] != 0
    assert decoupled_group_relative(parts[:1], torch.ones(1), PAIRS).tolist() == [0.0] * 6
    assert decoupled_group_relative(parts * torch.nan, torch.ones(2), PAIRS).tolist() == [0.0] * 6


@pytest.mark.usefixtures("production")
def test_shapes_of_several_rewards_are_checked_at_the_door():
    with pytest.raises(ValueError, match=r"parts \(2, 6\), weights \(3,\), group_ids \(6,\)"):
        decoupled_group_relative(torch.zeros(2, 6), torch.ones(3), PAIRS)


# --- turns ------------------------------------------------------------------------------------------------------------


def test_rewards_to_go_are_those_of_a_turn_and_all_after_it():
    """Three turns of 2, 1 and 1 tokens around a fed one; one turn; and a response without a score."""
    mask = torch.tensor([[True, True, False, True, True], [True, True, False, False, False], [True] * 5])
    of_turn = torch.tensor([[0, 0, 1, 1, 2], [0, 0, 1, 1, 1], [0, 0, 0, 1, 1]])
    per_token = torch.tensor([[0.5, 0.25, math.nan, -1.0, 2.0], [0.0, 4.0, math.nan, math.nan, math.nan], [1.0] * 5])
    to_go = rewards_to_go(torch.tensor([10.0, 0.0, math.nan]), per_token, of_turn, mask)
    expected = [[11.75, 11.0, 12.0], [4.0, math.nan, math.nan], [math.nan] * 3]
    assert_close(to_go, torch.tensor(expected, dtype=torch.float64), equal_nan=True)


def test_with_one_turn_rewards_to_go_are_scores():
    scores, per_token = torch.randn(4), torch.randn(4, 3)
    to_go = rewards_to_go(scores, per_token, torch.zeros(4, 3, dtype=torch.long), torch.ones(4, 3, dtype=torch.bool))
    assert_close(to_go[:, 0], scores.double() + per_token.double().sum(dim=1))
