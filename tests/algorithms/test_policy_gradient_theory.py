"""Expected gradients of the estimators, by enumeration of every rollout of a language model of two tokens.

Responses are "$", "a$" and "aa", where "$" is token 0 and ends one, so three of them make 27 rollouts, each with a
probability. The gradient that an algorithm takes in a rollout, weighted with that and summed, has to be

    ∇ Σ_y p(y) (score(y) - kl_coef log(p(y) / ref(y)))

or what is stated of its bias.
"""

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from llmrl.algorithms.config import GRPOConfig, PPOConfig
from llmrl.algorithms.grpo import GRPO
from llmrl.batches import Rollout, Scores, Sequences, StopReason
from llmrl.functional.losses import token_weights

from .tabular import Pair, TabularActor, TabularCritic, all_responses, make_ppo, state_of

LIMIT, NUM_TOKENS, NUM_DRAWN = 2, 2, 3
RESPONSES = all_responses(NUM_TOKENS, LIMIT)
SCORES = {(0,): 1.0, (1, 0): 3.5, (1, 1): 0.5}
PER_TOKEN = {(0,): (0.0, 0.0), (1, 0): (0.75, -0.5), (1, 1): (0.75, 0.25)}
"""Rewards of single tokens, beside the scores."""
ALIVE = slice(NUM_TOKENS, 2 * NUM_TOKENS)
"""The states before the second token: one row of logits for each first token."""


