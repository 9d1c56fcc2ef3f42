"""What PPO learns from a rollout and its losses, by hand and by definition; `test_ppo_update.py` has a whole update.

Where gamma is 0, a return is nothing but the token's own reward, and so shows how rewards are shaped. Where gamma and
lambda are 1, it is the sum of all rewards from the token on.
"""

import json
import math
import statistics
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from llmrl.algorithms.config import PPOConfig
from llmrl.batches import Rollout, Scores, Sequences, StopReason, TokenOutputs
from llmrl.functional.aggregation import Aggregation
from llmrl.functional.losses import token_weights
from llmrl.functional.statistics import Mean
from llmrl.metrics import Metrics
from tests import oracles

from .tabular import make_ppo

LENGTHS = [3, 1, 4, 2]
LIMIT = 4
NAN = math.nan


class FixedNetworks:
    """`ActorCritic` whose outputs are given, row by row: the prompt says which row it is."""

    def __init__(self, logprobs, values=None, *, last_values=None, entropy=None, share_trunk=False):
        self.tables = {
            "logprobs": logprobs,
            "entropy": torch.full_like(logprobs, 1.25) if entropy is None else entropy,
            "values": torch.zeros_like(logprobs) if values is None else values,
            "last_values": torch.zeros(len(logprobs)) if last_values is None else last_values,
        }
        self.share_trunk = share_trunk
        self.asked = []

    def _look_up(self, question, names, sequences):
        self.asked.append(question)
        return TokenOutputs(named={name: self.tables[name][sequences.prompt_ids[:, 0]] for name in names})

    def logprobs(self, sequences):
        return self._look_up("logprobs", ("logprobs", "entropy"), sequences)

    def values(self, sequences):
        return self._look_up("values", ("values", "last_values"), sequences)

    def both(self, sequences):
        return self._look_up("both", self.tables, sequences)


def mask_of(lengths=LENGTHS):
    return torch.arange(LIMIT) < torch.tensor(lengths)[:, None]


def make_rollout(*, lengths=LENGTHS, mask=None, finished=None, rollout_logprobs=None):
    mask = mask_of(lengths) if mask is None else mask
    ended = torch.tensor([True] * len(lengths) if finished is None else finished)
    prompts = torch.arange(len(lengths))[:, None]
    return Rollout(
        sequences=Sequences.from_rows(
            prompt_ids=prompts,
            prompt_mask=torch.ones_like(prompts, dtype=torch.bool),
            response_ids=torch.where(mask, 5, 0),
            response_mask=mask,
            response_lengths=torch.tensor(lengths),
        ),
        rollout_logprobs=torch.zeros(mask.shape) if rollout_logprobs is None else rollout_logprobs,
        stop_reason=torch.where(ended, StopReason.EOS, StopReason.LENGTH),
        group_ids=prompts[:, 0],
        rows=tuple({"number": number} for number in range(len(lengths))),
    )


def make_scores(total, per_token=None):
    total = torch.tensor(total)
    per_token = torch.zeros(len(total), LIMIT) if per_token is None else per_token
    return Scores(total=total, per_token=per_token, parts={})


def random_table(seed, *, fill=NAN, scale=1.0):
    """Numbers with NaN outside the mask, where nothing may look."""
    table = scale * torch.randn(len(LENGTHS), LIMIT, generator=torch.Generator().manual_seed(seed))
    return table.masked_fill(~mask_of(), fill)


OLD, NEW, REF = (random_table(seed) - 2.0 for seed in (0, 1, 2))
OLD_VALUES, NEW_VALUES = random_table(3), random_table(4)
SCORES = [1.0, -0.5, 2.0, 0.25]
ZEROS = torch.zeros(len(LENGTHS), LIMIT)


def collect(settings, scores=SCORES, *, kl=ZEROS, values=None, last_values=None, per_token=None, **rollout):
    """``(experience, metrics)`` with so many nats at each token."""
    ppo = make_ppo(
        PPOConfig(**settings),
        FixedNetworks(OLD, values, last_values=last_values),
        reference=FixedNetworks(OLD - kl),
        max_response_tokens=LIMIT,
    )
    return ppo.experience(make_rollout(**rollout), make_scores(scores, per_token))


def rewards_of(settings, scores=SCORES, **inputs):
    """What each token earned."""
    return collect({"gamma": 0.0, **settings}, scores, **inputs)[0].returns


def final(*scores):
    """Rewards that are all at the last tokens."""
    rewards = torch.zeros(len(LENGTHS), LIMIT)
    for row, (length, score) in enumerate(zip(LENGTHS, scores, strict=True)):
        rewards[row, length - 1] = score
    return rewards


# --- settings ---------------------------------------------------------------------------------------------------------


def test_ppo_compares_with_a_critic_and_not_with_siblings():
    assert PPOConfig().group_size == 1
    ppo = make_ppo(PPOConfig(aggregation="sequence"), FixedNetworks(OLD), max_response_tokens=LIMIT)
    assert (ppo.max_redraws, ppo.aggregation, ppo.max_response_tokens) == (0, "sequence", LIMIT)


# --- rewards ----------------------------------------------------------------------------------------------------------


def test_the_score_lands_on_the_last_token_and_every_nat_has_its_price():
    kl = torch.tensor([[0.5, -1.0, 2.0, 9.0], [0.25, 9.0, 9.0, 9.0], [0.0, 1.0, 0.0, -2.0], [4.0, 4.0, 9.0, 9.0]])
    expected = [[-0.05, 0.1, 1.0 - 0.2, 0], [-0.5 - 0.025, 0, 0, 0], [0, -0.1, 0, 2.0 + 0.2], [-0.4, 0.25 - 0.4, 0, 0]]
    assert_close(rewards_of({"kl_coef": 0.1}, kl=kl), torch.tensor(expected))
    assert_close(rewards_of({"kl_coef": 0.1}), final(*SCORES))


