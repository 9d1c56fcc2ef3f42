"""What the settings claim: the expected gradient of an estimator, written out as sums over every group of responses.

Nothing here is shared with the algorithms. A `Terms` names each part of an estimator once, the wrong ways to compute it
too, so that a gradient which is not the one claimed can be looked up among those of known faults.
"""

import itertools
import math
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from llmrl.algorithms.config import GRPOConfig, PPOConfig
from llmrl.verify.game import (
    LENGTHS,
    MAX_TOKENS,
    NUM_PROMPTS,
    RESPONSE_MASK,
    STATES,
    Game,
    Gradient,
    probabilities,
    token_logprobs,
)


@dataclass(frozen=True, kw_only=True)
class Terms:
    """The parts of an estimator: those of the algorithms, and those of known faults."""

    baseline: Literal["mean", "leave_one_out", "mean of the batch", "none", "critic"]
    scale: Literal["std", "sample std", "std of the batch", "none"] = "none"
    aggregation: Literal["token", "sequence", "constant"] = "token"
    advantage_shift: int = 0
    """Each token gets the advantage of the token that is this many further on; 0 beyond the ends."""
    ratio: Literal["token", "sequence"] = "token"
    ratio_to: Literal["old", "reference", "sampler"] = "old"
    clip_low: float = math.inf
    clip_high: float = math.inf
    dual_clip: float = math.inf
    is_pessimistic: bool = True
    """Whether the clipped objective is the smaller of two, or the greater."""
    policy_sign: float = 1.0
    kl_form: Literal["k1", "k2", "k3", "k3_paper", "none"] = "none"
    """Form of the KL in the loss."""
    kl_sign: float = 1.0
    entropy_sign: float = 1.0
    gamma: float = 1.0
    trace: float = 1.0
    """Decay of the temporal differences in the advantages, gamma * gae_lambda."""
    value_trace: float = 1.0
    value_clip: float = math.inf
    value_shift: int = 0
    """1: the value of a token is the one after it."""
    bootstraps_end: bool = False
    score_at: Literal["last", "every", "limit"] = "last"
    """The token that is paid the score: the last one, every one, or the one at the length limit."""
    targets: Literal["returns", "advantages"] = "returns"


GRPO_TERMS = ("baseline", "scale", "aggregation", "ratio", "clip_low", "clip_high", "kl_form")
PPO_TERMS = ("aggregation", "clip_low", "clip_high", "gamma")
ALSO_KNOWN = ("name", "group_size", "kl_coef", "entropy_coef", "dual_clip", "loss")
"""Settings that are in the terms under another name, in the game, or say nothing about the gradient."""
LAMBDAS = ("gae_lambda", "value_lambda", "value_clip")


def terms_of(config: GRPOConfig | PPOConfig) -> Terms | None:
    """The estimator that the settings name. None where no formula of it is written here: a setting that is not of
    these terms is not at its default, or names a user's baseline."""
    names = GRPO_TERMS if isinstance(config, GRPOConfig) else PPO_TERMS
    if any(
        getattr(config, field.name) != field.default
        for field in fields(config)
        if field.name not in (*names, *ALSO_KNOWN, *LAMBDAS)
    ):
        return None
    own = {name: getattr(config, name) for name in names}
    own["dual_clip"] = math.inf if config.dual_clip is None else config.dual_clip
    if isinstance(config, GRPOConfig):
        return Terms(**own) if config.baseline in ("mean", "leave_one_out") else None
    value_lambda = config.gae_lambda if config.value_lambda is None else config.value_lambda
    return Terms(
        baseline="critic",
        trace=config.gamma * config.gae_lambda,
        value_trace=config.gamma * value_lambda,
        value_clip=math.inf if config.value_clip is None else config.value_clip,
        **own,
    )


def expected_gradient(terms: Terms, game: Game) -> Gradient:
    """The gradient of the losses in expectation over the sampler's responses, in the limit of a large batch."""
    logits = game.current.clone().requires_grad_()
    if terms.baseline == "critic":
        values = game.values.clone().requires_grad_()
        prompt, response, chance = _responses(game)
        advantages, returns = _estimates(terms, game)
        weights = _weights(terms, response, chance)
        shifted = _shifted(_standardized(advantages, response, chance), response, terms.advantage_shift)
        loss = _policy_loss(terms, game, logits, prompt, response, shifted, weights)
        loss = loss + _value_loss(terms, game, values, returns, weights)
        actor, critic = torch.autograd.grad(loss, (logits, values), allow_unused=True, materialize_grads=True)
        return Gradient(actor=actor, critic=critic)
    prompt, response, chance, advantages = _compared(terms, game)
    weights = _weights(terms, response, chance)
    shifted = _shifted(advantages[:, None].expand(-1, MAX_TOKENS), response, terms.advantage_shift)
    loss = _policy_loss(terms, game, logits, prompt, response, shifted, weights)
    (actor,) = torch.autograd.grad(loss, logits, allow_unused=True, materialize_grads=True)
    return Gradient(actor=actor)


