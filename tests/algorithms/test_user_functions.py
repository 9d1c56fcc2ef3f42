"""Functions of users: what equals ours gives our numbers, and whatever is wrong is named."""

import re
from functools import partial

import pytest
import torch

from llmrl.algorithms.config import GRPOConfig, PPOConfig
from llmrl.algorithms.user_functions import UserBaseline, UserLoss, check_user_functions
from llmrl.functional.advantages import group_relative, leave_one_out
from llmrl.functional.losses import clipped_policy_loss
from llmrl.functional.statistics import Mean
from llmrl.user_code import UserCodeError, UserCodeFailure

GROUPS = torch.tensor([7, 4, 7, 4, 7, 4, 7])
SCORES = torch.tensor([1.0, 0.5, 0.0, 2.0, 0.25, -3.0, 0.1])
BASELINES = """
import torch

def of_others(scores, group_ids):
    same = group_ids[:, None] == group_ids
    return ((same * scores).sum(dim=1) - scores) / (same.sum(dim=1) - 1)

def of_group(scores, group_ids):
    same = group_ids[:, None] == group_ids
    return (same * scores).sum(dim=1) / same.sum(dim=1)

def zero(scores, group_ids):
    assert scores.dtype == torch.float64 and scores.device.type == group_ids.device.type == "cpu"
    return 0 * scores

def spoils_its_arguments(scores, group_ids):
    scores.zero_()
    return torch.zeros(len(scores))

def too_many(scores, group_ids):
    return torch.zeros(len(scores) + 1)

def a_list(scores, group_ids):
    return scores.tolist()

def infinite(scores, group_ids):
    return torch.where(scores == 2.0, torch.inf, 0.0)

def fails(scores, group_ids):
    raise KeyError("two\\nlines")

def asserts(scores, group_ids):
    assert len(scores) == 0

def full(scores, group_ids):
    raise torch.OutOfMemoryError("no memory")
"""
LOSSES = """
import torch
from llmrl.functional.losses import clipped_policy_loss
from llmrl.functional.statistics import Maximum, Mean

def clipped(logprobs, old_logprobs, advantages, weights):
    return clipped_policy_loss(logprobs, old_logprobs, advantages, weights, clip_low=0.1, clip_high=0.2)

def reinforce(logprobs, old_logprobs, advantages, weights):
    return -(weights * advantages * logprobs).sum()

def own_metric(*tensors):
    return reinforce(*tensors), {"policy/mine": Mean(1.0, 2.0)}

def per_token(logprobs, old_logprobs, advantages, weights):
    return weights * logprobs

def number(logprobs, old_logprobs, advantages, weights):
    return 0.5

def detached(logprobs, old_logprobs, advantages, weights):
    return (weights * logprobs.detach()).sum()

def plain_metric(*tensors):
    return reinforce(*tensors), {"policy/mine": 1.0}

def three(*tensors):
    return reinforce(*tensors), {}, 3

def per_token_metric(logprobs, old_logprobs, advantages, weights):
    return (weights * logprobs).sum(), {"policy/mine": Mean(weights, 2.0)}

def its_clips(*tensors):
    return reinforce(*tensors), {"policy/clip_fraction": Mean(1.0, 2.0), "policy/approx_kl": Mean(8.0, 2.0)}

TAKEN = ""
def taken(*tensors):
    return reinforce(*tensors), {TAKEN: Mean(1.0, 2.0)}

KINDS = [Mean(1.0, 2.0), Maximum(1.0)]
def mixed(*tensors):
    return reinforce(*tensors), {"policy/mine": KINDS.pop(0)}

def number_as_name(*tensors):
    return reinforce(*tensors), {3: Mean(1.0, 2.0)}

def not_finite(logprobs, old_logprobs, advantages, weights):
    return (weights * logprobs).sum() / 0.0

class Loss:
    def __call__(self, logprobs, old_logprobs, advantages, weights):
        return -(weights * advantages * logprobs).sum()

made = Loss()
two = lambda logprobs, weights: logprobs
named = lambda logprobs, *, old_logprobs, advantages, weights: logprobs
"""


@pytest.fixture(autouse=True)
def _files(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name, text in {"baselines.py": BASELINES, "losses.py": LOSSES}.items():
        (tmp_path / name).write_text(text)


# --- baselines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "ours"), [("of_others", leave_one_out), ("of_group", partial(group_relative, scale="none"))]
)
def test_a_baseline_that_equals_ours_gives_our_advantages(name, ours):
    assert torch.equal(UserBaseline(f"baselines.py:{name}")(SCORES, GROUPS), ours(SCORES, GROUPS))


