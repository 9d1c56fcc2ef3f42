import math
from functools import partial, reduce

import pytest
import torch
from torch.testing import assert_close

from llmrl.functional.losses import (
    bradley_terry_loss,
    cispo_loss,
    clipped_policy_loss,
    clipped_value_loss,
    cloning_loss,
    importance_ratio,
    policy_gradient_loss,
    proximal_value_loss,
    ratio_metrics,
    token_weights,
)
from llmrl.functional.masking import masked_sum
from llmrl.functional.statistics import Maximum, Mean
from llmrl.metrics import Metrics
from tests import oracles

AGGREGATIONS = ["token", "sequence", "constant"]
CLIPS = {"clip_low": 0.2, "clip_high": 0.3}


def row(*x):
    return torch.tensor([x])


def mean(statistic):
    assert isinstance(statistic, Mean)
    assert not torch.as_tensor(statistic.total).requires_grad
    return float(statistic.total) / float(statistic.num)


def weigh(mask, aggregation="token"):
    return token_weights(
        mask,
        aggregation=aggregation,
        num_tokens=mask.sum(),
        num_responses=mask.any(dim=1).sum(),
        max_response_tokens=50,
    )


# --- token_weights


def test_weights_by_hand():
    mask = torch.tensor([[True, True, False], [False, False, True]])
    counts = {"num_tokens": 3, "num_responses": 2, "max_response_tokens": 5}
    for aggregation, first, second in (("token", 1 / 3, 1 / 3), ("sequence", 1 / 4, 1 / 2), ("constant", 0.1, 0.1)):
        expected = torch.tensor([[first, first, 0], [0, 0, second]])
        assert_close(token_weights(mask, aggregation=aggregation, **counts), expected)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_weights_by_definition(mask, aggregation):
    weights = weigh(mask, aggregation)
    assert weights.dtype == torch.float32
    for b in range(mask.shape[0]):
        for t in range(mask.shape[1]):
            expected = oracles.token_weight(mask.tolist(), b, t, aggregation=aggregation, max_response_tokens=50)
            assert weights[b, t].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_weights_sum_to_1_over_microbatches(mask, aggregation):
    counts = {"num_tokens": int(mask.sum()), "num_responses": 4, "max_response_tokens": 7}
    parts = [token_weights(mask[rows], aggregation=aggregation, **counts).sum() for rows in ([0, 3], [1], [4], [2])]
    assert_close(sum(parts), torch.tensor(1.0))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("zero", [0, 0.0, torch.tensor(0)])
def test_counts_of_0_give_weights_of_0(mask, aggregation, zero):
    for m in (mask, mask & False):
        weights = token_weights(m, aggregation=aggregation, num_tokens=zero, num_responses=zero, max_response_tokens=7)
        assert (weights == 0).all()


def test_numbers_and_tensors_are_the_same_counts(mask):
    for number in (15, 15.0, torch.tensor(15), torch.tensor(15.0)):
        weights = token_weights(
            mask, aggregation="token", num_tokens=number, num_responses=number, max_response_tokens=7
        )
        assert_close(weights[mask], torch.full((int(mask.sum()),), 1 / 15))


@pytest.mark.usefixtures("production")
def test_an_unknown_aggregation_is_refused(mask):
    with pytest.raises(ValueError, match="'mean'"):
        token_weights(mask, aggregation="mean", num_tokens=1, num_responses=1, max_response_tokens=1)


# --- importance_ratio


def test_ratio_by_hand():
    logprobs, old = row(math.log(0.5), 0.0, torch.nan), row(math.log(0.25), 0.5, 0.0)
    ratio = importance_ratio(logprobs, old, torch.tensor([[True, True, False]]))
    assert_close(ratio, row(2.0, math.exp(-0.5), 1.0))


@pytest.mark.parametrize("junk", [torch.nan, torch.inf, -torch.inf, 1e4])
def test_ratio_outside_the_mask_is_1_and_has_no_gradient(mask, junk):
    logprobs = torch.where(mask, torch.randn(mask.shape), junk).requires_grad_()
    ratio = importance_ratio(logprobs, torch.zeros(mask.shape), mask)
    ratio.sum().backward()
    assert (ratio[~mask] == 1).all()
    assert_close(logprobs.grad, torch.where(mask, logprobs.detach().exp(), 0.0))


