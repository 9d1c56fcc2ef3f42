"""Temporal differences: one target, of which TD(0), SARSA, expected SARSA, n-step SARSA and Q-learning are rows.

    q(s, a) <- q(s, a) + α (target - q(s, a)),    target = Σ_{k<n} γ^k r_k + γ^n Σ_a' w(a') q(s_n, a')

    method            n    weights w of the state that n moves lead to
    SARSA             1    1 on the action taken there
    n-step SARSA      n    1 on the action taken there
    expected SARSA    1    the policy
    Q-learning        1    1 on the best action
    double            1    1 on the best action of another table
    Monte Carlo       ∞    nothing is left

Where the state is terminal, the weights are 0.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float64
from torch import Tensor

from llmrl.tabular.bellman import check_policy
from llmrl.tabular.mdp import MDP
from llmrl.tabular.monte_carlo import Table, epsilon_greedy
from llmrl.tabular.simulator import Move, Simulator

Weights = Callable[[int, int], Sequence[float]]
"""From a state and the action taken there to the weights of its action values."""


def td_target(rewards: Sequence[float], values: Sequence[float], weights: Sequence[float], *, gamma: float) -> float:
    """Σ_{k<n} γ^k r_k + γ^n Σ_a w(a) q(s_n, a).

    Args:
        rewards: The n rewards from the move that is learned on.
        values: Action values of the state after them.
        weights: One per value; 0 where the state is terminal.
        gamma: Discount, in [0, 1].

    Reference: Sutton and Barto 2018, eq. 7.4 and section 6.4 to 6.6; Zhao 2025, "Mathematical foundations of
    reinforcement learning", section 7.5.
    """
    bootstrap = sum(weight * value for weight, value in zip(weights, values, strict=True))
    return sum(gamma**k * reward for k, reward in enumerate(rewards)) + gamma ** len(rewards) * bootstrap


def step_size(visits: int, *, power: float) -> float:
    """α of the k-th visit of a pair, k^-power, which meets the conditions of Robbins and Monro: Σ α = ∞, Σ α² < ∞.

    Args:
        visits: k, from 1.
        power: In (1/2, 1]; 1 is the mean of all targets.

    Raises:
        ValueError: `power` is outside, so that one of the sums fails.

    Reference: Robbins and Monro 1951, "A stochastic approximation method"; Sutton and Barto 2018, eq. 2.7.
    """
    if not 0.5 < power <= 1.0:
        raise ValueError(f"power ({power}) must lie in (0.5, 1]: below, noise does not vanish; above, learning stops")
    return visits**-power


def td_prediction(
    mdp: MDP, policy: Tensor, *, num_steps: int, power: float = 1.0, generator: torch.Generator
) -> Float64[Tensor, " S"]:
    """TD(0): state values of a policy, v(s) <- v(s) + α (r + γ v(s') - v(s)).

    Reference: Sutton and Barto 2018, section 6.1.
    """
    simulator = Simulator(mdp, generator)
    table = check_policy(mdp, policy).tolist()
    values, visits = [0.0] * mdp.num_states, [0] * mdp.num_states
    state = simulator.start()
    for _ in range(num_steps):
        move = simulator.move(state, simulator.draw(table[state]))
        target = td_target([move.reward], [values[move.next_state]], [0.0 if move.ended else 1.0], gamma=mdp.gamma)
        visits[state] += 1
        values[state] += step_size(visits[state], power=power) * (target - values[state])
        state = simulator.start() if move.ended else move.next_state
    return torch.tensor(values, dtype=torch.float64)


def sarsa(
    mdp: MDP, *, epsilon: float, num_steps: int, n: int = 1, power: float = 0.8, generator: torch.Generator
) -> Float64[Tensor, "S A"]:
    """SARSA over n steps: action values of the ε-greedy policy that acts.

    Reference: Sutton and Barto 2018, sections 6.4 and 7.2.
    """
    learner = _Learner(mdp, generator, power)
    return learner.learn(learner.epsilon_greedy(epsilon), learner.taken, n, num_steps)


def expected_sarsa(
    mdp: MDP, *, epsilon: float, num_steps: int, power: float = 0.8, generator: torch.Generator
) -> Float64[Tensor, "S A"]:
    """Expected SARSA: as SARSA, with the mean over the next action in place of a sample of it.

    Reference: van Seijen et al. 2009, "A theoretical and empirical analysis of expected SARSA"; Sutton and Barto 2018,
    section 6.6.
    """
    learner = _Learner(mdp, generator, power)
    behaviour = learner.epsilon_greedy(epsilon)
    return learner.learn(behaviour, lambda state, _: behaviour(state), 1, num_steps)


def q_learning(
    mdp: MDP, *, behaviour: float | Tensor, num_steps: int, power: float = 0.8, generator: torch.Generator
) -> Float64[Tensor, "S A"]:
    """Q-learning: optimal action values, whatever policy acts, if it goes on to try every pair.

    Args:
        mdp: The process, without a horizon.
        behaviour: ε of the ε-greedy policy that acts (on-policy in the sense that it follows what is learned), or a
            policy (S, A) that stays as it is (off-policy).
        num_steps: Moves, over all episodes.
        power: See `step_size`.
        generator: Where every draw comes from.

    Reference: Watkins and Dayan 1992, "Q-learning"; Sutton and Barto 2018, section 6.5.
    """
    learner = _Learner(mdp, generator, power)
    acts = learner.fixed(behaviour) if isinstance(behaviour, Tensor) else learner.epsilon_greedy(behaviour)
    return learner.learn(acts, learner.best, 1, num_steps)


def double_q_learning(
    mdp: MDP, *, behaviour: Float64[Tensor, "S A"], num_steps: int, power: float = 0.8, generator: torch.Generator
) -> Float64[Tensor, "S A"]:
    """Double Q-learning: one table picks the best next action, another values it, so that noise is not maximized.

    Returns:
        The mean of both tables.

    Reference: van Hasselt 2010, "Double Q-learning"; Sutton and Barto 2018, section 6.7.
    """
    simulator = Simulator(mdp, generator)
    pair = [_Learner(mdp, generator, power), _Learner(mdp, generator, power)]
    acts = check_policy(mdp, behaviour).tolist()
    state = simulator.start()
    for _ in range(num_steps):
        move = simulator.move(state, simulator.draw(acts[state]))
        learns = simulator.draw([0.5, 0.5])
        learner, other = pair[learns], pair[1 - learns]
        weights = learner.best(move.next_state, 0)
        learner.update([move], other.table[move.next_state], [0.0] * len(weights) if move.ended else weights)
        state = simulator.start() if move.ended else move.next_state
    return torch.tensor([learner.table for learner in pair], dtype=torch.float64).mean(dim=0)


class _Learner:
    """A table of action values, its counts of visits, and the rules that pick actions and weights from it."""

    def __init__(self, mdp: MDP, generator: torch.Generator, power: float) -> None:
        self.simulator = Simulator(mdp, generator)
        self.mdp, self.power = mdp, power
        self.table: Table = torch.zeros_like(mdp.expected_rewards).tolist()
        self.visits = [[0] * mdp.num_actions for _ in range(mdp.num_states)]

    def epsilon_greedy(self, epsilon: float) -> Callable[[int], Sequence[float]]:
        return lambda state: epsilon_greedy(self.table[state], epsilon)

    def fixed(self, policy: Tensor) -> Callable[[int], Sequence[float]]:
        return check_policy(self.mdp, policy).tolist().__getitem__

    def taken(self, state: int, action: int) -> Sequence[float]:
        return [float(other == action) for other in range(self.mdp.num_actions)]

    def best(self, state: int, _: int) -> Sequence[float]:
        return epsilon_greedy(self.table[state], 0.0)

    def update(self, moves: list[Move], values: Sequence[float], weights: Sequence[float]) -> None:
        """One step of the first move's action value towards the target of all of them."""
        state, action = moves[0].state, moves[0].action
        target = td_target([move.reward for move in moves], values, weights, gamma=self.mdp.gamma)
        self.visits[state][action] += 1
        alpha = step_size(self.visits[state][action], power=self.power)
        self.table[state][action] += alpha * (target - self.table[state][action])

    def learn(
        self, behaviour: Callable[[int], Sequence[float]], weights: Weights, n: int, num_steps: int
    ) -> Float64[Tensor, "S A"]:
        """`num_steps` moves; each updates the pair n moves before it, and the end of an episode all that are left."""
        recent: list[Move] = []
        state = self.simulator.start()
        action = self.simulator.draw(behaviour(state))
        nothing = [0.0] * self.mdp.num_actions
        for _ in range(num_steps):
            recent.append(self.simulator.move(state, action))
            ended = recent[-1].ended
            state = self.simulator.start() if ended else recent[-1].next_state
            action = self.simulator.draw(behaviour(state))
            while recent and (ended or len(recent) == n):
                values = self.table[recent[-1].next_state]
                self.update(recent, values, nothing if ended else weights(state, action))
                recent.pop(0)
        return torch.tensor(self.table, dtype=torch.float64)
