"""Where an estimator ends up: trained by its exact expected gradient, on-policy, from the reference."""

from dataclasses import replace

import torch

from llmrl.verify.estimators import Estimator
from llmrl.verify.game import Game, enumeration, probabilities, with_exact_critic
from llmrl.verify.rows import Row

NUM_STEPS = 200
LEARNING_RATE = 0.1


def distance_from_optimum(row: Row, game: Game) -> float:
    """Total variation between the trained policy and the optimum of the objective, mean over prompts."""
    policy = game.reference.clone().requires_grad_()
    values = torch.zeros_like(game.values).requires_grad_()
    optimizer = torch.optim.Adam([policy, values], lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, NUM_STEPS)
    for _ in range(NUM_STEPS):
        table, critic = policy.detach().clone(), values.detach().clone()
        now = replace(game, sampler=table, old=table, current=table, old_values=critic, values=critic)
        now = with_exact_critic(now) if row.exact_critic else now
        gradient = Estimator(row, now).expected(enumeration(now, row.group_size))
        policy.grad, values.grad = gradient.actor, gradient.critic
        optimizer.step()
        schedule.step()
    difference = probabilities(policy.detach()) - game.optimum()
    return float(difference.abs().sum(dim=1).mean() / 2)