def test_ratio_of_a_policy_to_itself_is_exactly_1(mask):
    logprobs = -10 * torch.rand(mask.shape)
    assert (importance_ratio(logprobs, logprobs.clone(), mask) == 1).all()


# --- ratio_metrics


def test_ratio_metrics_by_hand():
    """Ratios 2, 1/2 and 1: k3 of KL(old, current) is ρ - 1 - log ρ."""
    logprobs, old = row(0.0, math.log(0.25), -3.0, math.nan), row(-math.log(2), math.log(0.5), -3.0, 7.0)
    metrics = ratio_metrics(logprobs, old, torch.tensor([[True, True, True, False]]))
    assert mean(metrics["policy/approx_kl"]) == pytest.approx(((1 - math.log(2)) + (-0.5 + math.log(2)) + 0) / 3)
    assert metrics["policy/ratio_max_deviation"] == Maximum(pytest.approx(1.0))


def test_ratio_metrics_of_a_policy_that_has_not_moved_are_exactly_0(mask):
    logprobs = -torch.rand(mask.shape)
    metrics = ratio_metrics(logprobs, logprobs.clone(), mask)
    assert metrics["policy/approx_kl"] == Mean(0.0, mask.sum())
    assert metrics["policy/ratio_max_deviation"] == Maximum(0.0)


def test_ratio_metrics_of_the_parts_pool_to_those_of_the_whole(mask):
    logprobs, old = -torch.rand(mask.shape), -torch.rand(mask.shape)
    parts = [Metrics(ratio_metrics(logprobs[i : i + 1], old[i : i + 1], mask[i : i + 1])) for i in range(len(mask))]
    pooled = reduce(Metrics.merge, parts).values()
    assert pooled == pytest.approx(Metrics(ratio_metrics(logprobs, old, mask)).values())


# --- clipped_policy_loss, and losses without its clip


@pytest.fixture
def policy(mask):
    """Ratios from 0.2 to 5, so that every case of the clips occurs."""
    old_logprobs = -3 * torch.rand(mask.shape, dtype=torch.float64)
    return {
        "logprobs": old_logprobs
        + torch.linspace(-1.6, 1.6, mask.numel()).double().reshape(mask.shape)[:, torch.randperm(7)],
        "old_logprobs": old_logprobs,
        "advantages": torch.randn(mask.shape, dtype=torch.float64),
        "weights": weigh(mask, "sequence").double(),
    }


def live(tensors, name):
    return {**tensors, name: tensors[name].clone().requires_grad_()}


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        # slope: of the loss in the logprob
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2.6, 0.0),  # rose enough
        (0.5, 2.0, -1.0, -1.0),  # fell, although good: never clipped
        (1.5, -2.0, 3.0, 3.0),  # rose, although bad: not clipped
        (0.9, -2.0, 1.8, 1.8),
        (0.5, -2.0, 1.6, 0.0),  # fell enough
        (4.0, -2.0, 6.0, 0.0),  # the dual clip of 3
        (4.0, 0.0, 0.0, 0.0),
    ],
)
def test_policy_loss_by_hand(ratio, advantage, loss, slope):
    logprobs = torch.tensor([[math.log(ratio) - 1]], requires_grad=True)
    ours, metrics = clipped_policy_loss(logprobs, row(-1.0), row(advantage), row(1.0), **CLIPS, dual_clip=3.0)
    ours.backward()
    assert_close(ours.detach(), torch.tensor(loss))
    assert_close(logprobs.grad, row(slope))
    assert mean(metrics["policy/clip_fraction"]) == (slope == 0 and advantage != 0)
    assert mean(metrics["policy/approx_kl"]) == pytest.approx(ratio - 1 - math.log(ratio), abs=1e-6)
    assert metrics["policy/ratio_max_deviation"].value.item() == pytest.approx(abs(ratio - 1), abs=1e-6)


