"""What the settings claim: the expected gradient of an estimator, written out as sums over every group of responses.

Nothing here is shared with the algorithms. A `Terms` names each part of an estimator once, the wrong ways to compute it
too, so that a gradient which is not the one claimed can be looked up among those of known faults.
"""

import itertools
import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from llmrl.algorithms.config import CLIPS, GRPOConfig, PPOConfig
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

    baseline: Literal["mean", "leave_one_out", "mean of the batch", "constant", "none", "critic"]
    baseline_value: float = 0.0
    """The baseline constant, in score."""
    scale: Literal["std", "sample std", "std of the batch", "batch", "none"] = "none"
    """"batch" standardizes over the tokens of the rollout; "std of the batch" divides by the spread of the scores."""
    credit: Literal["response", "token"] = "response"
    """Whether a token has the rewards of the whole response, or those from it on."""
    aggregation: Literal["token", "sequence", "constant"] = "token"
    advantage_shift: int = 0
    """Each token gets the advantage of the token that is this many further on; 0 beyond the ends."""
    ratio: Literal["token", "sequence"] = "token"
    ratio_to: Literal["old", "reference", "sampler"] = "old"
    loss: Literal["clipped", "cispo"] = "clipped"
    """Without clips the clipped surrogate is the policy gradient."""
    clip_low: float = math.inf
    clip_high: float = math.inf
    dual_clip: float = math.inf
    is_pessimistic: bool = True
    """Whether the clipped objective is the smaller of two, or the greater."""
    policy_sign: float = 1.0
    kl_form: Literal["k1", "k2", "k3", "k3_paper", "k1_reward", "none"] = "none"
    """Form of the KL in the loss; k1_reward: k1 in the rewards, where a critic has it always."""
    kl_sign: float = 1.0
    entropy_sign: float = 1.0
    gamma: float = 1.0
    trace: float = 1.0
    """Decay of the temporal differences in the advantages, gamma * gae_lambda."""
    value_trace: float = 1.0
    num_steps: int = MAX_TOKENS
    """Temporal differences in an advantage, at most."""
    value_num_steps: int = MAX_TOKENS
    value_clip: float = math.inf
    value_shift: int = 0
    """1: the value of a token is the one after it."""
    bootstraps_end: bool = False
    score_at: Literal["last", "every", "limit"] = "last"
    """The token that is paid the score: the last one, every one, or the one at the length limit."""
    targets: Literal["returns", "advantages"] = "returns"


GRPO_TERMS = ("baseline", "scale", "credit", "aggregation", "ratio", "kl_form")
PPO_TERMS = ("scale", "aggregation", "gamma")
ALSO_KNOWN = ("name", "group_size", "kl_coef", "entropy_coef", "loss", "baseline_value", *CLIPS)
"""Settings that are in the terms in another form, in the game, or say nothing about the gradient."""
RETURNS = ("gae_lambda", "value_lambda", "num_return_steps", "value_clip")
"""Settings of PPO that are in the terms in another form."""
BASELINES = {"response": ("mean", "leave_one_out", "none", "constant"), "token": ("none", "constant")}
"""For each credit the baselines that a formula is written for."""


def terms_of(config: GRPOConfig | PPOConfig) -> Terms | None:
    """The estimator that the settings name. None where no formula of it is written here: a setting that is not of
    these terms is not at its default, or the baseline is another one."""
    names = GRPO_TERMS if isinstance(config, GRPOConfig) else PPO_TERMS
    if any(
        getattr(config, field.name) != field.default
        for field in fields(config)
        if field.name not in (*names, *ALSO_KNOWN, *RETURNS)
    ):
        return None
    own: dict[str, Any] = {name: getattr(config, name) for name in names} | _clips(config)
    own["loss"] = "cispo" if config.loss == "cispo" else "clipped"
    if isinstance(config, GRPOConfig):
        is_known = config.baseline in BASELINES.get(config.credit, ())
        return Terms(baseline_value=config.baseline_value or 0.0, **own) if is_known else None
    value_clip = math.inf if config.value_clip is None else config.value_clip
    return Terms(baseline="critic", value_clip=value_clip, **own, **_returns(config))


def _returns(config: PPOConfig) -> dict[str, Any]:
    """How advantages and targets decay and where they end; n steps decay by gamma alone."""
    num_steps, gae_lambda = MAX_TOKENS, config.gae_lambda
    if config.num_return_steps is not None:
        num_steps, gae_lambda = config.num_return_steps, 1.0
    value_num_steps, value_lambda = num_steps, gae_lambda
    if config.value_lambda is not None:
        value_num_steps, value_lambda = MAX_TOKENS, config.value_lambda
    return {
        "trace": config.gamma * gae_lambda,
        "value_trace": config.gamma * value_lambda,
        "num_steps": num_steps,
        "value_num_steps": value_num_steps,
    }


def _clips(config: GRPOConfig | PPOConfig) -> dict[str, float]:
    """The clips that the loss reads; infinite where it reads none."""
    found = {name: getattr(config, name) for name, losses in CLIPS.items() if config.loss in losses}
    return {name: math.inf if found.get(name) is None else found[name] for name in CLIPS}


def expected_gradient(terms: Terms, game: Game) -> Gradient:
    """The gradient of the losses in expectation over the sampler's responses, in the limit of a large batch."""
    logits, values = game.current.clone().requires_grad_(), game.values.clone().requires_grad_()
    returns = None
    if terms.baseline == "critic":
        prompt, response, chance = _responses(game)
        advantages, returns = _estimates(terms, game)
    else:
        prompt, response, chance, advantages = _compared(terms, game)
    if terms.scale == "batch":
        advantages = _standardized(advantages, response, chance)
    weights = _weights(terms, response, chance)
    shifted = _shifted(advantages, response, terms.advantage_shift)
    loss = _policy_loss(terms, game, logits, prompt, response, shifted, weights)
    if returns is not None:
        loss = loss + _value_loss(terms, game, values, returns, weights)
    actor, critic = torch.autograd.grad(loss, (logits, values), allow_unused=True, materialize_grads=True)
    return Gradient(actor=actor, critic=None if returns is None else critic)