def test_tool_output_is_stepped_over():
    """Of four tokens the actor chose the first and the third: the score is the third's, whatever follows it."""
    mask = torch.tensor([[True, False, True, False]])
    rollout = make_rollout(lengths=[4], mask=mask)
    values = torch.tensor([[0.5, NAN, 0.25, NAN]])
    nats = torch.tensor([[1.0, NAN, 2.0, NAN]])
    ppo = make_ppo(
        PPOConfig(kl_coef=0.1, gamma=0.5, gae_lambda=1.0),
        FixedNetworks(OLD[2:3], values),
        reference=FixedNetworks(OLD[2:3] - nats),
        max_response_tokens=LIMIT,
    )
    experience, metrics = ppo.experience(rollout, make_scores([3.0]))
    assert_close(experience.returns, torch.tensor([[-0.1 + 0.5 * 2.8, 0.0, 2.8, 0.0]]))
    assert metrics.values()["kl/sequence"] == pytest.approx(3.0)
    assert metrics.values()["kl/mean"] == pytest.approx(1.5)


def test_without_a_reference_nothing_is_paid():
    ppo = make_ppo(PPOConfig(kl_coef=0.0, gamma=0.0), FixedNetworks(OLD), max_response_tokens=LIMIT)
    experience, metrics = ppo.experience(make_rollout(), make_scores(SCORES))
    assert_close(experience.returns, final(*SCORES))
    assert not any(name.startswith("kl/") for name in metrics.values())


def test_rewards_of_tokens_are_added_after_all_shaping():
    """They are neither clipped nor normalized, and a response keeps them when it was cut."""
    per_token = torch.tensor([[5.0, 0.0, 7.0, NAN], [0.5, NAN, NAN, NAN], [0.0, -6.0, 0.0, 0.0], [1.0, 2.0, NAN, NAN]])
    settings = {"kl_coef": 0.1, "score_clip": 1.0, "missing_eos_penalty": 3.0}
    kl = torch.full((4, LIMIT), 0.5)
    finished = [False, True, True, True]
    rewards = rewards_of(settings, per_token=per_token, kl=kl, finished=finished)
    expected = final(1.0 - 3.0, -0.5, 1.0, 0.25) - 0.05 + torch.where(mask_of(), per_token, 0.0)
    assert_close(rewards, torch.where(mask_of(), expected, 0.0))


def test_scores_are_clipped_on_both_sides():
    rewards = rewards_of({"kl_coef": 0.0, "score_clip": 0.75}, [1.0, -0.5, -2.0, 0.75])
    assert_close(rewards, final(0.75, -0.5, -0.75, 0.75))


def test_a_missing_end_costs_its_penalty():
    rewards = rewards_of({"missing_eos_penalty": 0.75}, finished=[True, False, True, False])
    assert_close(rewards, final(1.0, -0.5 - 0.75, 2.0, 0.25 - 0.75))
    assert_close(rewards_of({}, finished=[True, False, True, False]), final(*SCORES))  # and by default nothing


def test_the_overlong_penalty_grows_to_one_point_at_the_limit():
    # a buffer of 3 before the limit of 4: none up to 1 token, a third at 2, two thirds at 3
    rewards = rewards_of({"overlong_buffer_tokens": 3})
    assert_close(rewards, final(1.0 - 2 / 3, -0.5, 2.0 - 1.0, 0.25 - 1 / 3))


def test_running_normalization_over_two_rollouts():
    """Mean and spread are of all scores so far, those of the rollout itself included."""
    ppo = make_ppo(PPOConfig(gamma=0.0, normalize_scores=True), FixedNetworks(OLD), max_response_tokens=LIMIT)
    first, _ = ppo.experience(make_rollout(), make_scores([1.0, 2.0, 3.0, 6.0]))
    std = math.sqrt(14 / 4)  # mean 3, deviations -2 -1 0 3
    assert_close(first.returns, final(-2 / std, -1 / std, 0.0, 3 / std))
    assert ppo.state_dict()["score_moments"] == [4.0, 12.0, 50.0]
    second, _ = ppo.experience(make_rollout(), make_scores([0.0, 0.0, 0.0, -4.0]))
    std = math.sqrt((1 + 4 + 9 + 36 + 16) / 8 - 1)  # mean 8 / 8
    assert_close(second.returns, final(-1 / std, -1 / std, -1 / std, -5 / std))
    assert ppo.state_dict()["score_moments"] == [8.0, 8.0, 66.0]


def normalized(*batches):
    """``(PPO, returns and metrics of each batch)``: scores normalized over several rollouts."""
    ppo = make_ppo(PPOConfig(gamma=0.0, normalize_scores=True), FixedNetworks(OLD), max_response_tokens=LIMIT)
    told = []
    for scores in batches:
        experience, metrics = ppo.experience(make_rollout(), make_scores(scores))
        told.append((experience.returns.sum(dim=1), metrics.values()))
    return ppo, told


@pytest.mark.parametrize("huge", [1e30, -1e30, 1e38, 1e5])
@pytest.mark.parametrize("num_before", [0, 20])
def test_one_extreme_score_flattens_nothing(huge, num_before):
    """The scores of later rollouts are normalized as if it had been an ordinary one."""
    healthy = [0.0, 1.0, 1.0, 0.0]
    before, after = [healthy] * num_before, [healthy] * 60
    ppo, told = normalized(*before, [0.0, 1.0, 1.0, huge], *after)
    assert all(map(math.isfinite, ppo.state_dict()["score_moments"]))
    returns, metrics = told[num_before]
    assert metrics["score/extreme"] == 1.0
    assert metrics["score/extreme_size"] == pytest.approx(abs(huge))
    assert returns.isfinite().all()
    assert returns.abs().argmax() == 3
    assert (returns[1] - returns[0]).item() > 0.05
    gaps = [(returns[1] - returns[0]).item() for returns, _ in told]
    assert gaps[-1] > 1.4  # 2 without the extreme one
    assert num_before == 0 or min(gaps) > 1.0
    assert not any("score/extreme" in metrics for _, metrics in [*told[:num_before], *told[num_before + 1 :]])


def test_extreme_scores_keep_their_order():
    _, told = normalized(*[[0.0, 1.0, 0.5, 0.0]] * 5, [1.0, 900.0, 1e6, 1e30])
    returns, metrics = told[-1]
    assert metrics["score/extreme"] == 2.0
    assert returns[0] < returns[1] < returns[2] == returns[3]


