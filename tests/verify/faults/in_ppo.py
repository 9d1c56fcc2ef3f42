"""PPO with a fault, one a class: what it does wrong is its docstring."""

from dataclasses import replace
from typing import ClassVar

import torch
from torch.nn.functional import pad

from llmrl.algorithms.ppo import PPO
from llmrl.batches import StopReason, TokenOutputs
from llmrl.functional.masking import standardize


class Replaced(PPO):
    """PPO with some settings replaced, whatever was asked for; helper of the faults."""

    settings: ClassVar = {}

    def __init__(self, config, **others):
        super().__init__(replace(config, **self.settings), **others)


class ValuesNotHeld(Replaced):
    """The critic has no proximal term."""

    settings: ClassVar = {"value_proximal_coef": 0.0}


class StepNotPenalized(Replaced):
    """The KL of the step is not in the loss."""

    settings: ClassVar = {"step_kl_target": None}


class TruncatedNotBootstrapped(Replaced):
    """Truncated responses have their scores."""

    settings: ClassVar = {"bootstrap_truncated": False}


class TruncatedLearned(Replaced):
    """Truncated responses are learned from."""

    settings: ClassVar = {"mask_truncated": False}


class LengthNotPenalized(Replaced):
    """No penalty on overlong responses."""

    settings: ClassVar = {"overlong_buffer_tokens": 0}


class MissingEOSNotPenalized(Replaced):
    """No penalty on a missing EOS."""

    settings: ClassVar = {"missing_eos_penalty": 0.0}


class ScoreNotClipped(Replaced):
    """Scores as they are."""

    settings: ClassVar = {"score_clip": None}


class ValuesNotClipped(Replaced):
    """value_clip is not read."""

    settings: ClassVar = {"value_clip": None}


class ReturnsToTheEnd(Replaced):
    """All rewards are waited for, however many steps are asked for."""

    settings: ClassVar = {"num_return_steps": None, "gae_lambda": 1.0}


class AdvantagesOneLate(PPO):
    """Each token has the advantage of the one before it."""

    def losses(self, batch, weights):
        return super().losses(replace(batch, advantages=pad(batch.advantages, (1, -1))), weights)


class AdvantagesOneEarly(PPO):
    """Each token has the advantage of the one after it."""

    def losses(self, batch, weights):
        return super().losses(replace(batch, advantages=pad(batch.advantages, (-1, 1))), weights)


class StandardizedInMicrobatches(PPO):
    """Moments of the advantages are those of a microbatch."""

    def losses(self, batch, weights):
        return super().losses(replace(batch, advantages=standardize(batch.advantages, batch.counted)), weights)


class ValueAfterTheToken(PPO):
    """The critic is read one token late."""

    def __init__(self, config, *, networks, **others):
        super().__init__(config, networks=Late(networks), **others)


class Late:
    share_trunk = False

    def __init__(self, networks):
        self.networks = networks
        self.logprobs = networks.logprobs

    def values(self, sequences):
        outputs = self.networks.values(sequences)
        values = pad(outputs.values, (0, 1)).scatter(
            1, sequences.response_lengths[:, None], outputs.last_values[:, None]
        )
        return TokenOutputs(named={"values": values[:, 1:], "last_values": outputs.last_values})

    def both(self, sequences):
        return self.logprobs(sequences).merge(self.values(sequences))


def last(rollout):
    """True on the last token of each response."""
    mask = rollout.sequences.response_mask
    return mask & (torch.arange(mask.shape[1]) == rollout.sequences.response_lengths[:, None] - 1)


class TerminalBootstrapped(PPO):
    """The critic's value after the end is added to the score."""

    def __init__(self, config, **others):
        super().__init__(replace(config, bootstrap_truncated=True), **others)

    def experience(self, rollout, scores):
        paid = torch.where(last(rollout), scores.total[:, None], scores.per_token)
        cut = torch.full_like(rollout.stop_reason, StopReason.LENGTH)
        return super().experience(replace(rollout, stop_reason=cut), replace(scores, per_token=paid))


class ScoreAtEveryToken(PPO):
    """All tokens are paid."""

    def experience(self, rollout, scores):
        others = rollout.sequences.response_mask & ~last(rollout)
        return super().experience(
            rollout, replace(scores, per_token=torch.where(others, scores.total[:, None], scores.per_token))
        )


class ScoreAtTheLimit(PPO):
    """The last column is paid."""

    def experience(self, rollout, scores):
        is_long = rollout.sequences.response_lengths == self.max_response_tokens
        return super().experience(rollout, replace(scores, total=torch.where(is_long, scores.total, 0.0)))


class KLOfTheWrongSign(PPO):
    """The KL is a reward."""

    def __init__(self, config, **others):
        super().__init__(config, **others)
        self.kl_control.coef = -config.kl_coef


class TraceWithoutGamma(PPO):
    """Advantages decay by lambda alone."""

    def __init__(self, config, **others):
        value_lambda = config.gae_lambda if config.value_lambda is None else config.value_lambda
        gae_lambda = config.gae_lambda / config.gamma
        super().__init__(replace(config, gae_lambda=gae_lambda, value_lambda=value_lambda), **others)


class CriticNotCorrected(PPO):
    """The policy has the weights of V-trace, the critic's targets have not."""

    def __init__(self, config, **others):
        importance = "truncated" if config.importance == "v_trace" else config.importance
        super().__init__(replace(config, importance=importance), **others)


class CriticNotTrained(PPO):
    """The actor's loss alone."""

    def losses(self, batch, weights):
        yield next(super().losses(batch, weights))


class CriticLearnsAdvantages(PPO):
    """Targets lack the old values."""

    def experience(self, rollout, scores):
        experience, metrics = super().experience(rollout, scores)
        return replace(experience, returns=experience.returns - experience.old_values), metrics
