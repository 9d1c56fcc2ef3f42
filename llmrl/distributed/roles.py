"""Roles whose work is split over ranks: each rank computes a part and gets the result of a single process.

What crosses ranks is small beside a model: token ids, and a few numbers for each token of a rollout. So every rank has
the whole rollout and the whole experience; statistics, advantages and control are computed on it by each rank, with the
same result.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llmrl.batches import Batch, PreferencePairs, Prompts, ReadBatch, Rollout, Scores, Sequences, TokenOutputs
from llmrl.distributed.context import Context
from llmrl.distributed.microbatcher import Microbatcher, Parts
from llmrl.distributed.stop import STOP
from llmrl.microbatches import TokenBudget, in_row_order
from llmrl.roles import (
    ActorCritic,
    Collectives,
    Policy,
    RewardFunction,
    RolloutEngine,
    Sampling,
    Scorer,
    Trainable,
    ValueFunction,
)

Part = TypeVar("Part", bound=Batch)
Read = TypeVar("Read", bound=ReadBatch)
Answer = TypeVar("Answer", bound=Batch)


class DistributedEngine:
    """`RolloutEngine`: each rank responds to its block of the prompts, with the random numbers of a single process."""

    def __init__(self, engine: RolloutEngine, context: Context) -> None:
        self.engine = engine
        self.collectives = context.collectives
        self.device = context.device

    def generate(self, prompts: Prompts, sampling: Sampling) -> Rollout:
        """See `RolloutEngine`. The whole rollout, on every rank."""
        if self.collectives.world_size == 1:
            return self.engine.generate(prompts, sampling)

        def respond(mine: Int[Tensor, " n"]) -> Rollout:
            begins = sampling.first_response + int(mine[0]) * sampling.num_responses
            return self.engine.generate(prompts.select(mine), replace(sampling, first_response=begins))

        return Rollout.cat(distribute_blocks(respond, len(prompts.rows), self.collectives)).to(self.device)

    def load_weights(self, trained: Trainable) -> None:
        """See `RolloutEngine`."""
        self.engine.load_weights(trained)


class DistributedReward:
    """`RewardFunction`: each rank scores its block of the groups, so that a function which compares the responses of a
    group sees all of them."""

    def __init__(self, reward: RewardFunction, collectives: Collectives) -> None:
        self.reward = reward
        self.collectives = collectives

    def __call__(self, rollout: Rollout) -> Scores:
        """See `RewardFunction`. The scores of the whole rollout, on every rank."""
        if self.collectives.world_size == 1:
            return self.reward(rollout)
        sizes = rollout.group_ids.unique_consecutive(return_counts=True)[1].tolist()
        rows = torch.arange(len(rollout.rows)).split(sizes)

        def score(mine: Int[Tensor, " n"]) -> Scores:
            return self.reward(rollout.select(torch.cat([rows[group] for group in mine.tolist()])))

        parts = distribute_blocks(score, len(rows), self.collectives)
        return Scores.cat(parts).to(rollout.rollout_logprobs.device)


class DistributedPolicy:
    """`Policy`: without gradient the rows of a rollout are asked about in microbatches, each rank's of its own; with
    gradient the trainer has formed them, because activations stay until the backward pass."""

    def __init__(self, policy: Policy, context: Context, *, budget: TokenBudget) -> None:
        self.policy = policy
        self.microbatcher = Microbatcher(budget, context)

    def logprobs(self, sequences: Sequences) -> TokenOutputs:
        """See `Policy`."""
        ask = self.policy.logprobs
        return distribute_rows(ask, sequences, self.microbatcher)


class DistributedValues:
    """`ValueFunction`: splits rows as `DistributedPolicy` does."""

    def __init__(self, critic: ValueFunction, context: Context, *, budget: TokenBudget) -> None:
        self.critic = critic
        self.microbatcher = Microbatcher(budget, context)

    def values(self, sequences: Sequences) -> TokenOutputs:
        """See `ValueFunction`."""
        ask = self.critic.values
        return distribute_rows(ask, sequences, self.microbatcher)


class DistributedNetworks(DistributedPolicy, DistributedValues):
    """`ActorCritic`: splits rows as `DistributedPolicy` does."""

    def __init__(self, networks: ActorCritic, context: Context, *, budget: TokenBudget) -> None:
        super().__init__(networks, context, budget=budget)
        self.critic = self.networks = networks
        self.share_trunk = networks.share_trunk

    def both(self, sequences: Sequences) -> TokenOutputs:
        """See `ActorCritic`."""
        ask = self.networks.both
        return distribute_rows(ask, sequences, self.microbatcher)


class DistributedScorer:
    """`Scorer`: splits rows as `DistributedPolicy` does."""

    def __init__(self, scorer: Scorer, context: Context, *, budget: TokenBudget) -> None:
        self.scorer = scorer
        self.microbatcher = Microbatcher(budget, context)

    @torch.no_grad()
    def scores(self, sequences: Sequences) -> Float[Tensor, " B"]:
        """See `Scorer`."""

        def ask(part: Sequences) -> TokenOutputs:
            return TokenOutputs(named={"scores": self.scorer.scores(part)})

        outputs = distribute_rows(ask, sequences, self.microbatcher)
        return outputs.named["scores"]

    def pair_scores(self, pairs: PreferencePairs) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """See `Scorer`."""

        def ask(part: PreferencePairs) -> TokenOutputs:
            chosen, rejected = self.scorer.pair_scores(part)
            return TokenOutputs(named={"chosen": chosen, "rejected": rejected})

        outputs = distribute_rows(ask, pairs, self.microbatcher)
        return outputs.named["chosen"], outputs.named["rejected"]


def distribute_rows(ask: Callable[[Read], Answer], batch: Read, microbatcher: Microbatcher) -> Answer:
    """Outputs of `ask` for every row, in row order: in microbatches, each rank's of its own rows. With gradient, and
    for no rows, in one pass over what this rank was given.

    Every rank runs the same number of passes: where weights are sharded, forward passes are collective.
    """
    if torch.is_grad_enabled():
        return ask(batch)

    def ask_in_parts(parts: Parts, idle: Parts) -> tuple[list[Answer], Parts]:
        if not parts and not idle:
            return [ask(batch)], [torch.arange(0)]
        answers = []
        for part in parts:
            STOP.look()
            answers.append(ask(batch.select(part)))
        for row in idle:
            ask(batch.select(row))
        return answers, parts

    answers, parts = microbatcher.run(batch, ask_in_parts)
    collectives = microbatcher.collectives
    if collectives.world_size == 1:
        return in_row_order(answers, parts)
    on_cpu = [answer.to("cpu") for answer in answers]
    of_ranks = collectives.gather((on_cpu, parts))
    answers, parts = (list(chain.from_iterable(each)) for each in zip(*of_ranks, strict=True))
    return in_row_order(answers, parts).to(batch.device)


def distribute_blocks(work: Callable[[Int[Tensor, " n"]], Part], count: int, collectives: Collectives) -> list[Part]:
    """Results of `work` on each rank's block of `count` items, in order, on the CPU; a rank may have none."""
    first, last = block(count, collectives)
    part = work(torch.arange(first, last)).to("cpu") if first < last else None
    return [part for part in collectives.gather(part) if part is not None]


def block(count: int, collectives: Collectives) -> tuple[int, int]:
    """``(begin, end)`` of this rank's block of `count` items; sizes of blocks differ by at most one."""
    rank, size = collectives.rank, collectives.world_size
    return rank * count // size, (rank + 1) * count // size