def test_where_extremes_are_frequent_the_scale_follows():
    """A reward of 0 or 5000: after a few rollouts it is what scores are like."""
    _, told = normalized(*[[0.0, 0.0, 5000.0, 0.0]] * 60)
    assert "score/extreme" in told[0][1]
    assert not any("score/extreme" in metrics for _, metrics in told[5:])
    assert_close(told[-1][0], torch.tensor([-0.55, -0.55, 1.8, -0.55]), atol=0.1, rtol=0)


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_in_no_moments(bad):
    ppo, _ = normalized([1.0, 2.0, bad, 6.0])
    assert ppo.state_dict()["score_moments"] == [3.0, 9.0, 41.0]


def test_without_normalization_an_extreme_score_is_only_counted():
    experience, metrics = collect({"gamma": 0.0, "kl_coef": 0.0}, [0.0, 1.0, 1e30, 0.0])
    assert_close(experience.returns, final(0.0, 1.0, 1e30, 0.0))
    assert metrics.values()["score/extreme"] == 1.0
    assert "score/extreme" not in collect({"score_clip": 5.0}, [0.0, 1.0, 1e30, 0.0])[1].values()


def test_a_score_that_the_critic_stands_for_is_in_no_moments():
    settings = {"kl_coef": 0.0, "normalize_scores": True, "bootstrap_truncated": True}
    rewards = rewards_of(settings, [1.0, 3.0, 9.0, NAN], finished=[True, True, False, True])
    assert_close(rewards, final(-1.0, 1.0, 0.0, 0.0))  # mean 2, spread 1


def test_equal_scores_are_normalized_to_nothing():
    assert (rewards_of({"normalize_scores": True, "kl_coef": 0.0}, [0.9] * 4) == 0).all()


def test_the_order_is_clip_normalize_penalties_kl():
    """Each of the other orders gives other numbers: the clip acts before the moments, both penalties after them."""
    settings = {
        "kl_coef": 0.5,
        "score_clip": 2.0,
        "normalize_scores": True,
        "missing_eos_penalty": 4.0,
        "overlong_buffer_tokens": 2,
    }
    kl = torch.full((4, LIMIT), 0.1)
    finished = [True, True, False, True]
    # 0 -9 9 0 is clipped to 0 -2 2 0: mean 0, spread sqrt 2; lengths 3 1 4 2 lose 1/2 0 1 0
    rewards = rewards_of(settings, [0.0, -9.0, 9.0, 0.0], kl=kl, finished=finished)
    expected = final(-0.5, -math.sqrt(2), math.sqrt(2) - 4.0 - 1.0, 0.0) - 0.05
    assert_close(rewards, torch.where(mask_of(), expected, 0.0))


def test_what_is_clipped_off_is_in_no_moments():
    """Clipped at 4, scores have mean 2 and variance 5/2; of the scores themselves they are 13/4 and 195/16."""
    rewards = rewards_of({"score_clip": 4.0, "normalize_scores": True, "kl_coef": 0.0}, [0.0, 1.0, 3.0, 9.0])
    assert_close(rewards, final(*(x / math.sqrt(2.5) for x in (-2.0, -1.0, 1.0, 2.0))))


# --- advantages and returns -------------------------------------------------------------------------------------------


def test_returns_and_advantages_by_hand():
    """gamma and lambda 1: what is still to come, and that less the value; over all tokens mean 0 and spread 1."""
    values = torch.tensor([[0.5, 0.0, 1.0, NAN], [0.5, NAN, NAN, NAN], [1.0, 1.0, 1.0, 1.0], [0.25, -0.75, NAN, NAN]])
    kl = torch.tensor([[1.0, 2.0, 3.0, NAN], [0.0, NAN, NAN, NAN], [-1.0, 0.0, 0.0, 1.0], [0.0, 5.0, NAN, NAN]])
    experience, _ = collect({"kl_coef": 0.1, "gae_lambda": 1.0}, values=values, kl=kl)
    returns = [[0.4, 0.5, 0.7, 0.0], [-0.5, 0.0, 0.0, 0.0], [2.0, 1.9, 1.9, 1.9], [-0.25, -0.25, 0.0, 0.0]]
    assert_close(experience.returns, torch.tensor(returns))
    raw = torch.tensor([[-0.1, 0.5, -0.3, 0], [-1.0, 0, 0, 0], [1.0, 0.9, 0.9, 0.9], [-0.5, 0.5, 0, 0]])
    counted = raw[mask_of()].tolist()
    expected = (raw - statistics.fmean(counted)) / math.sqrt(statistics.pvariance(counted) + 1e-8)
    assert_close(experience.advantages, torch.where(mask_of(), expected, 0.0))
    assert_close(experience.old_values[mask_of()], values[mask_of()])
    assert_close(experience.old_logprobs[mask_of()], OLD[mask_of()], rtol=0, atol=0)


def as_lists(x):
    return torch.where(mask_of(), x, 0.0).tolist()


def double_sum(gae_lambda, *, gamma=0.9, bootstrap=(0.0,) * 4, scores=SCORES):
    rewards = final(*scores)
    values, mask = as_lists(OLD_VALUES), mask_of().tolist()
    advantages = oracles.gae_double_sum(
        rewards.tolist(), values, mask, list(bootstrap), gamma=gamma, gae_lambda=gae_lambda
    )
    return torch.tensor(advantages)


def standardized(advantages):
    counted = advantages[mask_of()].tolist()
    return torch.where(
        mask_of(), (advantages - statistics.fmean(counted)) / math.sqrt(statistics.pvariance(counted) + 1e-8), 0.0
    )


def test_both_lambdas_by_the_sums_of_the_paper():
    """Each gives the numbers of one `gae`: advantages of the one, targets of the other."""
    settings = {"gamma": 0.9, "gae_lambda": 0.5}
    advantages, old_values = standardized(double_sum(0.5)), torch.where(mask_of(), OLD_VALUES, 0.0)
    one, _ = collect(settings, values=OLD_VALUES)
    assert_close(one.advantages, advantages)
    assert_close(one.returns, double_sum(0.5) + old_values)
    for value_lambda in (0.0, 0.8, 1.0):
        two, _ = collect({**settings, "value_lambda": value_lambda}, values=OLD_VALUES)
        assert_close(two.advantages, advantages)
        assert_close(two.returns, double_sum(value_lambda) + old_values)


