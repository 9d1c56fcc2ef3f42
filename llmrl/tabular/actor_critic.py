"""Actor-critic: the policy gradient one move at a time, its return replaced by what a critic knows.

logits(s, ·) += α γ^t ρ w ∇ log π(a | s)

method          w                              critic
QAC             q(s, a)                        SARSA
A2C             δ = r + γ v(s') - v(s)         TD(0)
off-policy      δ, and ρ = π(a | s) / b(a | s) TD(0) with ρ
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from llmrl.tabular.bellman import check_policy
from llmrl.tabular.mdp import MDP
from llmrl.tabular.policy_gradient import softmax_row
from llmrl.tabular.simulator import Simulator


@dataclass(frozen=True)
class ActorCritic:
    """What was learned: logits of the actor, (S, A), and the critic's values, (S,) or of QAC (S, A)."""

    logits: Float64[Tensor, "S A"]
    values: Tensor


def qac(mdp: MDP, *, num_steps: int, actor_rate: float, critic_rate: float, generator: torch.Generator) -> ActorCritic:
    """The simplest actor-critic: SARSA's action values weigh the gradient.

    Reference: Sutton et al. 2000; Zhao 2025, "Mathematical foundations of reinforcement learning", algorithm 10.1.
    """
    simulator = Simulator(mdp, generator)
    logits = torch.zeros_like(mdp.expected_rewards).tolist()
    values = torch.zeros_like(mdp.expected_rewards).tolist()
    state, discount = simulator.start(), 1.0
    action = simulator.draw(softmax_row(logits[state]))
    for _ in range(num_steps):
        move = simulator.move(state, action)
        next_state = simulator.start() if move.ended else move.next_state
        next_action = simulator.draw(softmax_row(logits[next_state]))
        bootstrap = 0.0 if move.ended else mdp.gamma * values[next_state][next_action]
        _climb(logits[state], action, actor_rate * discount * values[state][action])
        values[state][action] += critic_rate * (move.reward + bootstrap - values[state][action])
        discount = 1.0 if move.ended else discount * mdp.gamma
        state, action = next_state, next_action
    return ActorCritic(torch.tensor(logits, dtype=torch.float64), torch.tensor(values, dtype=torch.float64))


def advantage_actor_critic(
    mdp: MDP,
    *,
    num_steps: int,
    actor_rate: float,
    critic_rate: float,
    generator: torch.Generator,
    behaviour: Float64[Tensor, "S A"] | None = None,
    logits: Float64[Tensor, "S A"] | None = None,
) -> ActorCritic:
    """A2C: the TD error of a critic of states weighs the gradient; off-policy where another policy acts.

    Args:
        mdp: The process, without a horizon.
        num_steps: Moves, over all episodes.
        actor_rate: Learning rate of the logits; 0 leaves the policy as it is, which is then evaluated.
        critic_rate: Learning rate of the values.
        generator: Where every draw comes from.
        behaviour: The policy b that acts, with every action possible; states then weigh as it visits them,
            without γ^t. None: the actor itself acts.
        logits: Where the actor begins. None: zeros, the uniform policy.

    Raises:
        ValueError: An action is impossible under `behaviour`.

    Reference: Mnih et al. 2016, arXiv:1602.01783, with one worker and one step; Degris et al. 2012, arXiv:1205.4839,
    without eligibility traces.
    """
    simulator = Simulator(mdp, generator)
    acts = None if behaviour is None else check_policy(mdp, behaviour).tolist()
    if acts is not None and min(map(min, acts)) <= 0:
        raise ValueError("behaviour gives an action probability 0: what never happens cannot be weighted up")
    table = (torch.zeros_like(mdp.expected_rewards) if logits is None else logits).tolist()
    values = [0.0] * mdp.num_states
    state, discount = simulator.start(), 1.0
    for _ in range(num_steps):
        policy = softmax_row(table[state])
        move = simulator.move(state, simulator.draw(policy if acts is None else acts[state]))
        ratio = 1.0 if acts is None else policy[move.action] / acts[state][move.action]
        bootstrap = 0.0 if move.ended else mdp.gamma * values[move.next_state]
        error = ratio * (move.reward + bootstrap - values[state])
        _climb(table[state], move.action, actor_rate * discount * error)
        values[state] += critic_rate * error
        discount = 1.0 if move.ended or acts is not None else discount * mdp.gamma
        state = simulator.start() if move.ended else move.next_state
    return ActorCritic(torch.tensor(table, dtype=torch.float64), torch.tensor(values, dtype=torch.float64))


def _climb(row: list[float], action: int, step: float) -> None:
    """row += step * ∇ log softmax(row)[action]."""
    for other, probability in enumerate(softmax_row(row)):
        row[other] += step * ((other == action) - probability)
