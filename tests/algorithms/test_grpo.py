"""Each member of the family against its paper's formula, written here as slow loops over responses and tokens."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from llmrl.algorithms.config import GRPOConfig
from llmrl.algorithms.grpo import GRPO
from llmrl.batches import Episodes, Rollout, Scores, Sequences, StopReason, TokenOutputs
from llmrl.functional.logprobs import linear_token_logprobs
from llmrl.functional.losses import token_weights
from llmrl.metrics import Metrics
from tests import oracles

LENGTHS = [3, 1, 4, 2, 4, 3]  # two groups of three
GROUPS = [7, 7, 7, 4, 4, 4]
SCORES = [1.0, 0.0, 0.25, 0.0, 0.0, 2.0]
LIMIT = 4


class FixedPolicy:
    """A policy whose log-probabilities are given; with entropy 0."""

    def __init__(self, logprobs):
        self.table = logprobs

    def logprobs(self, sequences):
        return TokenOutputs(named={"logprobs": self.table, "entropy": torch.zeros_like(self.table)})


def mask_of(lengths):
    return torch.arange(LIMIT) < torch.tensor(lengths)[:, None]


def make_rollout(lengths=LENGTHS, groups=GROUPS):
    mask = mask_of(lengths)
    prompts = torch.ones(len(lengths), 2, dtype=torch.long)
    return Rollout(
        sequences=Sequences.from_rows(
            prompt_ids=prompts,
            prompt_mask=prompts.bool(),
            response_ids=torch.where(mask, 5, 0),
            response_mask=mask,
            response_lengths=torch.tensor(lengths),
        ),
        rollout_logprobs=torch.zeros(mask.shape),
        stop_reason=torch.full((len(lengths),), StopReason.EOS),
        group_ids=torch.tensor(groups),
        rows=tuple({"prompt": "p"} for _ in lengths),
    )


def make_scores(scores=SCORES):
    total = torch.tensor(scores)
    return Scores(total=total, per_token=torch.zeros(len(scores), LIMIT), parts={"correct": total})


def random_logprobs(seed):
    """Log-probabilities with NaN outside the mask, where nothing may look."""
    table = -torch.rand(len(LENGTHS), LIMIT, generator=torch.Generator().manual_seed(seed)) - 0.1
    return table.masked_fill(~mask_of(LENGTHS), math.nan)


OLD, NEW, REF = random_logprobs(0), random_logprobs(1), random_logprobs(2)


def loss_of(config, *, scores=SCORES, new=NEW, microbatches=((0, 1, 2, 3, 4, 5),)):
    """The loss of the whole minibatch and its gradient, summed over microbatches."""
    rollout = make_rollout()
    reference = FixedPolicy(REF) if config.kl_coef else None
    old = GRPO(config, actor=FixedPolicy(OLD), reference=reference, max_response_tokens=LIMIT)
    experience, _ = old.experience(rollout, make_scores(scores))
    live = new.clone().requires_grad_()
    mask = experience.counted
    total = torch.zeros(())
    for rows in microbatches:
        index = torch.tensor(rows)
        part = experience.select(index)
        weights = token_weights(
            part.counted,
            aggregation=config.aggregation,
            num_tokens=mask.sum(),
            num_responses=mask.any(dim=1).sum(),
            max_response_tokens=LIMIT,
        )
        algorithm = GRPO(config, actor=FixedPolicy(live[index]), reference=reference, max_response_tokens=LIMIT)
        for name, loss, _ in algorithm.losses(part, weights):
            assert name == "actor"
            loss.backward()
            total = total + loss.detach()
    return total, live.grad


# --- the papers, as loops ---------------------------------------------------------------------------------------------


def groups():
    return [[i for i, g in enumerate(GROUPS) if g == group] for group in dict.fromkeys(GROUPS)]


def standardized(scores):
    advantages = [0.0] * len(scores)
    for members in groups():
        mean = sum(scores[i] for i in members) / len(members)
        std = math.sqrt(sum((scores[i] - mean) ** 2 for i in members) / len(members))
        for i in members:
            advantages[i] = (scores[i] - mean) / (std + 1e-6)
    return advantages


def centred(scores):
    return [s - sum(scores[j] for j in m) / len(m) for i, s in enumerate(scores) for m in groups() if i in m]


def without_self(scores):
    return [
        s - sum(scores[j] for j in m if j != i) / (len(m) - 1) for i, s in enumerate(scores) for m in groups() if i in m
    ]


def surrogate(new, i, t, advantage, low, high):
    ratio = torch.exp(new[i, t] - OLD[i, t])
    return torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def grpo_paper(new):
    """arXiv:2402.03300, eq. 3 and 4: mean over responses of the mean over tokens, minus β k3."""
    advantages, total = standardized(SCORES), torch.zeros(())
    for i, length in enumerate(LENGTHS):
        for t in range(length):
            k3 = torch.exp(REF[i, t] - new[i, t]) - (REF[i, t] - new[i, t]) - 1
            total = total + (surrogate(new, i, t, advantages[i], 0.2, 0.2) - 0.04 * k3) / length
    return -total / len(LENGTHS)


def dr_grpo_paper(new):
    """arXiv:2503.20783, section 3.2 and its listing: no division by the spread, a constant divides."""
    advantages, total = centred(SCORES), torch.zeros(())
    for i, length in enumerate(LENGTHS):
        for t in range(length):
            total = total + surrogate(new, i, t, advantages[i], 0.2, 0.2)
    return -total / (len(LENGTHS) * LIMIT)


def dapo_paper(new):
    """arXiv:2503.14476, eq. 8: one mean over all tokens, the upper clip wider."""
    shaped = [s + min(0.0, (LIMIT - 2 - n) / 2) for s, n in zip(SCORES, LENGTHS, strict=True)]
    advantages, total = standardized(shaped), torch.zeros(())
    for i, length in enumerate(LENGTHS):
        for t in range(length):
            total = total + surrogate(new, i, t, advantages[i], 0.2, 0.28)
    return -total / sum(LENGTHS)


def gspo_paper(new):
    """arXiv:2507.18071, eq. 5 and 7: one ratio for a response, the geometric mean of its tokens' ratios."""
    advantages, total = standardized(SCORES), torch.zeros(())
    for i, length in enumerate(LENGTHS):
        ratio = torch.exp(sum(new[i, t] - OLD[i, t] for t in range(length)) / length)
        clipped = ratio.clamp(1 - 0.05, 1 + 0.1)
        total = total + torch.minimum(ratio * advantages[i], clipped * advantages[i])
    return -total / len(LENGTHS)