def test_a_cut_response_is_worth_what_the_critic_says_of_its_end():
    """In place of its score; those that ended by themselves keep theirs, and have no value behind the last token."""
    inputs = {"values": OLD_VALUES, "last_values": torch.tensor([10.0, 20.0, 30.0, 40.0])}
    settings = {"gamma": 0.9, "gae_lambda": 0.5, "overlong_buffer_tokens": 0}
    finished = [True, False, True, False]
    old_values = torch.where(mask_of(), OLD_VALUES, 0.0)
    on, _ = collect({**settings, "bootstrap_truncated": True}, finished=finished, **inputs)
    expected = double_sum(0.5, bootstrap=(0, 20.0, 0, 40.0), scores=(1.0, 0, 2.0, 0))
    assert_close(on.returns, expected + old_values)
    assert_close(on.advantages, standardized(expected))
    off, _ = collect(settings, finished=finished, **inputs)
    assert_close(off.returns, double_sum(0.5) + old_values)
    both, _ = collect({**settings, "bootstrap_truncated": True, "value_lambda": 1.0}, finished=finished, **inputs)
    expected = double_sum(1.0, bootstrap=(0, 20.0, 0, 40.0), scores=(1.0, 0, 2.0, 0))
    assert_close(both.returns, expected + old_values)


def test_a_cut_response_loses_nothing_but_its_score():
    """Rewards of tokens stay."""
    per_token = torch.full((4, LIMIT), 0.5)
    settings = {"kl_coef": 0.0, "bootstrap_truncated": True}
    rewards = rewards_of(settings, finished=[True, True, False, True], per_token=per_token)
    assert_close(rewards, torch.where(mask_of(), final(1.0, -0.5, 0.0, 0.25) + 0.5, 0.0))


def test_exact_values_leave_no_advantage():
    experience, _ = collect({"gae_lambda": 0.7}, [0.9] * 4, values=torch.full((4, LIMIT), 0.9))
    assert (experience.advantages == 0).all()
    assert_close(experience.returns, torch.where(mask_of(), torch.tensor(0.9), 0.0))


def poisoned(table, rows):
    table = table.clone()
    table[rows] = NAN
    return table


UNSCORED = [1.0, NAN, 2.0, 0.25]
EVERYTHING = {
    "kl_coef": 0.1,
    "kl_target": 1.0,
    "score_clip": 1.5,
    "normalize_scores": True,
    "missing_eos_penalty": 0.5,
    "overlong_buffer_tokens": 2,
    "entropy_coef": 0.1,
    "step_kl_target": 0.01,
}


def run_update(rows, scores, *, poison) -> Any:
    """An update on some of the four responses: experience, metrics, gradients and the state that it leaves."""
    index = torch.tensor(rows)
    tables = [OLD, random_table(5).exp(), OLD_VALUES]
    live = [NEW, random_table(6).exp(), NEW_VALUES]
    last, ref, sampled = random_table(7, fill=0.0)[:, 0], REF, OLD
    per_token = random_table(8)
    if poison:
        tables, live = ([poisoned(table, poison) for table in some] for some in (tables, live))
        last, ref, sampled, per_token = (poisoned(x, poison) for x in (last, ref, sampled, per_token))
    live = [table.clone().requires_grad_() for table in live]
    ppo = make_ppo(
        PPOConfig(**EVERYTHING),
        FixedNetworks(tables[0], tables[2], entropy=tables[1], last_values=last),
        reference=FixedNetworks(ref),
        max_response_tokens=LIMIT,
    )
    rollout = make_rollout(finished=[False, False, True, True], rollout_logprobs=sampled).select(index)
    experience, metrics = ppo.experience(rollout, make_scores(scores, per_token).select(index))
    ppo.networks = FixedNetworks(live[0], live[2], entropy=live[1])
    for _, loss, told in ppo.losses(experience, weights_of(experience)):
        loss.backward()
        metrics = metrics.merge(told)
    with torch.no_grad():
        metrics = metrics.merge(ppo.finish(experience))
    return experience, metrics.values(), [table.grad for table in live], ppo.state_dict()


def weights_of(experience, *, aggregation: Aggregation = "token", whole=None):
    mask = experience.counted if whole is None else whole
    return token_weights(
        experience.counted,
        aggregation=aggregation,
        num_tokens=mask.sum(),
        num_responses=mask.any(dim=1).sum(),
        max_response_tokens=LIMIT,
    )


def test_a_response_that_could_not_be_scored_is_as_if_it_had_not_been_drawn():
    """Whatever else is not known of it: losses, gradients, moments, counts and prices are those of the others alone."""
    ours, told, gradients, state = run_update([0, 1, 2, 3], UNSCORED, poison=[1])
    theirs, expected, only, kept = run_update([0, 2, 3], SCORES, poison=[])
    others = [0, 2, 3]
    counted = mask_of()[others]
    for name in ("advantages", "returns"):
        assert_close(getattr(ours, name)[others], getattr(theirs, name))
        assert (getattr(ours, name)[1] == 0).all()
    assert told.keys() == expected.keys()
    assert all(told[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-7) for name in told)
    assert state == {**kept, "kl": pytest.approx(kept["kl"]), "step_kl": pytest.approx(kept["step_kl"])}
    for gradient, theirs in zip(gradients, only, strict=True):
        assert_close(gradient[others][counted], theirs[others][counted])
        assert (gradient[1] == 0).all()
        assert gradient.isfinite().all()


def test_a_rollout_that_nothing_could_score_changes_nothing():
    experience, told, gradients, state = run_update([0, 1, 2, 3], [NAN] * 4, poison=[0, 1, 2, 3])
    assert (experience.advantages == 0).all()
    assert (experience.returns == 0).all()
    assert all((gradient == 0).all() for gradient in gradients)
    assert (told["policy/loss"], told["value/loss"]) == (0.0, 0.0)
    assert "kl/sequence" not in told  # a mean over nothing
    assert state["kl"] == {"coef": 0.1}
    assert state["step_kl"] == {"coef": 1.0}
    assert state["score_moments"] == [0.0, 0.0, 0.0]


# --- losses -----------------------------------------------------------------------------------------------------------


def make_experience(settings, *, scores=SCORES):
    """Of the old networks, with rewards that nothing but the scores make."""
    experience, _ = collect({"gamma": 0.9, **settings, "kl_coef": 0.0}, scores, values=OLD_VALUES)
    return experience