# --- draws: the prompt, the response and the probability of each row --------------------------------------------------


def _responses(game: Game) -> tuple[Int[Tensor, " R"], Int[Tensor, " R"], Float64[Tensor, " R"]]:
    prompt, response = torch.cartesian_prod(torch.arange(NUM_PROMPTS), torch.arange(len(LENGTHS))).T
    return prompt, response, probabilities(game.sampler)[prompt, response] / NUM_PROMPTS


def _compared(
    terms: Terms, game: Game
) -> tuple[Int[Tensor, " R"], Int[Tensor, " R"], Float64[Tensor, " R"], Float64[Tensor, " R"]]:
    """Rows of every group of two, with their advantages: written for the first of the group, as both are alike."""
    pairs = itertools.product(range(NUM_PROMPTS), range(len(LENGTHS)), range(len(LENGTHS)))
    prompt, first, second = torch.tensor(list(pairs)).T
    likely = probabilities(game.sampler)
    chance = likely[prompt, first] * likely[prompt, second] / NUM_PROMPTS
    own, other = game.scores[prompt, first], game.scores[prompt, second]
    of_all = (likely * game.scores).sum() / NUM_PROMPTS
    match terms.baseline:
        case "mean":
            advantages = own - (own + other) / 2
        case "leave_one_out":
            advantages = own - other
        case "mean of the batch":
            advantages = own - of_all
        case _:
            advantages = own
    half = (own - other).abs() / 2  # the standard deviation of two numbers
    match terms.scale:
        case "std":
            advantages = advantages / (half + 1e-6)
        case "sample std":
            advantages = advantages / (half * math.sqrt(2) + 1e-6)
        case "std of the batch":
            variance = (likely * (game.scores - of_all) ** 2).sum() / NUM_PROMPTS
            advantages = advantages / (variance.sqrt() + 1e-6)
    return prompt, first, chance, advantages


def _weights(terms: Terms, response: Int[Tensor, " R"], chance: Float64[Tensor, " R"]) -> Float64[Tensor, "R T"]:
    lengths = LENGTHS[response]
    match terms.aggregation:
        case "token":
            weights = chance / (chance * lengths).sum()
        case "sequence":
            weights = chance / lengths
        case "constant":
            weights = chance / MAX_TOKENS
    return torch.where(RESPONSE_MASK[response], weights[:, None], 0.0)


# --- advantages with a critic -----------------------------------------------------------------------------------------


def _estimates(terms: Terms, game: Game) -> tuple[Float64[Tensor, "R T"], Float64[Tensor, "R T"]]:
    """Advantages and targets of every response to every prompt, by the double sum of GAE."""
    penalties = game.kl_coef * terms.kl_sign * (token_logprobs(game.old) - token_logprobs(game.reference))
    advantages = torch.zeros(NUM_PROMPTS, len(LENGTHS), MAX_TOKENS, dtype=torch.float64)
    returns = torch.zeros_like(advantages)
    for n, y in itertools.product(range(NUM_PROMPTS), range(len(LENGTHS))):
        length = int(LENGTHS[y])
        rewards = [-float(penalties[n, y, t]) for t in range(length)]
        for t in range(length):
            if terms.score_at == "every" or t == {"last": length, "limit": MAX_TOKENS}.get(terms.score_at, 0) - 1:
                rewards[t] += float(game.scores[n, y])
        values = [_value(game.old_values, n, y, t + terms.value_shift) for t in range(length)]
        values.append(_value(game.old_values, n, y, length) if terms.bootstraps_end else 0.0)
        deltas = [rewards[t] + terms.gamma * values[t + 1] - values[t] for t in range(length)]
        for t in range(length):
            advantages[n, y, t] = sum(terms.trace ** (k - t) * deltas[k] for k in range(t, length))
            target = sum(terms.value_trace ** (k - t) * deltas[k] for k in range(t, length))
            returns[n, y, t] = target + (values[t] if terms.targets == "returns" else 0.0)
    return advantages.flatten(0, 1), returns.flatten(0, 1)


def _value(table: Tensor, prompt: int, response: int, t: int) -> float:
    return float(table[prompt, STATES[response, t]])


def _standardized(
    advantages: Float64[Tensor, "R T"], response: Int[Tensor, " R"], chance: Float64[Tensor, " R"]
) -> Float64[Tensor, "R T"]:
    share = torch.where(RESPONSE_MASK[response], chance[:, None], 0.0)
    share = share / share.sum()
    mean = (share * advantages).sum()
    variance = (share * (advantages - mean) ** 2).sum()
    return (advantages - mean) / (variance + 1e-8).sqrt()