@pytest.mark.parametrize("dual_clip", [None, 1.5])
def test_policy_loss_by_definition(policy, mask, dual_clip):
    ours, metrics = clipped_policy_loss(**policy, **CLIPS, dual_clip=dual_clip)
    inputs = [oracles.masked_entries(policy[name].tolist(), mask.tolist()) for name in policy]
    losses = [
        oracles.clipped_policy_token(lp, o, a, **CLIPS, dual_clip=dual_clip)
        for lp, o, a, _ in zip(*inputs, strict=True)
    ]
    assert ours.item() == pytest.approx(sum(w * x for w, x in zip(inputs[3], losses, strict=True)), rel=1e-12)
    ratios = [math.exp(lp - o) for lp, o, *_ in zip(*inputs, strict=True)]
    cut = [abs(x + a * r) > 1e-12 for x, a, r in zip(losses, inputs[2], ratios, strict=True)]
    assert 0 < sum(cut) < len(cut)
    assert metrics["policy/clip_fraction"] == (sum(cut), len(cut))
    expected_kl = sum(r - 1 - math.log(r) for r in ratios)
    assert metrics["policy/approx_kl"].total.item() == pytest.approx(expected_kl, rel=1e-12)
    assert metrics["policy/ratio_max_deviation"].value.item() == pytest.approx(max(abs(r - 1) for r in ratios))


def test_the_gradient_of_the_definition(policy):
    """Against central differences of the loss itself, which the by-definition test holds."""
    inputs = live(policy, "logprobs")
    assert torch.autograd.gradcheck(
        lambda x: clipped_policy_loss(**{**inputs, "logprobs": x}, **CLIPS)[0], inputs["logprobs"]
    )


def test_on_policy_gradient_is_that_of_reinforce(policy):
    policy["old_logprobs"] = policy["logprobs"].clone()
    inputs = live(policy, "logprobs")
    loss, metrics = clipped_policy_loss(**inputs, clip_low=0.0, clip_high=0.0, dual_clip=2.0)
    loss.backward()
    assert_close(inputs["logprobs"].grad, -policy["weights"] * policy["advantages"])
    assert mean(metrics["policy/clip_fraction"]) == mean(metrics["policy/approx_kl"]) == 0
    assert metrics["policy/ratio_max_deviation"] == Maximum(0)


def test_wide_clips_leave_importance_sampling(policy, mask):
    loss, _ = clipped_policy_loss(**policy, clip_low=1.0, clip_high=100.0)
    ratio = (policy["logprobs"] - policy["old_logprobs"]).exp()
    assert_close(loss, -(policy["weights"] * ratio * policy["advantages"])[mask].sum())


WITHOUT_A_CLIP = {
    "policy_gradient": policy_gradient_loss,
    "cispo": partial(cispo_loss, clip_low=0.3, clip_high=0.5),
}


def test_the_policy_gradient_is_the_clipped_loss_with_clips_that_never_act(policy):
    inputs = [live(policy, "logprobs") for _ in range(2)]
    losses = [
        policy_gradient_loss(**inputs[0])[0],
        clipped_policy_loss(**inputs[1], clip_low=1.0, clip_high=100.0)[0],
    ]
    for loss in losses:
        loss.backward()
    assert_close(*losses)
    assert_close(*(tensors["logprobs"].grad for tensors in inputs))


def test_cispo_has_the_gradient_of_the_paper(policy, mask):
    inputs, clips = live(policy, "logprobs"), {"clip_low": 0.3, "clip_high": 0.5}
    loss, metrics = cispo_loss(**inputs, **clips)
    loss.backward()
    clipped = 0
    for b, t in mask.nonzero().tolist():
        lp, old, advantage, weight = (float(x[b, t]) for x in policy.values())
        slope = oracles.cispo_slope(lp, old, advantage, **clips)
        assert inputs["logprobs"].grad[b, t].item() == pytest.approx(weight * slope, rel=1e-12)
        clipped += not 0.7 <= math.exp(lp - old) <= 1.5
    assert 0 < clipped < mask.sum()
    assert metrics["policy/clip_fraction"] == (clipped, mask.sum())
    assert (inputs["logprobs"].grad[~mask] == 0).all()