def losses_of(
    settings, *, share_trunk=False, new=NEW, values=NEW_VALUES, entropy=None, cut=((0, 1, 2, 3),), **more
) -> Any:
    """Names in the order of their losses, the sums of those over the microbatches, gradients and metrics."""
    experience = make_experience(settings)
    live = [table.clone().requires_grad_() for table in (new, ZEROS if entropy is None else entropy, values)]
    networks = FixedNetworks(live[0], live[2], entropy=live[1], share_trunk=share_trunk)
    config = PPOConfig(**settings)
    ppo = make_ppo(config, networks, max_response_tokens=LIMIT, **more)
    losses, metrics = {}, Metrics()
    for rows in cut:
        part = experience.select(torch.tensor(rows))
        weights = weights_of(part, aggregation=config.aggregation, whole=experience.counted)
        for name, loss, told in ppo.losses(part, weights):
            loss.backward()
            losses[name] = losses.get(name, 0.0) + loss.item()
            metrics = metrics.merge(told)
    return losses, [table.grad for table in live], metrics.values(), networks.asked


def policy_by_definition(settings, new=NEW):
    """The clipped surrogate as a loop over tokens."""
    config = PPOConfig(**settings)
    experience, mask, total = make_experience(settings), mask_of().tolist(), 0.0
    for row, length in enumerate(LENGTHS):
        for t in range(length):
            loss = oracles.clipped_policy_token(
                float(new[row, t]),
                float(OLD[row, t]),
                float(experience.advantages[row, t]),
                clip_low=config.clip_low,
                clip_high=config.clip_high,
                dual_clip=config.dual_clip,
            )
            weight = oracles.token_weight(mask, row, t, aggregation=config.aggregation, max_response_tokens=LIMIT)
            total += weight * loss
    return total


def value_by_definition(settings):
    config = PPOConfig(**settings)
    experience, mask, total = make_experience(settings), mask_of().tolist(), 0.0
    for row, length in enumerate(LENGTHS):
        for t in range(length):
            loss = oracles.clipped_value_token(
                float(NEW_VALUES[row, t]),
                float(OLD_VALUES[row, t]),
                float(experience.returns[row, t]),
                value_clip=config.value_clip,
            )
            weight = oracles.token_weight(mask, row, t, aggregation=config.aggregation, max_response_tokens=LIMIT)
            total += weight * loss
    return total


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"clip_low": 0.5, "clip_high": 0.1},
        {"dual_clip": 1.5},
        {"value_clip": None},
        {"value_clip": 1.0, "aggregation": "sequence"},
        {"aggregation": "constant"},
    ],
)
def test_the_losses_are_the_papers(settings):
    losses, (policy_gradient, _, value_gradient), told, _ = losses_of(settings)
    policy, value = policy_by_definition(settings), value_by_definition(settings)
    assert list(losses) == ["actor", "critic"]
    assert losses["actor"] == pytest.approx(policy, rel=1e-5)
    assert losses["critic"] == pytest.approx(value, rel=1e-5)
    assert (told["policy/loss"], told["value/loss"]) == (losses["actor"], losses["critic"])
    for gradient in (policy_gradient, value_gradient):
        assert (gradient != 0).any()
        assert (gradient[~mask_of()] == 0).all()


@pytest.mark.parametrize("settings", [{"entropy_coef": 0.1, "step_kl_target": 0.1}, {"aggregation": "sequence"}])
@pytest.mark.parametrize("cut", [((0, 1), (2, 3)), ((3,), (1, 0, 2))])
@pytest.mark.parametrize("share_trunk", [False, True])
def test_how_the_minibatch_is_cut_does_not_matter(settings, cut, share_trunk):
    entropy = random_table(5).exp()
    whole = losses_of(settings, entropy=entropy, share_trunk=share_trunk)
    parts = losses_of(settings, entropy=entropy, share_trunk=share_trunk, cut=cut)
    for ours, theirs in zip(parts[:3], whole[:3], strict=True):
        assert_close(ours, theirs)


def test_each_network_is_run_for_its_own_loss_and_the_actor_comes_first():
    losses, _, _, asked = losses_of({})
    assert list(losses) == ["actor", "critic"]
    assert asked == ["logprobs", "values"]


def test_the_critic_is_run_only_after_the_actor_has_been_run_backward():
    """Of two networks, only one holds activations at a time."""
    networks = FixedNetworks(NEW.clone().requires_grad_(), NEW_VALUES)
    experience = make_experience({})
    losses = make_ppo(PPOConfig(), networks, max_response_tokens=LIMIT).losses(experience, weights_of(experience))
    name, loss, _ = next(losses)
    assert (name, networks.asked) == ("actor", ["logprobs"])
    loss.backward()
    assert next(losses)[0] == "critic"
    assert networks.asked == ["logprobs", "values"]


def test_the_warm_up_trains_the_critic_alone():
    losses, (policy_gradient, _, value_gradient), told, asked = losses_of({}, warmup_iterations=1)
    assert list(losses) == ["critic"]
    assert asked == ["values"]
    assert policy_gradient is None
    assert (value_gradient != 0).any()
    assert "policy/loss" not in told
    assert losses["critic"] == pytest.approx(losses_of({})[0]["critic"])


def test_the_warm_up_ends():
    ppo = make_ppo(PPOConfig(), FixedNetworks(OLD), max_response_tokens=LIMIT, warmup_iterations=2)
    experience, names = make_experience({}), []
    for _ in range(3):
        names.append([name for name, _, _ in ppo.losses(experience, weights_of(experience))])
        ppo.finish(experience)
    assert names == [["critic"], ["critic"], ["actor", "critic"]]


def test_a_shared_trunk_has_one_loss_from_one_pass():
    apart, gradients, told, _ = losses_of({"entropy_coef": 0.1}, entropy=NEW.exp())
    losses, shared, said, asked = losses_of({"entropy_coef": 0.1}, entropy=NEW.exp(), share_trunk=True, value_coef=0.3)
    assert asked == ["both"]
    assert losses == {"actor": pytest.approx(apart["actor"] + 0.3 * apart["critic"])}
    assert_close(shared, [gradients[0], gradients[1], 0.3 * gradients[2]])
    assert said == pytest.approx(told)


