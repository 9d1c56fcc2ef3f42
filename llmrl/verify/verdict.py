"""Verdicts: whether an estimator has the gradient that it claims, and if not, which fault it has."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from llmrl.algorithms.config import LOSSES
from llmrl.functional.aggregation import Aggregation
from llmrl.user_code import UserCodeFailure
from llmrl.verify.claims import Terms, expected_gradient, reasons, terms_of, without_kl
from llmrl.verify.estimators import Estimator, draws_of
from llmrl.verify.faults import NO_CLAIM, UNKNOWN, WRONG_SIGN, Fault, with_faults
from llmrl.verify.game import (
    LENGTHS,
    MAX_TOKENS,
    Game,
    Gradient,
    enumeration,
    make_game,
    moved,
    probabilities,
    with_exact_critic,
)
from llmrl.verify.invariances import broken_invariances
from llmrl.verify.rows import Row
from llmrl.verify.training import distance_from_optimum

KL_COEF, ENTROPY_COEF = 0.3, 0.1
TOLERANCE = 1e-5
"""Relative distance below which two gradients are one; weights are in float32."""
SCORES, KL, OFF_POLICY, STALE, APART = "scores", "kl", "off-policy", "stale", "apart"
ON_POLICY = (SCORES, KL)
OWN_PARTS: dict[str, list[dict[str, Any]]] = {
    "baseline": [{"baseline": name} for name in ("leave_one_out", "mean", "mean of the batch", "none")],
    "scale": [{"scale": name} for name in ("none", "std", "batch", "std of the batch")],
    "clip_low": [
        {"clip_low": math.inf, "clip_high": math.inf, "dual_clip": math.inf},
        {"clip_low": 0.0, "clip_high": 0.0, "loss": "cispo"},
    ],
}
"""What a class may have that does not read a setting; for the loss without clips the ratio, or no ratio."""
NUM_RESPONSES = 1024
"""Responses that the standard error is given for."""


def probes(*, exact_critic: bool) -> dict[str, Game]:
    """The games that every estimator is measured in: on-policy by the scores alone and with the KL; after the actor has
    moved away from the old one, past the clip; with responses of another policy than the old actor; and with all three
    apart, and an entropy bonus."""
    game = make_game(kl_coef=KL_COEF)
    actor, values = moved(game.sampler, by=0.15, seed=11), moved(game.values, by=0.4, seed=12)
    away = replace(game, current=actor, values=values)
    older = moved(game.sampler, by=0.2, seed=13)
    stale = replace(game, old=older, current=older)
    apart = replace(away, old=older, entropy_coef=ENTROPY_COEF)
    games = {SCORES: replace(game, kl_coef=0.0), KL: game, OFF_POLICY: away, STALE: stale, APART: apart}
    return {name: with_exact_critic(game) if exact_critic else game for name, game in games.items()}


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was found out about one estimator."""

    name: str
    factor: float
    """Expected gradient of the scores over the true one, times what its aggregation divides by: 1 for RLOO."""
    bias: float
    """Distance of the expected gradient from the true one times a factor, relative to that; on-policy, scores alone."""
    bias_kl: float
    """The same of the KL-regularized objective."""
    cosine: float
    """With the true gradient of the KL-regularized objective."""
    cosine_off_policy: float
    """The same where the actor has moved away from the policy that sampled."""
    cosine_stale: float
    """The same where another policy sampled than the old actor, from which the current one has not moved."""
    claim_error: float | None
    """Largest distance from what the settings claim, relative; None where no formula of it is known."""
    variance: float
    """Variance of the gradient per response, relative to the squared norm of the expected one."""
    standard_error: float
    """Standard error of the gradient of 1,024 responses, relative to the norm of the expected one."""
    distance: float | None
    """Total variation from the optimum after training; None where nothing was trained."""
    faults: tuple[Fault, ...]
    reason: str

    @property
    def holds(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults

    def to_record(self) -> dict[str, Any]:
        """As JSON holds it."""
        record = asdict(self)
        return record | {"faults": [fault.name for fault in self.faults], "holds": self.holds}


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What was found out about several estimators."""

    reports: list[Report]
    failures: dict[str, UserCodeFailure]
    """By row, what the user's code failed with."""
    left_out: list[str]
    """Rows whose settings the user's class does not read."""

    @property
    def hold(self) -> bool:
        """Whether nothing is wrong with any of them."""
        return not self.failures and all(report.holds for report in self.reports)


def verify_all(rows: Iterable[Row], *, quick: bool) -> Findings:
    """Verifies several estimators; where a user's code fails in one of them, the others are verified still.

    Raises:
        UserCodeFailure: The user's code failed, and there is no row in which it did not.
    """
    reports: list[Report] = []
    failures: dict[str, UserCodeFailure] = {}
    left_out: list[str] = []
    for row in rows:
        try:
            report = verify(row, quick=quick)
        except UserCodeFailure as failure:
            failures[row.name] = failure
            continue
        if report is None:
            left_out.append(row.name)
        else:
            reports.append(report)
    if failures and not reports:
        raise next(iter(failures.values()))
    return Findings(reports=reports, failures=failures, left_out=left_out)


def verify(row: Row, *, quick: bool) -> Report | None:
    """Verifies one estimator. None where the user's class does not read the row's settings. `quick` trains nothing, and
    rows of whole rollouts are never trained: each step would take all of them.

    Raises:
        UserCodeFailure: The user's code failed.
    """
    games = probes(exact_critic=row.exact_critic)
    draws = draws_of(row, games[KL])
    estimators = {name: Estimator(row, game) for name, game in games.items()}
    used, measured = estimators[KL], dict[str, Gradient]()
    for name, estimator in estimators.items():
        try:
            measured[name] = estimator.expected(draws)
        except UserCodeFailure:
            if estimator.unread():  # it may fail because the row is of another estimator
                return None
            raise
    if set(used.unread()) - _unread_by_ours(row, games[KL]):
        return None
    terms, error, found, note = _judge(used, games, measured)
    found += tuple(broken_invariances(row, games[APART]))
    bias = {name: _bias(measured[name], games[name]) for name in ON_POLICY}
    variance = used.variance(draws)
    return Report(
        name=row.name,
        factor=bias[SCORES][0] * _divisor(used.algorithm.aggregation, games[SCORES]),
        bias=bias[SCORES][1],
        bias_kl=bias[KL][1],
        cosine=_cosine(measured[KL], games[KL]),
        cosine_off_policy=_cosine(measured[OFF_POLICY], games[OFF_POLICY]),
        cosine_stale=_cosine(measured[STALE], games[STALE]),
        claim_error=error,
        variance=variance,
        standard_error=(variance / NUM_RESPONSES) ** 0.5,
        distance=None if quick or row.compares_prompts else distance_from_optimum(row, games[KL]),
        faults=found,
        reason="; ".join(
            [fault.reason for fault in found]
            or [note or _relation(terms, exact_critic=row.exact_critic), *_not_judged(used)]
        ),
    )


def _unread_by_ours(row: Row, game: Game) -> set[str]:
    """Settings of a row that GRPO itself has no use for, such as the scale beside a baseline of one left out."""
    if row.code is None or row.algorithm == "ppo":
        return set()
    ours = Estimator(replace(row, code="llmrl.algorithms.grpo:GRPO"), game)
    ours.expected(enumeration(game, row.group_size))
    return set(ours.unread())


def _judge(
    used: Estimator, games: Mapping[str, Game], measured: Mapping[str, Gradient]
) -> tuple[Terms | None, float | None, tuple[Fault, ...], str]:
    """``(terms, distance from them, faults, note)``: what the settings claim, else known faults of it, else the true
    gradient."""
    claims = _claims_of(used)
    names = games.keys() if used.config.loss in LOSSES else ON_POLICY
    compared = {name: games[name] for name in names}
    errors_of = partial(_errors, games=compared, measured=measured, any_scale=not used.reads("aggregation"))
    for terms in claims:
        errors = list(errors_of(terms))
        if all(error < TOLERANCE for error in errors):  # not by the maximum, which can miss NaN
            return terms, max(errors), (), ""
    terms = claims[0] if claims else None
    error = max(errors_of(terms)) if terms else None
    known = {
        fault: None
        for claim in claims
        for fault, wrong in with_faults(claim)
        if all(error < TOLERANCE for error in errors_of(wrong))
    }
    if known:
        return terms, error, tuple(known), ""
    factor, bias = _bias(measured[SCORES], games[SCORES])
    if not bias < TOLERANCE or (terms and not _has_kl_of(terms, games, measured)):
        return terms, error, (UNKNOWN if terms else NO_CLAIM,), ""
    if factor < 0:
        return terms, error, (WRONG_SIGN,), ""
    multiple = factor * _divisor(used.algorithm.aggregation, games[SCORES])
    note = f"{multiple:.4f} times the true gradient of the scores, by an estimator of its own"
    own_score = "; an own score in the baseline makes such a factor" if multiple < 1 - TOLERANCE else ""
    return terms, error, (), note + own_score


def _claims_of(used: Estimator) -> list[Terms]:
    """The estimators that the settings name: one, and several where a user's class does not read a setting, so that
    this part is its own; none where no formula is written out."""
    terms = terms_of(used.config)
    if terms is None:
        return []
    terms = terms if used.reads("kl_coef") else without_kl(terms)
    changes: dict[str, Any] = {} if used.reads("entropy_coef") else {"entropy_sign": 0.0}
    if not used.reads("aggregation"):
        changes["aggregation"] = used.algorithm.aggregation
    choices = [parts for name, parts in OWN_PARTS.items() if not used.reads(name)]
    return [
        replace(terms, **changes, **{name: value for part in chosen for name, value in part.items()})
        for chosen in itertools.product(*choices)
    ]


def _has_kl_of(terms: Terms, games: Mapping[str, Game], measured: Mapping[str, Gradient]) -> bool:
    """Whether the KL adds to the gradient what it adds to that of the terms."""
    ours = measured[KL].actor - measured[SCORES].actor
    theirs = expected_gradient(terms, games[KL]).actor - expected_gradient(terms, games[SCORES]).actor
    return bool((ours - theirs).abs().max() < TOLERANCE * games[KL].gradient().abs().max())


def _errors(
    terms: Terms, games: Mapping[str, Game], measured: Mapping[str, Gradient], *, any_scale: bool
) -> Iterator[float]:
    """Distance from the gradient of these terms in each game, relative to the gradient of the objective. `any_scale`
    takes the terms times the positive number that is nearest in the first game."""
    scale = None if any_scale else 1.0
    for name, game in games.items():
        ours, theirs = measured[name].flat, expected_gradient(terms, game).flat
        if scale is None:
            scale = float((ours @ theirs).abs() / (theirs @ theirs).clamp(min=1e-300)) or 1.0
        distance = ours - scale * theirs
        yield float(distance.abs().max() / game.gradient().abs().max())


def _bias(measured: Gradient, game: Game) -> tuple[float, float]:
    """``(factor, bias)``: the multiple of the true gradient that is nearest, and the distance relative to that."""
    truth, ascent = game.gradient(), -measured.actor
    factor = (ascent * truth).sum() / truth.square().sum()
    rest = (ascent - factor * truth).norm()
    return float(factor), float(rest / (factor * truth).norm()) if factor else float("inf")


def _cosine(measured: Gradient, game: Game) -> float:
    truth, ascent = game.gradient(), -measured.actor
    return float((truth * ascent).sum() / (truth.norm() * ascent.norm()).clamp(min=1e-300))


def _divisor(aggregation: Aggregation, game: Game) -> float:
    """What the loss of a response divides by, on the average: so a factor of 1 is the policy gradient itself."""
    match aggregation:
        case "constant":
            return float(MAX_TOKENS)
        case "token":
            return float((probabilities(game.sampler) * LENGTHS).sum(dim=1).mean())
    return 1.0


def _not_judged(used: Estimator) -> list[str]:
    """What a verdict says nothing of."""
    is_own = used.config.loss not in LOSSES
    return ["a loss of your own is judged on-policy only, in the first optimizer step of a rollout"] * is_own


def _relation(terms: Terms | None, *, exact_critic: bool) -> str:
    """How a right gradient is related to that of the objective."""
    found = [] if terms is None else reasons(terms, exact_critic=exact_critic)
    return f"not the gradient of the objective: {'; '.join(found)}" if found else "the gradient of the objective"