def opo_paper(new):
    """arXiv:2505.23585, section 3: REINFORCE over the scores' mean weighted by lengths, here that of the others."""
    total = torch.zeros(())
    for members in groups():
        for i in members:
            others = [j for j in members if j != i]
            baseline = sum(LENGTHS[j] * SCORES[j] for j in others) / sum(LENGTHS[j] for j in others)
            for t in range(LENGTHS[i]):
                total = total + torch.exp(new[i, t] - OLD[i, t]) * (SCORES[i] - baseline)
    return -total / (len(LENGTHS) * LIMIT)


def cispo_paper(new):
    """arXiv:2506.13585, eq. 4 and 5: the clipped ratio weights log p, and has no gradient."""
    advantages, total = standardized(SCORES), torch.zeros(())
    for i, length in enumerate(LENGTHS):
        for t in range(length):
            total = total + torch.exp(new[i, t] - OLD[i, t]).detach().clamp(0.0, 1.3) * advantages[i] * new[i, t]
    return -total / sum(LENGTHS)


def over_the_batch(advantages):
    """Standardized over all tokens, where `advantages` has one for each."""
    flat = [a for row in advantages for a in row]
    mean = sum(flat) / len(flat)
    std = math.sqrt(sum((a - mean) ** 2 for a in flat) / len(flat) + 1e-8)
    return [[(a - mean) / std for a in row] for row in advantages]


def reinforce_plus_plus_paper(new):
    """arXiv:2501.03262: A_t = score - β Σ of k1 from t on, standardized over the batch; the clipped loss."""
    to_go = [
        [SCORES[i] - 0.1 * sum(float(OLD[i, u] - REF[i, u]) for u in range(t, n)) for t in range(n)]
        for i, n in enumerate(LENGTHS)
    ]
    advantages, total = over_the_batch(to_go), torch.zeros(())
    for i, length in enumerate(LENGTHS):
        for t in range(length):
            total = total + surrogate(new, i, t, advantages[i][t], 0.2, 0.2)
    return -total / sum(LENGTHS)


def reinforce_plus_plus_baseline_paper(new):
    """arXiv:2501.03262: the difference from the mean of the group, standardized over the batch; k2 in the loss."""
    advantages = over_the_batch([[a] * n for a, n in zip(centred(SCORES), LENGTHS, strict=True)])
    total = torch.zeros(())
    for i, length in enumerate(LENGTHS):
        for t in range(length):
            k2 = torch.exp(new[i, t] - OLD[i, t]).detach() * (new[i, t] - REF[i, t]) ** 2 / 2
            total = total + surrogate(new, i, t, advantages[i][t], 0.2, 0.2) - 0.1 * k2
    return -total / sum(LENGTHS)


def reinforce_paper(new, baseline):
    """Williams 1992, with a baseline for response i at token t."""
    total = torch.zeros(())
    for i, length in enumerate(LENGTHS):
        for t in range(length):
            total = total + torch.exp(new[i, t] - OLD[i, t]) * (SCORES[i] - baseline(i, t))
    return -total / (len(LENGTHS) * LIMIT)


def mean_of_others(i, t):
    """Of all responses but i, whatever their prompts, that have a token t; for the only one, its own score."""
    others = [SCORES[j] for j, n in enumerate(LENGTHS) if j != i and n > t]
    return sum(others) / len(others) if others else SCORES[i]