def test_the_entropy_bonus_makes_uncertainty_cheap():
    """Its gradient is minus the coefficient over the number of tokens: the optimizer raises the entropy."""
    entropy = random_table(5).exp()
    without, _, _, _ = losses_of({}, entropy=entropy)
    losses, (_, gradient, _), _, _ = losses_of({"entropy_coef": 0.2}, entropy=entropy)
    bonus = 0.2 * float(entropy[mask_of()].mean())
    assert losses["actor"] == pytest.approx(without["actor"] - bonus, rel=1e-5)
    assert losses["critic"] == without["critic"]
    assert_close(gradient, torch.where(mask_of(), torch.tensor(-0.2 / sum(LENGTHS)), 0.0))


def test_the_entropy_bonus_is_weighted_like_the_loss():
    _, (_, gradient, _), _, _ = losses_of({"entropy_coef": 0.2, "aggregation": "sequence"}, entropy=NEW.exp())
    weights = [[-0.2 / 4 / length] * length + [0.0] * (LIMIT - length) for length in LENGTHS]
    assert_close(gradient, torch.tensor(weights))


def test_the_step_penalty_is_the_kl_from_old_to_new():
    """ρ - 1 - log ρ at each token, ρ = new over old: at ρ = 1 nothing, and its slope in log ρ is ρ - 1."""
    settings = {"step_kl_target": 0.01}
    without, (plain, _, _), _, _ = losses_of({})
    losses, (gradient, _, _), _, _ = losses_of(settings, step_kl_coef=0.7)
    total = 0.0
    for row, length in enumerate(LENGTHS):
        for t in range(length):
            log_ratio = float(NEW[row, t] - OLD[row, t])
            total += math.exp(log_ratio) - 1 - log_ratio
            slope = 0.7 * (math.exp(log_ratio) - 1) / sum(LENGTHS)
            assert float(gradient[row, t] - plain[row, t]) == pytest.approx(slope, rel=1e-4, abs=1e-6)
    assert losses["actor"] == pytest.approx(without["actor"] + 0.7 * total / sum(LENGTHS), rel=1e-5)
    here, _, _, _ = losses_of(settings, new=OLD, step_kl_coef=0.7)
    assert here["actor"] == pytest.approx(losses_of({}, new=OLD)[0]["actor"], abs=1e-7)


def test_the_step_penalty_on_tokens_of_another_policy_is_the_same_kl():
    """Every token of a vocabulary once, weighted by the policy μ that sampled: the expectation over what it draws."""
    generator = torch.Generator().manual_seed(0)
    old, new, sampled = torch.randn(3, 4, 1, generator=generator).log_softmax(dim=1)
    rollout = make_rollout(lengths=[1] * 4, mask=torch.ones(4, 1, dtype=torch.bool), rollout_logprobs=sampled)
    losses, told = [], []
    for target in (None, 0.01):
        config = PPOConfig(kl_coef=0.0, importance="truncated", importance_cap=100.0, step_kl_target=target)
        ppo = make_ppo(config, FixedNetworks(old), max_response_tokens=1, step_kl_coef=0.7)
        scores = Scores(total=torch.tensor(SCORES), per_token=torch.zeros(4, 1), parts={})
        experience, _ = ppo.experience(rollout, scores)
        ppo.networks = FixedNetworks(new)
        losses.append({name: float(loss) for name, loss, _ in ppo.losses(experience, sampled.exp())}["actor"])
        told.append(ppo.finish(experience).values())
    kl = float((old.exp() * (old - new)).sum())
    assert losses[1] - losses[0] == pytest.approx(0.7 * kl, rel=1e-4)
    ratio = (new - old).exp()
    mean = float(((old - sampled).exp() * (ratio - 1 - ratio.log())).mean())
    assert told[1]["policy/step_kl"] == pytest.approx(mean, rel=1e-4)


def test_old_numbers_are_frozen_while_the_networks_move():
    """Experience holds numbers, not networks: the second epoch learns from what the first did."""
    networks = FixedNetworks(OLD, OLD_VALUES)
    ppo = make_ppo(PPOConfig(kl_coef=0.0), networks, max_response_tokens=LIMIT)
    experience, _ = ppo.experience(make_rollout(), make_scores(SCORES))
    names = ("old_logprobs", "advantages", "old_values", "returns")
    before = {name: getattr(experience, name).clone() for name in names}
    for tables in ((OLD, OLD_VALUES), (NEW, NEW_VALUES)):
        networks.tables = {**networks.tables, "logprobs": tables[0], "values": tables[1]}
        told = Metrics()
        for _, _, metrics in ppo.losses(experience, weights_of(experience)):
            told = told.merge(metrics)
    for name, value in before.items():
        assert_close(getattr(experience, name), value, rtol=0, atol=0, equal_nan=True)
        assert not getattr(experience, name).requires_grad
    moved = (NEW - OLD)[mask_of()].double().exp()
    assert told.values()["policy/ratio_max_deviation"] == pytest.approx(float((moved - 1).abs().max()), rel=1e-5)


# --- a single optimizer step per rollout ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "network", "roles", "asked"),
    [
        ({"kl_coef": 0.0}, {}, {}, "values"),
        ({"kl_coef": 0.1}, {}, {"reference": FixedNetworks(REF)}, "both"),
        ({"kl_coef": 0.0}, {}, {"reference": FixedNetworks(REF)}, "both"),
        ({"kl_coef": 0.0, "step_kl_target": 0.01}, {}, {}, "both"),
        ({"kl_coef": 0.0}, {"share_trunk": True}, {}, "both"),
        ({"kl_coef": 0.0}, {}, {"warmup_iterations": 1}, "both"),
    ],
    ids=["nothing", "KL in the reward", "KL that is logged", "KL of the step", "one pass for both", "warm-up"],
)
def test_the_actor_is_asked_before_the_only_step_where_something_reads_it(settings, network, roles, asked):
    """Whatever is asked, the critic's numbers and the losses are the same, and the metrics have the same names."""

    def one_iteration(one_step):
        networks = FixedNetworks(OLD, OLD_VALUES, **network)
        ppo = make_ppo(PPOConfig(**settings), networks, max_response_tokens=LIMIT, one_step=one_step, **roles)
        experience, metrics = ppo.experience(make_rollout(), make_scores(SCORES))
        (question,) = networks.asked
        live = OLD.clone().requires_grad_()
        networks.tables = {**networks.tables, "logprobs": live, "values": NEW_VALUES.clone().requires_grad_()}
        learned = Metrics()
        for _, loss, of_loss in ppo.losses(experience, weights_of(experience)):
            loss.backward()
            learned = learned.merge(of_loss)
        with torch.no_grad():
            values = metrics.merge(learned.per_step()).merge(ppo.finish(experience)).values()
        return question, (experience.advantages, experience.returns, live.grad), values

    (question, ours, values), (plain, theirs, expected) = one_iteration(True), one_iteration(False)
    assert (question, plain) == (asked, "both")
    assert_close(ours, theirs, rtol=0, atol=0)
    assert values == pytest.approx(expected, rel=1e-6)
    assert "policy/entropy" in values