def test_cispo_without_bounds_has_the_gradient_of_the_policy_gradient(policy):
    inputs = [live(policy, "logprobs") for _ in range(2)]
    cispo_loss(**inputs[0], clip_low=1.0, clip_high=100.0)[0].backward()
    policy_gradient_loss(**inputs[1])[0].backward()
    assert_close(*(tensors["logprobs"].grad for tensors in inputs))


@pytest.mark.parametrize("name", WITHOUT_A_CLIP)
def test_in_the_first_step_every_loss_has_the_gradient_of_reinforce(policy, name):
    policy["old_logprobs"] = policy["logprobs"].clone()
    inputs = live(policy, "logprobs")
    WITHOUT_A_CLIP[name](**inputs)[0].backward()
    assert_close(inputs["logprobs"].grad, -policy["weights"] * policy["advantages"])


@pytest.mark.parametrize("name", WITHOUT_A_CLIP)
def test_losses_without_a_clip_never_read_where_the_weight_is_0(policy, poison, name):
    poisoned = {**poison(policy), "weights": policy["weights"]}
    results = []
    for tensors in (live(policy, "logprobs"), live(poisoned, "logprobs")):
        loss, metrics = WITHOUT_A_CLIP[name](**tensors)
        loss.backward()
        results.append((loss.detach(), tensors["logprobs"].grad, tuple(metrics.values())))
    assert_close(results[1], results[0], rtol=0, atol=0)


@pytest.mark.parametrize("name", WITHOUT_A_CLIP)
def test_losses_without_a_clip_ignore_how_the_minibatch_was_cut(policy, name):
    whole, _ = WITHOUT_A_CLIP[name](**policy)
    parts = [{key: x[rows] for key, x in policy.items()} for rows in (slice(0, 2), slice(2, 3), slice(3, None))]
    assert_close(sum(WITHOUT_A_CLIP[name](**part)[0] for part in parts), whole)


@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_policy_loss_never_reads_where_the_weight_is_0(policy, poison, dual_clip):
    poisoned = {**poison(policy), "weights": policy["weights"]}
    results = []
    for tensors in (live(policy, "logprobs"), live(poisoned, "logprobs")):
        loss, metrics = clipped_policy_loss(**tensors, **CLIPS, dual_clip=dual_clip)
        loss.backward()
        results.append((loss.detach(), tensors["logprobs"].grad, tuple(metrics.values())))
    assert_close(results[1], results[0], rtol=0, atol=0)


@pytest.mark.parametrize("advantage", [1.0, 0.0])
def test_a_ratio_that_overflows_harms_nothing_where_it_is_clipped(advantage):
    logprobs = torch.tensor([[0.0]], requires_grad=True)
    loss, _ = clipped_policy_loss(logprobs, row(-200.0), row(advantage), row(1.0), **CLIPS)
    loss.backward()
    assert_close(loss.detach(), torch.tensor(-1.3 * advantage))
    assert logprobs.grad.item() == 0


def test_a_nan_that_counts_is_not_hidden():
    logprobs = torch.tensor([[torch.nan, 0.0]], requires_grad=True)
    loss, _ = clipped_policy_loss(logprobs, row(0.0, 0.0), row(1.0, 1.0), row(0.5, 0.5), **CLIPS)
    loss.backward()
    assert loss.isnan()
    assert logprobs.grad.isnan().tolist() == [[True, False]]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_policy_loss_ignores_how_the_minibatch_was_cut(policy, mask, aggregation):
    policy["weights"] = weigh(mask, aggregation).double()
    whole = live(policy, "logprobs")
    loss, metrics = clipped_policy_loss(**whole, **CLIPS)
    loss.backward()
    for cut in ([[0, 1, 2, 3, 4]], [[0], [1], [2], [3], [4]], [[4, 1], [3, 0, 2]]):
        parts = live(policy, "logprobs")
        results = [clipped_policy_loss(**{k: x[rows] for k, x in parts.items()}, **CLIPS) for rows in cut]
        sum(part for part, _ in results).backward()
        assert_close(sum(part for part, _ in results).detach(), loss.detach())
        assert_close(parts["logprobs"].grad, whole["logprobs"].grad)
        for name in ("policy/clip_fraction", "policy/approx_kl"):
            pooled = [sum(column) for column in zip(*(part[name] for _, part in results), strict=True)]
            assert_close(pooled, list(metrics[name]))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (2, 3)])
