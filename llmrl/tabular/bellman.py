"""Exact values of a policy by linear algebra, exact visits of its states, and the Bellman backup."""

import torch
from jaxtyping import Bool, Float64, Int
from torch import Tensor

from llmrl.functional.masking import check_shapes
from llmrl.tabular.mdp import MDP, check_distribution


def backup(mdp: MDP, values: Float64[Tensor, " S"]) -> Float64[Tensor, "S A"]:
    """Action values one step ahead of state values.

        q(s, a) = r(s, a) + γ Σ_s' p(s' | s, a) v(s'),    v = 0 where s' is terminal

    Reference: Sutton and Barto 2018, eq. 4.6.
    """
    return mdp.expected_rewards + mdp.gamma * mdp.transitions @ torch.where(mdp.terminal, 0.0, values)


def evaluate(mdp: MDP, policy: Tensor) -> tuple[Tensor, Tensor]:
    """Exact values of a policy: ``(v, q)``.

        v = (I - γ P_π)^-1 r_π over the states that are not terminal;    q from `backup`

    With a horizon H, by recursion from the last step: v_t(s) = Σ_a π_t(a | s) q_t(s, a), and q_t from v_{t+1}.

    Args:
        mdp: The process.
        policy: Probability of each action, (S, A); with a horizon (H, S, A) too, one policy per step.

    Returns:
        Shapes (S,) and (S, A); with a horizon (H, S) and (H, S, A), entry t before action t. 0 in terminal states.

    Raises:
        ValueError: The policy is no distribution or has another shape, or gamma is 1 and some state never ends.

    Reference: Sutton and Barto 2018, eq. 3.14 and section 4.1; Puterman 1994, theorem 6.1.1, for finite horizons
    section 4.2.
    """
    policy = check_policy(mdp, policy)
    if mdp.horizon is None:
        values = _stationary(mdp, policy)
        return values, backup(mdp, values)
    values, action_values = [torch.zeros_like(mdp.start)], []
    for step in reversed(range(mdp.horizon)):
        action_values.append(backup(mdp, values[-1]))
        values.append((policy[step] * action_values[-1]).sum(dim=1))
    return torch.stack(values[:0:-1]), torch.stack(action_values[::-1])


def visitation(mdp: MDP, policy: Tensor) -> Tensor:
    """Discounted number of visits to each state that is not terminal.

        d(s) = Σ_t γ^t P(s_t = s),    d = (I - γ P_πᵀ)^-1 start

    It sums to (1 - γ)^-1 where nothing is terminal, and with gamma 1 to the mean length of an episode.

    Returns:
        Shape (S,); with a horizon (H, S), one term of the sum per step. 0 in terminal states.

    Raises:
        ValueError: As `evaluate`.

    Reference: Sutton et al. 2000, "Policy gradient methods for reinforcement learning with function approximation",
    theorem 1.
    """
    policy = check_policy(mdp, policy)
    start = torch.where(mdp.terminal, 0.0, mdp.start)
    if mdp.horizon is None:
        return torch.linalg.solve(_system(mdp, policy).T, start)
    visits = [start]
    for step in range(mdp.horizon - 1):
        moves = torch.einsum("sa,san->sn", policy[step], mdp.transitions)
        visits.append(torch.where(mdp.terminal, 0.0, mdp.gamma * visits[-1] @ moves))
    return torch.stack(visits)


def objective(mdp: MDP, policy: Tensor) -> Float64[Tensor, ""]:
    """Expected discounted return from the start, J = Σ_s start(s) v(s).

    Reference: Sutton and Barto 2018, eq. 13.4.
    """
    values, _ = evaluate(mdp, policy)
    return mdp.start @ (values if mdp.horizon is None else values[0])


def greedy(action_values: Float64[Tensor, "S A"]) -> Float64[Tensor, "S A"]:
    """The policy that takes the best action in each state, the first of equal ones."""
    return one_hot(action_values.argmax(dim=1), action_values.shape[1])


def one_hot(actions: Int[Tensor, " S"], num_actions: int) -> Float64[Tensor, "S A"]:
    """The policy that takes one action in each state."""
    return torch.nn.functional.one_hot(actions, num_actions).double()


def check_policy(mdp: MDP, policy: Tensor) -> Tensor:
    """The policy, with a horizon expanded to (H, S, A).

    Raises:
        ValueError: It is no distribution, or has another shape.
    """
    if mdp.horizon is not None and policy.ndim == 2:
        policy = policy.expand(mdp.horizon, -1, -1)
    steps = "" if mdp.horizon is None else "H "
    check_shapes(policy=(policy, f"{steps}S A"), transitions=(mdp.transitions, "S A S"))
    if mdp.horizon is not None and len(policy) != mdp.horizon:
        raise ValueError(f"policy {tuple(policy.shape)} must have one entry per step of the horizon ({mdp.horizon})")
    check_distribution("policy", policy)
    return policy


def check_stationary(mdp: MDP) -> None:
    """Raises ValueError where a horizon makes values depend on the step."""
    if mdp.horizon is not None:
        raise ValueError(f"horizon ({mdp.horizon}) must be None for stationary values; use `mdp.unrolled()`")


def _stationary(mdp: MDP, policy: Float64[Tensor, "S A"]) -> Float64[Tensor, " S"]:
    return torch.linalg.solve(_system(mdp, policy), (policy * mdp.expected_rewards).sum(dim=1))


def _system(mdp: MDP, policy: Float64[Tensor, "S A"]) -> Float64[Tensor, "S S"]:
    """I - γ P_π with no way into a terminal state."""
    moves = torch.einsum("sa,san->sn", policy, mdp.transitions)
    if mdp.gamma == 1.0 and not bool((ends := _ends(moves, mdp.terminal)).all()):
        state = int((~ends).nonzero()[0])
        raise ValueError(
            f"gamma (1) needs a policy that ends from every state, and this one never does from state {state}: "
            "set gamma below 1 or a horizon"
        )
    return torch.eye(mdp.num_states, dtype=torch.float64) - mdp.gamma * torch.where(mdp.terminal, 0.0, moves)


def _ends(moves: Float64[Tensor, "S S"], terminal: Bool[Tensor, " S"]) -> Bool[Tensor, " S"]:
    """States from which a terminal one can be reached."""
    ends = terminal
    for _ in range(len(moves)):
        ends = ends | ((moves > 0) & ends).any(dim=1)
    return ends