REINFORCE = {"group_size": 3, "scale": "none", "loss": "policy_gradient", "aggregation": "constant"}
FAMILY = {
    "REINFORCE": (GRPOConfig(**REINFORCE, baseline="none"), partial(reinforce_paper, baseline=lambda i, t: 0.0)),
    "REINFORCE, constant": (
        GRPOConfig(**REINFORCE, baseline="constant", baseline_value=0.75),
        partial(reinforce_paper, baseline=lambda i, t: 0.75),
    ),
    "REINFORCE, batch": (
        GRPOConfig(**REINFORCE, baseline="batch"),
        partial(reinforce_paper, baseline=lambda i, t: mean_of_others(i, 0)),
    ),
    "REINFORCE, time": (
        GRPOConfig(**REINFORCE, baseline="batch", credit="token"),
        partial(reinforce_paper, baseline=mean_of_others),
    ),
    "OPO": (GRPOConfig(**REINFORCE, baseline="optimal"), opo_paper),
    "CISPO": (GRPOConfig(group_size=3, loss="cispo", clip_low=1.0, clip_high=0.3), cispo_paper),
    "REINFORCE++": (
        GRPOConfig(group_size=3, baseline="none", credit="token", scale="batch", kl_coef=0.1, kl_form="k1_reward"),
        reinforce_plus_plus_paper,
    ),
    "REINFORCE++ baseline": (GRPOConfig(group_size=3, scale="batch", kl_coef=0.1), reinforce_plus_plus_baseline_paper),
    "GRPO": (
        GRPOConfig(group_size=3, aggregation="sequence", kl_coef=0.04, kl_form="k3_paper"),
        grpo_paper,
    ),
    "Dr. GRPO": (GRPOConfig(group_size=3, scale="none", aggregation="constant"), dr_grpo_paper),
    "DAPO": (GRPOConfig(group_size=3, clip_high=0.28, overlong_buffer_tokens=2), dapo_paper),
    "GSPO": (
        GRPOConfig(group_size=3, aggregation="sequence", ratio="sequence", clip_low=0.05, clip_high=0.1),
        gspo_paper,
    ),
}


@pytest.mark.parametrize("name", FAMILY)
def test_the_loss_and_its_gradient_are_the_papers(name):
    config, paper = FAMILY[name]
    live = NEW.clone().requires_grad_()
    expected = paper(live)
    expected.backward()
    loss, gradient = loss_of(config)
    assert_close(loss, expected.detach())
    mask = mask_of(LENGTHS)
    assert_close(gradient[mask], live.grad[mask])
    assert (gradient[~mask] == 0).all()


def test_rloo_is_reinforce_with_the_others_as_baseline():
    # at ratio 1 the gradient of log p of a whole response is weighted with its score minus the mean of the others
    config = GRPOConfig(group_size=3, baseline="leave_one_out", scale="none", aggregation="constant")
    _, gradient = loss_of(config, new=OLD)
    for i, length in enumerate(LENGTHS):
        for t in range(length):
            assert gradient[i, t].item() == pytest.approx(-without_self(SCORES)[i] / (len(LENGTHS) * LIMIT), abs=1e-7)


@pytest.mark.parametrize("name", FAMILY)
def test_how_the_minibatch_is_cut_does_not_matter(name):
    config, _ = FAMILY[name]
    whole = loss_of(config)
    for cut in [((0, 1, 2), (3, 4, 5)), ((5, 0), (2,), (4, 1, 3))]:
        assert_close(loss_of(config, microbatches=cut), whole)


def test_dual_clip_bounds_the_loss_of_a_bad_token_that_became_likely():
    # ratio e^3 with advantage A < 0: unbounded -A e^3, bounded -A * 2; the gradient there is cut
    new = OLD + 3.0
    config = GRPOConfig(group_size=3, scale="none", dual_clip=2.0)
    loss, gradient = loss_of(config, new=new)
    expected = sum(n * (-a * 1.2 if a > 0 else -a * 2.0) for n, a in zip(LENGTHS, centred(SCORES), strict=True)) / sum(
        LENGTHS
    )
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert (gradient == 0).all()
    unbounded, _ = loss_of(GRPOConfig(group_size=3, scale="none"), new=new)
    assert unbounded > loss


@pytest.mark.parametrize(("form", "slope"), [("k2", "ratio * d"), ("k3", "ratio * d")])
def test_kl_in_the_loss_has_the_gradient_ratio_times_log_ratio(form, slope):
    # a token pulls with ρ d, d = log p - log p_ref: ∇(ρ̄ d²/2) = ρ d ∇log p, and ∇(ρ (e^-d - 1 + d)) = ρ d ∇log p
    config = GRPOConfig(group_size=3, scale="none", kl_coef=0.5, kl_form=form)
    _, with_kl = loss_of(config, scores=[1.0] * 6)
    for i, length in enumerate(LENGTHS):
        for t in range(length):
            ratio, d = math.exp(NEW[i, t] - OLD[i, t]), float(NEW[i, t] - REF[i, t])
            assert with_kl[i, t].item() == pytest.approx(0.5 * ratio * d / sum(LENGTHS), rel=1e-4), slope