def test_policy_loss_of_nothing_is_0(shape):
    x = torch.full(shape, torch.nan)
    loss, metrics = clipped_policy_loss(x, x, x, torch.zeros(shape), **CLIPS)
    assert loss == 0
    assert metrics["policy/clip_fraction"] == metrics["policy/approx_kl"] == (0, 0)
    assert metrics["policy/ratio_max_deviation"] == (0,)


@pytest.mark.parametrize(
    ("field", "value"), [("clip_low", -0.1), ("clip_high", -0.1), ("dual_clip", 1.0), ("dual_clip", 0.5)]
)
def test_impossible_clips_are_refused(policy, field, value):
    with pytest.raises(ValueError, match=rf"{field} \({value}\)"):
        clipped_policy_loss(**policy, **{**CLIPS, field: value})


def test_gspo_is_the_row_mean_as_logprob_with_sequence_weights():
    """-A times the geometric mean ratio of each response, averaged over responses (arXiv:2507.18071, eq. 5 and 7)."""
    mask = torch.tensor([[True, True, True], [True, False, False]])
    log_ratio = torch.tensor([[0.1, -0.3, 0.05], [0.2, 0.0, 0.0]])
    means = (log_ratio * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
    advantages = torch.tensor([[1.0], [-2.0]])
    loss, _ = clipped_policy_loss(
        means.expand(2, 3),
        torch.zeros(2, 3),
        advantages.expand(2, 3),
        weigh(mask, "sequence"),
        clip_low=0.5,
        clip_high=0.5,
    )
    assert_close(loss.item(), -(math.exp(-0.05) * 1 + math.exp(0.2) * -2) / 2, rtol=1e-6, atol=0)


# --- cloning_loss


def test_the_cloning_loss_is_the_kl_of_whole_distributions_in_expectation():
    """All five tokens, each as often as the policy that sampled it says: value and gradient of KL(old, current)."""
    current, old, sampled = torch.randn(3, 5, dtype=torch.float64)
    current.requires_grad_()
    logprobs, old, sampled = (logits.log_softmax(dim=0) for logits in (current, old, sampled))
    ours, kl = cloning_loss(logprobs[None], old[None], sampled[None], sampled.exp()[None])
    expected = (old.exp() * (old - logprobs)).sum()
    assert_close(ours, expected)
    slopes = [torch.autograd.grad(loss, current, retain_graph=True)[0] for loss in (ours, expected)]
    assert_close(slopes[0], slopes[1])
    assert_close(slopes[1], current.softmax(dim=0).detach() - old.exp())  # by hand
    assert kl.num == 5


def test_the_cloning_loss_by_hand():
    """e^0.5 (2 - 1 - ln 2): likelier before the phase than when it was sampled, and twice as likely now."""
    logprobs = torch.tensor([[-2.0 + 0.5 + math.log(2.0)]], requires_grad=True)
    loss, kl = cloning_loss(logprobs, row(-1.5), row(-2.0), row(0.5))
    loss.backward()
    per_token = math.exp(0.5) * (1 - math.log(2.0))
    assert loss.item() == pytest.approx(0.5 * per_token, rel=1e-6)
    assert mean(kl) == pytest.approx(per_token, rel=1e-6)
    assert_close(logprobs.grad, row(0.5 * math.exp(0.5)))


def test_an_actor_that_stands_still_pays_nothing_and_feels_nothing(policy):
    inputs = live(policy, "logprobs")
    loss, _ = cloning_loss(inputs["logprobs"], policy["logprobs"], policy["old_logprobs"], policy["weights"])
    loss.backward()
    assert loss == 0
    assert not inputs["logprobs"].grad.any()


def test_the_cloning_loss_never_reads_where_the_weight_is_0(policy, poison):
    results = []
    for tensors in (live(policy, "logprobs"), live({**poison(policy), "weights": policy["weights"]}, "logprobs")):
        loss, kl = cloning_loss(tensors["logprobs"], tensors["old_logprobs"], tensors["advantages"], tensors["weights"])
        loss.backward()
        results.append((loss.detach(), tensors["logprobs"].grad, tuple(kl)))
    assert_close(results[1], results[0], rtol=0, atol=0)


# --- clipped_value_loss


@pytest.fixture
def critic(mask):
    x = {name: torch.randn(mask.shape, dtype=torch.float64) for name in ("values", "old_values", "returns")}
    return {**x, "weights": weigh(mask).double()}


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "slope"),
    [
        (1.0, 1.0, 3.0, 2.0, -2.0),
        (2.0, 1.0, 3.0, 1.125, 0.0),  # clipped at 1.5: moved enough towards the target
        (0.0, 1.0, 3.0, 4.5, -3.0),  # moved away: the true error is the larger
        (1.25, 1.0, 3.0, 1.53125, -1.75),
    ],
)
def test_value_loss_by_hand(value, old, target, loss, slope):
    values = torch.tensor([[value]], requires_grad=True)
    ours, metrics = clipped_value_loss(values, row(old), row(target), row(1.0), value_clip=0.5)
    ours.backward()
    assert_close(ours.detach(), torch.tensor(loss))
    assert_close(values.grad, row(slope))
    assert mean(metrics["value/clip_fraction"]) == (slope == 0)


