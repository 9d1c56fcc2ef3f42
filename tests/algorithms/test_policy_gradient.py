"""What PPO and GRPO share, against numbers worked out by hand."""

import math
from dataclasses import replace

import pytest
import torch

from llmrl.algorithms.config import GRPOConfig, PPOConfig
from llmrl.algorithms.grpo import GRPO
from llmrl.algorithms.policy_gradient import (
    add_entropy_bonus,
    advantage_metrics,
    kl_metrics,
    learned_responses,
    length_penalty,
    make_policy_loss,
    policy_metrics,
    routing_agreement,
)
from llmrl.algorithms.user_functions import UserLoss
from llmrl.batches import (
    Experience,
    GRPOExperience,
    Rollout,
    Scores,
    Sequences,
    StopReason,
    TokenOutputs,
)
from llmrl.metrics import Metrics

from . import tabular
from .test_grpo import make_rollout, make_scores


@pytest.mark.parametrize("config", [GRPOConfig, PPOConfig])
@pytest.mark.parametrize(
    ("ratio", "advantage", "bounded"), [(2.0, 1.0, 1.25), (0.5, -1.0, 0.9), (4.0, -1.0, 3.0), (0.95, -1.0, 0.95)]
)
def test_the_clips_are_those_of_the_settings(config, ratio, advantage, bounded):
    loss = make_policy_loss(config(clip_low=0.1, clip_high=0.25, dual_clip=3.0))
    logprobs, one = torch.tensor([[math.log(ratio)]]), torch.ones(1, 1)
    assert float(loss(logprobs, 0 * one, advantage * one, one)[0]) == pytest.approx(-advantage * bounded)


@pytest.mark.parametrize("config", [GRPOConfig, PPOConfig])
def test_a_loss_of_a_user_takes_the_place_of_ours(config, tmp_path):
    (tmp_path / "mine.py").write_text("def loss(logprobs, old_logprobs, advantages, weights): return logprobs.sum()")
    loss = make_policy_loss(config(loss=f"{tmp_path}/mine.py:loss"))
    assert isinstance(loss, UserLoss)
    x = torch.ones(2, 3, requires_grad=True)
    assert float(loss(x, x, x, x)[0].detach()) == 6.0


def test_the_penalty_grows_over_the_buffer_and_is_none_without_one():
    rollout = make_rollout([4, 3, 2, 1], [0, 0, 1, 1])
    assert length_penalty(rollout, limit=4, buffer=2).tolist() == [-1.0, -0.5, 0.0, 0.0]
    assert length_penalty(rollout, limit=4, buffer=0).tolist() == [0.0] * 4


def test_a_policy_is_measured_on_the_tokens_that_count():
    """Not on padding, whatever stands there, and not on a response that could not be scored."""
    rollout, scores = make_rollout([2, 4, 1], [0, 0, 0]), make_scores([1.0, math.nan, 0.0])
    tokens = torch.tensor([[0.5, 1.0, math.nan, math.nan], [9.0, 9.0, 9.0, 9.0], [-3.0, math.nan, 7.0, 7.0]])
    experience = Experience(rollout=rollout, scores=scores, old_logprobs=tokens, advantages=tokens)
    values = Metrics(policy_metrics(experience, 2 * tokens)).values()
    assert values == {"policy/entropy": pytest.approx(-1.0), "policy/rollout_gap": pytest.approx(1.5)}


def test_routes_are_compared_by_token_and_layer():
    """Of tokens that count: six pairs, four of which are the same."""
    rollout, scores = make_rollout([2, 3, 1], [0, 0, 0]), make_scores([1.0, math.nan, 0.0])
    sampled, again = torch.zeros(3, 4, 2).short(), torch.ones(3, 4, 2).short()
    sampled[0, :2], again[0, :2] = torch.tensor([[[1, 2], [3, 4]], [[1, 2], [3, 0]]])
    sampled[2, 0], again[2, 0] = torch.tensor([[7, 8], [7, 9]])
    again[1] = sampled[1]  # of a response that could not be scored
    tokens = torch.zeros(3, 4)
    experience = Experience(
        rollout=replace(rollout, routes=sampled), scores=scores, old_logprobs=tokens, advantages=tokens
    )
    outputs = TokenOutputs(named={"routes": again})
    assert Metrics(routing_agreement(experience, outputs)).values() == {"experts/agreement": pytest.approx(4 / 6)}
    assert routing_agreement(replace(experience, rollout=rollout), outputs) == {}
    assert routing_agreement(experience, TokenOutputs(named={})) == {}