def test_without_a_baseline_the_advantage_is_the_score():
    assert torch.equal(UserBaseline("baselines.py:zero")(SCORES, GROUPS), SCORES)


def test_a_response_that_could_not_be_scored_is_not_handed_over():
    """As if it had not been sampled; its advantage is 0."""
    scores = SCORES.clone()
    scores[[1, 4]] = torch.nan
    known = ~scores.isnan()
    advantages = UserBaseline("baselines.py:of_others")(scores, GROUPS)
    assert torch.equal(advantages[known], leave_one_out(SCORES[known], GROUPS[known]))
    assert advantages[~known].tolist() == [0.0, 0.0]


def test_where_nothing_could_be_scored_the_function_is_not_called():
    scores = torch.full_like(SCORES, torch.nan)
    assert torch.equal(UserBaseline("baselines.py:fails")(scores, GROUPS), torch.zeros(7))


def test_a_baseline_that_changes_what_it_gets_changes_no_score():
    scores = SCORES.clone()
    assert torch.equal(UserBaseline("baselines.py:spoils_its_arguments")(scores, GROUPS), SCORES)
    assert torch.equal(scores, SCORES)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("too_many", r"returned a tensor of shape \(8,\); expected a tensor of 7 numbers, one for each score$"),
        ("a_list", r"returned '?\[1\.0, .* \(list\); expected a tensor of 7 numbers"),
        ("infinite", r"returned inf for score 3 \(2\.0, group 4\); expected a tensor of 7 numbers, .*, each finite$"),
        ("fails", r"raised KeyError: 'two\\nlines' at .*/baselines\.py:30$"),
        ("asserts", r"raised AssertionError at .*/baselines\.py:33$"),
    ],
)
def test_a_baseline_that_fails_is_named(name, told):
    with pytest.raises(UserCodeFailure, match=rf"^algorithm\.baseline baselines\.py:{name} {told}"):
        UserBaseline(f"baselines.py:{name}")(SCORES, GROUPS)


def test_that_the_memory_is_full_is_passed_on():
    with pytest.raises(torch.OutOfMemoryError, match=r"^no memory$"):
        UserBaseline("baselines.py:full")(SCORES, GROUPS)


# --- losses -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def batch():
    """`logprobs`, `old_logprobs`, `advantages` and `weights`; what is not counted holds NaN."""
    random = torch.Generator().manual_seed(0)
    logprobs, old, advantages = (torch.randn(3, 4, generator=random) for _ in range(3))
    counted = torch.arange(4) < torch.tensor([[4], [1], [3]])
    logprobs = logprobs.where(counted, torch.nan).requires_grad_()
    return logprobs, old.where(counted, torch.nan), advantages, counted / 8


def test_a_loss_that_equals_ours_gives_our_loss_gradient_and_metrics(batch):
    (theirs, their_metrics) = UserLoss("losses.py:clipped")(*batch)
    (ours, our_metrics) = clipped_policy_loss(*batch, clip_low=0.1, clip_high=0.2)
    assert torch.equal(theirs, ours)
    assert torch.equal(*(torch.autograd.grad(loss, batch[0])[0] for loss in (theirs, ours)))
    assert their_metrics == our_metrics


@pytest.mark.parametrize("name", ["reinforce", "made"])
def test_the_gradient_is_that_of_the_loss(batch, name):
    batch = [x.nan_to_num().detach() for x in batch]
    batch[0].requires_grad_()
    loss, _ = UserLoss(f"losses.py:{name}")(*batch)
    assert torch.equal(torch.autograd.grad(loss, batch[0])[0], -(batch[3] * batch[2]))