@pytest.mark.parametrize("value_clip", [None, 0.0, 0.3])
def test_value_loss_by_definition(critic, mask, value_clip):
    ours, metrics = clipped_value_loss(**critic, value_clip=value_clip)
    inputs = [oracles.masked_entries(critic[name].tolist(), mask.tolist()) for name in critic]
    losses = [oracles.clipped_value_token(v, o, r, value_clip=value_clip) for v, o, r, _ in zip(*inputs, strict=True)]
    assert ours.item() == pytest.approx(sum(w * x for w, x in zip(inputs[3], losses, strict=True)), rel=1e-12)
    cut = sum(x > 0.5 * (v - r) ** 2 for x, v, r in zip(losses, inputs[0], inputs[2], strict=True))
    assert metrics["value/clip_fraction"] == (cut, len(losses))
    assert (cut > 0) == (value_clip is not None)


def test_without_a_clip_the_gradient_is_the_error(critic):
    inputs = live(critic, "values")
    clipped_value_loss(**inputs, value_clip=None)[0].backward()
    assert_close(inputs["values"].grad, critic["weights"] * (critic["values"] - critic["returns"]))


def test_a_small_step_inside_the_clip_never_counts_as_clipped():
    """old + (value - old) is not value in float32; that rounding must not look like a clip."""
    values, old_values, returns = torch.randn(3, 100, 100) * torch.tensor([1.0, 100.0, 1.0])[:, None, None]
    _, metrics = clipped_value_loss(values, old_values, returns, torch.ones(100, 100), value_clip=1e4)
    assert metrics["value/clip_fraction"].total == 0


@pytest.mark.parametrize("value_clip", [None, 0.3])
def test_value_loss_never_reads_where_the_weight_is_0(critic, poison, value_clip):
    poisoned = {**poison(critic), "weights": critic["weights"]}
    results = []
    for tensors in (live(critic, "values"), live(poisoned, "values")):
        loss, metrics = clipped_value_loss(**tensors, value_clip=value_clip)
        loss.backward()
        results.append((loss.detach(), tensors["values"].grad, tuple(metrics.values())))
    assert_close(results[1], results[0], rtol=0, atol=0)


