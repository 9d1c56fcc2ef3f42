"""GRPO with a fault, one a class: what it does wrong is its docstring."""

from dataclasses import replace
from typing import ClassVar

import torch

from llmrl.algorithms.grpo import GRPO
from llmrl.functional.advantages import group_relative, leave_one_out
from llmrl.functional.losses import clipped_policy_loss


class With(GRPO):
    """GRPO with some settings replaced, whatever was asked for; helpers of the faults."""

    settings: ClassVar = {}

    def __init__(self, config, **roles):
        super().__init__(replace(config, **self.settings), **roles)
        self.asked = config
        self.replaced = {name: getattr(config, name) for name in self.settings}  # read, so that no row is left out

    def losses(self, batch, weights):
        for module, loss, metrics in super().losses(batch, weights):
            yield module, loss + self.extra(batch, weights), metrics

    def extra(self, batch, weights):
        return 0.0

    def log_ratio(self, batch):
        """To the reference."""
        return torch.where(batch.counted, self.actor.logprobs(batch.sequences).logprobs - batch.ref_logprobs, 0.0)


class K3AsALoss(With):
    """k3 without the ratio."""

    settings: ClassVar = {"kl_form": "k3_paper"}


class KLInTheLoss(With):
    """The KL is in the loss, where it is asked for in the rewards."""

    settings: ClassVar = {"kl_form": "k2"}


class Standardized(With):
    """Advantages are standardized over the rollout."""

    settings: ClassVar = {"scale": "batch"}


class GradientClipped(With):
    """A token past the clip has no gradient."""

    settings: ClassVar = {"loss": "clipped"}


class K1AsALoss(With):
    """The log-ratio itself as the KL."""

    settings: ClassVar = {"kl_coef": 0.0}

    def extra(self, batch, weights):
        return self.asked.kl_coef * (weights * self.log_ratio(batch)).sum()


class KLDetached(With):
    """The KL is in the loss, and has no gradient."""

    settings: ClassVar = {"kl_coef": 0.0}

    def extra(self, batch, weights):
        return self.asked.kl_coef * (weights * self.log_ratio(batch).square() / 2).sum().detach()


class KLOfTheWrongSign(With):
    """The KL is subtracted from the loss."""

    settings: ClassVar = {"kl_coef": 0.0}

    def extra(self, batch, weights):
        live = self.actor.logprobs(batch.sequences).logprobs
        ratio = torch.where(batch.counted, live - batch.old_logprobs, 0.0).exp().detach()
        return -self.asked.kl_coef * (weights * ratio * self.log_ratio(batch).square() / 2).sum()


class KLTwice(With):
    """The KL is added twice; the scores are right."""

    def __init__(self, config, **roles):
        super().__init__(replace(config, kl_coef=2 * config.kl_coef), **roles)


class EntropyOfTheWrongSign(With):
    """The entropy is a loss."""

    settings: ClassVar = {"entropy_coef": 0.0}

    def extra(self, batch, weights):
        entropy = torch.where(batch.counted, self.actor.logprobs(batch.sequences).entropy, 0.0)
        return self.asked.entropy_coef * (weights * entropy).sum()


class Compared(GRPO):
    """GRPO with other advantages."""

    def __init__(self, config, **roles):
        super().__init__(config, **roles)
        self.estimate_advantages = self.compare


class StdOverTheBatch(Compared):
    """Deviations from the group's mean over the standard deviation of all scores."""

    def compare(self, scores, group_ids, lengths):
        return group_relative(scores, group_ids, scale="none") / (scores.std(correction=0) + 1e-6)


class StdOfASample(Compared):
    """Deviations over the standard deviation of a sample."""

    def compare(self, scores, group_ids, lengths):
        groups = scores.view(-1, self.config.group_size)
        return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-6)).flatten()


class OwnScoreInTheBaseline(GRPO):
    """The mean of the whole group, where that of the others is asked for."""

    def __init__(self, config, **roles):
        super().__init__(config, **roles)
        if config.baseline == "leave_one_out":
            self.estimate_advantages = lambda scores, group_ids, _: group_relative(scores, group_ids, scale="none")


class BaselineOfTheBatch(Compared):
    """The mean of all scores."""

    def compare(self, scores, group_ids, lengths):
        return scores - scores.mean()


class OwnLengthInTheBaseline(Compared):
    """The mean of the whole group by lengths, as the paper of OPO has it."""

    def compare(self, scores, group_ids, lengths):
        groups, shares = (x.view(-1, self.config.group_size) for x in (scores, lengths.double()))
        return (groups - (shares * groups).sum(1, keepdim=True) / shares.sum(1, keepdim=True)).flatten()


class LengthsNotWeighed(Compared):
    """The plain mean of the others."""

    def compare(self, scores, group_ids, lengths):
        return leave_one_out(scores, group_ids)


class RootsOfLengths(Compared):
    """The mean of the others by the roots of their lengths."""

    def compare(self, scores, group_ids, lengths):
        return leave_one_out(scores, group_ids, weights=lengths.double().sqrt())


