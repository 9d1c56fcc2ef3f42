"""Algorithms run by their own protocol, `experience` and `losses`, on draws from the game: the expected gradient and
its spread."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from llmrl.algorithms.config import GRPOConfig, PPOConfig
from llmrl.algorithms.grpo import GRPO
from llmrl.algorithms.ppo import PPO
from llmrl.algorithms.user_algorithm import UserAlgorithm, make_user_algorithm
from llmrl.algorithms.user_functions import checked_loss, failures_of
from llmrl.batches import Batch, Experience
from llmrl.functional.losses import token_weights
from llmrl.models.networks import SeparateNetworks
from llmrl.reports.progress import Silent
from llmrl.roles import Algorithm
from llmrl.user_code import load_object
from llmrl.verify.game import (
    MAX_TOKENS,
    Draws,
    Game,
    Gradient,
    TableCritic,
    TablePolicy,
    enumeration,
    every_rollout,
    population,
)
from llmrl.verify.rows import Row

Config = GRPOConfig | PPOConfig
Passes = list[tuple[Tensor, Tensor, Tensor]]
"""``(prompts, states, gradients)`` of each forward pass, by row and token."""


def config_of(row: Row, game: Game) -> Config:
    """The settings of a row, with the coefficients of the game."""
    kind = GRPOConfig if row.algorithm == "grpo" else PPOConfig
    own = {"group_size": row.group_size} if kind is GRPOConfig else {}
    return kind(**{**own, **row.settings, "kl_coef": game.kl_coef, "entropy_coef": game.entropy_coef})


def draws_of(row: Row, game: Game) -> Draws:
    """What the expectation of an estimator is taken over. In a population each response is as frequent as it is likely,
    which an estimator sees that looks at the whole rollout; of groups of three there are too many."""
    if row.compares_prompts:
        return every_rollout(game)
    return (population if row.group_size < 3 else enumeration)(game, row.group_size)


class Estimator:
    """An algorithm on the game's tables.

    Args:
        row: What is verified.
        game: The tables, and the coefficients of KL and entropy.
        off_mask: What stands in the padding of every output of actor, reference and critic.
    """

    def __init__(self, row: Row, game: Game, *, off_mask: float = 0.0) -> None:
        self.game = game
        self.actor = TablePolicy(game.old, off_mask=off_mask)
        self.critic = TableCritic(game.old_values, off_mask=off_mask)
        self.config, self.is_of_user = config_of(row, game), row.code is not None
        reference = TablePolicy(game.reference, off_mask=off_mask)
        self.place = f"algorithm {row.code or row.name}"
        self.algorithm = _make(row, self.config, self.actor, self.critic, reference)

    def experience(self, draws: Draws) -> Experience:
        """What the algorithm learns from, as the actor and critic were at the start of the iteration."""
        self.actor.logits, self.critic.table = self.game.old, self.game.old_values
        with torch.no_grad(), self._failures("experience"):
            parts = [self.algorithm.experience(rollout, scores)[0] for rollout, scores in draws.rollouts]
        return parts[0] if len(parts) == 1 else type(parts[0]).cat(parts)

    def weights(self, experience: Any, draws: Draws) -> Float64[Tensor, "B T"]:
        """Weights of the tokens of one optimizer step, as the loop gives them, times the frequency of each row."""
        mask, frequency = experience.counted, draws.frequency
        weights = token_weights(
            mask,
            aggregation=self.algorithm.aggregation,
            num_tokens=(frequency * mask.sum(dim=1)).sum(),
            num_responses=(frequency * mask.any(dim=1)).sum(),
            max_response_tokens=self.algorithm.max_response_tokens,
        )
        return weights * frequency[:, None]

    def run_losses(self, batch: Batch, weights: Tensor) -> tuple[Passes, Passes]:
        """Runs each loss backward. Returns ``(prompts, states, gradients)`` of every pass of actor and critic."""
        self.actor.logits, self.critic.table = self.game.current, self.game.values
        self.actor.passes.clear()
        self.critic.passes.clear()
        with self._failures("losses"):
            for _, loss, _ in self.algorithm.losses(batch, weights):
                checked_loss(loss, f"{self.place}.losses yielded").backward()
        return _gradients(self.actor), _gradients(self.critic)

    def gradient_of(self, batch: Batch, weights: Tensor) -> Gradient:
        """The gradient of the losses of one microbatch."""
        actor, critic = self.run_losses(batch, weights)
        total = torch.zeros_like(self.game.current)
        for prompts, states, gradients in actor:
            total = total.index_put((prompts, states), gradients, accumulate=True)
        if isinstance(self.config, GRPOConfig):
            return Gradient(actor=total)
        values = torch.zeros_like(self.game.values)
        for prompts, states, gradients in critic:
            values = values.index_put((prompts, states), gradients, accumulate=True)
        return Gradient(actor=total, critic=values)

    def expected(self, draws: Draws) -> Gradient:
        """The gradient of one optimizer step on all draws; on the population it is the expected one."""
        experience = self.experience(draws)
        return self.gradient_of(experience, self.weights(experience, draws))

    def variance(self, draws: Draws) -> float:
        """Variance of the actor's gradient per response: the trace of the covariance over units times their size,
        divided by the squared norm of the expected gradient. The gradient of B responses has this over B as its
        variance."""
        experience = self.experience(draws)
        (prompts, states, gradients), *_ = self.run_losses(experience, self.weights(experience, draws))[0]
        table = self.game.current
        num_units = len(prompts) // draws.unit_size
        units = (torch.arange(len(prompts)) // draws.unit_size)[:, None].expand_as(states)
        of_unit = torch.zeros(num_units, *table.shape, dtype=table.dtype)
        of_unit = of_unit.index_put((units, prompts, states), gradients * num_units, accumulate=True).flatten(1)
        mean, frequency = of_unit.mean(dim=0), draws.frequency[:: draws.unit_size]
        spread = (of_unit.square().sum(dim=1) / frequency).mean() - mean.square().sum()
        return float(draws.unit_size * spread / mean.square().sum())

    def unread(self) -> list[str]:
        """Settings that a user's class did not read, of those that differ from their defaults."""
        return self.algorithm.config.unread() if isinstance(self.algorithm, UserAlgorithm) else []

    def reads(self, setting: str) -> bool:
        """Whether the class has asked for a setting; PPO and GRPO ask for all that they need."""
        return not isinstance(self.algorithm, UserAlgorithm) or setting in vars(self.algorithm.config)["names_read"]

    def _failures(self, method: str) -> AbstractContextManager[None]:
        """Context of a call of a method: what a user's class raises becomes one line."""
        return failures_of(type(self.algorithm), f"{self.place}.{method}") if self.is_of_user else nullcontext()


def _make(
    row: Row, config: Config, actor: TablePolicy, critic: TableCritic, reference: TablePolicy
) -> Algorithm | UserAlgorithm:
    shared: dict[str, Any] = {"reference": reference, "max_response_tokens": MAX_TOKENS}
    if isinstance(config, PPOConfig):
        make = PPO if row.code is None else load_object(row.code, role="algorithm")
        networks = SeparateNetworks(actor, critic)
        with failures_of(make, f"algorithm {row.code}"):
            return make(config, networks=networks, warmup_iterations=0, value_coef=0.5, one_step=False, **shared)
    if row.code is None:
        return GRPO(config, actor=actor, **shared)
    named = replace(config, name=row.code)
    return make_user_algorithm(row.code, named, progress=Silent(), actor=actor, **shared)


def _gradients(table: TablePolicy | TableCritic) -> Passes:
    """Prompts, states and gradients of each pass that a loss was computed from."""
    return [(prompts, states, read.grad) for prompts, states, read in table.passes if read.grad is not None]