def test_value_loss_ignores_how_the_minibatch_was_cut(critic):
    whole, parts = live(critic, "values"), live(critic, "values")
    clipped_value_loss(**whole, value_clip=0.3)[0].backward()
    for rows in ([3], [0, 4], [2, 1]):
        clipped_value_loss(**{k: x[rows] for k, x in parts.items()}, value_clip=0.3)[0].backward()
    assert_close(parts["values"].grad, whole["values"].grad)


def test_a_negative_value_clip_is_refused(critic):
    with pytest.raises(ValueError, match=r"value_clip \(-1.0\)"):
        clipped_value_loss(**critic, value_clip=-1.0)


# --- proximal_value_loss


@pytest.mark.parametrize("coef", [0.0, 0.25, 3.0])
def test_the_proximal_term_draws_values_between_return_and_old_value(critic, coef):
    """Gradient descent ends at (R + c V_old) / (1 + c), where the sum of both slopes by hand is 0."""
    target, old, weights = critic["returns"], critic["old_values"], critic["weights"]
    values = old.clone().requires_grad_()
    for _ in range(200):
        error, _ = clipped_value_loss(values, old, target, weights, value_clip=None)
        loss = error + coef * proximal_value_loss(values, old, weights)
        (slope,) = torch.autograd.grad(loss, values)
        assert_close(slope, weights * (values - target + coef * (values - old)))
        values = (values - 0.4 * slope / weights.max() / (1 + coef)).detach().requires_grad_()
    expected = torch.where(weights != 0, (target + coef * old) / (1 + coef), old)
    assert_close(values.detach(), expected)


def test_proximal_term_by_definition(critic, mask):
    ours = proximal_value_loss(critic["values"], critic["old_values"], critic["weights"])
    names = ("values", "old_values", "weights")
    value, old, weight = (oracles.masked_entries(critic[name].tolist(), mask.tolist()) for name in names)
    expected = sum(w * 0.5 * (v - o) ** 2 for v, o, w in zip(value, old, weight, strict=True))
    assert ours.item() == pytest.approx(expected, rel=1e-12)


def test_proximal_term_never_reads_where_the_weight_is_0(critic, poison):
    results = []
    for tensors in (live(critic, "values"), live({**poison(critic), "weights": critic["weights"]}, "values")):
        loss = proximal_value_loss(tensors["values"], tensors["old_values"], tensors["weights"])
        loss.backward()
        results.append((loss.detach(), tensors["values"].grad))
    assert_close(results[1], results[0], rtol=0, atol=0)


# --- bradley_terry_loss


def test_bradley_terry_by_hand():
    chosen, rejected = torch.tensor([math.log(3.0), 1.0, 0.0]), torch.tensor([0.0, 1.0, math.log(3.0)])
    loss, metrics = bradley_terry_loss(chosen, rejected, num_pairs=3)
    # the chosen one wins with probability 3/4, 1/2, 1/4
    assert_close(loss.item(), -(math.log(0.75) + math.log(0.5) + math.log(0.25)) / 3, rtol=1e-6, atol=0)
    assert metrics["pairs/accuracy"] == (1.5, 3)
    assert mean(metrics["pairs/margin"]) == pytest.approx(0, abs=1e-6)


def test_bradley_terry_with_margin_and_center():
    chosen, rejected, margin = torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor([0.5])
    loss, metrics = bradley_terry_loss(chosen, rejected, margin=margin, center_coef=0.01, num_pairs=4)
    assert_close(loss.item(), (math.log(1 + math.exp(-0.5)) + 0.01 * 9) / 4, rtol=1e-6, atol=0)
    assert metrics["pairs/accuracy"] == (1, 1)
    assert metrics["pairs/margin"] == (1, 1)


def test_gradient_of_bradley_terry_is_the_probability_of_being_wrong():
    chosen = torch.randn(6, dtype=torch.float64, requires_grad=True)
    rejected = torch.randn(6, dtype=torch.float64, requires_grad=True)
    loss, metrics = bradley_terry_loss(chosen, rejected, num_pairs=6)
    loss.backward()
    difference = (chosen - rejected).detach()
    assert mean(metrics["pairs/margin"]) == pytest.approx(difference.mean().item())
    assert mean(metrics["pairs/accuracy"]) == pytest.approx((difference > 0).double().mean().item())
    wrong = 1 / (1 + difference.exp())
    assert_close(chosen.grad, -wrong / 6)
    assert_close(rejected.grad, wrong / 6)


