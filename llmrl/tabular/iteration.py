"""Dynamic programming: optimal values by value iteration, policy iteration, and what lies between; with a KL, too."""

from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from llmrl.tabular.bellman import backup, check_policy, check_stationary, evaluate, greedy
from llmrl.tabular.mdp import MDP

TOLERANCE = 1e-12
"""Largest change of a value by the last iteration."""
MAX_ITERATIONS = 100_000


@dataclass(frozen=True)
class Solution:
    """Values at the end of an iteration, and the largest change by each of its steps."""

    action_values: Float64[Tensor, "S A"]
    policy: Float64[Tensor, "S A"]
    changes: list[float]


def value_iteration(mdp: MDP) -> Solution:
    """Optimal values by the Bellman optimality operator.

        v(s) <- max_a r(s, a) + γ Σ_s' p(s' | s, a) v(s')

    The distance to the optimum shrinks by γ in each iteration. Truncated policy iteration with one sweep.

    Raises:
        ValueError: The process has a horizon, or values go on changing: gamma 1, and a policy that never ends.

    Reference: Sutton and Barto 2018, section 4.4.
    """
    return truncated_policy_iteration(mdp, num_sweeps=1)


def truncated_policy_iteration(mdp: MDP, *, num_sweeps: int) -> Solution:
    """Optimal values by greedy improvement and `num_sweeps` sweeps of evaluation, v <- r_π + γ P_π v.

    One sweep is value iteration; the more sweeps, the fewer iterations.

    Raises:
        ValueError: As `value_iteration`; `num_sweeps` is below 1.

    Reference: Puterman and Shin 1978, "Modified policy iteration algorithms for discounted Markov decision problems".
    """
    check_stationary(mdp)
    if num_sweeps < 1:
        raise ValueError(f"num_sweeps ({num_sweeps}) must be at least 1")
    values, changes = torch.zeros_like(mdp.start), []
    while len(changes) < MAX_ITERATIONS:
        policy, old = greedy(backup(mdp, values)), values
        for _ in range(num_sweeps):
            values = (policy * backup(mdp, values)).sum(dim=1)
        changes.append(float((values - old).abs().max()))
        if changes[-1] <= TOLERANCE * max(1.0, float(values.abs().max())):
            action_values = backup(mdp, values)
            return Solution(action_values, greedy(action_values), changes)
    raise ValueError(
        f"values still change by {changes[-1]:.3g} after {MAX_ITERATIONS} iterations: with gamma 1, "
        "an action that ends nothing must cost something; set gamma below 1 or a horizon"
    )


def policy_iteration(mdp: MDP, policy: Tensor | None = None) -> Solution:
    """Optimal values by exact evaluation and greedy improvement, in finitely many iterations.

    Args:
        mdp: The process.
        policy: Where it begins, (S, A); with gamma 1 one that ends. None: the uniform policy.

    Raises:
        ValueError: The process has a horizon, or a policy on the way never ends with gamma 1.

    Reference: Howard 1960; Sutton and Barto 2018, section 4.3.
    """
    check_stationary(mdp)
    policy, changes = check_policy(mdp, mdp.uniform_policy() if policy is None else policy), []
    values, action_values = evaluate(mdp, policy)
    while not changes or changes[-1] > TOLERANCE * max(1.0, float(values.abs().max())):
        policy, old = greedy(action_values), values
        values, action_values = evaluate(mdp, policy)
        changes.append(float((values - old).abs().max()))
    return Solution(action_values, policy, changes)


def finite_horizon(mdp: MDP) -> tuple[Float64[Tensor, "H S A"], Float64[Tensor, "H S A"]]:
    """Optimal ``(action values, policy)`` of each step of a horizon, by backward recursion.

    Raises:
        ValueError: The process has no horizon.

    Reference: Puterman 1994, section 4.5.
    """
    if mdp.horizon is None:
        raise ValueError("horizon (None) must be a number of actions; without one use `value_iteration`")
    values, action_values = torch.zeros_like(mdp.start), []
    for _ in range(mdp.horizon):
        action_values.insert(0, backup(mdp, values))
        values = action_values[0].amax(dim=1)
    return torch.stack(action_values), torch.stack([greedy(q) for q in action_values])


def regularized_iteration(mdp: MDP, reference: Float64[Tensor, "S A"], *, kl_coef: float) -> Solution:
    """Optimum of the return minus `kl_coef` times the KL to a reference, along the episode.

        v(s) <- β log Σ_a reference(a | s) exp(q(s, a) / β),    π(a | s) ∝ reference(a | s) exp(q(s, a) / β)

    The objective of RLHF. Of one action it is the known policy ∝ reference * exp(score / kl_coef).

    Args:
        mdp: The process.
        reference: Probability of each action.
        kl_coef: β > 0, units of the reward per nat.

    Returns:
        q counts the KL of later actions, not of its own.

    Raises:
        ValueError: As `value_iteration`; `kl_coef` is not positive.

    Reference: Ziebart 2010, "Modeling purposeful adaptive behavior", section 5; Rafailov et al. 2023, arXiv:2305.18290,
    eq. 4, for one action.
    """
    check_stationary(mdp)
    if not kl_coef > 0:
        raise ValueError(f"kl_coef ({kl_coef}) must be greater than 0; without a KL use `value_iteration`")
    log_reference = check_policy(mdp, reference).log()
    values, changes = torch.zeros_like(mdp.start), []
    while len(changes) < MAX_ITERATIONS:
        logits = log_reference + backup(mdp, values) / kl_coef
        new = torch.where(mdp.terminal, 0.0, kl_coef * logits.logsumexp(dim=1))
        changes.append(float((new - values).abs().max()))
        values = new
        if changes[-1] <= TOLERANCE * max(1.0, float(values.abs().max())):
            action_values = backup(mdp, values)
            return Solution(action_values, (log_reference + action_values / kl_coef).softmax(dim=1), changes)
    raise ValueError(f"values still change by {changes[-1]:.3g} after {MAX_ITERATIONS} iterations: set gamma below 1")
