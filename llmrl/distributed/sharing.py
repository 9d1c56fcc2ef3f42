"""Roles whose work the ranks share. Each rank does a part and gets the whole, so whoever asks sees one process.

What crosses ranks is small beside a model: token ids, and a few numbers for each token of a rollout. So every rank has
the whole rollout and the whole experience; statistics, advantages and control are computed on it by each rank, with the
same result.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llmrl.distributed.device import pick_device
from llmrl.experience import Batch, Prompts, Rollout, Scores, Sequences, dealt
from llmrl.roles import ActorCritic, Collectives, Policy, RewardFunction, RolloutEngine, Sampling, Trainable

Part = TypeVar("Part", bound=Batch)


def shared_engine(engine: RolloutEngine, collectives: Collectives) -> RolloutEngine:
    """The engine itself, where there is one process."""
    return engine if collectives.world_size == 1 else SharedEngine(engine, collectives)


def shared_reward(reward: RewardFunction, collectives: Collectives) -> RewardFunction:
    """The reward itself, where there is one process."""
    return reward if collectives.world_size == 1 else SharedReward(reward, collectives)


def shared_policy(policy: Policy, collectives: Collectives) -> Policy:
    """The policy itself, where there is one process."""
    return policy if collectives.world_size == 1 else SharedPolicy(policy, collectives)


def shared_networks(networks: ActorCritic, collectives: Collectives) -> ActorCritic:
    """The networks themselves, where there is one process."""
    return networks if collectives.world_size == 1 else SharedNetworks(networks, collectives)


class SharedEngine:
    """`RolloutEngine`: each rank responds to its block of the prompts, by the random numbers of one process."""

    def __init__(self, engine: RolloutEngine, collectives: Collectives) -> None:
        self.engine = engine
        self.collectives = collectives

    def generate(self, prompts: Prompts, sampling: Sampling) -> Rollout:
        """See `RolloutEngine`. The whole rollout, on every rank."""

        def respond(mine: Int[Tensor, " n"]) -> Rollout:
            begins = sampling.first_response + int(mine[0]) * sampling.num_responses
            return self.engine.generate(prompts.select(mine), replace(sampling, first_response=begins))

        return Rollout.cat(share_blocks(respond, len(prompts.rows), self.collectives)).to(pick_device())

    def load_weights(self, trained: Trainable) -> None:
        """See `RolloutEngine`."""
        self.engine.load_weights(trained)


class SharedReward:
    """`RewardFunction`: each rank scores its block of the responses."""

    def __init__(self, reward: RewardFunction, collectives: Collectives) -> None:
        self.reward = reward
        self.collectives = collectives

    def __call__(self, rollout: Rollout) -> Scores:
        """See `RewardFunction`. The scores of the whole rollout, on every rank."""
        parts = share_blocks(lambda mine: self.reward(rollout.select(mine)), len(rollout.rows), self.collectives)
        return Scores.cat(parts).to(rollout.rollout_logprobs.device)


class SharedPolicy:
    """`Policy`: without gradient each rank takes its part of the rows; with gradient they are dealt already."""

    def __init__(self, policy: Policy, collectives: Collectives) -> None:
        self.policy = policy
        self.collectives = collectives

    def logprobs(self, sequences: Sequences) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
        """See `Policy`."""
        logprobs, entropy = share_rows(self.policy.logprobs, sequences, self.collectives)
        return logprobs, entropy


class SharedNetworks(SharedPolicy):
    """`ActorCritic`, likewise."""

    def __init__(self, networks: ActorCritic, collectives: Collectives) -> None:
        super().__init__(networks, collectives)
        self.networks = networks
        self.share_trunk = networks.share_trunk

    def values(self, sequences: Sequences) -> tuple[Float[Tensor, "B T"], Float[Tensor, " B"]]:
        """See `ValueFunction`."""
        values, last_values = share_rows(self.networks.values, sequences, self.collectives)
        return values, last_values

    def both(
        self, sequences: Sequences
    ) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"], Float[Tensor, "B T"], Float[Tensor, " B"]]:
        """See `ActorCritic`."""
        logprobs, entropy, values, last_values = share_rows(self.networks.both, sequences, self.collectives)
        return logprobs, entropy, values, last_values


def share_rows(
    ask: Callable[[Sequences], tuple[Tensor, ...]], sequences: Sequences, collectives: Collectives
) -> tuple[Tensor, ...]:
    """Answers about each row, each rank asked about its part; with gradient about all that are given."""
    if torch.is_grad_enabled():
        return ask(sequences)
    mine = dealt(sequences.num_tokens, collectives.rank, collectives.world_size)
    answers = ask(sequences.select(mine)) if len(mine) else ()
    gathered = collectives.gather((mine.cpu(), tuple(answer.cpu() for answer in answers)))
    parts = [part for part in gathered if len(part[0])]
    order = torch.cat([index for index, _ in parts])
    device = sequences.response_ids.device
    return tuple(_in_order(torch.cat(pieces), order).to(device) for pieces in zip(*(a for _, a in parts), strict=True))


def _in_order(x: Tensor, order: Int[Tensor, " B"]) -> Tensor:
    """Row i goes to place order[i]."""
    return torch.empty_like(x).index_copy(0, order, x)


def share_blocks(work: Callable[[Int[Tensor, " n"]], Part], count: int, collectives: Collectives) -> list[Part]:
    """What `work` makes of each rank's block of so many things, in order, on the CPU; a rank may have none."""
    first, last = block(count, collectives)
    part = work(torch.arange(first, last)).to("cpu") if first < last else None
    return [part for part in collectives.gather(part) if part is not None]


def block(count: int, collectives: Collectives) -> tuple[int, int]:
    """First and last + 1 of so many things, of those that are this rank's: all ranks have as many, or one more."""
    rank, size = collectives.rank, collectives.world_size
    return rank * count // size, (rank + 1) * count // size