def test_bradley_terry_is_stable_far_out():
    chosen = torch.tensor([-500.0, 500.0], requires_grad=True)
    loss, _ = bradley_terry_loss(chosen, -chosen.detach(), num_pairs=1)
    loss.backward()
    assert loss.item() == 1000
    assert chosen.grad.tolist() == [-1, 0]


def test_bradley_terry_ignores_a_common_shift_unless_centered():
    chosen, rejected = torch.randn(2, 5, dtype=torch.float64)
    plain, _ = bradley_terry_loss(chosen, rejected, num_pairs=5)
    assert_close(bradley_terry_loss(chosen + 3, rejected + 3, num_pairs=5)[0], plain)
    centered, _ = bradley_terry_loss(chosen + 3, rejected + 3, center_coef=0.5, num_pairs=5)
    assert_close(centered, plain + 0.1 * (chosen + rejected + 6).square().sum())


@pytest.mark.parametrize("number", [5, 5.0, torch.tensor(5)])
def test_pairs_may_be_cut_into_microbatches(number):
    chosen, rejected, margin = torch.randn(3, 5, dtype=torch.float64)
    settings = {"center_coef": 0.1, "num_pairs": number}
    whole, metrics = bradley_terry_loss(chosen, rejected, margin=margin, **settings)
    parts = [bradley_terry_loss(chosen[r], rejected[r], margin=margin[r], **settings) for r in ([4, 0], [1, 2, 3], [])]
    assert_close(sum(part for part, _ in parts), whole)
    for name, statistic in metrics.items():
        pooled = [float(sum(column)) for column in zip(*(part[name] for _, part in parts), strict=True)]
        assert pooled == pytest.approx([float(x) for x in statistic])


def test_large_scores_are_no_nan_where_nothing_is_centred():
    """Their square would be infinite."""
    scores = torch.tensor([1e20, -1e20], requires_grad=True)
    loss, _ = bradley_terry_loss(scores, torch.zeros(2), num_pairs=2)
    loss.backward()
    assert loss.item() == pytest.approx(5e19)
    assert_close(scores.grad, torch.tensor([0.0, -0.5]))


def test_no_pairs_give_a_loss_of_0():
    assert bradley_terry_loss(torch.ones(2), torch.zeros(2), num_pairs=0)[0] == 0


@pytest.mark.usefixtures("production")
def test_shapes_are_checked_at_the_door():
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"old_logprobs \(2, 1\)"):
        importance_ratio(x, x[:, :1], mask)
    for bad in range(4):
        tensors = [x[:1] if i == bad else x for i in range(4)]
        with pytest.raises(ValueError, match=r"\(1, 3\)"):
            clipped_policy_loss(*tensors, **CLIPS)
        with pytest.raises(ValueError, match=r"\(1, 3\)"):
            clipped_value_loss(*tensors, value_clip=0.2)
    with pytest.raises(ValueError, match=r"margin \(1,\)"):
        bradley_terry_loss(x[0], x[0], margin=torch.zeros(1), num_pairs=3)
    with pytest.raises(ValueError, match=r"margin \(3, 1\)"):
        bradley_terry_loss(x[0], x[0], margin=torch.zeros(3, 1), num_pairs=3)
    with pytest.raises(ValueError, match=r"chosen_scores \(3,\), rejected_scores \(2,\)"):
        bradley_terry_loss(x[0], x[0, :2], num_pairs=3)


def test_the_sum_that_a_loss_is(policy, mask):
    """Token aggregation of a plain KL term, as an algorithm adds it, is the mean over tokens."""
    weights, kl = weigh(mask), torch.randn(mask.shape)
    assert masked_sum(weights * kl, weights > 0).item() == pytest.approx(kl[mask].double().mean().item(), abs=1e-6)