def test_equal_scores_leave_no_trace():
    loss, gradient = loss_of(GRPOConfig(group_size=3), scores=[0.9] * 6)
    assert loss == 0
    assert (gradient == 0).all()


def test_a_response_that_could_not_be_scored_is_as_if_it_had_not_been_drawn():
    config = GRPOConfig(group_size=3, scale="none")
    _, gradient = loss_of(config, scores=[1.0, math.nan, 0.0, 0.0, 0.0, 2.0])
    assert (gradient[1] == 0).all()
    tokens = sum(LENGTHS) - LENGTHS[1]
    ratio = math.exp(NEW[0, 0] - OLD[0, 0])
    assert gradient[0, 0].item() == pytest.approx(-0.5 * min(ratio, 1.2) / tokens if ratio < 1.2 else 0.0, rel=1e-5)


def test_the_overlong_penalty_reaches_the_advantages():
    config = GRPOConfig(group_size=3, scale="none", overlong_buffer_tokens=2)
    algorithm = GRPO(config, actor=FixedPolicy(OLD), reference=None, max_response_tokens=LIMIT)
    experience, described = algorithm.experience(make_rollout(), make_scores([0.0] * 6))
    # lengths 3 1 4: penalties -1/2 0 -1, mean -1/2
    limit_less_buffer = LIMIT - 2
    penalties = [-max(length - limit_less_buffer, 0) / 2 for length in LENGTHS]
    assert described.values()["score/overlong_penalty"] == pytest.approx(sum(penalties) / 6)
    assert_close(experience.advantages[:3, 0], torch.tensor([0.0, 0.5, -0.5]))
    assert_close(experience.scores.total, torch.zeros(6))  # the score itself stays what the reward said


def test_what_tokens_got_counts_in_the_comparison():
    """Each response's tokens may have rewards of their own; its siblings are compared by the sum of all."""
    scores = make_scores([1.0, 0.0, 0.25, 0.0, 0.0, 2.0])
    per_token = torch.zeros(6, LIMIT)
    per_token[0, :3] = torch.tensor([0.5, -1.0, 0.25])  # -0.25 in all
    per_token[1, 0] = 3.0
    config = GRPOConfig(group_size=3, scale="none")
    algorithm = GRPO(config, actor=FixedPolicy(OLD), reference=None, max_response_tokens=LIMIT)
    experience, _ = algorithm.experience(make_rollout(), replace(scores, per_token=per_token))
    expected = torch.tensor([0.75 - 4 / 3, 3.0 - 4 / 3, 0.25 - 4 / 3, -2 / 3, -2 / 3, 4 / 3])
    assert_close(experience.advantages[:, 0], expected)


def test_tool_output_is_no_part_of_the_ratio_of_a_response():
    """GSPO's mean is over the tokens that the actor chose, however many stand between them."""
    mask = torch.tensor([[True, False, False, True], [True, True, False, False]])
    rollout = make_rollout([4, 2], [3, 3])
    rollout = replace(rollout, sequences=replace(rollout.sequences, response_mask=mask))
    old = torch.tensor([[-1.0, -9.0, -7.0, -2.0], [-1.0, -1.0, 0.0, 0.0]])
    new = torch.tensor([[-0.9, -1.0, -1.0, -2.2], [-1.1, -1.3, 5.0, 5.0]])  # on average -0.05 and -0.2
    config = GRPOConfig(group_size=2, scale="none", aggregation="sequence", ratio="sequence")
    before = GRPO(config, actor=FixedPolicy(old), reference=None, max_response_tokens=LIMIT)
    experience, _ = before.experience(rollout, make_scores([1.0, 0.0]))  # advantages 1/2 and -1/2
    weights = token_weights(
        mask, aggregation="sequence", num_tokens=mask.sum(), num_responses=torch.tensor(2), max_response_tokens=LIMIT
    )
    after = GRPO(config, actor=FixedPolicy(new), reference=None, max_response_tokens=LIMIT)
    ((_, loss, _),) = after.losses(experience, weights)
    assert loss.item() == pytest.approx(-(math.exp(-0.05) - math.exp(-0.2)) / 4, rel=1e-5)


def advantages_of(rollout, scores, **settings):
    config = GRPOConfig(**settings)
    actor = FixedPolicy(torch.zeros(len(rollout.rows), LIMIT))
    algorithm = GRPO(config, actor=actor, reference=None, max_response_tokens=LIMIT)
    return algorithm.experience(rollout, scores)[0].advantages