# --- draws: the prompt, the response and the probability of each row --------------------------------------------------


def _responses(game: Game) -> tuple[Int[Tensor, " R"], Int[Tensor, " R"], Float64[Tensor, " R"]]:
    prompt, response = torch.cartesian_prod(torch.arange(NUM_PROMPTS), torch.arange(len(LENGTHS))).T
    return prompt, response, probabilities(game.sampler)[prompt, response] / NUM_PROMPTS


def _compared(
    terms: Terms, game: Game
) -> tuple[Int[Tensor, " R"], Int[Tensor, " R"], Float64[Tensor, " R"], Float64[Tensor, "R T"]]:
    """Rows of every group of two, with their advantages: written for the first of the group, as both are alike."""
    pairs = itertools.product(range(NUM_PROMPTS), range(len(LENGTHS)), range(len(LENGTHS)))
    prompt, first, second = torch.tensor(list(pairs)).T
    likely = probabilities(game.sampler)
    chance = likely[prompt, first] * likely[prompt, second] / NUM_PROMPTS
    credited = _credited(terms, game)
    own, other, whole = credited[prompt, first], credited[prompt, second], credited[:, :, 0]
    of_all = (likely * whole).sum() / NUM_PROMPTS
    match terms.baseline:
        case "mean":
            advantages = own - (own + other) / 2
        case "leave_one_out":
            advantages = own - other
        case "mean of the batch":
            advantages = own - of_all
        case "constant":
            advantages = own - terms.baseline_value
        case _:
            advantages = own
    half = (own - other).abs() / 2  # the standard deviation of two numbers
    match terms.scale:
        case "std":
            advantages = advantages / (half + 1e-6)
        case "sample std":
            advantages = advantages / (half * math.sqrt(2) + 1e-6)
        case "std of the batch":
            variance = (likely * (whole - of_all) ** 2).sum() / NUM_PROMPTS
            advantages = advantages / (variance.sqrt() + 1e-6)
    return prompt, first, chance, advantages


def _credited(terms: Terms, game: Game) -> Float64[Tensor, "N Y T"]:
    """What each token is credited with: the score, minus the KL of the response or of the tokens from it on."""
    penalties = torch.zeros(NUM_PROMPTS, len(LENGTHS), MAX_TOKENS, dtype=torch.float64)
    if terms.kl_form == "k1_reward":
        penalties = _penalties(terms, game)
    begins = [t if terms.credit == "token" else 0 for t in range(MAX_TOKENS)]
    return torch.stack([game.scores - penalties[:, :, begin:].sum(dim=2) for begin in begins], dim=2)


def _penalties(terms: Terms, game: Game) -> Float64[Tensor, "N Y T"]:
    """The price of the KL of each token."""
    return game.kl_coef * terms.kl_sign * (token_logprobs(game.old) - token_logprobs(game.reference))


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
    """Advantages and targets of every response to every prompt, by the double sum of GAE, or its first
    differences."""
    penalties = _penalties(terms, game)
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
            ends, value_ends = (min(length, t + num) for num in (terms.num_steps, terms.value_num_steps))
            advantages[n, y, t] = sum(terms.trace ** (k - t) * deltas[k] for k in range(t, ends))
            target = sum(terms.value_trace ** (k - t) * deltas[k] for k in range(t, value_ends))
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
    loss = -terms.policy_sign * (weights * _gain(terms, log_ratio, advantages)).sum()
    loss = loss + game.kl_coef * terms.kl_sign * (weights * _kl(terms, game, logprobs, prompt, response)).sum()
    distribution = logits.log_softmax(dim=-1)[prompt[:, None], STATES[response, :-1]]
    entropy = -(distribution.exp() * distribution).sum(dim=-1)
    return loss - game.entropy_coef * terms.entropy_sign * (weights * entropy).sum()


def _gain(
    terms: Terms, log_ratio: Float64[Tensor, "R T"], advantages: Float64[Tensor, "R T"]
) -> Float64[Tensor, "R T"]:
    """What the policy loss makes larger."""
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - terms.clip_low, 1 + terms.clip_high)
    if terms.loss == "cispo":
        return advantages * clipped.detach() * log_ratio
    least = torch.minimum if terms.is_pessimistic else torch.maximum
    gain = least(advantages * ratio, advantages * clipped)
    return torch.where(advantages < 0, torch.maximum(gain, advantages * min(terms.dual_clip, 1e300)), gain)


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
        case "k1_reward" | "none":
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
            terms.baseline == "critic"
            and (terms.trace < terms.gamma or terms.num_steps < MAX_TOKENS)
            and not exact_critic
        ),
        "later rewards are discounted": terms.gamma < 1,
        "the baseline has 1/G of the own score in it, the KL has not": (
            terms.baseline == "mean" and terms.scale == "none" and terms.kl_form not in ("k1_reward", "none")
        ),
        "a token does not answer for the KL of later ones": terms.kl_form in ("k2", "k3"),
        "k3 without the ratio has the gradient of the KL from reference to policy": terms.kl_form == "k3_paper",
    }
    return [text for text, holds in found.items() if holds]


def without_kl(terms: Terms) -> Terms:
    """The same estimator without a KL in the loss or the rewards."""
    return replace(terms, kl_form="none")