# --- what steers itself -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stop_kl", "total", "stops"), [(0.05, 0.6, True), (0.05, 0.4, False), (0.05, 0.5, False), (None, 1e9, False)]
)
def test_the_epochs_end_where_the_mean_kl_is_beyond_the_limit(stop_kl, total, stops):
    ppo = make_ppo(PPOConfig(stop_kl=stop_kl), FixedNetworks(OLD), max_response_tokens=LIMIT)
    assert ppo.should_stop(Metrics({"policy/approx_kl": Mean(torch.tensor(total), torch.tensor(10))})) is stops


def test_a_minibatch_without_an_actor_does_not_end_the_epochs():
    ppo = make_ppo(PPOConfig(stop_kl=0.05), FixedNetworks(OLD), max_response_tokens=LIMIT)
    assert not ppo.should_stop(Metrics())
    assert not ppo.should_stop(Metrics({"policy/approx_kl": Mean(torch.tensor(0.0), torch.tensor(0))}))


def step_kl(new=NEW):
    """Mean over tokens of ρ - 1 - log ρ."""
    log_ratio = (new - OLD)[mask_of()].double()
    return float((log_ratio.exp() - 1 - log_ratio).mean())


@pytest.mark.parametrize(("target", "factor"), [(0.001, 1.5), (None, 1.0), (1000.0, 1 / 1.5)])
def test_the_price_of_a_step_follows_how_far_the_updates_went(target, factor):
    config = PPOConfig(kl_coef=0.0, step_kl_target=step_kl() if target is None else target)
    networks = FixedNetworks(OLD)
    ppo = make_ppo(config, networks, max_response_tokens=LIMIT, step_kl_coef=0.6)
    experience, _ = ppo.experience(make_rollout(), make_scores(SCORES))
    ppo.networks = FixedNetworks(NEW)
    told = ppo.finish(experience).values()
    assert told == {"policy/step_kl": pytest.approx(step_kl(), rel=1e-5), "policy/step_kl_coef": 0.6}
    assert ppo.step_kl_control.coef == pytest.approx(0.6 * factor)


def test_without_a_step_target_finishing_measures_nothing():
    networks = FixedNetworks(OLD)
    ppo = make_ppo(PPOConfig(), networks, max_response_tokens=LIMIT)
    assert ppo.finish(make_experience({})).values() == {}
    assert networks.asked == []
    assert ppo.state_dict()["num_iterations"] == 1


def test_prices_wait_while_the_actor_does():
    """In the warm-up no step is taken, so there is none to be measured, and none that a price could change."""
    config = PPOConfig(step_kl_target=0.01, kl_target=1.0)
    reference = FixedNetworks(OLD)
    ppo = make_ppo(config, FixedNetworks(OLD), reference=reference, max_response_tokens=LIMIT, warmup_iterations=2)
    for _ in range(2):
        experience, metrics = ppo.experience(make_rollout(), make_scores(SCORES))
        assert metrics.values()["kl/coef"] == 0.05
        assert ppo.finish(experience).values() == {}
    assert (ppo.kl_control.coef, ppo.step_kl_control.coef) == (0.05, 1.0)
    experience, _ = ppo.experience(make_rollout(), make_scores(SCORES))
    ppo.finish(experience)
    assert ppo.kl_control.coef == pytest.approx(0.05 * (1 - 0.2 * 4 / 10_000), rel=1e-9)
    assert ppo.step_kl_control.coef == pytest.approx(1 / 1.5)


KL = torch.tensor([[1.0, 2.0, 3.0, 9.0], [-1.0, 9.0, 9.0, 9.0], [0.5, 0.5, 0.5, 0.5], [0.0, 1.0, 9.0, 9.0]])


def test_the_kl_is_summed_over_a_response_and_then_averaged():
    _, metrics = collect({"kl_coef": 0.1}, kl=KL)
    told = metrics.values()
    assert told["kl/sequence"] == pytest.approx((6.0 - 1.0 + 2.0 + 1.0) / 4, rel=1e-5)
    assert told["kl/mean"] == pytest.approx((6.0 - 1.0 + 2.0 + 1.0) / 10, rel=1e-5)


def test_the_price_of_a_nat_moves_after_it_was_paid():
    """kl/sequence is 2: a target of 1 is overshot, and by 4 responses of a horizon of 10 the price rises by 8 %."""
    config = PPOConfig(gamma=0.0, kl_coef=0.1, kl_target=1.0)
    ppo = make_ppo(config, FixedNetworks(OLD), reference=FixedNetworks(OLD - KL), max_response_tokens=LIMIT)
    ppo.kl_control.horizon = 10
    for price in (0.1, 0.1 * 1.08, 0.1 * 1.08**2):
        experience, metrics = ppo.experience(make_rollout(), make_scores(SCORES))
        assert metrics.values()["kl/coef"] == pytest.approx(price)
        assert float(experience.returns[0, 0]) == pytest.approx(-price * 1.0, rel=1e-5)
    assert ppo.state_dict()["kl"]["coef"] == pytest.approx(0.1 * 1.08**3)


def test_a_fixed_price_stays():
    _, metrics = collect({"kl_coef": 0.1}, kl=KL)
    assert metrics.values()["kl/coef"] == 0.1


# --- state ------------------------------------------------------------------------------------------------------------