def test_tokens_are_compared_with_the_tokens_of_the_same_number():
    """Tool output is not counted; rewards to go of the first tokens 1.5, 3 and 1, of the second ones 0.5 and 1."""
    mask = torch.tensor([[True, False, False, True], [True, True, False, False], [False, True, False, False]])
    rollout = make_rollout([4, 2, 2], [7, 7, 7])
    rollout = replace(rollout, sequences=replace(rollout.sequences, response_mask=mask))
    per_token = torch.tensor([[1.0, 0.0, 0.0, 0.5], [2.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    scores = replace(make_scores([0.0, 1.0, 1.0]), per_token=per_token)
    ours = advantages_of(rollout, scores, group_size=3, baseline="leave_one_out", scale="none", credit="token")
    expected = [[-0.5, 0, 0, -0.5], [1.75, 0.5, 0, 0], [0, -1.25, 0, 0]]
    assert_close(torch.where(mask, ours, 0.0), torch.tensor(expected))


def test_with_turns_of_one_token_both_credits_are_the_same():
    rollout = replace(
        make_rollout([4, 2, 3], [7, 7, 7]), episodes=episodes_of([[1, 2, 3, 4], [1, 2, 0, 0], [1, 2, 3, 0]])
    )
    per_token = torch.randn(3, LIMIT, generator=torch.Generator().manual_seed(3)).masked_fill(~mask_of([4, 2, 3]), 0.0)
    scores = replace(make_scores([0.0, 1.0, 0.5]), per_token=per_token)
    turns, tokens = (advantages_of(rollout, scores, group_size=3, credit=credit) for credit in ("turn", "token"))
    assert_close(*(torch.where(mask_of([4, 2, 3]), x, 0.0) for x in (turns, tokens)))


@pytest.mark.parametrize("baseline", ["none", "batch"])
@pytest.mark.parametrize("scale", ["none", "batch"])
def test_one_response_to_a_prompt_is_compared_with_those_to_others(baseline, scale):
    scores = [1.0, 0.5, math.nan, 4.0]
    rollout = make_rollout([4, 2, 1, 3], [2, 3, 4, 5])
    ours = advantages_of(rollout, make_scores(scores), group_size=1, baseline=baseline, scale=scale)
    known = [x for x in scores if x == x]
    raw = [0.0 if x != x else x if baseline == "none" else x - (sum(known) - x) / 2 for x in scores]
    if scale == "batch":
        lengths = [4, 2, 0, 3]
        mean = sum(n * x for n, x in zip(lengths, raw, strict=True)) / 9
        std = math.sqrt(sum(n * (x - mean) ** 2 for n, x in zip(lengths, raw, strict=True)) / 9 + 1e-8)
        raw = [(x - mean) / std if n else 0.0 for n, x in zip(lengths, raw, strict=True)]
    assert_close(ours[:, 0], torch.tensor(raw))


def test_truncated_responses_are_not_in_the_spread_of_the_batch():
    _, experience, _ = truncated_experience((2,), scale="batch", baseline="none")
    kept = [[s] * n for i, (s, n) in enumerate(zip(SCORES, LENGTHS, strict=True)) if i != 2]
    expected = [row[0] for row in over_the_batch(kept)]
    assert_close(experience.advantages[[0, 1, 3, 4, 5], 0], torch.tensor(expected))


def episodes_of(turn_ends):
    num = len(turn_ends)
    zeros = torch.zeros(num, dtype=torch.long)
    return Episodes(
        turn_ends=torch.tensor(turn_ends),
        turn_rewards=torch.zeros(num, len(turn_ends[0])),
        end_reward=torch.zeros(num),
        num_calls=zeros,
        num_bad_calls=zeros,
        failures=(None,) * num,
        reasons=(None,) * num,
        openings=("p",) * num,
        messages=((),) * num,
    )


def test_turns_are_compared_with_the_turns_of_the_same_number():
    """Rewards to go of the first turns 1.5, 2 and 1; of the second ones 0.5 and 1, which the third response lacks."""
    mask = torch.tensor([[True, False, True, True], [True, True, False, True], [True, True, True, False]])
    rollout = make_rollout([4, 4, 3], [7, 7, 7])
    rollout = replace(
        rollout,
        sequences=replace(rollout.sequences, response_mask=mask),
        episodes=episodes_of([[1, 4], [2, 4], [3, 0]]),
    )
    per_token = torch.tensor([[1.0, 0.0, 0.0, 0.5], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]])
    scores = replace(make_scores([0.0, 1.0, 0.0]), per_token=per_token)
    config = GRPOConfig(group_size=3, scale="none", credit="turn")
    algorithm = GRPO(config, actor=FixedPolicy(torch.zeros(3, LIMIT)), reference=None, max_response_tokens=LIMIT)
    experience, _ = algorithm.experience(rollout, scores)
    expected = [[0.0, 0, -0.25, -0.25], [0.5, 0.5, 0, 0.25], [-0.5, -0.5, -0.5, 0]]
    assert_close(torch.where(mask, experience.advantages, 0.0), torch.tensor(expected))


def test_with_one_turn_both_credits_are_the_same():
    tables = []
    for credit in ("response", "turn"):
        config = GRPOConfig(group_size=3, credit=credit)
        algorithm = GRPO(config, actor=FixedPolicy(OLD), reference=None, max_response_tokens=LIMIT)
        tables.append(algorithm.experience(make_rollout(), make_scores())[0].advantages)
    assert_close(*tables)


def test_a_turn_that_only_one_response_has_teaches_nothing():
    rollout = replace(make_rollout([4, 4], [7, 7]), episodes=episodes_of([[2, 4], [4, 0]]))
    scores = replace(make_scores([0.0, 0.0]), per_token=torch.tensor([[0.0, 0.0, 0.0, 5.0], [0.0] * 4]))
    config = GRPOConfig(group_size=2, scale="none", credit="turn")
    algorithm = GRPO(config, actor=FixedPolicy(torch.zeros(2, LIMIT)), reference=None, max_response_tokens=LIMIT)
    experience, _ = algorithm.experience(rollout, scores)
    assert_close(experience.advantages, torch.tensor([[2.5, 2.5, 0.0, 0.0], [-2.5] * 4]))


@pytest.mark.parametrize("credit", ["response", "turn", "token"])
def test_a_rollout_in_which_no_episode_has_begun_teaches_nothing(credit):
    rollout = make_rollout([0, 0], [7, 7])
    sequences = replace(
        rollout.sequences, response_ids=torch.zeros(2, 0).long(), response_mask=torch.zeros(2, 0, dtype=torch.bool)
    )
    rollout = replace(rollout, sequences=sequences, rollout_logprobs=torch.zeros(2, 0))
    scores = Scores(total=torch.tensor([math.nan] * 2), per_token=torch.zeros(2, 0), parts={})
    config = GRPOConfig(group_size=2, credit=credit)
    algorithm = GRPO(config, actor=FixedPolicy(torch.zeros(2, 0)), reference=None, max_response_tokens=LIMIT)
    assert algorithm.experience(rollout, scores)[0].advantages.shape == (2, 0)


# --- entropy ----------------------------------------------------------------------------------------------------------

IDS = torch.tensor([[2, 0, 1, 4], [3, 4, 4, 4], [1, 1, 0, 2], [0, 3, 4, 4], [2, 2, 2, 2], [1, 0, 3, 4]])
VOCABULARY, CHUNK = 5, 2


class LinearPolicy:
    """A policy whose logits are linear in given hidden states, read by the head in chunks of two tokens."""

    def __init__(self, hidden, weight, index):
        self.hidden, self.weight, self.index = hidden, weight, index

    def logprobs(self, sequences):
        mask = sequences.response_mask
        hidden, ids = self.hidden[self.index][mask], IDS[self.index][mask]
        named = {}
        for name, known in zip(
            ("logprobs", "entropy"), linear_token_logprobs(hidden, self.weight, ids, chunk_tokens=CHUNK), strict=True
        ):
            named[name] = torch.full(mask.shape, math.nan).masked_scatter(mask, known)
        return TokenOutputs(named=named)


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_the_entropy_bonus_and_its_gradient_are_the_definition(aggregation):
    """-coef times the entropy of each token's distribution, written out over the vocabulary, under the loss's own
    aggregation; with scores that are all equal there is nothing else."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(len(LENGTHS), LIMIT, 3, generator=generator)
    ours = (2 * torch.randn(VOCABULARY, 3, generator=generator)).requires_grad_()
    config = GRPOConfig(group_size=3, entropy_coef=0.3, aggregation=aggregation)
    start = GRPO(config, actor=FixedPolicy(OLD), reference=None, max_response_tokens=LIMIT)
    experience, _ = start.experience(make_rollout(), make_scores([1.0] * 6))
    counts = {"num_tokens": sum(LENGTHS), "num_responses": len(LENGTHS), "max_response_tokens": LIMIT}
    total = torch.zeros(())
    for rows in [(5, 0), (2,), (4, 1, 3)]:
        index = torch.tensor(rows)
        part = experience.select(index)
        weights = token_weights(part.counted, aggregation=aggregation, **counts)
        policy = LinearPolicy(hidden, ours, index)
        ((_, loss, _),) = GRPO(config, actor=policy, reference=None, max_response_tokens=LIMIT).losses(part, weights)
        loss.backward()
        total = total + loss.detach()

    theirs, expected = ours.detach().double().requires_grad_(), torch.zeros((), dtype=torch.float64)
    for i, length in enumerate(LENGTHS):
        divisor = {"token": sum(LENGTHS), "sequence": 6 * length, "constant": 6 * LIMIT}[aggregation]
        for t in range(length):
            logits = theirs @ hidden[i, t].double()
            p = logits.exp() / logits.exp().sum()
            expected = expected + 0.3 * sum(p[v] * p[v].log() for v in range(VOCABULARY)) / divisor
    expected.backward()
    assert_close(total, expected.detach().float())
    assert_close(ours.grad, theirs.grad.float(), rtol=1e-4, atol=1e-6)


# --- truncated responses ----------------------------------------------------------------------------------------------


def truncated_experience(truncated, scores=SCORES, **settings):
    reasons = [StopReason.LENGTH if i in truncated else StopReason.EOS for i in range(len(LENGTHS))]
    rollout = replace(make_rollout(), stop_reason=torch.tensor(reasons))
    config = GRPOConfig(group_size=3, mask_truncated=True, **settings)
    algorithm = GRPO(config, actor=FixedPolicy(OLD), reference=None, max_response_tokens=LIMIT)
    return config, *algorithm.experience(rollout, make_scores(scores))


def dapo_paper_filtered(new, truncated):
    """arXiv:2503.14476, eq. 8 with overlong filtering: advantages of whole groups, one mean over the tokens of the
    responses that ended by themselves."""
    advantages, total = standardized(SCORES), torch.zeros(())
    kept = [i for i in range(len(LENGTHS)) if i not in truncated]
    for i in kept:
        for t in range(LENGTHS[i]):
            total = total + surrogate(new, i, t, advantages[i], 0.2, 0.28)
    return -total / sum(LENGTHS[i] for i in kept)


@pytest.mark.parametrize("truncated", [(2,), (0, 5), (0, 1, 2)])
def test_truncated_responses_count_in_their_group_and_not_in_the_loss(truncated):
    config, experience, metrics = truncated_experience(truncated, clip_high=0.28)
    live, paper = NEW.clone().requires_grad_(), NEW.clone().requires_grad_()
    mask = experience.counted
    assert mask.any(dim=1).tolist() == [i not in truncated for i in range(6)]
    weights = token_weights(
        mask, aggregation="token", num_tokens=mask.sum(), num_responses=mask.any(dim=1).sum(), max_response_tokens=LIMIT
    )
    algorithm = GRPO(config, actor=FixedPolicy(live), reference=None, max_response_tokens=LIMIT)
    ((_, loss, _),) = algorithm.losses(experience, weights)
    loss.backward()
    expected = dapo_paper_filtered(paper, truncated)
    expected.backward()
    assert_close(loss.detach(), expected.detach())
    assert_close(live.grad[mask], paper.grad[mask])
    assert (live.grad[~mask] == 0).all()
    assert_close(experience.advantages[:, 0], torch.tensor(standardized(SCORES)))
    assert metrics.values()["advantage/max"] == pytest.approx(float(experience.advantages[mask].max()))


def test_where_every_response_is_truncated_nothing_counts():
    _, experience, metrics = truncated_experience(range(6))
    assert not experience.counted.any()
    assert not any(math.isnan(value) for value in metrics.values().values())


# --- several rewards --------------------------------------------------------------------------------------------------


def test_rewards_are_standardized_one_by_one_where_their_weights_are_given():
    correct, format_ = [1.0, 0.0, 0.0, 0.0, 1.0, 1.0], [0.5, 0.5, 0.0, 0.5, math.nan, 0.5]
    watched = torch.full((6,), 1e9)
    total = torch.tensor([2.25, 0.25, math.nan, 0.25, 2.0, 2.25])  # the third response is excluded: a function failed
    scores = Scores(
        total=total,
        per_token=torch.zeros(6, LIMIT),
        parts={"watched": watched, "correct": torch.tensor(correct), "format": torch.tensor(format_)},
    )
    algorithm = GRPO(
        GRPOConfig(group_size=3),
        actor=FixedPolicy(OLD),
        reference=None,
        max_response_tokens=LIMIT,
        reward_weights={"correct": 2.0, "format": 0.5},
    )
    experience, _ = algorithm.experience(make_rollout(), scores)
    known = [[math.nan if i == 2 else x for i, x in enumerate(part)] for part in (correct, format_)]
    expected = oracles.decoupled_group_relative(known, [2.0, 0.5], GROUPS)
    assert_close(experience.advantages[:, 0], torch.tensor(expected))
    assert experience.advantages[2, 0] == 0


def test_kl_metrics_are_per_token_and_per_response():
    config = GRPOConfig(group_size=3, kl_coef=0.1, scale="none")
    algorithm = GRPO(config, actor=FixedPolicy(OLD), reference=FixedPolicy(REF), max_response_tokens=LIMIT)
    values = algorithm.experience(make_rollout(), make_scores())[1].values()
    total = sum(float(OLD[i, t] - REF[i, t]) for i, n in enumerate(LENGTHS) for t in range(n))
    assert values["kl/mean"] == pytest.approx(total / sum(LENGTHS), rel=1e-5)
    assert values["kl/sequence"] == pytest.approx(total / len(LENGTHS), rel=1e-5)


def test_no_kl_keeps_no_reference_and_reports_none():
    algorithm = GRPO(GRPOConfig(group_size=3), actor=FixedPolicy(OLD), reference=None, max_response_tokens=LIMIT)
    experience, metrics = algorithm.experience(make_rollout(), make_scores())
    assert "kl/mean" not in metrics.values()
    assert (experience.ref_logprobs == 0).all()


# --- a single optimizer step per rollout ------------------------------------------------------------------------------


class Spread(FixedPolicy):
    """A policy with entropy, that counts how often it is asked."""

    num_asked = 0

    def logprobs(self, sequences):
        self.num_asked += 1
        return TokenOutputs(named={"logprobs": self.table, "entropy": self.table.square()})


def one_iteration(config, *, one_step, microbatches, scores=(1.0, 0.0, math.nan, 0.0, 0.0, 2.0)):
    """Loss, gradient and metrics of the only optimizer step on a rollout, and how often the actor was asked before."""
    reference = FixedPolicy(REF) if config.kl_coef else None
    roles = {"reference": reference, "max_response_tokens": LIMIT, "one_step": one_step}
    actor, live, total = Spread(OLD), OLD.clone().requires_grad_(), torch.zeros(())
    rollout = replace(make_rollout(), rollout_logprobs=OLD + 0.25)
    experience, metrics = GRPO(config, actor=actor, **roles).experience(rollout, make_scores(scores))
    counts = {"num_tokens": experience.counted.sum(), "num_responses": experience.counted.any(dim=1).sum()}
    learned = Metrics()
    for rows in microbatches:
        index = torch.tensor(rows)
        part, policy = experience.select(index), Spread(live[index])
        if reference is not None:
            roles["reference"] = FixedPolicy(REF[index])
        weights = token_weights(part.counted, aggregation=config.aggregation, max_response_tokens=LIMIT, **counts)
        ((_, loss, statistics),) = GRPO(config, actor=policy, **roles).losses(part, weights)
        assert policy.num_asked == 1
        loss.backward()
        total, learned = total + loss.detach(), learned.merge(statistics)
    return total, live.grad, metrics.merge(learned.per_step()).values(), actor.num_asked


@pytest.mark.parametrize("microbatches", [((0, 1, 2, 3, 4, 5),), ((5, 0), (2,), (4, 1, 3))])
@pytest.mark.parametrize(
    "config",
    [
        *(config for config, _ in FAMILY.values()),
        GRPOConfig(group_size=3, baseline="leave_one_out", scale="none", aggregation="constant"),
        *(GRPOConfig(group_size=3, scale="none", kl_coef=0.1, kl_form=form) for form in ("k2", "k3")),
    ],
    ids=[*FAMILY, "RLOO", "k2", "k3"],
)
def test_the_only_step_on_a_rollout_needs_no_pass_before_it(config, microbatches):
    """Loss, gradient and metrics are those of a pass for old log-probabilities and the step after it, to the bit. A KL
    in the reward is needed before it."""
    loss, gradient, values, num_asked = one_iteration(config, one_step=True, microbatches=microbatches)
    plain = one_iteration(config, one_step=False, microbatches=microbatches)
    assert (num_asked, plain[3]) == (int(config.kl_form == "k1_reward"), 1)
    assert torch.equal(loss, plain[0])
    assert torch.equal(gradient, plain[1])
    assert gradient.abs().sum() > 0.1
    assert values == pytest.approx(plain[2], rel=1e-6)
    assert values.keys() >= {"policy/entropy", "policy/rollout_gap"} | ({"kl/mean"} if config.kl_coef else set())
    assert values["policy/rollout_gap"] == pytest.approx(0.25, rel=1e-5)


def test_a_loss_of_a_user_may_write_to_the_old_log_probabilities_of_the_only_step(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def loss(logprobs, old_logprobs, advantages, weights):\n"
        "    ratio = (logprobs - old_logprobs.clamp_(max=-0.5)).where(weights != 0, 0.0).exp()\n"
        "    return -(weights * advantages * ratio).sum()\n"
    )
    config = GRPOConfig(group_size=3, loss=f"{tmp_path}/mine.py:loss")
    parts = {"microbatches": ((0, 1, 2, 3, 4, 5),)}
    assert torch.equal(
        one_iteration(config, one_step=True, **parts)[1], one_iteration(config, one_step=False, **parts)[1]
    )


@pytest.mark.parametrize("huge", [1e30, -1e30, 3e38])
@pytest.mark.parametrize("settings", [{}, {"scale": "none"}, {"baseline": "leave_one_out", "scale": "none"}])
def test_an_extreme_score_stays_in_its_group_and_is_counted(settings, huge):
    algorithm = GRPO(
        GRPOConfig(group_size=3, **settings),
        actor=FixedPolicy(random_logprobs(0)),
        reference=None,
        max_response_tokens=4,
    )
    usual, _ = algorithm.experience(make_rollout(), make_scores([0.0, 0.5, 1.0, *SCORES[3:]]))
    experience, metrics = algorithm.experience(make_rollout(), make_scores([0.0, 0.5, huge, *SCORES[3:]]))
    assert experience.advantages.isfinite().all()
    assert experience.advantages[3:].equal(usual.advantages[3:])
    assert settings or experience.advantages.abs().max() <= math.sqrt(2)  # of three, whatever their size
    assert metrics.values()["score/extreme"] == 1.0
    assert metrics.values()["score/extreme_size"] == pytest.approx(abs(huge))


def test_usual_scores_are_not_counted_as_extreme():
    algorithm = GRPO(
        GRPOConfig(group_size=3), actor=FixedPolicy(random_logprobs(0)), reference=None, max_response_tokens=4
    )
    _, metrics = algorithm.experience(make_rollout(), make_scores([math.nan, *SCORES[1:]]))
    assert not any(name.startswith("score/extreme") for name in metrics.values())