def test_how_far_the_actor_moved_is_measured_whatever_the_loss_measures(batch):
    batch = [x.nan_to_num() for x in batch]
    _, metrics = UserLoss("losses.py:own_metric")(*batch)
    _, ours = clipped_policy_loss(*batch, clip_low=0.1, clip_high=0.2)
    moved = ("policy/approx_kl", "policy/ratio_max_deviation")
    assert metrics == {**{name: ours[name] for name in moved}, "policy/mine": Mean(1.0, 2.0)}
    assert not any(number.requires_grad for name in moved for number in metrics[name])


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (
            "per_token",
            r"returned a tensor of shape \(3, 4\) as the loss; expected a tensor without dimensions, such as",
        ),
        ("number", r"returned 0\.5 \(float\) as the loss; expected a tensor without dimensions"),
        ("three", r"returned \(Tensor, dict, int\) as the loss; expected"),
        (
            "not_finite",
            r"returned nan as the loss; expected a finite number; select with torch\.where\(weights != 0, x, 0\.0\)",
        ),
        (
            "per_token_metric",
            r"returned a tensor of shape \(3, 4\) in the metric 'policy/mine'; expected numbers, or tensors with",
        ),
        ("number_as_name", r"returned \{3: Mean\(.*\)\} \(dict\) as metrics; expected statistics by name, such as"),
        ("detached", r"returned a loss without gradient; compute it from logprobs, with no detach\(\)"),
        ("plain_metric", r"returned \{'policy/mine': 1\.0\} \(dict\) as metrics; expected statistics by name, such as"),
    ],
)
def test_a_loss_that_returns_something_else_is_named(batch, name, told):
    with pytest.raises(UserCodeFailure, match=rf"^algorithm\.loss losses\.py:{name} {told}"):
        UserLoss(f"losses.py:{name}")(*batch)


@pytest.mark.parametrize(
    "name",
    [
        *("policy/loss", "policy/entropy", "policy/step_kl", "value/loss", "value", "kl/coef"),
        *("score/mean", "score", "score/correct", "actor/grad_norm", "eval/pass_at_4", "iteration"),
    ],
)
def test_a_metric_of_a_loss_that_llmrl_logs_is_named(batch, name):
    loss = UserLoss("losses.py:taken")
    loss.function.__globals__["TAKEN"] = name
    told = rf"taken returned a metric '{name}', which llmrl logs itself; choose another name, such as policy/my_share$"
    with pytest.raises(UserCodeFailure, match=rf"^algorithm\.loss losses\.py:{told}"):
        loss(*(x.nan_to_num() for x in batch))


def test_a_loss_measures_its_own_clips_and_not_how_far_the_actor_moved(batch):
    batch = [x.nan_to_num() for x in batch]
    _, metrics = UserLoss("losses.py:its_clips")(*batch)
    _, ours = clipped_policy_loss(*batch, clip_low=0.1, clip_high=0.2)
    assert metrics["policy/clip_fraction"] == Mean(1.0, 2.0)
    assert metrics["policy/approx_kl"] == ours["policy/approx_kl"]


def test_a_metric_of_a_loss_of_two_kinds_is_named(batch):
    loss = UserLoss("losses.py:mixed")
    batch = [x.nan_to_num() for x in batch]
    loss(*batch)
    told = r"^algorithm\.loss losses\.py:mixed returned a Maximum as the metric 'policy/mine', which was a Mean before"
    with pytest.raises(UserCodeFailure, match=told):
        loss(*batch)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("gone.py:loss", r": there is no file /.*/gone\.py; a path begins in the folder that you run in$"),
        ("losses.py:reinforced", r": losses\.py has no 'reinforced'; did you mean 'reinforce'\?$"),
        ("losses.py:Loss", r" is the class Loss; name a function of \(logprobs, old_logprobs, advantages, weights\)$"),
        ("losses.py:__name__", r" is '.* \(str\); name a function of \(logprobs"),
        (
            "losses.py:two",
            r" takes \(logprobs, weights\) and is called with \(logprobs, old_logprobs, advantages, weights\): "
            "too many positional arguments; change its parameters$",
        ),
        ("losses.py:named", " takes .*: too many positional arguments; change its parameters$"),
        ("builtins:max", " does not tell its parameters; wrap it in a function$"),
    ],
)
def test_a_loss_that_cannot_be_called_is_refused_with_the_way_out(name, told):
    with pytest.raises(UserCodeError, match=rf"^algorithm\.loss {re.escape(name)}{told}"):
        UserLoss(name)


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        GRPOConfig(loss="gone.py:x"),
        GRPOConfig(baseline="gone.py:x", scale="none"),
        PPOConfig(loss="gone.py:x"),
    ],
    ids=repr,
)
def test_whatever_the_settings_name_is_loaded(config):
    with pytest.raises(UserCodeError, match="there is no file"):
        check_user_functions(config)


@pytest.mark.parametrize("config", [GRPOConfig(), GRPOConfig(baseline="leave_one_out", scale="none"), PPOConfig()])
def test_settings_that_name_only_ours_need_no_file(config):
    check_user_functions(config)
