"""Policy gradients of a softmax policy: exact, by the theorem, and from episodes, with a baseline or without."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float64
from torch import Tensor

from llmrl.tabular.bellman import check_stationary, evaluate, visitation
from llmrl.tabular.mdp import MDP
from llmrl.tabular.simulator import Move, Simulator, discounted_sums


def softmax_policy(logits: Float64[Tensor, "S A"]) -> Float64[Tensor, "S A"]:
    """π(a | s) = exp(logits(s, a)) / Σ_a' exp(logits(s, a')).

    Reference: Sutton and Barto 2018, eq. 13.2.
    """
    return logits.softmax(dim=1)


def exact_gradient(mdp: MDP, logits: Float64[Tensor, "S A"]) -> Float64[Tensor, "S A"]:
    """Gradient of J in the logits, by the policy gradient theorem.

        ∇J = Σ_s d(s) Σ_a q(s, a) ∇π(a | s),    so that ∂J/∂logits(s, a) = d(s) π(a | s) (q(s, a) - v(s))

    Args:
        mdp: The process, without a horizon.
        logits: Logits of the softmax policy.

    Reference: Sutton et al. 2000, theorem 1; Agarwal et al. 2021, arXiv:1908.00261, lemma C.1, for a softmax.
    """
    check_stationary(mdp)
    policy = softmax_policy(logits)
    values, action_values = evaluate(mdp, policy)
    return visitation(mdp, policy)[:, None] * policy * (action_values - values[:, None])


def score_gradient(
    policy: Float64[Tensor, "S A"], moves: Sequence[Move], weights: Sequence[float]
) -> Float64[Tensor, "S A"]:
    """Σ_t w_t ∇ log π(a_t | s_t) in the logits: w_t (1[a = a_t] - π(a | s_t)) in the row of s_t."""
    gradient = torch.zeros_like(policy)
    states = torch.tensor([move.state for move in moves])
    actions = torch.tensor([move.action for move in moves])
    scale = torch.tensor(weights, dtype=torch.float64)
    gradient.index_put_((states, actions), scale, accumulate=True)
    return gradient.index_add_(0, states, -scale[:, None] * policy[states])


def sampled_gradients(
    mdp: MDP,
    logits: Float64[Tensor, "S A"],
    *,
    baseline: Float64[Tensor, " S"] | None,
    num_episodes: int,
    max_steps: int,
    generator: torch.Generator,
) -> Float64[Tensor, "E S A"]:
    """REINFORCE's estimate of the gradient from each of E episodes: unbiased, whatever the baseline.

        g = Σ_t γ^t (G_t - b(s_t)) ∇ log π(a_t | s_t)

    Args:
        mdp: The process, without a horizon.
        logits: Logits of the softmax policy.
        baseline: b of each state. None: 0.
        num_episodes: E.
        max_steps: Where an episode is truncated, which biases the estimate if it happens.
        generator: Where every draw comes from.

    Reference: Williams 1992, "Simple statistical gradient-following algorithms"; Sutton and Barto 2018, eq. 13.11.
    """
    simulator, policy = Simulator(mdp, generator), softmax_policy(logits)
    table = policy.tolist()
    known = [0.0] * mdp.num_states if baseline is None else baseline.tolist()
    gradients = []
    for _ in range(num_episodes):
        moves = simulator.episode(table, max_steps=max_steps)
        returns = discounted_sums([move.reward for move in moves], mdp.gamma)
        weights = [
            mdp.gamma**t * (total - known[move.state])
            for t, (move, total) in enumerate(zip(moves, returns, strict=True))
        ]
        gradients.append(score_gradient(policy, moves, weights))
    return torch.stack(gradients)


def reinforce(
    mdp: MDP,
    *,
    num_episodes: int,
    max_steps: int,
    learning_rate: float,
    baseline_rate: float,
    generator: torch.Generator,
) -> Float64[Tensor, "S A"]:
    """Logits after REINFORCE with a learned baseline, one step per episode, from the uniform policy.

    Args:
        mdp: The process, without a horizon.
        num_episodes: Steps.
        max_steps: Where an episode is truncated.
        learning_rate: Learning rate of the logits.
        baseline_rate: How much of the difference to a return a state's baseline learns; 0: no baseline.
        generator: Where every draw comes from.

    Reference: Sutton and Barto 2018, section 13.4.
    """
    simulator = Simulator(mdp, generator)
    logits, baseline = torch.zeros_like(mdp.expected_rewards), [0.0] * mdp.num_states
    for _ in range(num_episodes):
        policy = softmax_policy(logits)
        moves = simulator.episode(policy.tolist(), max_steps=max_steps)
        returns = discounted_sums([move.reward for move in moves], mdp.gamma)
        weights = []
        for t, (move, total) in enumerate(zip(moves, returns, strict=True)):
            error = total - baseline[move.state]
            baseline[move.state] += baseline_rate * error
            weights.append(mdp.gamma**t * error)
        logits = logits + learning_rate * score_gradient(policy, moves, weights)
    return logits


def softmax_row(logits: Sequence[float]) -> list[float]:
    """`softmax_policy` of one state, in plain numbers."""
    highest = max(logits)
    exponentials = [math.exp(logit - highest) for logit in logits]
    total = sum(exponentials)
    return [exponential / total for exponential in exponentials]
