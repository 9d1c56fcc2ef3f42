import itertools
import math
import statistics
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import one_hot

from llmrl.algorithms.config import GRPOConfig, PPOConfig
from llmrl.verify.claims import Terms, expected_gradient, reasons, terms_of, without_kl
from llmrl.verify.game import LENGTHS, RESPONSE_IDS, STATES, make_game, moved, probabilities, with_exact_critic

REINFORCE = "policy_gradient"
PLAIN = {"scale": "none", "aggregation": "constant"}
GAME = make_game(kl_coef=0.3)
SCORES_ALONE = make_game(kl_coef=0.0)
AWAY = replace(GAME, current=moved(GAME.sampler, by=0.5, seed=5), old=moved(GAME.sampler, by=0.3, seed=6))
"""Sampler, old and current actor differ, so that a baseline changes the expected gradient."""


def by_hand(game, weigh):
    """Gradient of -E[Σ_t weigh(prompt, response, t, ratio) log π_t] / 3, response by response and token by token."""
    likely, gradient = probabilities(game.sampler), torch.zeros_like(game.current)
    for n, y in itertools.product(range(2), range(15)):
        for t in range(int(LENGTHS[y])):
            state, token = int(STATES[y, t]), int(RESPONSE_IDS[y, t])
            chances, old = game.current[n, state].softmax(0), game.old[n, state].softmax(0)
            factor = likely[n, y] / 2 * weigh(n, y, t, float(chances[token] / old[token]))
            gradient[n, state] -= factor * (one_hot(torch.tensor(token), 3) - chances) / 3
    return gradient


def plain(**settings):
    """Terms of GRPO's settings, without a KL."""
    terms = terms_of(GRPOConfig(loss=REINFORCE, **PLAIN, **settings))
    assert terms is not None
    return without_kl(terms)


def others_of(game, n):
    """Every response to a prompt: probability, score and length."""
    return list(zip(probabilities(game.sampler)[n].tolist(), game.scores[n].tolist(), LENGTHS.tolist(), strict=True))


def behaviour(game, n, y, t):
    """Probability of a token by the old actor over that by the sampler."""
    state, token = int(STATES[y, t]), int(RESPONSE_IDS[y, t])
    return float(game.old[n, state].softmax(0)[token] / game.sampler[n, state].softmax(0)[token])


def price(game, n, y, t):
    """What the KL of a token costs."""
    state, token = int(STATES[y, t]), int(RESPONSE_IDS[y, t])
    return 0.3 * float((game.old[n, state].log_softmax(0) - game.reference[n, state].log_softmax(0))[token])


def test_scores_less_those_of_the_others_have_the_gradient_of_the_objective():
    terms = terms_of(GRPOConfig(group_size=2, baseline="leave_one_out", **PLAIN))
    assert terms is not None
    gradient = expected_gradient(terms, SCORES_ALONE).actor
    torch.testing.assert_close(gradient, -SCORES_ALONE.gradient() / 3)


def test_a_mean_with_the_own_score_in_it_takes_half_of_two():
    whole, others = (
        expected_gradient(Terms(baseline=baseline, aggregation="constant"), SCORES_ALONE).actor
        for baseline in ("mean", "leave_one_out")
    )
    torch.testing.assert_close(whole, others / 2)


@pytest.mark.parametrize("trace", [0.0, 0.5, 1.0])
def test_an_exact_critic_leaves_no_bias_at_any_lambda(trace):
    game = with_exact_critic(GAME)
    ours, truth = -expected_gradient(Terms(baseline="critic", trace=trace), game).actor, game.gradient()
    torch.testing.assert_close(ours * (truth.norm() / ours.norm()), truth)


def test_k3_alone_has_the_gradient_of_the_kl_in_the_other_direction():
    logits = GAME.current.clone().requires_grad_()
    reference = probabilities(GAME.reference)
    other = (reference * (reference.log() - probabilities(logits).log())).sum(1).mean()
    (forward,) = torch.autograd.grad(other, logits)
    with_kl = Terms(baseline="none", aggregation="constant", kl_form="k3_paper", policy_sign=0.0)
    ours = expected_gradient(with_kl, GAME).actor * 3 / 0.3
    first = (slice(None), 0)  # the first token: later states are reached by the policy here, by the reference there
    torch.testing.assert_close(ours[first], forward[first])


