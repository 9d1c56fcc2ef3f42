"""Known faults of policy-gradient estimators: the wrong term of each, and what to say about it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from llmrl.verify.claims import Terms
from llmrl.verify.game import MAX_TOKENS


@dataclass(frozen=True, eq=False)
class Fault:
    """Something that is wrong with an estimator."""

    name: str
    reason: str
    terms: dict[str, Any] = field(default_factory=dict)
    """The terms that have these values in place of those claimed."""


WRONG_SIGN = Fault("wrong sign", "the gradient of the scores points away from them", {"policy_sign": -1.0})
FAULTS = (
    Fault(
        "k3 as a loss",
        "the KL is k3 without the ratio, whose expected gradient is that of KL(reference, policy), the other direction",
        {"kl_form": "k3_paper"},
    ),
    Fault("k1 as a loss", "the KL is k1 in the loss, whose expected gradient on-policy is zero", {"kl_form": "k1"}),
    Fault("KL without gradient", "the KL is detached, or left out", {"kl_form": "none"}),
    Fault(
        "KL in the loss",
        "the KL is k2 in the loss, not in the rewards: a token does not answer for the KL of later ones",
        {"kl_form": "in the loss"},
    ),
    Fault("KL of the wrong sign", "the KL is added where it should be subtracted", {"kl_sign": -1.0}),
    Fault(
        "own score in the baseline",
        "the baseline has the response's own score in it, so that the scores have (G-1)/G of their gradient",
        {"baseline": "mean"},
    ),
    Fault(
        "baseline of the batch",
        "scores are compared with the mean of the batch, other prompts included",
        {"baseline": "mean of the batch"},
    ),
    Fault(
        "lengths not weighed",
        "responses count the same in the baseline, where their lengths should weigh them",
        {"length_power": 0.0},
    ),
    Fault(
        "weights not squared",
        "the baseline weighs responses by the roots of their lengths: by norms of gradients, not by their squares",
        {"length_power": 0.5},
    ),
    Fault(
        "weights squared twice",
        "the baseline weighs responses by their squared lengths, not by these",
        {"length_power": 2.0},
    ),
    Fault("no baseline", "scores are compared with nothing", {"baseline": "none"}),
    Fault(
        "std over the batch",
        "advantages are divided by the standard deviation of the whole batch, not of the group",
        {"scale": "std of the batch"},
    ),
    Fault("std of a sample", "the standard deviation is that of a sample, with G-1 in it", {"scale": "sample std"}),
    Fault("scaled by the std", "advantages are divided by the spread of the group", {"scale": "std"}),
    Fault("not scaled", "advantages are not divided by any spread", {"scale": "none"}),
    Fault(
        "standardized",
        "advantages are standardized over the tokens of the rollout, against the setting",
        {"scale": "batch"},
    ),
    Fault("advantages one early", "each token has the advantage of the token after it", {"advantage_shift": 1}),
    Fault("advantages one late", "each token has the advantage of the token before it", {"advantage_shift": -1}),
    Fault(
        "ratio to the reference", "the ratio is that to the reference, not to the old policy", {"ratio_to": "reference"}
    ),
    Fault(
        "ratio to the engine's",
        "the ratio is that to the log-probabilities of the engine, not to the old policy",
        {"ratio_to": "sampler"},
    ),
    Fault(
        "no policy gradient",
        "the scores have no gradient: something is detached",
        {"policy_sign": 0.0},
    ),
    WRONG_SIGN,
    Fault(
        "clip of the wrong side",
        "the loss is the smaller of the clipped and the unclipped one, where it should be the larger",
        {"is_pessimistic": False},
    ),
    Fault("no clip", "the ratio is not clipped", {"clip_low": math.inf, "clip_high": math.inf}),
    Fault("not corrected", "importance weights are left out, or all 1", {"importance": "none"}),
    Fault("importance upside down", "importance weights divide the sampler by the actor", {"importance_power": -1.0}),
    Fault(
        "importance of the live actor",
        "importance weights are of the live actor, not of the old one: its step counts twice",
        {"importance_of": "current"},
    ),
    Fault("no cap", "importance weights have no bounds", {"importance_cap": math.inf}),
    Fault(
        "capped and no more",
        "importance weights are capped, where masked ones are 0 outside the bounds and V-trace corrects the critic too",
        {"importance": "truncated"},
    ),
    Fault("masked, not capped", "weights above the cap are 0, not the cap", {"importance": "masked"}),
    Fault(
        "importance of tokens",
        "importance weights are of each token, not of the response",
        {"importance_level": "token"},
    ),
    Fault(
        "importance of responses",
        "importance weights are of the whole response, not of each token",
        {"importance_level": "sequence"},
    ),
    Fault(
        "gradient clipped",
        "a token past the clip has no gradient, where the clip should only bound its weight",
        {"loss": "clipped"},
    ),
    Fault("one clip for both sides", "the ratio is clipped from above by clip_low", {"clip_high": "clip_low"}),
    Fault("ratio of tokens", "the ratio is that of each token, not of the response", {"ratio": "token"}),
    Fault("entropy of the wrong sign", "the entropy is subtracted where it should be added", {"entropy_sign": -1.0}),
    Fault("no entropy bonus", "the entropy bonus is left out, or has no gradient", {"entropy_sign": 0.0}),
    Fault("aggregated by token", "each token counts the same, against the setting", {"aggregation": "token"}),
    Fault("aggregated by sequence", "each response counts the same, against the setting", {"aggregation": "sequence"}),
    Fault("divided by a constant", "losses are divided by a constant: rows times width", {"aggregation": "constant"}),
    Fault("value after the token", "the value of a token is read after it is chosen", {"value_shift": 1}),
    Fault(
        "terminal state bootstrapped",
        "the critic's value after the last token is added to a score that is final",
        {"bootstraps_end": True},
    ),
    Fault("trace without gamma", "advantages decay by gae_lambda alone, without gamma", {"trace": "without gamma"}),
    Fault("score at every token", "every token is paid the score, not the last one alone", {"score_at": "every"}),
    Fault(
        "score at the length limit",
        "the score stands at the last column, which short responses do not have",
        {"score_at": "limit"},
    ),
    Fault("critic not trained", "the loss of the critic is left out, or has no gradient", {"value_coef": 0.0}),
    Fault("critic learns advantages", "the critic's targets lack the old values", {"targets": "advantages"}),
    Fault("values not held", "the critic's proximal term is left out", {"value_proximal_coef": 0.0}),
    Fault("step not penalized", "the KL of the step is left out, or has no gradient", {"step_kl_coef": 0.0}),
    Fault("truncated responses learned", "truncated responses are not masked", {"mask_truncated": False}),
    Fault(
        "truncated not bootstrapped",
        "a truncated response has its score, not the critic's value after it",
        {"bootstrap_truncated": False},
    ),
    Fault("score not clipped", "score_clip is not applied", {"score_clip": math.inf}),
    Fault("missing EOS not penalized", "missing_eos_penalty is not subtracted", {"missing_eos_penalty": 0.0}),
    Fault("length not penalized", "the penalty on overlong responses is left out", {"overlong_buffer_tokens": 0}),
    Fault("values not clipped", "value_clip is not applied", {"value_clip": math.inf}),
    Fault(
        "returns to the end",
        "returns wait for the end of the response, not for num_return_steps",
        {"num_steps": MAX_TOKENS, "value_num_steps": MAX_TOKENS},
    ),
)
"""What a gradient that is not the one claimed is looked up among."""

OF_THE_CRITIC = (
    "trace",
    "num_steps",
    "value_shift",
    "value_clip",
    "bootstraps_end",
    "score_at",
    "targets",
    "value_coef",
)
"""Terms that only an estimator with a critic has."""
OF_SCORES = ("std", "sample std", "std of the batch")
"""Scales that only an estimator without a critic has."""
OF_LARGE_BATCHES = ("batch", "std of the batch")
"""Scales by the spread of more responses than a rollout of one to each prompt."""
UNKNOWN = Fault(
    "unknown",
    "the gradient is neither the one claimed nor that of a known fault; for what a class does not read, the settings "
    "that there are were tried, and nothing of its own",
)
NO_CLAIM = Fault("no claim", "no formula of these settings is written out, and the gradient is not the true one")
MICROBATCHES = Fault(
    "local denominators",
    "the result depends on how the minibatch is split into microbatches: it divides by a number of the part",
)
RANKS = Fault("ranks differ", "two ranks that share a minibatch do not add up to one that has all of it")
WIDTH = Fault("padding counted", "further columns of padding change the result: the mask is dropped")
CONTENT = Fault(
    "padding read", "NaN in the padding gets into the result: select with torch.where in place of a product with 0"
)
ORDER = Fault("order of groups", "the result depends on the order of the groups")
DISTURBED = (MICROBATCHES, RANKS, WIDTH, CONTENT, ORDER)


def with_faults(claimed: Terms) -> Iterator[tuple[Fault, Terms]]:
    """Each known fault that an estimator can have, and the terms that it then has."""
    for fault in FAULTS:
        changes = {name: _meant(value, claimed) for name, value in fault.terms.items()}
        if _is_possible(changes, claimed) and (terms := replace(claimed, **changes)) != claimed:
            yield fault, terms


def _is_possible(changes: dict[str, Any], claimed: Terms) -> bool:
    """Whether an estimator has the part that a fault is in."""
    has_critic, names, scale = claimed.baseline == "critic", changes.keys(), changes.get("scale")
    if "is_pessimistic" in changes and (claimed.loss == "cispo" or claimed.clip_low == math.inf):
        return False
    if "kl_form" in changes and (has_critic or claimed.kl_form == "none"):
        return False
    if any(name.startswith("importance") for name in names) and claimed.importance == "none":
        return False
    if "length_power" in changes and not claimed.length_power:
        return False
    if claimed.siblings == "rollout" and (changes.get("baseline") == "mean of the batch" or scale in OF_LARGE_BATCHES):
        return False
    return names.isdisjoint({"baseline"} if has_critic else OF_THE_CRITIC) and not (has_critic and scale in OF_SCORES)


def _meant(value: Any, claimed: Terms) -> Any:
    match value:
        case "clip_low":
            return claimed.clip_low
        case "in the loss":
            return "k2" if claimed.kl_form == "k1_reward" else claimed.kl_form
        case "without gamma":
            return claimed.trace / claimed.gamma if claimed.gamma else claimed.trace
    return value