def _shifted(advantages: Float64[Tensor, "R T"], response: Int[Tensor, " R"], by: int) -> Float64[Tensor, "R T"]:
    """The advantage of the token `by` further on; 0 where there is none."""
    found = torch.zeros_like(advantages)
    for t in range(MAX_TOKENS):
        if 0 <= t + by < MAX_TOKENS:
            found[:, t] = torch.where(RESPONSE_MASK[response, t + by], advantages[:, t + by], 0.0)
    return found


# --- losses -----------------------------------------------------------------------------------------------------------


def _policy_loss(
    terms: Terms,
    game: Game,
    logits: Tensor,
    prompt: Int[Tensor, " R"],
    response: Int[Tensor, " R"],
    advantages: Float64[Tensor, "R T"],
    weights: Float64[Tensor, "R T"],
) -> Float64[Tensor, ""]:
    logprobs = token_logprobs(logits)[prompt, response]
    log_ratio = logprobs - _base(terms, game)[prompt, response]
    if terms.ratio == "sequence":
        log_ratio = (log_ratio.sum(dim=1) / LENGTHS[response])[:, None].expand_as(logprobs)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - terms.clip_low, 1 + terms.clip_high)
    least = torch.minimum if terms.is_pessimistic else torch.maximum
    gain = least(advantages * ratio, advantages * clipped)
    gain = torch.where(advantages < 0, torch.maximum(gain, advantages * min(terms.dual_clip, 1e300)), gain)
    loss = -terms.policy_sign * (weights * gain).sum()
    loss = loss + game.kl_coef * terms.kl_sign * (weights * _kl(terms, game, logprobs, prompt, response)).sum()
    distribution = logits.log_softmax(dim=-1)[prompt[:, None], STATES[response, :-1]]
    entropy = -(distribution.exp() * distribution).sum(dim=-1)
    return loss - game.entropy_coef * terms.entropy_sign * (weights * entropy).sum()


def _base(terms: Terms, game: Game) -> Float64[Tensor, "N Y T"]:
    """Log-probabilities that the importance ratio divides by."""
    return token_logprobs({"old": game.old, "reference": game.reference, "sampler": game.sampler}[terms.ratio_to])


def _kl(
    terms: Terms, game: Game, logprobs: Float64[Tensor, "R T"], prompt: Int[Tensor, " R"], response: Int[Tensor, " R"]
) -> Float64[Tensor, "R T"]:
    ratio = (logprobs - _base(terms, game)[prompt, response]).exp()
    log_ratio = logprobs - token_logprobs(game.reference)[prompt, response]
    k3 = (-log_ratio).exp() - 1 + log_ratio
    match terms.kl_form:
        case "k1":
            return log_ratio
        case "k2":
            return ratio.detach() * log_ratio**2 / 2
        case "k3":
            return ratio * k3
        case "k3_paper":
            return k3
        case "none":
            return 0 * logprobs


def _value_loss(
    terms: Terms, game: Game, values: Tensor, returns: Float64[Tensor, "R T"], weights: Float64[Tensor, "R T"]
) -> Float64[Tensor, ""]:
    states = STATES[:, terms.value_shift : MAX_TOKENS + terms.value_shift].clamp(max=values.shape[1] - 1)
    live, old = (table[:, states].flatten(0, 1) for table in (values, game.old_values))
    clipped = old + (live - old).clamp(-terms.value_clip, terms.value_clip)
    worst = torch.maximum((live - returns) ** 2, (clipped - returns) ** 2)
    return (weights * torch.where(weights > 0, worst, 0.0)).sum() / 2


# --- relation to the objective ----------------------------------------------------------------------------------------


def reasons(terms: Terms, *, exact_critic: bool) -> list[str]:
    """Why the gradient of a right estimator is not that of the objective; empty where it is, up to a factor."""
    found = {
        "each group's scores are divided by their spread": terms.scale == "std",
        "tokens of short responses count more": terms.aggregation == "sequence",
        "the critic's errors stay in the advantages": (
            terms.baseline == "critic" and terms.trace < terms.gamma and not exact_critic
        ),
        "later rewards are discounted": terms.gamma < 1,
        "the baseline has 1/G of the own score in it, the KL has not": (
            terms.baseline == "mean" and terms.scale == "none" and terms.kl_form != "none"
        ),
        "a token does not answer for the KL of later ones": terms.kl_form in ("k2", "k3"),
        "k3 without the ratio has the gradient of the KL from reference to policy": terms.kl_form == "k3_paper",
    }
    return [text for text, holds in found.items() if holds]


def without_kl(terms: Terms) -> Terms:
    """The same estimator without a KL in the loss."""
    return replace(terms, kl_form="none")