def test_k2_times_the_ratio_is_the_gradient_of_the_kl_of_each_state():
    logits = GAME.current.clone().requires_grad_()
    live, reference = (table.log_softmax(-1) for table in (logits, GAME.reference))
    (slope,) = torch.autograd.grad((live.exp() * (live - reference)).sum(-1)[:, 0].mean(), logits)
    ours = expected_gradient(Terms(baseline="none", aggregation="constant", kl_form="k2", policy_sign=0.0), GAME).actor
    torch.testing.assert_close(ours[:, 0] * 3 / 0.3, slope[:, 0])


def test_the_std_of_two_scores_leaves_only_their_order():
    likely, gradient = probabilities(SCORES_ALONE.sampler), torch.zeros(2, 3, dtype=torch.float64)
    for n, y, z in itertools.product(range(2), range(15), range(15)):
        sign = float((SCORES_ALONE.scores[n, y] - SCORES_ALONE.scores[n, z]).sign())
        score = one_hot(RESPONSE_IDS[y, 0], 3) - SCORES_ALONE.sampler[n, 0].softmax(0)
        gradient[n] -= likely[n, y] * likely[n, z] * sign * score / int(LENGTHS[y]) / 2
    ours = expected_gradient(Terms(baseline="mean", scale="std", aggregation="sequence"), SCORES_ALONE).actor
    torch.testing.assert_close(ours[:, 0], gradient, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("game", [GAME, AWAY])
def test_without_a_clip_each_token_counts_by_its_ratio(game):
    ours = expected_gradient(Terms(baseline="constant", baseline_value=0.7, aggregation="constant"), game).actor
    torch.testing.assert_close(ours, by_hand(game, lambda n, y, t, ratio: (game.scores[n, y] - 0.7) * ratio))


def test_cispo_bounds_the_weight_and_keeps_the_gradient():
    ratios = []

    def weigh(n, y, t, ratio):
        ratios.append(ratio)
        return AWAY.scores[n, y] * min(max(ratio, 0.9), 1.3)

    terms = Terms(baseline="none", aggregation="constant", loss="cispo", clip_low=0.1, clip_high=0.3)
    torch.testing.assert_close(expected_gradient(terms, AWAY).actor, by_hand(AWAY, weigh))
    assert min(ratios) < 0.9
    assert max(ratios) > 1.3


@pytest.mark.parametrize("credit", ["response", "token"])
def test_a_kl_in_the_rewards_is_paid_by_the_response_or_from_the_token_on(credit):
    def weigh(n, y, t, ratio):
        begin = t if credit == "token" else 0
        return AWAY.scores[n, y] * ratio - sum(price(AWAY, n, y, k) for k in range(begin, int(LENGTHS[y]))) * ratio

    terms = Terms(baseline="none", credit=credit, aggregation="constant", kl_form="k1_reward")
    torch.testing.assert_close(expected_gradient(terms, AWAY).actor, by_hand(AWAY, weigh))


@pytest.mark.parametrize(
    ("baseline", "credit"),
    [("none", "response"), ("none", "token"), ("constant", "token"), ("leave_one_out", "response")],
)
def test_a_kl_in_the_rewards_has_the_gradient_of_the_objective(baseline, credit):
    terms = Terms(baseline=baseline, baseline_value=2.0, credit=credit, aggregation="constant", kl_form="k1_reward")
    torch.testing.assert_close(expected_gradient(terms, GAME).actor, -GAME.gradient() / 3)
    assert reasons(terms, exact_critic=False) == []


def test_two_steps_are_two_rewards_and_the_value_after_them():
    def value(n, y, t):
        return float(AWAY.old_values[n, STATES[y, t]]) if t < int(LENGTHS[y]) else 0.0

    def advantage(n, y, t, ratio):
        length = int(LENGTHS[y])
        rewards = [float(AWAY.scores[n, y]) * (k == length - 1) - price(AWAY, n, y, k) for k in range(length)]
        second = 0.9 * rewards[t + 1] + 0.81 * value(n, y, t + 2) if t + 1 < length else 0.0
        return (rewards[t] + second - value(n, y, t)) * ratio

    terms = terms_of(PPOConfig(num_return_steps=2, gamma=0.9, scale="none", aggregation="constant", loss=REINFORCE))
    assert terms is not None
    torch.testing.assert_close(expected_gradient(terms, AWAY).actor, by_hand(AWAY, advantage))


@pytest.mark.parametrize(("num_steps", "gae_lambda"), [(1, 0.0), (3, 1.0), (9, 1.0)])
def test_one_step_is_lambda_0_and_all_of_them_are_lambda_1(num_steps, gae_lambda):
    steps, traces = terms_of(PPOConfig(num_return_steps=num_steps)), terms_of(PPOConfig(gae_lambda=gae_lambda))
    assert steps is not None
    assert traces is not None
    torch.testing.assert_close(expected_gradient(steps, AWAY).flat, expected_gradient(traces, AWAY).flat)


def test_standardizing_scales_the_gradient_and_no_more():
    plain, scaled = (expected_gradient(Terms(baseline="none", scale=scale), GAME).actor for scale in ("none", "batch"))
    torch.testing.assert_close(scaled * (plain.norm() / scaled.norm()), plain)
    share = probabilities(GAME.sampler) * LENGTHS
    mean = (share * GAME.scores).sum() / share.sum()
    std = ((share * (GAME.scores - mean) ** 2).sum() / share.sum()).sqrt()
    assert float(plain.norm() / scaled.norm()) == pytest.approx(float(std), rel=1e-6)


# --- siblings ---------------------------------------------------------------------------------------------------------


def test_a_mean_of_the_batch_is_that_of_the_response_to_the_other_prompt():
    def weigh(n, y, t, ratio):
        return ratio * sum(chance * (float(AWAY.scores[n, y]) - score) for chance, score, _ in others_of(AWAY, 1 - n))

    terms = plain(baseline="batch", group_size=1)
    torch.testing.assert_close(expected_gradient(terms, AWAY).actor, by_hand(AWAY, weigh))
    within = replace(terms, baseline="mean")
    torch.testing.assert_close(expected_gradient(within, AWAY).actor, by_hand(AWAY, weigh) / 2)


def test_a_baseline_in_time_is_of_the_responses_that_are_as_long():
    def weigh(n, y, t, ratio):
        as_long = [(chance, score) for chance, score, length in others_of(AWAY, 1 - n) if length > t]
        return ratio * sum(chance * (float(AWAY.scores[n, y]) - score) for chance, score in as_long)

    terms = plain(baseline="batch", credit="token", group_size=1)
    torch.testing.assert_close(expected_gradient(terms, AWAY).actor, by_hand(AWAY, weigh))


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_the_optimal_baseline_weighs_the_others_by_their_lengths(power):
    def baseline(n):
        pairs = itertools.product(others_of(AWAY, n), repeat=2)
        return sum(
            chance * other * (length**power * score + longer**power * better) / (length**power + longer**power)
            for (chance, score, length), (other, better, longer) in pairs
        )

    baselines = [baseline(n) for n in range(2)]
    terms = plain(baseline="optimal", group_size=3)
    ours = expected_gradient(replace(terms, length_power=power), AWAY).actor
    torch.testing.assert_close(ours, by_hand(AWAY, lambda n, y, t, ratio: (AWAY.scores[n, y] - baselines[n]) * ratio))


def test_a_baseline_by_lengths_is_exact_without_the_own_score_and_biased_with_it():
    optimal = Terms(baseline="leave_one_out", length_power=1.0, group_size=3, aggregation="constant")
    torch.testing.assert_close(expected_gradient(optimal, SCORES_ALONE).actor, -SCORES_ALONE.gradient() / 3)
    of_the_paper = expected_gradient(replace(optimal, baseline="mean"), SCORES_ALONE).actor
    truth = SCORES_ALONE.gradient()
    rest = of_the_paper - (of_the_paper * truth).sum() / truth.square().sum() * truth
    assert float(rest.norm() / of_the_paper.norm()) > 0.05


def test_three_responses_take_two_thirds_of_what_the_others_give():
    pairs, triples = (Terms(baseline="leave_one_out", group_size=num, aggregation="constant") for num in (2, 3))
    others = expected_gradient(pairs, AWAY).actor
    torch.testing.assert_close(expected_gradient(triples, AWAY).actor, others)
    torch.testing.assert_close(expected_gradient(replace(triples, baseline="mean"), AWAY).actor, others * 2 / 3)


@pytest.mark.parametrize(("scale", "of_sample"), [("std", False), ("sample std", True)])
def test_the_std_of_three_scores_is_theirs(scale, of_sample):
    gradient = torch.zeros(2, 3, dtype=torch.float64)
    for n in range(2):
        all_of_it, means = others_of(SCORES_ALONE, n), torch.zeros(15, dtype=torch.float64)
        for y, one, other in itertools.product(range(15), range(15), range(15)):
            three = [all_of_it[row][1] for row in (y, one, other)]
            spread = (statistics.stdev if of_sample else statistics.pstdev)(three)
            means[y] += all_of_it[one][0] * all_of_it[other][0] * (three[0] - sum(three) / 3) / (spread + 1e-6)
        for y, (chance, _, length) in enumerate(all_of_it):
            score = one_hot(RESPONSE_IDS[y, 0], 3) - SCORES_ALONE.sampler[n, 0].softmax(0)
            gradient[n] -= chance * means[y] * score / length / 2
    ours = expected_gradient(Terms(baseline="mean", scale=scale, group_size=3, aggregation="sequence"), SCORES_ALONE)
    torch.testing.assert_close(ours.actor[:, 0], gradient)


# --- responses of another policy --------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("importance", ["truncated", "masked"])
def test_importance_weights_are_those_of_the_old_actor_over_the_sampler(importance, level):
    beyond = []

    def weight(n, y, t):
        tokens = range(int(LENGTHS[y])) if level == "sequence" else [t]
        ratio = math.prod(behaviour(AWAY, n, y, k) for k in tokens)
        beyond.append(ratio > 1.2)
        if importance == "masked":
            return ratio if 1 / 1.2 <= ratio <= 1.2 else 0.0
        return min(ratio, 1.2)

    terms = plain(baseline="none", importance=importance, importance_level=level, importance_cap=1.2)
    ours = expected_gradient(terms, AWAY).actor
    wanted = by_hand(AWAY, lambda n, y, t, ratio: AWAY.scores[n, y] * ratio * weight(n, y, t))
    torch.testing.assert_close(ours, wanted)
    assert 0 < sum(beyond) < len(beyond)


def test_whole_importance_weights_have_the_gradient_of_the_objective_whoever_sampled():
    older = replace(SCORES_ALONE, old=AWAY.old, current=AWAY.old)
    uncorrected = Terms(baseline="leave_one_out", aggregation="constant")
    whole = replace(uncorrected, importance="truncated", importance_level="sequence")
    torch.testing.assert_close(expected_gradient(whole, older).actor, -older.gradient() / 3)
    gap = expected_gradient(uncorrected, older).actor + older.gradient() / 3
    assert float(gap.norm() / older.gradient().norm()) > 0.01


def test_v_trace_is_the_recursion_of_its_paper():
    def traced(n, y):
        length, following, corrected, advantages = int(LENGTHS[y]), 0.0, 0.0, []
        for t in reversed(range(length)):
            value, rho = float(AWAY.old_values[n, STATES[y, t]]), behaviour(AWAY, n, y, t)
            delta = float(AWAY.scores[n, y]) * (t == length - 1) - price(AWAY, n, y, t) + 0.9 * following - value
            advantages.insert(0, (delta + 0.9 * 0.5 * corrected) * min(rho, 1.2))
            corrected = min(rho, 1.2) * delta + 0.9 * 0.5 * min(rho, 1.0) * corrected
            following = value
            targets[n, y, t] = value + corrected
        return advantages

    targets = {}
    traces = {(n, y): traced(n, y) for n, y in itertools.product(range(2), range(15))}
    others = {"scale": "none", "aggregation": "constant", "loss": REINFORCE, "value_clip": None}
    terms = terms_of(PPOConfig(gamma=0.9, gae_lambda=0.5, importance="v_trace", importance_cap=1.2, **others))
    assert terms is not None
    ours = expected_gradient(terms, AWAY)
    torch.testing.assert_close(ours.actor, by_hand(AWAY, lambda n, y, t, ratio: traces[n, y][t] * ratio))
    of_values, likely = torch.zeros_like(AWAY.values), probabilities(AWAY.sampler)
    for (n, y, t), target in targets.items():
        state = STATES[y, t]
        of_values[n, state] += likely[n, y] * (AWAY.values[n, state] - target) / 2 / 3
    torch.testing.assert_close(ours.critic, of_values)


def test_without_another_policy_nothing_is_corrected():
    plain = PPOConfig(gae_lambda=0.5)
    corrected = replace(plain, importance="v_trace", importance_cap=1.2)
    ours, theirs = (expected_gradient(terms_of(config), GAME).flat for config in (corrected, plain))
    torch.testing.assert_close(ours, theirs)


# --- truncated responses, and scores that are shaped ------------------------------------------------------------------

TRUNCATED = [bool(length == 3 and ids[2] != 0) for ids, length in zip(RESPONSE_IDS, LENGTHS, strict=True)]


def test_masked_responses_are_not_counted():
    terms = plain(baseline="none", mask_truncated=True)
    share = float((probabilities(AWAY.sampler) * ~torch.tensor(TRUNCATED)).sum() / 2)
    wanted = by_hand(AWAY, lambda n, y, t, ratio: 0.0 if TRUNCATED[y] else AWAY.scores[n, y] * ratio / share)
    torch.testing.assert_close(expected_gradient(terms, AWAY).actor, wanted)
    assert 0.1 < share < 0.9


@pytest.mark.parametrize(
    ("settings", "shaped"),
    [
        ({"score_clip": 1.0}, lambda score, y: min(score, 1.0)),
        ({"missing_eos_penalty": 0.5}, lambda score, y: score - 0.5 * TRUNCATED[y]),
        ({"overlong_buffer_tokens": 2}, lambda score, y: score - {1: 0.0, 2: 0.5, 3: 1.0}[int(LENGTHS[y])]),
    ],
)
def test_scores_are_shaped_before_the_kl(settings, shaped):
    def advantage(n, y, t, ratio):
        to_go = shaped(float(AWAY.scores[n, y]), y) - sum(price(AWAY, n, y, k) for k in range(t, int(LENGTHS[y])))
        return (to_go - float(AWAY.old_values[n, STATES[y, t]])) * ratio

    terms = terms_of(PPOConfig(gae_lambda=1.0, scale="none", aggregation="constant", loss=REINFORCE, **settings))
    assert terms is not None
    torch.testing.assert_close(expected_gradient(terms, AWAY).actor, by_hand(AWAY, advantage))
    assert reasons(terms, exact_critic=False) == ["scores are clipped, or lose penalties"]


def test_a_truncated_response_has_the_value_after_it():
    def advantage(n, y, t, ratio):
        length = int(LENGTHS[y])
        end = float(AWAY.old_values[n, STATES[y, 3]]) if TRUNCATED[y] else float(AWAY.scores[n, y])
        to_go = end - sum(price(AWAY, n, y, k) for k in range(t, length))
        return (to_go - float(AWAY.old_values[n, STATES[y, t]])) * ratio

    settings = {"scale": "none", "aggregation": "constant", "loss": REINFORCE, "bootstrap_truncated": True}
    terms = terms_of(PPOConfig(gae_lambda=1.0, **settings))
    assert terms is not None
    torch.testing.assert_close(expected_gradient(terms, AWAY).actor, by_hand(AWAY, advantage))


def test_a_proximal_critic_is_drawn_to_its_old_values():
    plainly, held = (Terms(baseline="critic", value_proximal_coef=coef) for coef in (0.0, 0.5))
    away, share = replace(AWAY, values=moved(AWAY.values, by=0.3, seed=8)), torch.zeros_like(AWAY.values)
    for n, y in itertools.product(range(2), range(15)):
        for t in range(int(LENGTHS[y])):
            share[n, STATES[y, t]] += probabilities(AWAY.sampler)[n, y]
    pull = 0.5 * share / share.sum() * (away.values - away.old_values)
    ours, theirs = (expected_gradient(terms, away).critic for terms in (held, plainly))
    torch.testing.assert_close(ours - theirs, pull)


@pytest.mark.parametrize("importance", ["none", "truncated"])
def test_a_penalized_step_has_the_gradient_of_its_kl(importance):
    logits = AWAY.current.clone().requires_grad_()
    away = replace(AWAY, sampler=AWAY.old) if importance == "none" else AWAY  # the tokens of the old actor, or weights
    old, live = away.old.log_softmax(-1), logits.log_softmax(-1)
    (slope,) = torch.autograd.grad((old.exp() * (old - live)).sum(-1)[:, 0].mean(), logits)
    terms = Terms(baseline="none", aggregation="constant", policy_sign=0.0, step_kl_coef=1.0, importance=importance)
    torch.testing.assert_close(expected_gradient(terms, away).actor[:, 0] * 3, slope[:, 0])


# --- settings ---------------------------------------------------------------------------------------------------------


def test_settings_without_a_formula_make_no_claim():
    assert terms_of(GRPOConfig(baseline="batch", scale="none")) is None
    assert terms_of(GRPOConfig(baseline="batch", scale="batch", group_size=1)) is None
    assert terms_of(GRPOConfig(credit="turn", group_size=2)) is None
    assert terms_of(GRPOConfig(group_size=4)) is None
    assert terms_of(GRPOConfig(group_size=2, baseline="mine.py:baseline", scale="none")) is None
    assert terms_of(PPOConfig(normalize_scores=True)) is None


def test_settings_become_terms():
    terms = terms_of(PPOConfig(gamma=0.9, gae_lambda=0.5, value_lambda=1.0, value_clip=None))
    assert terms is not None
    assert (terms.trace, terms.value_trace, terms.value_clip) == (0.45, 0.9, float("inf"))


def test_a_loss_has_the_clips_that_it_reads():
    def clips(**settings):
        terms = terms_of(GRPOConfig(group_size=2, clip_low=0.1, clip_high=0.3, dual_clip=3.0, **settings))
        assert terms is not None
        return terms.loss, terms.clip_low, terms.clip_high, terms.dual_clip

    infinite = float("inf")
    assert clips() == ("clipped", 0.1, 0.3, 3.0)
    assert clips(loss="cispo") == ("cispo", 0.1, 0.3, infinite)
    assert clips(loss=REINFORCE) == ("clipped", infinite, infinite, infinite)


def test_steps_are_of_the_targets_too_unless_these_have_a_lambda():
    both, one = (terms_of(PPOConfig(num_return_steps=2, value_lambda=lam)) for lam in (None, 0.5))
    assert both is not None
    assert one is not None
    assert (both.trace, both.num_steps, both.value_trace, both.value_num_steps) == (1.0, 2, 1.0, 2)
    assert (one.trace, one.num_steps, one.value_trace, one.value_num_steps) == (1.0, 2, 0.5, 3)


def test_reasons_are_those_of_the_terms():
    assert reasons(Terms(baseline="leave_one_out", kl_form="k1_reward"), exact_critic=False) == []
    with_kl = Terms(baseline="leave_one_out", kl_form="k2")
    assert reasons(with_kl, exact_critic=False) == ["a token does not answer for the KL of later ones"]
    assert reasons(without_kl(with_kl), exact_critic=False) == ["it has no KL"]
    assert reasons(Terms(baseline="critic", trace=0.5), exact_critic=True) == []
    assert reasons(Terms(baseline="critic", trace=0.5), exact_critic=False) != []
    assert reasons(Terms(baseline="critic", num_steps=2), exact_critic=True) == []
    assert reasons(Terms(baseline="critic", num_steps=2), exact_critic=False) != []
    assert reasons(Terms(baseline="mean", kl_form="k1_reward"), exact_critic=False) == []