def test_the_state_is_plain_numbers_and_comes_back():
    settings = {"normalize_scores": True, "kl_coef": 0.1, "kl_target": 1.0, "step_kl_target": 0.001}

    def make():
        networks = FixedNetworks(OLD, OLD_VALUES)
        reference = FixedNetworks(OLD - KL)
        return make_ppo(PPOConfig(**settings), networks, reference=reference, max_response_tokens=LIMIT)

    first, second = make(), make()
    experience, _ = first.experience(make_rollout(), make_scores(SCORES))
    first.networks = FixedNetworks(NEW, NEW_VALUES)
    first.finish(experience)
    state = first.state_dict()
    assert state == {
        "kl": {"coef": pytest.approx(0.1 * (1 + 0.2 * 4 / 10_000), rel=1e-9)},
        "step_kl": {"coef": 1.5},
        "score_moments": [4.0, 2.75, 5.3125],
        "num_iterations": 1,
    }
    second.load_state_dict(json.loads(json.dumps(state)))
    assert second.state_dict() == state
    second.networks = first.networks
    ours, theirs = (ppo.experience(make_rollout(), make_scores(SCORES))[0] for ppo in (second, first))
    assert_close(ours.returns, theirs.returns, rtol=0, atol=0)
    assert second.state_dict() == first.state_dict()


def test_a_run_that_is_continued_with_other_settings_takes_what_it_can_use():
    networks = FixedNetworks(OLD)
    first = make_ppo(PPOConfig(step_kl_target=0.1), networks, max_response_tokens=LIMIT)
    first.finish(make_experience({}))
    plain = make_ppo(PPOConfig(kl_coef=0.7), networks, max_response_tokens=LIMIT)
    state = plain.state_dict()
    plain.load_state_dict(first.state_dict())
    assert plain.state_dict() == {**state, "num_iterations": 1}  # a fixed price is what the settings say now
    first.load_state_dict(state)
    assert first.step_kl_control.coef == pytest.approx(1 / 1.5)


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_what_is_told_of_a_rollout():
    entropy, sampled = random_table(5).exp(), OLD + random_table(6, scale=0.1)
    ppo = make_ppo(
        PPOConfig(kl_coef=0.1, gamma=0.9),
        FixedNetworks(OLD, OLD_VALUES, entropy=entropy),
        reference=FixedNetworks(OLD - KL),
        max_response_tokens=LIMIT,
    )
    rollout, scores = make_rollout(rollout_logprobs=sampled), make_scores([*SCORES[:3], NAN])
    experience, metrics = ppo.experience(rollout, scores)
    counted = mask_of([3, 1, 4, 0])  # the last response could not be scored
    told = metrics.values()
    assert told["policy/entropy"] == pytest.approx(float(entropy[counted].mean()), rel=1e-5)
    assert told["policy/rollout_gap"] == pytest.approx(float((OLD - sampled)[counted].abs().mean()), rel=1e-4)
    values, returns = OLD_VALUES[counted].tolist(), experience.returns[counted].tolist()
    assert told["value/mean"] == pytest.approx(statistics.fmean(values), rel=1e-5)
    assert told["value/std"] == pytest.approx(statistics.pstdev(values), rel=1e-5)
    residuals = [target - value for target, value in zip(returns, values, strict=True)]
    explained = 1 - statistics.pvariance(residuals) / statistics.pvariance(returns)
    assert told["value/explained_variance"] == pytest.approx(explained, rel=1e-4)
    rewards = [1.0 - 0.6, -0.5 + 0.1, 2.0 - 0.2]
    assert told["reward/mean"] == pytest.approx(statistics.fmean(rewards), rel=1e-5)
    assert told["reward/std"] == pytest.approx(statistics.pstdev(rewards), rel=1e-5)
    assert told["kl/sequence"] == pytest.approx((6.0 - 1.0 + 2.0) / 3, rel=1e-5)


def test_a_critic_that_knows_everything_explains_everything_and_one_that_knows_nothing_nothing():
    settings = {"kl_coef": 0.0, "gamma": 0.0}
    for values, share in ((rewards_of(settings), 1.0), (torch.full((4, LIMIT), 0.3), 0.0)):
        _, metrics = collect(settings, values=values)
        assert metrics.values()["value/explained_variance"] == pytest.approx(share, abs=1e-6)


@pytest.mark.parametrize("score", [0.0, 1e-3, 0.1, 0.9, 3.7, 1e4])
def test_returns_that_do_not_vary_are_explained_by_nobody(score):
    """Their variance is rounding, and a share of it would be noise."""
    _, metrics = collect({"gae_lambda": 1.0}, [score] * 4, values=random_table(3))
    assert "value/explained_variance" not in metrics.values()


# --- truncated responses, and advantages in the metrics ---------------------------------------------------------------


def test_a_truncated_response_that_is_masked_is_as_if_it_could_not_be_scored():
    settings = {"kl_coef": 0.1, "kl_target": 3.0, "normalize_scores": True, "score_clip": 1.5}
    finished, kl = [True, False, True, False], random_table(8, scale=0.3)
    collected = [
        collect({**settings, "mask_truncated": True}, finished=finished, kl=kl, values=OLD_VALUES),
        collect(settings, [1.0, NAN, 2.0, NAN], finished=finished, kl=kl, values=OLD_VALUES),
    ]
    (masked, metrics), (unscored, theirs) = collected
    assert masked.counted.any(dim=1).tolist() == finished
    assert masked.counted.equal(unscored.counted)
    for name in ("advantages", "returns"):
        assert_close(getattr(masked, name), getattr(unscored, name), rtol=0, atol=0)
    assert metrics.values() == theirs.values()
    assert metrics.values()["kl/sequence"] == pytest.approx(sum(float(kl[i, : LENGTHS[i]].sum()) for i in (0, 2)) / 2)


def test_advantages_are_described_before_they_are_standardized():
    # gamma and lambda 1, values 0: each token's advantage is the score of its response
    _, metrics = collect({"gae_lambda": 1.0, "kl_coef": 0.0})
    told = [score for score, length in zip(SCORES, LENGTHS, strict=True) for _ in range(length)]
    values = metrics.values()
    assert values["advantage/mean"] == pytest.approx(statistics.fmean(told))
    assert values["advantage/std"] == pytest.approx(statistics.pstdev(told))
    assert (values["advantage/min"], values["advantage/max"]) == (-0.5, 2.0)
    assert values["advantage/positive_fraction"] == pytest.approx(9 / 10)
