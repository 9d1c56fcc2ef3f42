import pytest
import torch
from torch.autograd import grad

from llmrl.functional.advantages import gae
from llmrl.functional.mtp import clamped_value_loss, head_targets, next_chosen
from llmrl.tabular import evaluate, token_mdp

NAN = float("nan")
MASK = torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()
"""A response with tool output inside, a shorter one, and one that counts nowhere."""


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- the next token ---------------------------------------------------------------------------------------------------


def test_the_next_chosen_token_steps_over_what_was_not():
    ids = torch.tensor([[5, 6, 99, 7, 8], [1, 2, 3, 99, 99], [99, 99, 99, 99, 99]])
    once = next_chosen(ids, MASK)
    assert once.tolist() == [[6, 7, 0, 8, 0], [2, 3, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert next_chosen(once, MASK).tolist() == [[7, 8, 0, 0, 0], [3, 0, 0, 0, 0], [0, 0, 0, 0, 0]]


def test_nothing_follows_where_nothing_was_chosen():
    assert next_chosen(torch.ones(2, 3), torch.zeros(2, 3).bool()).tolist() == [[0.0] * 3] * 2
    assert next_chosen(torch.ones(0, 3), torch.ones(0, 3).bool()).shape == (0, 3)


# --- targets ----------------------------------------------------------------------------------------------------------


def slow_targets(rewards, target_values, mask, bootstrap_values, gamma):
    """One token and one head at a time, as the definition reads."""
    num_heads = len(target_values) - 1
    targets = [torch.zeros_like(rewards) for _ in target_values]
    for row in range(len(rewards)):
        chosen = [t for t in range(mask.shape[1]) if mask[row, t]]
        for i, t in enumerate(chosen):
            for k in range(num_heads + 1):
                reward, value = 0.0, 0.0
                if i + k < len(chosen):
                    reward = float(rewards[row, chosen[i + k]])
                if i + k == len(chosen) - 1:
                    reward += gamma * float(bootstrap_values[row])
                if k < num_heads:
                    value = float(target_values[k + 1][row, t])
                elif i + 1 < len(chosen):
                    value = float(target_values[k][row, chosen[i + 1]])
                targets[k][row, t] = reward + gamma * value
    return targets


@pytest.mark.parametrize("num_heads", [1, 2, 6])
@pytest.mark.parametrize("gamma", [1.0, 0.7])
def test_targets_are_those_of_the_slow_loop_whatever_stands_outside_the_mask(num_heads, gamma):
    rewards, *values = (numbers(3, 5, seed=seed).where(MASK, NAN) for seed in range(num_heads + 2))
    bootstrap_values = torch.tensor([0.0, 2.0, 3.0])
    targets = head_targets(rewards, values, MASK, bootstrap_values, gamma=gamma)
    expected = slow_targets(rewards, values, MASK, bootstrap_values, gamma)
    for ours, theirs in zip(targets, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert (ours[~MASK] == 0).all()


def test_one_head_alone_has_the_targets_of_td():
    """Which are the returns of GAE with lambda 0, bootstrapped where a limit truncated the response."""
    rewards, values, bootstrap_values = numbers(3, 5), numbers(3, 5, seed=1), torch.tensor([0.5, 2.0, 3.0])
    (targets,) = head_targets(rewards, [values], MASK, bootstrap_values, gamma=0.9)
    _, returns = gae(rewards, values, MASK, bootstrap_values, gamma=0.9, gae_lambda=0.0)
    torch.testing.assert_close(targets, returns)


def test_by_hand():
    """Two tokens that pay 1 and 2, and one head beyond the policy's own."""
    rewards, values = torch.tensor([[1.0, 2.0]]), [torch.tensor([[9.0, 9.0]]), torch.tensor([[4.0, 8.0]])]
    targets = head_targets(rewards, values, torch.ones(1, 2).bool(), torch.zeros(1), gamma=0.5)
    assert [y.tolist() for y in targets] == [[[1 + 2, 2 + 4]], [[2 + 4, 0.0]]]


@pytest.mark.usefixtures("production")
def test_shapes_are_checked_at_the_door():
    x = numbers(3, 5)
    with pytest.raises(ValueError, match=r"target_values\[1\] \(3, 4\)"):
        head_targets(x, [x, x[:, :4]], MASK, torch.zeros(3), gamma=1.0)
    with pytest.raises(ValueError, match=r"bootstrap_values \(2,\)"):
        head_targets(x, [x, x], MASK, torch.zeros(2), gamma=1.0)
    with pytest.raises(ValueError, match=r"targets \(3, 4\)"):
        clamped_value_loss(x, x[:, :4], x, grad_clamp=1.0)
    with pytest.raises(ValueError, match=r"x \(3, 4\)"):
        next_chosen(x[:, :4], MASK)


# --- the fixed point on the token MDP ---------------------------------------------------------------------------------


def game(gamma, eos):
    """Three tokens, up to three times, a score for each response, and a policy in each state."""
    generator = torch.Generator().manual_seed(3)
    paid = {}
    mdp = token_mdp(
        lambda prefix: paid.setdefault(prefix, float(torch.randn((), generator=generator))),
        vocabulary=3,
        max_tokens=3,
        eos=eos,
        gamma=gamma,
    )
    policy = torch.randn(len(mdp.prefixes), 3, generator=generator, dtype=torch.float64).softmax(dim=1)
    return mdp, policy, paid


def every_response(game, policy, scores):
    """All responses as rows, padded: their states, mask and rewards, and the probability of each."""
    number = {prefix: state for state, prefix in enumerate(game.prefixes)}
    responses = [prefix for prefix in game.prefixes if game.mdp.terminal[number[prefix]]]
    width = max(map(len, responses))
    states, mask = torch.zeros(len(responses), width, dtype=torch.long), torch.zeros(len(responses), width).bool()
    rewards, chance = torch.full((len(responses), width), NAN, dtype=torch.float64), []
    for row, response in enumerate(responses):
        states[row, : len(response)] = torch.tensor([number[response[:t]] for t in range(len(response))])
        mask[row, : len(response)], rewards[row, : len(response)] = True, 0.0
        rewards[row, len(response) - 1] = scores[response]
        steps = [policy[number[response[:t]], token] for t, token in enumerate(response)]
        chance.append(torch.stack(steps).prod())
    return states, mask, rewards, torch.stack(chance)


def learned_tables(states, mask, rewards, chance, bootstrap_values, *, num_heads, gamma, rate, num_states):
    """Heads as tables, each step the exact expectation of their targets; the target heads follow by their average."""
    weights = chance[:, None].expand(mask.shape)[mask]
    reach = torch.zeros(num_states, dtype=torch.float64).index_add(0, states[mask], weights)
    averaged = torch.zeros(num_heads + 1, num_states, dtype=torch.float64)
    for _ in range(400):
        targets = head_targets(rewards, list(averaged[:, states]), mask, bootstrap_values, gamma=gamma)
        sums = [torch.zeros_like(reach).index_add(0, states[mask], weights * y[mask]) for y in targets]
        live = torch.stack(sums) / reach.clamp(min=1e-300)
        averaged = averaged + rate * (live - averaged)
    return averaged


@pytest.mark.parametrize("num_heads", [1, 2, 4])
@pytest.mark.parametrize(("gamma", "eos", "rate"), [(1.0, 0, 0.5), (0.7, 0, 0.3), (0.9, None, 1.0)])
def test_the_fixed_point_is_the_value_of_the_policy_k_moves_on(num_heads, gamma, eos, rate):
    """v_k = P^k V, V by linear algebra: v_0 is the value of the policy, without any bias by the bootstrap."""
    mdp, policy, scores = game(gamma, eos)
    states, mask, rewards, chance = every_response(mdp, policy, scores)
    assert float(chance.sum()) == pytest.approx(1.0)
    none = torch.zeros(len(states), dtype=torch.float64)
    heads = learned_tables(
        states,
        mask,
        rewards,
        chance,
        none,
        num_heads=num_heads,
        gamma=gamma,
        rate=rate,
        num_states=len(mdp.prefixes),
    )
    values, _ = evaluate(mdp.mdp, policy)
    moves = torch.einsum("sa,san->sn", policy, mdp.mdp.transitions)
    for k, head in enumerate(heads):
        expected = torch.linalg.matrix_power(moves, k) @ values
        torch.testing.assert_close(head, torch.where(mdp.mdp.terminal, 0.0, expected), atol=1e-8, rtol=0)


def test_a_truncated_response_is_worth_what_stands_after_it():
    """Bootstrapped ones get no score: the fixed point is the value of a game that pays γ times that value instead."""
    gamma = 0.8
    mdp, policy, scores = game(gamma, eos=0)
    after = {prefix: 0.0 if prefix[-1] == 0 else 0.1 * sum(prefix) for prefix in scores}
    unpaid = {prefix: score if prefix[-1] == 0 else 0.0 for prefix, score in scores.items()}
    states, mask, rewards, chance = every_response(mdp, policy, unpaid)
    responses = [prefix for prefix, ends in zip(mdp.prefixes, mdp.mdp.terminal, strict=True) if ends]
    bootstrap_values = torch.tensor([after[prefix] for prefix in responses], dtype=torch.float64)
    heads = learned_tables(
        states,
        mask,
        rewards,
        chance,
        bootstrap_values,
        num_heads=2,
        gamma=gamma,
        rate=0.5,
        num_states=len(mdp.prefixes),
    )
    paid = token_mdp(
        lambda prefix: unpaid[prefix] + gamma * after[prefix], vocabulary=3, max_tokens=3, eos=0, gamma=gamma
    )
    torch.testing.assert_close(heads[0], evaluate(paid.mdp, policy)[0], atol=1e-8, rtol=0)


# --- the loss ---------------------------------------------------------------------------------------------------------


def test_the_loss_and_its_clamped_gradient_by_hand():
    values = torch.tensor([[0.5, 3.0, -4.0, NAN]], requires_grad=True)
    targets, weights = torch.zeros(1, 4), torch.tensor([[0.5, 0.25, 0.25, 0.0]])
    loss, metrics = clamped_value_loss(values, targets, weights, grad_clamp=2.0)
    # half the square up to 2, and a line of slope 2 from there on: 1/8, 4, 6
    assert float(loss.detach()) == pytest.approx(0.5 / 8 + 0.25 * (2 + 2 * 1) + 0.25 * (2 + 2 * 2))
    (gradient,) = grad(loss, values)
    assert gradient.tolist() == [[0.5 * 0.5, 0.25 * 2.0, 0.25 * -2.0, 0.0]]
    total, num = metrics["value/clamp_fraction"]
    assert (int(total), int(num)) == (2, 3)


def test_a_clamp_that_is_never_reached_leaves_the_squared_error():
    values, targets, weights = numbers(3, 5), numbers(3, 5, seed=1), MASK / 7
    loss, _ = clamped_value_loss(values, targets, weights, grad_clamp=1e6)
    torch.testing.assert_close(loss, (weights * 0.5 * (values - targets) ** 2).sum())


def test_a_clamp_below_the_spread_of_the_targets_leaves_the_mean():
    """10 with a chance of one in ten: the mean is 1, and where the pulls are in balance with a clamp of 1 is 1/9."""
    targets, weights = torch.tensor([[0.0, 10.0]]), torch.tensor([[0.9, 0.1]])
    for value, clamp in ((1.0, 10.0), (1 / 9, 1.0)):
        values = torch.full((1, 2), value, requires_grad=True)
        loss, _ = clamped_value_loss(values, targets, weights, grad_clamp=clamp)
        assert float(grad(loss, values)[0].sum()) == pytest.approx(0.0, abs=1e-6)


def test_a_clamp_of_zero_is_refused():
    with pytest.raises(ValueError, match=r"grad_clamp \(0\.0\) must be greater than 0"):
        clamped_value_loss(numbers(3, 5), numbers(3, 5), MASK / 7, grad_clamp=0.0)