def test_the_kl_is_per_token_and_per_response_that_counts():
    kl = torch.tensor([[0.5, 1.0], [math.nan, math.nan], [-0.25, math.nan]])
    mask = torch.tensor([[True, True], [False, False], [True, False]])
    assert Metrics({**kl_metrics(kl, mask)}).values() == {
        "kl/mean": pytest.approx(1.25 / 3),
        "kl/sequence": pytest.approx(1.25 / 2),
    }


@pytest.mark.parametrize("config", [GRPOConfig, PPOConfig])
def test_truncated_responses_are_left_out_where_that_is_asked_for(config):
    reasons = torch.tensor([StopReason.EOS, StopReason.LENGTH, StopReason.EOS] * 2)
    rollout = replace(make_rollout(), stop_reason=reasons)
    assert learned_responses(rollout, config()).tolist() == [True] * 6
    assert learned_responses(rollout, config(mask_truncated=True)).tolist() == [True, False, True] * 2


def test_the_entropy_bonus_is_aggregated_by_the_weights():
    entropy = torch.tensor([[0.5, 2.0, math.nan], [4.0, math.nan, math.nan]], requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    weights = torch.tensor([[0.1, 0.2, 0.0], [0.3, 0.0, 0.0]])
    loss = add_entropy_bonus(torch.tensor(7.0), entropy, weights, mask, coef=0.5)
    assert loss.item() == pytest.approx(7.0 - 0.5 * (0.1 * 0.5 + 0.2 * 2.0 + 0.3 * 4.0))
    loss.backward()
    assert entropy.grad.tolist() == (-0.5 * weights).tolist()
    same = torch.tensor(7.0)
    assert add_entropy_bonus(same, entropy, weights, mask, coef=0.0) is same


def test_advantages_are_described_over_the_tokens_that_count():
    advantages = torch.tensor([[1.0, -3.0, math.nan], [2.0, 0.0, 99.0]])
    mask = torch.tensor([[True, True, False], [True, True, False]])
    assert Metrics(advantage_metrics(advantages, mask)).values() == {
        "advantage/mean": 0.0,
        "advantage/std": pytest.approx((14 / 4) ** 0.5),
        "advantage/min": -3.0,
        "advantage/max": 2.0,
        "advantage/positive_fraction": 0.5,
    }
    assert advantage_metrics(advantages, mask & False) == {}


# --- responses of another policy --------------------------------------------------------------------------------------


def every_response(behaviour, actor):
    """Every response of two tokens at most, as an engine reports it that samples from `behaviour`."""
    responses = tabular.all_responses(3, 2)
    ids = torch.tensor([[*response, 0][:2] for response in responses])
    mask = torch.arange(2) < torch.tensor([[len(response)] for response in responses])
    sequences = Sequences.from_rows(
        prompt_ids=torch.ones(len(ids), 1).long(),
        prompt_mask=torch.ones(len(ids), 1).bool(),
        response_ids=ids,
        response_mask=mask,
        response_lengths=mask.sum(dim=1),
    )
    rollout = Rollout(
        sequences=sequences,
        rollout_logprobs=behaviour.logprobs(sequences).logprobs.detach(),
        stop_reason=torch.ones(len(ids)).long(),
        group_ids=torch.zeros(len(ids)).long(),
        rows=({},) * len(ids),
    )
    score = torch.linspace(-1.0, 2.0, len(ids))
    experience = GRPOExperience(
        rollout=rollout,
        scores=Scores(total=score, per_token=torch.zeros(mask.shape), parts={}),
        old_logprobs=actor.logprobs(sequences).logprobs.detach(),
        ref_logprobs=torch.zeros(mask.shape),
        advantages=score[:, None].expand(mask.shape),
        learned=torch.ones(len(ids)).bool(),
    )
    return experience, torch.tensor([behaviour.probability(response) for response in responses])


def expected_gradient(importance, level, cap):
    """The gradient of the loss in expectation over an engine of other logits; the ratios, scores and probabilities of
    whole responses; and the gradient of the log-probability of each."""
    logits = tabular.random_logits(3, 2)
    actor, behaviour = tabular.TabularActor(logits), tabular.TabularActor(logits + tabular.random_logits(3, 2, seed=1))
    experience, chance = every_response(behaviour, actor)
    config = GRPOConfig(importance=importance, importance_level=level, importance_cap=cap)
    grpo = GRPO(config, actor=actor, reference=None, max_response_tokens=2)
    weights = torch.where(experience.counted, chance[:, None].float(), 0.0)
    ((_, loss, _),) = grpo.losses(experience, weights)
    (gradient,) = torch.autograd.grad(loss, actor.logits)
    logprobs = actor.logprobs(experience.sequences).logprobs.sum(dim=1)
    scores_of = torch.stack([torch.autograd.grad(x, actor.logits, retain_graph=True)[0] for x in logprobs])
    ratio = logprobs.detach().double().exp() / chance
    return gradient, ratio, experience.scores.total, chance, scores_of


def test_whole_weights_of_an_engine_of_other_logits_give_the_gradient_without_bias():
    gradient, ratio, score, chance, of_response = expected_gradient("truncated", "sequence", 1e6)
    truth = -torch.einsum("b,bsv->sv", (ratio * chance * score).float(), of_response)
    torch.testing.assert_close(gradient, truth, rtol=1e-4, atol=1e-6)
    uncorrected, *_ = expected_gradient("none", "token", 2.0)
    assert (uncorrected - truth).abs().max() > 0.1


@pytest.mark.parametrize(
    ("importance", "weight"),
    [("truncated", lambda rho: min(rho, 1.5)), ("masked", lambda rho: rho if 1 / 1.5 <= rho <= 1.5 else 0.0)],
)
def test_the_bias_of_the_others_is_that_of_the_ratios_which_they_change(importance, weight):
    gradient, ratio, score, chance, of_response = expected_gradient(importance, "sequence", 1.5)
    weights = torch.tensor([weight(rho) for rho in ratio.tolist()])
    assert (weights != ratio).any()
    whole, *_ = expected_gradient("truncated", "sequence", 1e6)
    bias = -torch.einsum("b,bsv->sv", ((weights - ratio) * chance * score).float(), of_response)
    torch.testing.assert_close(gradient - whole, bias, rtol=1e-4, atol=1e-6)
    assert bias.abs().max() > 0.01


def test_the_kl_of_grpo_is_weighted_as_its_advantages_are():
    """Its gradient over the engine's responses is the one over the actor's own."""
    logits = tabular.random_logits(3, 2)
    actor, behaviour = tabular.TabularActor(logits), tabular.TabularActor(logits + tabular.random_logits(3, 2, seed=1))
    gradients = []
    for sampler, importance in ((behaviour, "truncated"), (actor, "none"), (behaviour, "none")):
        experience, chance = every_response(sampler, actor)
        config = GRPOConfig(importance=importance, importance_level="sequence", importance_cap=1e6, kl_coef=1.0)
        grpo = GRPO(config, actor=actor, reference=actor, max_response_tokens=2)
        batch = replace(experience, advantages=torch.zeros_like(experience.advantages))
        batch = replace(batch, ref_logprobs=torch.linspace(-3, -1, 2 * len(chance)).view(-1, 2))
        ((_, loss, _),) = grpo.losses(batch, torch.where(batch.counted, chance[:, None].float(), 0.0))
        gradients.append(torch.autograd.grad(loss, actor.logits)[0])
    corrected, own, uncorrected = gradients
    torch.testing.assert_close(corrected, own, rtol=1e-4, atol=1e-6)
    assert (uncorrected - own).abs().max() > 0.05