class SquaresOfLengths(Compared):
    """The mean of the others by the squares of their lengths."""

    def compare(self, scores, group_ids, lengths):
        return leave_one_out(scores, group_ids, weights=lengths.square())


class NoBaseline(Compared):
    """The score itself."""

    def compare(self, scores, group_ids, lengths):
        return scores


class LocalDenominators(GRPO):
    """Weights sum to 1 in every microbatch."""

    def losses(self, batch, weights):
        return super().losses(batch, weights / weights.sum())


class MaskDropped(GRPO):
    """The mean over rows and columns."""

    def losses(self, batch, weights):
        return super().losses(batch, torch.full_like(weights, 1 / weights.numel()))


class RatioToTheReference(GRPO):
    """The ratio is that to the reference."""

    def losses(self, batch, weights):
        return super().losses(replace(batch, old_logprobs=batch.ref_logprobs), weights)


class RatioToTheEngine(GRPO):
    """The ratio is that to what the engine reported."""

    def losses(self, batch, weights):
        return super().losses(replace(batch, old_logprobs=batch.rollout.rollout_logprobs), weights)


class NotCorrected(With):
    """No importance weights."""

    settings: ClassVar = {"importance": "none"}


class NoCap(With):
    """Importance weights as they are."""

    settings: ClassVar = {"importance_cap": 1e9}


class CappedAndNoMore(With):
    """Importance weights are truncated, not masked."""

    settings: ClassVar = {"importance": "truncated"}


class MaskedNotCapped(With):
    """Importance weights are masked, not truncated."""

    settings: ClassVar = {"importance": "masked"}


class ImportanceOfTokens(With):
    """Importance weights of each token."""

    settings: ClassVar = {"importance_level": "token"}


class ImportanceOfResponses(With):
    """Importance weights of whole responses."""

    settings: ClassVar = {"importance_level": "sequence"}


class ImportanceUpsideDown(GRPO):
    """Importance weights divide by the policy that learns."""

    def losses(self, batch, weights):
        turned = 2 * batch.old_logprobs - batch.rollout.rollout_logprobs
        return super().losses(replace(batch, rollout=replace(batch.rollout, rollout_logprobs=turned)), weights)


class ImportanceOfTheLiveActor(GRPO):
    """Importance weights move with the actor."""

    def losses(self, batch, weights):
        live = self.actor.logprobs(batch.sequences).logprobs.detach()
        moved = batch.rollout.rollout_logprobs + batch.old_logprobs - live
        return super().losses(replace(batch, rollout=replace(batch.rollout, rollout_logprobs=moved)), weights)


class AggregatedBySequence(GRPO):
    """Responses count the same, whatever the setting."""

    def __init__(self, config, **roles):
        super().__init__(config, **roles)
        self.aggregation = "sequence"


class Losing(GRPO):
    """GRPO with another loss."""

    def __init__(self, config, **roles):
        super().__init__(config, **roles)
        self.right_loss, self.policy_loss = self.policy_loss, self.loss

    def parts(self, logprobs, old_logprobs, advantages):
        ratio = (logprobs - old_logprobs).exp()
        clipped = ratio.clamp(1 - self.config.clip_low, 1 + self.config.clip_high)
        return -advantages * ratio, -advantages * clipped


class WrongSign(Losing):
    """The loss is what should grow."""

    def loss(self, *inputs):
        loss, metrics = self.right_loss(*inputs)
        return -loss, metrics


class ClipOfTheWrongSide(Losing):
    """The smaller of both losses."""

    def loss(self, logprobs, old_logprobs, advantages, weights):
        loss = torch.minimum(*self.parts(logprobs, old_logprobs, advantages))
        return (weights * torch.where(weights > 0, loss, 0.0)).sum(), {}


class NoClip(Losing):
    """The unclipped surrogate."""

    def loss(self, logprobs, old_logprobs, advantages, weights):
        loss, _ = self.parts(logprobs, old_logprobs, advantages)
        return (weights * torch.where(weights > 0, loss, 0.0)).sum(), {}


class OneClip(Losing):
    """clip_low on both sides."""

    def loss(self, logprobs, old_logprobs, advantages, weights):
        return clipped_policy_loss(
            logprobs,
            old_logprobs,
            advantages,
            weights,
            clip_low=self.config.clip_low,
            clip_high=min(self.config.clip_low, self.config.clip_high),
            dual_clip=self.config.dual_clip,
        )


class PaddingRead(Losing):
    """Padding is multiplied by 0, not selected away."""

    def loss(self, logprobs, old_logprobs, advantages, weights):
        return (weights * torch.maximum(*self.parts(logprobs, old_logprobs, advantages))).sum(), {}


class DrawnInOrder(Compared):
    """Earlier responses count more."""

    def compare(self, scores, group_ids, lengths):
        return group_relative(scores, group_ids) / torch.arange(1, len(scores) + 1)
