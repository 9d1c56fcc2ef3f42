"""What the settings claim: the expected gradient of an estimator, written out as sums over every group of responses.

Nothing here is shared with the algorithms. A `Terms` names each part of an estimator once, the wrong ways to compute it
too, so that a gradient which is not the one claimed can be looked up among those of known faults.
"""

import itertools
import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float64, Int
from torch import Tensor

from llmrl.algorithms.config import CLIPS, GRPOConfig, PPOConfig
from llmrl.verify.game import (
    IS_TRUNCATED,
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
    group_size: int = 2
    """Responses that are compared with each other."""
    siblings: Literal["group", "rollout"] = "group"
    """Whether these are of one prompt, or a response to each prompt of the rollout."""
    length_power: float = 0.0
    """The mean over them weighs each by its length to this power: 1 in OPO."""
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
    importance: Literal["none", "truncated", "masked", "v_trace"] = "none"
    importance_level: Literal["token", "sequence"] = "token"
    importance_cap: float = math.inf
    importance_of: Literal["old", "current"] = "old"
    """The policy whose probabilities are divided by the sampler's."""
    importance_power: float = 1.0
    """-1: the ratio is upside down."""
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
    value_coef: float = 1.0
    """Weight of the critic's loss."""
    value_proximal_coef: float = 0.0
    step_kl_coef: float = 0.0
    """Weight of KL(old, current), by k3."""
    mask_truncated: bool = False
    bootstrap_truncated: bool = False
    score_clip: float = math.inf
    missing_eos_penalty: float = 0.0
    overlong_buffer_tokens: int = 0
    bootstraps_end: bool = False
    score_at: Literal["last", "every", "limit"] = "last"
    """The token that is paid the score: the last one, every one, or the one at the length limit."""
    targets: Literal["returns", "advantages"] = "returns"


LARGEST_GROUP = 3
"""Responses of a group, of which every combination is summed over."""
IMPORTANCE = ("importance", "importance_level", "importance_cap")
TRUNCATED = ("mask_truncated", "overlong_buffer_tokens")
GRPO_TERMS = ("group_size", "scale", "credit", "aggregation", "ratio", "kl_form", *IMPORTANCE, *TRUNCATED)
PPO_TERMS = (
    *("scale", "aggregation", "gamma", *IMPORTANCE, *TRUNCATED),
    *("missing_eos_penalty", "bootstrap_truncated", "value_proximal_coef"),
)
ALSO_KNOWN = ("name", "baseline", "kl_coef", "entropy_coef", "loss", "baseline_value", *CLIPS)
"""Settings that are in the terms in another form, in the game, or say nothing about the gradient."""
ELSEWHERE = ("gae_lambda", "value_lambda", "num_return_steps", "value_clip", "score_clip", "step_kl_target")
"""Settings of PPO that are in the terms in another form."""
BASELINES: dict[str, dict[str, Any]] = {
    **{name: {"baseline": name} for name in ("mean", "leave_one_out")},
    **{name: {"baseline": name, "group_size": 2} for name in ("none", "constant")},
    "optimal": {"baseline": "leave_one_out", "length_power": 1.0},
    "batch": {"baseline": "leave_one_out", "siblings": "rollout", "group_size": NUM_PROMPTS},
}
"""Terms of each baseline; that of the batch in rollouts of one response to each prompt."""


def terms_of(config: GRPOConfig | PPOConfig) -> Terms | None:
    """The estimator that the settings name. None where no formula of it is written here: a setting that is not of
    these terms is not at its default, or the baseline is another one."""
    names = GRPO_TERMS if isinstance(config, GRPOConfig) else PPO_TERMS
    if any(
        getattr(config, field.name) != field.default
        for field in fields(config)
        if field.name not in (*names, *ALSO_KNOWN, *ELSEWHERE)
    ):
        return None
    own: dict[str, Any] = {name: getattr(config, name) for name in names} | _clips(config)
    own["loss"] = "cispo" if config.loss == "cispo" else "clipped"
    if isinstance(config, GRPOConfig):
        is_of_larger = config.baseline == "batch" and (config.group_size > 1 or config.scale == "batch")
        if config.baseline not in BASELINES or config.credit == "turn" or is_of_larger:
            return None
        terms = Terms(**{**own, **BASELINES[config.baseline], "baseline_value": config.baseline_value or 0.0})
        return terms if terms.group_size <= LARGEST_GROUP else None
    bounds = {name: getattr(config, name) for name in ("value_clip", "score_clip")}
    own |= {name: math.inf if bound is None else bound for name, bound in bounds.items()}
    own["step_kl_coef"] = 0.0 if config.step_kl_target is None else 1.0  # where its controller begins
    return Terms(baseline="critic", **own, **_returns(config))


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
    if terms.mask_truncated:
        chance = torch.where(IS_TRUNCATED[response], 0.0, chance)
        chance = chance / chance.sum()
    if terms.scale == "batch":
        advantages = _standardized(advantages, response, chance)
    weights = _weights(terms, response, chance)
    shifted = _shifted(advantages, response, terms.advantage_shift)
    loss = _policy_loss(terms, game, logits, prompt, response, shifted, weights)
    if returns is not None:
        loss = loss + terms.value_coef * _value_loss(terms, game, values, returns, weights)
    actor, critic = torch.autograd.grad(loss, (logits, values), allow_unused=True, materialize_grads=True)
    return Gradient(actor=actor, critic=None if returns is None else critic)


# --- draws: the prompt, the response and the probability of each row --------------------------------------------------


def _responses(game: Game) -> tuple[Int[Tensor, " R"], Int[Tensor, " R"], Float64[Tensor, " R"]]:
    prompt, response = torch.cartesian_prod(torch.arange(NUM_PROMPTS), torch.arange(len(LENGTHS))).T
    return prompt, response, probabilities(game.sampler)[prompt, response] / NUM_PROMPTS


def _compared(
    terms: Terms, game: Game
) -> tuple[Int[Tensor, " R"], Int[Tensor, " R"], Float64[Tensor, " R"], Float64[Tensor, "R T"]]:
    """Rows of every group of responses, with their advantages: written for the first of the group, as all are alike."""
    groups = torch.cartesian_prod(torch.arange(NUM_PROMPTS), *[torch.arange(len(LENGTHS))] * terms.group_size)
    prompt, responses = groups.split([1, terms.group_size], dim=1)
    step = 1 if terms.siblings == "rollout" else 0
    prompts = (prompt + step * torch.arange(terms.group_size)) % NUM_PROMPTS
    likely, credited = probabilities(game.sampler), _credited(terms, game)
    chance = likely[prompts, responses].prod(dim=1) / NUM_PROMPTS
    among = credited[prompts, responses]
    own, whole = among[:, 0], credited[:, :, 0]
    of_all = (likely * whole).sum() / NUM_PROMPTS
    is_compared = RESPONSE_MASK[responses] if terms.credit == "token" else torch.ones_like(among, dtype=torch.bool)
    match terms.baseline:
        case "mean" | "leave_one_out":
            shares = torch.where(is_compared, (LENGTHS[responses].double() ** terms.length_power)[:, :, None], 0.0)
            if terms.baseline == "leave_one_out":
                shares[:, 0] = 0.0
            total = shares.sum(dim=1)
            advantages = torch.where(total > 0, own - (shares * among).sum(dim=1) / total.clamp(min=1e-300), 0.0)
        case "mean of the batch":
            advantages = own - of_all
        case "constant":
            advantages = own - terms.baseline_value
        case _:
            advantages = own
    match terms.scale:
        case "std" | "sample std":
            advantages = advantages / (_spread(among, is_compared, correction=int(terms.scale == "sample std")) + 1e-6)
        case "std of the batch":
            variance = (likely * (whole - of_all) ** 2).sum() / NUM_PROMPTS
            advantages = advantages / (variance.sqrt() + 1e-6)
    return prompt[:, 0], responses[:, 0], chance, advantages


def _spread(
    among: Float64[Tensor, "R G T"], is_compared: Bool[Tensor, "R G T"], *, correction: int
) -> Float64[Tensor, "R T"]:
    """Standard deviation of what is compared; a correction of 1 makes it that of a sample."""
    num = is_compared.sum(dim=1).clamp(min=1)
    mean = torch.where(is_compared, among, 0.0).sum(dim=1) / num
    squares = torch.where(is_compared, (among - mean[:, None]) ** 2, 0.0).sum(dim=1)
    return (squares / (num - correction).clamp(min=1)).sqrt()


def _credited(terms: Terms, game: Game) -> Float64[Tensor, "N Y T"]:
    """What each token is credited with: the score, minus the KL of the response or of the tokens from it on."""
    penalties = torch.zeros(NUM_PROMPTS, len(LENGTHS), MAX_TOKENS, dtype=torch.float64)
    if terms.kl_form == "k1_reward":
        penalties = _penalties(terms, game)
    begins = [t if terms.credit == "token" else 0 for t in range(MAX_TOKENS)]
    return torch.stack([_scores(terms, game) - penalties[:, :, begin:].sum(dim=2) for begin in begins], dim=2)


def _scores(terms: Terms, game: Game) -> Float64[Tensor, "N Y"]:
    """Scores after the clip, minus the penalties on responses that are truncated, or nearly."""
    scores = game.scores.clamp(-terms.score_clip, terms.score_clip) - terms.missing_eos_penalty * IS_TRUNCATED
    if buffer := terms.overlong_buffer_tokens:
        scores = scores - (LENGTHS - (MAX_TOKENS - buffer)).clamp(min=0) / buffer
    return scores


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
    """Advantages and targets of every response to every prompt, by the double sum of GAE, or its first differences, or
    that of V-trace."""
    ratio = torch.ones(NUM_PROMPTS, len(LENGTHS), MAX_TOKENS)
    if terms.importance == "v_trace":
        ratio = _behaviour_ratio(terms, game)
    rho_bar, c_bar = ratio.clamp(max=terms.importance_cap).tolist(), ratio.clamp(max=1.0).tolist()
    penalties, scores, table = (x.tolist() for x in (_penalties(terms, game), _scores(terms, game), game.old_values))
    lengths, states, is_truncated = LENGTHS.tolist(), STATES.tolist(), IS_TRUNCATED.tolist()
    advantages = torch.zeros(NUM_PROMPTS, len(LENGTHS), MAX_TOKENS, dtype=torch.float64)
    returns = torch.zeros_like(advantages)
    for n, y in itertools.product(range(NUM_PROMPTS), range(len(LENGTHS))):
        length, values_of = lengths[y], [table[n][state] for state in states[y]]
        rewards = [-penalty for penalty in penalties[n][y][:length]]
        is_bootstrapped = terms.bootstrap_truncated and is_truncated[y]
        for t in range(0 if is_bootstrapped else length):
            if terms.score_at == "every" or t == {"last": length, "limit": MAX_TOKENS}.get(terms.score_at, 0) - 1:
                rewards[t] += scores[n][y]
        values = values_of[terms.value_shift : length + terms.value_shift]
        values.append(values_of[length] if terms.bootstraps_end or is_bootstrapped else 0.0)
        deltas = [rewards[t] + terms.gamma * values[t + 1] - values[t] for t in range(length)]
        for t in range(length):
            ends, value_ends = (min(length, t + num) for num in (terms.num_steps, terms.value_num_steps))
            rho, c = rho_bar[n][y], c_bar[n][y]  # 1 without V-trace
            later = [math.prod(c[t + 1 : k]) * rho[k] * deltas[k] for k in range(t + 1, length)]
            advantage, target = deltas[t], rho[t] * deltas[t]
            advantage += sum(terms.trace**k * x for k, x in enumerate(later[: ends - t - 1], start=1))
            target += c[t] * sum(terms.value_trace**k * x for k, x in enumerate(later[: value_ends - t - 1], start=1))
            advantages[n, y, t] = advantage
            returns[n, y, t] = target + (values[t] if terms.targets == "returns" else 0.0)
    return advantages.flatten(0, 1), returns.flatten(0, 1)


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
    importance = _importance(terms, game)[prompt, response]
    loss = -terms.policy_sign * (weights * _gain(terms, log_ratio, importance * advantages)).sum()
    kl = _kl(terms, game, logprobs, prompt, response)
    loss = loss + game.kl_coef * terms.kl_sign * (weights * importance * kl).sum()
    step = logprobs - token_logprobs(game.old)[prompt, response]
    loss = loss + terms.step_kl_coef * (weights * importance * (step.exp() - 1 - step)).sum()
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


def _importance(terms: Terms, game: Game) -> Float64[Tensor, "N Y T"]:
    """What multiplies advantages and KL where another policy sampled."""
    ratio = _behaviour_ratio(terms, game)
    match terms.importance:
        case "none":
            return torch.ones_like(ratio)
        case "masked":
            is_near = (ratio <= terms.importance_cap) & (ratio >= 1 / terms.importance_cap)
            return torch.where(is_near, ratio, 0.0)
    return ratio.clamp(max=terms.importance_cap)


def _behaviour_ratio(terms: Terms, game: Game) -> Float64[Tensor, "N Y T"]:
    """Probability of each token, or of each response, by the policy that learns over that by the sampler."""
    learning = game.old if terms.importance_of == "old" else game.current
    log_ratio = terms.importance_power * (token_logprobs(learning) - token_logprobs(game.sampler))
    if terms.importance_level == "sequence":
        log_ratio = log_ratio.sum(dim=2, keepdim=True).expand_as(log_ratio)
    return log_ratio.exp()


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
    proximal = terms.value_proximal_coef * (live - old) ** 2
    return (weights * torch.where(weights > 0, worst + proximal, 0.0)).sum() / 2


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
        "truncated responses are left out": terms.mask_truncated,
        "a truncated response has the critic's value in place of a score": terms.bootstrap_truncated,
        "scores are clipped, or lose penalties": (
            terms.score_clip < math.inf or terms.missing_eos_penalty > 0 or terms.overlong_buffer_tokens > 0
        ),
        "a token that no other response reaches learns nothing": (
            terms.credit == "token" and terms.baseline in ("mean", "leave_one_out")
        ),
        "the baseline has 1/G of the own score in it, the KL has not": (
            terms.baseline == "mean" and terms.scale == "none" and terms.kl_form not in ("k1_reward", "none")
        ),
        "it has no KL": terms.kl_form == "none" and terms.baseline != "critic",
        "a token does not answer for the KL of later ones": terms.kl_form in ("k2", "k3"),
        "k3 without the ratio has the gradient of the KL from reference to policy": terms.kl_form == "k3_paper",
    }
    return [text for text, holds in found.items() if holds]


def without_kl(terms: Terms) -> Terms:
    """The same estimator without a KL in the loss or the rewards."""
    return replace(terms, kl_form="none")