def logits_of(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((LIMIT + 1) * NUM_TOKENS, NUM_TOKENS, generator=generator, dtype=torch.float64)


def rollout_of(responses, *, grouped):
    """One rollout of these responses, to one prompt or to a prompt each."""
    ids = torch.tensor([response + (0,) * (LIMIT - len(response)) for response in responses])
    lengths = torch.tensor([len(response) for response in responses])
    prompts = torch.ones(len(responses), 1, dtype=torch.long)
    return Rollout(
        sequences=Sequences.from_rows(
            prompt_ids=prompts,
            prompt_mask=prompts.bool(),
            response_ids=ids,
            response_mask=torch.arange(LIMIT) < lengths[:, None],
            response_lengths=lengths,
        ),
        rollout_logprobs=torch.zeros(ids.shape),
        stop_reason=torch.full((len(responses),), StopReason.EOS),
        group_ids=torch.zeros(len(responses), dtype=torch.long) if grouped else torch.arange(len(responses)),
        rows=tuple({} for _ in responses),
    )


def scores_of(responses):
    total = torch.tensor([SCORES[response] for response in responses], dtype=torch.float64)
    per_token = torch.tensor([PER_TOKEN[response] for response in responses], dtype=torch.float64)
    return Scores(total=total, per_token=per_token, parts={})


def gradients(make, actor, *, grouped=False, num_drawn=NUM_DRAWN):
    """``(probabilities, gradients)`` of every rollout: that of the objective, so minus that of the loss."""
    probabilities, taken = [], []
    for responses in itertools.product(RESPONSES, repeat=num_drawn):
        algorithm = make()
        with torch.no_grad():
            experience, _ = algorithm.experience(rollout_of(responses, grouped=grouped), scores_of(responses))
        mask = experience.counted
        weights = token_weights(
            mask,
            aggregation="constant",
            num_tokens=mask.sum(),
            num_responses=len(responses),
            max_response_tokens=LIMIT,
        )
        _, loss, _ = next(iter(algorithm.losses(experience, weights.double())))
        (gradient,) = torch.autograd.grad(loss, actor.logits)
        probabilities.append(math.prod(map(actor.probability, responses)))
        taken.append(-LIMIT * gradient)
    return torch.tensor(probabilities, dtype=torch.float64), torch.stack(taken)


def expectation(probabilities, taken):
    return (probabilities[:, None, None] * taken).sum(dim=0)


def variance(probabilities, taken):
    """Summed over the logits."""
    return (probabilities[:, None, None] * (taken - expectation(probabilities, taken)) ** 2).sum().item()


def true_gradient(actor, reference=None, kl_coef=0.0):
    logits = actor.logits.detach().clone().requires_grad_()
    tables = [logits.log_softmax(dim=1), (actor if reference is None else reference).logits.detach().log_softmax(dim=1)]
    objective = torch.zeros((), dtype=torch.float64)
    for response in RESPONSES:
        live, ref = (
            sum(table[state_of(response[:t], NUM_TOKENS), token] for t, token in enumerate(response))
            for table in tables
        )
        score = SCORES[response] + sum(PER_TOKEN[response])
        objective = objective + live.exp() * (score - kl_coef * (live - ref))
    (gradient,) = torch.autograd.grad(objective, logits)
    return gradient


def make_grpo(actor, reference=None, **settings):
    config = GRPOConfig(**{"scale": "none", "loss": "policy_gradient", "aggregation": "constant", **settings})
    return lambda: GRPO(config, actor=actor, reference=reference, max_response_tokens=LIMIT)


SIBLINGS = {"group_size": NUM_DRAWN}
ALONE = {"group_size": 1}
UNBIASED = {
    "none": ALONE | {"baseline": "none"},
    "constant": ALONE | {"baseline": "constant", "baseline_value": 1.25},
    "batch mean": ALONE | {"baseline": "batch"},
    "rewards to go": ALONE | {"baseline": "none", "credit": "token"},
    "leave one out": SIBLINGS | {"baseline": "leave_one_out"},
    "optimal": SIBLINGS | {"baseline": "optimal"},
    "cispo": SIBLINGS | {"baseline": "leave_one_out", "loss": "cispo"},
    "clipped": SIBLINGS | {"baseline": "leave_one_out", "loss": "clipped"},
}


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
@pytest.mark.parametrize("name", UNBIASED)
def test_the_expected_gradient_is_that_of_the_objective(name, kl_coef):
    actor, reference = TabularActor(logits_of(0)), TabularActor(logits_of(1))
    settings = UNBIASED[name] | ({"kl_coef": kl_coef, "kl_form": "k1_reward"} if kl_coef else {})
    make = make_grpo(actor, reference if kl_coef else None, **settings)
    ours = expectation(*gradients(make, actor, grouped=settings["group_size"] > 1))
    assert_close(ours, true_gradient(actor, reference, kl_coef), rtol=1e-5, atol=1e-7)


def test_the_mean_of_the_whole_group_shortens_the_gradient():
    """A response is one of the G that it is compared with, so 1/G of its gradient is lost and its direction is not."""
    actor = TabularActor(logits_of(0))
    ours = expectation(*gradients(make_grpo(actor, **SIBLINGS), actor, grouped=True))
    assert_close(ours, true_gradient(actor) * (1 - 1 / NUM_DRAWN), rtol=1e-5, atol=1e-7)


def test_a_baseline_in_time_loses_the_tokens_that_no_other_response_reaches():
    """At the first token nothing; at the second the share of rollouts in which no other response has one."""
    actor = TabularActor(logits_of(0))
    make = make_grpo(actor, baseline="batch", credit="token", **ALONE)
    expected = true_gradient(actor)
    expected[ALIVE] *= 1 - actor.probability((0,)) ** (NUM_DRAWN - 1)
    assert_close(expectation(*gradients(make, actor)), expected, rtol=1e-5, atol=1e-7)


def test_the_order_of_variances_is_that_of_theory():
    """Where each token is as likely as the other, |∇ log p(y)|^2 is 1/2 for each token of y, and so the length is the
    weight of the optimal baseline: no constant has less variance, and the mean score has more."""
    actor = TabularActor(torch.zeros((LIMIT + 1) * NUM_TOKENS, NUM_TOKENS, dtype=torch.float64))
    probability = {y: actor.probability(y) for y in RESPONSES}
    scores = {y: SCORES[y] + sum(PER_TOKEN[y]) for y in RESPONSES}
    mean = sum(probability[y] * scores[y] for y in RESPONSES)
    optimal = sum(probability[y] * len(y) * scores[y] for y in RESPONSES) / sum(
        probability[y] * len(y) for y in RESPONSES
    )

    def variance_with(value):
        make = make_grpo(actor, baseline="constant", baseline_value=value, **ALONE)
        return variance(*gradients(make, actor, num_drawn=1))

    without = variance(*gradients(make_grpo(actor, baseline="none", **ALONE), actor, num_drawn=1))
    assert without == pytest.approx(variance_with(0.0))
    assert without > 1.5 * variance_with(mean)
    assert variance_with(mean) > 1.01 * variance_with(optimal)
    assert variance_with(optimal) < min(variance_with(optimal - 0.1), variance_with(optimal + 0.1))


def test_rewards_to_go_have_less_variance_than_the_whole():
    """What was paid before a token is noise for it."""
    actor = TabularActor(logits_of(0))
    whole, to_go = (
        variance(*gradients(make_grpo(actor, baseline="none", credit=credit, **ALONE), actor))
        for credit in ("response", "token")
    )
    assert to_go < whole


# --- with a critic ----------------------------------------------------------------------------------------------------


def make_critic(actor, noise):
    """The values of the actor's states, plus noise."""
    table = torch.zeros((LIMIT + 1) * NUM_TOKENS, dtype=torch.float64)
    for t in range(LIMIT):
        for prefix in {response[:t] for response in RESPONSES if len(response) > t}:
            going_on = [y for y in RESPONSES if y[:t] == prefix and len(y) > t]
            likely = [actor.probability(y) for y in going_on]
            to_go = [SCORES[y] + sum(PER_TOKEN[y][t:]) for y in going_on]
            table[state_of(prefix, NUM_TOKENS)] = sum(p * s for p, s in zip(likely, to_go, strict=True)) / sum(likely)
    generator = torch.Generator().manual_seed(7)
    table += noise * torch.randn(table.shape, generator=generator, dtype=torch.float64)
    return TabularCritic(table, num_tokens=NUM_TOKENS)


def with_critic(actor, noise, **settings):
    config = PPOConfig(scale="none", loss="policy_gradient", aggregation="constant", kl_coef=0.0, **settings)
    networks = Pair(actor, make_critic(actor, noise))
    return gradients(lambda: make_ppo(config, networks, max_response_tokens=LIMIT), actor, num_drawn=1)


@pytest.mark.parametrize(
    ("settings", "noise"),
    [
        ({"gae_lambda": 1.0}, 0.0),
        ({"gae_lambda": 1.0}, 1.0),  # any baseline will do
        ({"num_return_steps": LIMIT}, 1.0),
        ({"num_return_steps": 1}, 0.0),  # what is bootstrapped has to be right
        ({"gae_lambda": 0.5}, 0.0),
    ],
)
def test_a_value_baseline_leaves_the_expected_gradient_as_it_is(settings, noise):
    actor = TabularActor(logits_of(0))
    assert_close(expectation(*with_critic(actor, noise, **settings)), true_gradient(actor), rtol=1e-5, atol=1e-7)


def test_returns_of_few_steps_have_the_bias_of_the_critic():
    """r + V(next) - V in place of the rest: the expected gradient at the first token is off by E[∇ log p V's error]."""
    actor = TabularActor(logits_of(0))
    bias = expectation(*with_critic(actor, 1.0, num_return_steps=1)) - true_gradient(actor)
    error = (make_critic(actor, 1.0).table - make_critic(actor, 0.0).table).detach()[state_of((1,), NUM_TOKENS)]
    first = actor.logits.detach()[0].softmax(dim=0)
    expected = error * first[1] * (torch.tensor([0.0, 1.0], dtype=torch.float64) - first)
    assert_close(bias[0], expected, rtol=1e-5, atol=1e-7)
    assert_close(bias[1:], torch.zeros_like(bias[1:]), rtol=0, atol=1e-7)


def test_a_value_baseline_has_the_least_variance():
    actor = TabularActor(logits_of(0))
    values = variance(*with_critic(actor, 0.0, gae_lambda=1.0))
    none = variance(*gradients(make_grpo(actor, baseline="none", credit="token", **ALONE), actor, num_drawn=1))
    assert values < none / 2
