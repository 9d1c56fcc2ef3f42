"""The loop of reinforcement learning: sample, score, estimate advantages, update, publish weights.

iteration   one rollout and its updates
epoch       one pass over its experience
minibatch   one optimizer step, over whole groups
microbatch  one forward pass, by a token budget
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from llmrl.batches import AuxiliaryExperience, Episodes, Experience, Prompts, Rollout, Scores, StopReason
from llmrl.distributed.context import Context
from llmrl.distributed.microbatcher import Microbatcher
from llmrl.errors import Error
from llmrl.functional.advantages import flat_groups
from llmrl.functional.losses import token_weights
from llmrl.functional.masking import masked_moments, masked_sum
from llmrl.functional.statistics import Maximum, Mean, Moments, Statistic, Total
from llmrl.functional.streams import Purpose, permutation
from llmrl.metrics import AGREEMENT, Metrics
from llmrl.microbatches import TokenBudget
from llmrl.roles import (
    Algorithm,
    AuxiliaryPhase,
    Balance,
    MovingReference,
    PromptSource,
    RewardFunction,
    RolloutEngine,
    Sampling,
    Trainable,
)
from llmrl.trainers.config import UpdateConfig
from llmrl.trainers.optimize import accumulate_and_step
from llmrl.trainers.resumable import Resumable
from llmrl.trainers.stored import StoredRollouts

Learned = TypeVar("Learned", Experience, AuxiliaryExperience)
LossesOf = Callable[[Any, Tensor], Iterator[tuple[str, Tensor, Metrics]]]
"""Losses of a batch, with the weights of its tokens."""

FIRST_ONLY = ("policy/ratio_max_deviation", AGREEMENT)
"""Metrics of the first minibatch that is learned from only: until its step all passes read the same weights."""


class FlatGroupsError(Error, RuntimeError):
    """No scores to learn from: every redraw was used up and groups of equal scores remain."""


class RLTrainer(Resumable):
    """Trains by any algorithm over any engine, reward and policy."""

    def __init__(
        self,
        *,
        algorithm: Algorithm,
        engine: RolloutEngine,
        reward: RewardFunction,
        prompts: PromptSource,
        trained: Mapping[str, Trainable],
        update: UpdateConfig,
        budget: TokenBudget,
        prompts_per_iteration: int,
        sampling: Sampling,
        context: Context,
        observe: Callable[[int, Experience], None],
        reference: MovingReference | None,
        auxiliary: AuxiliaryPhase | None,
        balance: Balance | None,
    ) -> None:
        self.algorithm = algorithm
        self.engine = engine
        self.reward = reward
        self.prompts = prompts
        self.config = update
        self.stored = StoredRollouts(staleness=update.staleness, num_replayed=update.num_replayed)
        self.microbatcher = Microbatcher(budget, context)
        self.prompts_per_iteration = prompts_per_iteration
        self.sampling = sampling
        """Sampling of every rollout, except for the number of its first response."""
        self.group_size = sampling.num_responses
        self.seed = sampling.seed
        self.collectives = context.collectives
        self.progress = context.progress
        self.observe = observe
        """Called with every experience before it is learned from, to write samples."""
        self.reference = reference
        """None where the reference stays as it is, or there is none."""
        self.auxiliary = auxiliary
        self.balance = balance
        """None where the actor is no mixture of experts."""
        self.num_responses = 0
        """Lower bound of new global response numbers: every response so far, on every rank, has a smaller one."""
        self.seconds: dict[str, float] = {}
        super().__init__(trained, prompts)
        self.engine.load_weights(trained["actor"])

    def iterate(self) -> Metrics:
        """Runs the next iteration, on the next prompts."""
        self.seconds = {}
        started = time.perf_counter()
        metrics = self.step(self.prompts.next(self.prompts_per_iteration))
        if self.reference is not None:
            metrics = metrics.merge(self.reference.finish_iteration(self.iteration + 1))
        self.finish_iteration(self.iteration + 1)
        total = time.perf_counter() - started
        timing = {f"time/{name}_s": Total(seconds) for name, seconds in self.seconds.items()}
        speed = Mean(metrics.statistics["tokens/sampled"][0], total)
        return metrics.merge(Metrics({**timing, "time/iteration_s": Total(total), "tokens/per_s": speed}))

    def step(self, prompts: Prompts) -> Metrics:
        """One iteration: sample, score, estimate advantages, update, publish weights."""
        with torch.no_grad():
            rollout, scores, metrics = self.collect(prompts)
            new = [(rollout, scores)]
            self.stored.drop_unlike(new[0])
            while len(new) < self.stored.num_missing:  # the first iteration of a run that learns from stale rollouts
                rollout, scores, more = self.collect(self.prompts.next(self.prompts_per_iteration))
                new, metrics = [*new, (rollout, scores)], metrics.merge(more)
            rollout, scores = self.stored.exchange(new)
            with self.phase("logprobs", 1):
                experience, described = self.algorithm.experience(rollout, scores)
                self.progress.advance()
        metrics = metrics.merge(described)
        self.observe(self.iteration, experience)
        for minibatch in self.minibatches(experience):
            update = self.update(minibatch)
            metrics = metrics.merge(update.without(*(name for name in FIRST_ONLY if name in metrics.statistics)))
            if self.algorithm.should_stop(update):
                break
        with torch.no_grad():
            metrics = metrics.merge(self.algorithm.finish(experience))
        if self.auxiliary is not None:
            metrics = metrics.merge(self.learn_again(self.auxiliary, experience))
        self.engine.load_weights(self.trained["actor"])
        return metrics

    def learn_again(self, auxiliary: AuxiliaryPhase, experience: Experience) -> Metrics:
        """The auxiliary phase, in the iterations that one follows."""
        with torch.no_grad(), self.timed("logprobs"):
            kept = auxiliary.collect(self.iteration, experience)
        metrics = Metrics()
        if kept is not None:
            for minibatch in self.shuffled(kept, auxiliary.num_epochs, Purpose.AUXILIARY):
                metrics = metrics.merge(self.update(minibatch, auxiliary.losses))
        return metrics

    def collect(self, prompts: Prompts) -> tuple[Rollout, Scores, Metrics]:
        """Responses to the prompts, and their scores.

        Where the algorithm asks for it, groups whose scores are all equal are replaced: new prompts are drawn, and only
        groups that teach something are kept, until there are as many as asked for. The metrics are of everything drawn.

        Raises:
            FlatGroupsError: The redraws are used up and groups are still missing.
        """
        rollout, scores = self.draw(prompts)
        metrics = describe(rollout, scores, self.group_size)
        if not self.algorithm.max_redraws:
            return rollout, scores, metrics
        kept, wanted = informative(rollout, scores), len(prompts.rows) * self.group_size
        for _ in range(self.algorithm.max_redraws):
            missing = wanted - len(kept[0].rows)
            if not missing:
                break
            rollout, scores = self.draw(self.prompts.next(missing // self.group_size))
            metrics = metrics.merge(describe(rollout, scores, self.group_size))
            more = informative(rollout, scores)
            kept = Rollout.cat([kept[0], more[0]]), Scores.cat([kept[1], more[1]])
        if len(kept[0].rows) < wanted:
            raise FlatGroupsError(
                f"after {self.algorithm.max_redraws} redraws only {len(kept[0].rows) // self.group_size} of "
                f"{len(prompts.rows)} groups have scores that differ; raise algorithm.max_redraws or "
                "algorithm.group_size, choose prompts that are neither too easy nor too hard, or set "
                "algorithm.max_redraws to 0, which keeps groups that teach nothing"
            )
        return *kept, metrics

    def draw(self, prompts: Prompts) -> tuple[Rollout, Scores]:
        """One group for each prompt, scored. No number of the random streams is used twice in a run.

        Numbers begin at a multiple of the group size, which a resumed run may have changed: a group is its first number
        over that.
        """
        first_response = math.ceil(self.num_responses / self.group_size) * self.group_size
        num_responses = len(prompts.rows) * self.group_size
        self.num_responses = first_response + num_responses
        with self.phase("rollout", num_responses):
            rollout = self.engine.generate(prompts, replace(self.sampling, first_response=first_response))
        with self.phase("reward", num_responses):
            scores = self.reward(rollout).only_finite()
        return rollout, scores

    def minibatches(self, experience: Experience) -> Iterator[Experience]:
        """Minibatches of an iteration's updates."""
        assert self.config.minibatch_size is not None, "set with the run"
        num_steps = self.config.num_epochs * len(experience.rollout.rows) // self.config.minibatch_size
        assert num_steps == 1 or experience.old_logprobs is not None, "later steps move away from the old policy"
        return self.shuffled(experience, self.config.num_epochs, Purpose.MINIBATCHES)

    def shuffled(self, experience: Learned, num_epochs: int, purpose: Purpose) -> Iterator[Learned]:
        """Epochs of shuffled groups; a group is never torn apart. The shuffle is the same on every rank."""
        assert self.config.minibatch_size is not None, "set with the run"
        groups = torch.arange(len(experience.sequences.response_ids)).view(-1, self.group_size)
        for epoch in range(num_epochs):
            order = permutation(len(groups), self.seed, purpose, iteration=self.iteration, epoch=epoch)
            for chosen in order.split(self.config.minibatch_size // self.group_size):
                yield experience.select(groups[chosen].flatten())

    def update(self, minibatch: Experience | AuxiliaryExperience, losses_of: LossesOf | None = None) -> Metrics:
        """One optimizer step of every trained module; none where not one response could be scored, on any rank.
        `losses_of` a batch and its weights; None: those of the algorithm.

        A step on a gradient of zero would still move the weights, by what the optimizer remembers.
        """
        mask = minibatch.counted
        num_tokens, num_responses = mask.sum(), mask.any(dim=1).sum()
        if not num_tokens:
            return Metrics()

        weights = token_weights(
            mask,
            aggregation=self.algorithm.aggregation,
            num_tokens=num_tokens,
            num_responses=num_responses,
            max_response_tokens=self.algorithm.max_response_tokens,
        )

        def losses(index: Tensor) -> Iterator[tuple[str, Tensor, Metrics]]:
            return (losses_of or self.algorithm.losses)(minibatch.select(index), weights[index])

        with self.timed("update"):
            metrics = accumulate_and_step(self.trained, losses, minibatch.sequences, self.microbatcher)
        if self.balance is not None:
            self.balance.finish_step(metrics)
        return metrics

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[None]:
        """Context of a phase of the iteration: shown while it lasts, its seconds counted."""
        self.progress.phase(name, total)
        with self.timed(name):
            yield

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Context of work whose seconds count as those of a phase."""
        started = time.perf_counter()
        yield
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # or the next phase would be charged for what this one has queued
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def position(self) -> dict[str, Any]:
        position = {"num_responses": self.num_responses, "algorithm": self.algorithm.state_dict()}
        if self.auxiliary is not None:
            position["auxiliary"] = self.auxiliary.state_dict()
        position["waiting"] = self.stored.waiting  # as they are: only a checkpoint holds them as a state
        return super().position() | position

    def move_to(self, position: dict[str, Any]) -> None:
        self.num_responses = position["num_responses"]
        self.algorithm.load_state_dict(position["algorithm"])
        if self.auxiliary is not None:
            self.auxiliary.load_state_dict(position["auxiliary"])
        self.stored.waiting = position["waiting"]
        super().move_to(position)

    @property
    def holds_all(self) -> bool:
        return super().holds_all and (self.reference is None or self.reference.holds_all)

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        del state["cursor"]["waiting"]
        if self.stored.num_kept:
            state["cursor"]["stored"] = self.stored.state_dict()
        if self.reference is not None:
            state["reference"] = self.reference.state_dict()
        if self.balance is not None:
            state["balance"] = self.balance.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stored.load_state_dict(state["cursor"].get("stored", {}))  # not in one of a run without stale rollouts
        super().load_state_dict({**state, "cursor": {**state["cursor"], "waiting": self.stored.waiting}})
        if self.reference is not None and "reference" in state:  # not in one of a run whose reference stayed
            self.reference.load_state_dict(state["reference"])
        if self.balance is not None and "balance" in state:
            self.balance.load_state_dict(state["balance"])
        self.engine.load_weights(self.trained["actor"])


def informative(rollout: Rollout, scores: Scores) -> tuple[Rollout, Scores]:
    """The groups whose scores differ: a comparison within the others teaches nothing."""
    index = (~flat_groups(scores.per_response, rollout.group_ids)).nonzero().flatten()
    return rollout.select(index), scores.select(index)


def describe(rollout: Rollout, scores: Scores, group_size: int) -> Metrics:
    """Metrics of everything that was drawn: scores, lengths, ends, flat groups."""
    scored, lengths = ~scores.total.isnan(), rollout.num_chosen.double()
    statistics: dict[str, Statistic] = {
        "score": Moments(*masked_moments(scores.per_response, scored)),
        "score/unscored": Total((~scored).sum()),
        "response/length": Mean(lengths.sum(), len(lengths)),
        "response/length_max": Maximum(lengths.max()),
        "response/finished_fraction": Mean(rollout.finished.sum(), len(lengths)),
        "tokens/sampled": Total(lengths.sum()),
    }
    if group_size > 1:
        flat = flat_groups(scores.per_response, rollout.group_ids)
        statistics["group/flat_fraction"] = Mean(flat.sum(), len(flat))
    if rollout.episodes is not None:
        statistics |= describe_episodes(rollout, rollout.episodes)
    for name, part in scores.parts.items():
        known = ~part.isnan()
        statistics[f"score/{name}"] = Mean(masked_sum(part, known), known.sum())
    for name, failed in scores.failed.items():
        statistics[f"reward/{name}/failed"] = Total(failed.sum())
    return Metrics(statistics)


def describe_episodes(rollout: Rollout, episodes: Episodes) -> dict[str, Statistic]:
    """Metrics of turns and tools; an episode that has not begun has no turn."""
    num_turns = episodes.num_turns.double()
    begun = num_turns > 0
    num_begun = begun.sum()
    statistics: dict[str, Statistic] = {
        "turn/count": Mean(num_turns.sum(), num_begun),
        "turn/count_max": Maximum(num_turns.max()),
        "turn/limit_fraction": Mean((rollout.stop_reason == StopReason.TURNS).sum(), num_begun),
        "turn/length": Mean(rollout.num_chosen[begun].double().sum(), num_turns.sum()),
        "turn/reward": Mean(episodes.turn_rewards.double().sum(), num_turns.sum()),
        "tool/calls": Mean(episodes.num_calls.double().sum(), num_begun),
        "tool/failed": Mean(episodes.num_bad_calls.double().sum(), episodes.num_calls.double().sum()),
        "environment/failed": Total(episodes.failed.sum()),
    }
    for name, count in Counter(name for name in episodes.failures if name is not None).items():
        statistics[f"environment/failed/{name}"] = Total(torch.tensor(count))
    return statistics
