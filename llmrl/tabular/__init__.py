"""The reading room: small Markov decision processes, exact answers about them, and the methods of a first course.

Torch only, in float64, every draw from a seeded generator. Nothing here trains a language model, and no run imports it.
"""

from llmrl.tabular.actor_critic import ActorCritic, advantage_actor_critic, qac
from llmrl.tabular.bellman import backup, evaluate, greedy, objective, visitation
from llmrl.tabular.deep_q import DuelingQ, LinearQ, Replay, bellman_targets, collect_replay, deep_q_learning
from llmrl.tabular.gridworld import draw_policy, gridworld
from llmrl.tabular.iteration import (
    Solution,
    finite_horizon,
    policy_iteration,
    regularized_iteration,
    truncated_policy_iteration,
    value_iteration,
)
from llmrl.tabular.mdp import MDP
from llmrl.tabular.monte_carlo import basic_monte_carlo, epsilon_greedy, exploring_starts, on_policy_control
from llmrl.tabular.policy_gradient import exact_gradient, reinforce, sampled_gradients, softmax_policy
from llmrl.tabular.simulator import Move, Simulator, discounted_sums, sample_episodes
from llmrl.tabular.td import (
    double_q_learning,
    expected_sarsa,
    q_learning,
    sarsa,
    step_size,
    td_prediction,
    td_target,
)
from llmrl.tabular.tokens import TokenMDP, token_mdp
from llmrl.tabular.trust_region import Step, fisher_matrix, mean_kl, natural_gradient, trpo_step

__all__ = [
    "MDP",
    "ActorCritic",
    "DuelingQ",
    "LinearQ",
    "Move",
    "Replay",
    "Simulator",
    "Solution",
    "Step",
    "TokenMDP",
    "advantage_actor_critic",
    "backup",
    "basic_monte_carlo",
    "bellman_targets",
    "collect_replay",
    "deep_q_learning",
    "discounted_sums",
    "double_q_learning",
    "draw_policy",
    "epsilon_greedy",
    "evaluate",
    "exact_gradient",
    "expected_sarsa",
    "exploring_starts",
    "finite_horizon",
    "fisher_matrix",
    "greedy",
    "gridworld",
    "mean_kl",
    "natural_gradient",
    "objective",
    "on_policy_control",
    "policy_iteration",
    "q_learning",
    "qac",
    "regularized_iteration",
    "reinforce",
    "sample_episodes",
    "sampled_gradients",
    "sarsa",
    "softmax_policy",
    "step_size",
    "td_prediction",
    "td_target",
    "token_mdp",
    "trpo_step",
    "truncated_policy_iteration",
    "value_iteration",
    "visitation",
]
