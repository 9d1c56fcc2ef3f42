import inspect

import pytest

from llmrl.user_code import UserCodeFailure
from llmrl.verify.rows import PLAIN, ROWS, Row
from llmrl.verify.targets import rows_of
from llmrl.verify.verdict import verify, verify_all
from tests.verify.faults import in_grpo, in_ppo

PLANTED = [
    (in_grpo, "K3AsALoss", "rloo", "k3 as a loss"),
    (in_grpo, "K1AsALoss", "rloo", "k1 as a loss"),
    (in_grpo, "KLDetached", "rloo", "KL without gradient"),
    (in_grpo, "KLOfTheWrongSign", "rloo", "KL of the wrong sign"),
    (in_grpo, "KLTwice", "rloo", "unknown"),
    (in_grpo, "EntropyOfTheWrongSign", "grpo, defaults", "entropy of the wrong sign"),
    (in_grpo, "StdOverTheBatch", "grpo, defaults", "std over the batch"),
    (in_grpo, "StdOfASample", "grpo, sequence", "std of a sample"),
    (in_grpo, "OwnScoreInTheBaseline", "rloo", "own score in the baseline"),
    (in_grpo, "BaselineOfTheBatch", "rloo", "baseline of the batch"),
    (in_grpo, "LocalDenominators", "grpo, defaults", "local denominators"),
    (in_grpo, "MaskDropped", "dr. grpo", "padding counted, padding read, local denominators"),
    (in_grpo, "RatioToTheReference", "grpo, defaults", "ratio to the reference"),
    (in_grpo, "RatioToTheEngine", "rloo, k3", "ratio to the engine's"),
    (in_grpo, "AggregatedBySequence", "grpo, defaults", "aggregated by sequence"),
    (in_grpo, "WrongSign", "dr. grpo", "wrong sign"),
    (in_grpo, "ClipOfTheWrongSide", "dapo", "clip of the wrong side"),
    (in_grpo, "NoClip", "grpo, defaults", "no clip"),
    (in_grpo, "OneClip", "dapo", "one clip for both sides"),
    (in_grpo, "PaddingRead", "grpo, defaults", "padding read"),
    (in_grpo, "DrawnInOrder", "grpo, defaults", "unknown, order of groups"),
    (in_grpo, "GradientClipped", "cispo", "gradient clipped"),
    (in_grpo, "KLInTheLoss", "reinforce, KL in the reward", "KL in the loss"),
    (in_grpo, "KLInTheLoss", "rloo, KL in the reward", "KL in the loss"),
    (in_grpo, "NoBaseline", "reinforce, constant baseline", "no baseline"),
    (in_grpo, "Standardized", "reinforce", "standardized"),
    (in_grpo, "WrongSign", "reinforce++", "wrong sign"),
    (in_grpo, "BaselineOfTheBatch", "reinforce, mean of the batch", "own score in the baseline"),
    (in_grpo, "OwnLengthInTheBaseline", "opo", "own score in the baseline"),
    (in_grpo, "LengthsNotWeighed", "opo", "lengths not weighed"),
    (in_grpo, "RootsOfLengths", "opo", "weights not squared"),
    (in_grpo, "SquaresOfLengths", "opo", "weights squared twice"),
    (in_grpo, "NotCorrected", "rloo, truncated importance", "not corrected"),
    (in_grpo, "NoCap", "rloo, truncated importance", "no cap"),
    (in_grpo, "MaskedNotCapped", "rloo, truncated importance", "masked, not capped"),
    (in_grpo, "ImportanceOfResponses", "rloo, truncated importance", "importance of responses"),
    (in_grpo, "ImportanceOfTokens", "rloo, importance of responses", "importance of tokens"),
    (in_grpo, "ImportanceUpsideDown", "rloo, importance of responses", "importance upside down"),
    (in_grpo, "ImportanceOfTheLiveActor", "rloo, masked importance", "importance of the live actor"),
    (in_grpo, "CappedAndNoMore", "rloo, masked importance", "capped and no more"),
    (in_ppo, "CriticNotCorrected", "ppo, v-trace", "capped and no more"),
    (in_ppo, "ValuesNotHeld", "ppo, proximal critic", "values not held"),
    (in_ppo, "StepNotPenalized", "ppo, penalized trpo", "step not penalized"),
    (in_ppo, "TruncatedNotBootstrapped", "ppo, truncated bootstrapped", "truncated not bootstrapped"),
    (in_ppo, "TruncatedLearned", "ppo, truncated masked", "truncated responses learned"),
    (in_ppo, "LengthNotPenalized", "ppo, penalties", "length not penalized"),
    (in_ppo, "MissingEOSNotPenalized", "ppo, penalties", "missing EOS not penalized"),
    (in_ppo, "ScoreNotClipped", "ppo, penalties", "score not clipped"),
    (in_ppo, "ReturnsToTheEnd", "ppo, 2 steps, exact critic", "returns to the end"),
    (in_ppo, "CriticNotTrained", "ppo, defaults", "critic not trained"),
    (in_ppo, "CriticLearnsAdvantages", "reinforce with value baseline", "critic learns advantages"),
    (in_ppo, "AdvantagesOneLate", "ppo, defaults", "advantages one late"),
    (in_ppo, "AdvantagesOneEarly", "ppo, defaults", "advantages one early"),
    (in_ppo, "StandardizedInMicrobatches", "ppo, defaults", "local denominators"),
    (in_ppo, "ValueAfterTheToken", "ppo, defaults", "value after the token"),
    (in_ppo, "TerminalBootstrapped", "ppo, defaults", "terminal state bootstrapped"),
    (in_ppo, "ScoreAtEveryToken", "ppo, defaults", "score at every token"),
    (in_ppo, "ScoreAtTheLimit", "ppo, lambda 1", "score at the length limit"),
    (in_ppo, "KLOfTheWrongSign", "ppo, lambda 1", "KL of the wrong sign"),
    (in_ppo, "TraceWithoutGamma", "ppo, gamma 0.9", "trace without gamma"),
    (in_ppo, "CriticLearnsAdvantages", "ppo, defaults", "critic learns advantages"),
    (in_ppo, "ValuesNotClipped", "ppo, defaults", "values not clipped"),
]
HELPERS = {"With", "Replaced", "Compared", "Losing", "Late"}


def marked(*values, name):
    """Values of a test of a row, slow where that is of whole rollouts, each of which is tried."""
    of_rollouts = {row.name for row in ROWS if row.compares_prompts}
    marks = pytest.mark.slow if name in of_rollouts else ()
    return pytest.param(*values, marks=marks, id=name if len(values) == 1 else f"{values[1]}-{name}")


@pytest.mark.parametrize(("file", "code", "name", "found"), [marked(*each, name=each[2]) for each in PLANTED])
def test_a_planted_fault_is_named(file, code, name, found):
    (row,) = [row for row in rows_of(f"{file.__file__}:{code}") if row.name == name]
    report = verify(row, quick=True)
    assert report is not None
    assert ", ".join(fault.name for fault in report.faults) == found
    assert report.reason


def test_every_planted_fault_is_tried():
    for file in (in_grpo, in_ppo):
        classes = {name for name, value in vars(file).items() if inspect.isclass(value)}
        planted = {name for name in classes if vars(file)[name].__module__ == file.__name__} - HELPERS
        assert planted == {code for module, code, _, _ in PLANTED if module is file}
    assert len(PLANTED) > 20


@pytest.mark.parametrize("row", [marked(row, name=row.name) for row in ROWS])
def test_ours_have_the_gradients_that_they_claim(row):
    report = verify(row, quick=True)
    assert report is not None
    assert report.faults == ()
    assert report.claim_error is not None
    assert report.claim_error < 1e-6


def test_numbers_of_rloo_are_those_of_theory():
    report = verify(next(row for row in ROWS if row.name == "rloo"), quick=True)
    assert report is not None
    assert report.factor == pytest.approx(1.0, abs=1e-6)
    assert report.bias < 1e-6
    assert report.bias_kl > 0.01  # the KL of later tokens
    assert report.standard_error == pytest.approx((report.variance / 1024) ** 0.5)
    assert report.to_record() | {"faults": [], "holds": True, "distance": None} == report.to_record()


def test_settings_without_a_claim_are_judged_by_the_true_gradient():
    settings = {**PLAIN, "baseline": "leave_one_out", "max_redraws": 1}
    report = verify(Row(name="any", algorithm="grpo", settings=settings), quick=True)
    assert report is not None
    assert report.claim_error is None
    assert report.faults == ()
    assert "true gradient of the scores" in report.reason


def test_settings_without_a_claim_and_with_a_bias_are_no_claim():
    report = verify(Row(name="any", algorithm="ppo", settings={"normalize_scores": True}), quick=True)
    assert report is not None
    assert [fault.name for fault in report.faults] == ["no claim"]


@pytest.mark.parametrize("name", ["rloo, KL in the reward", "reinforce, KL in the reward", "reinforce++"])
def test_a_kl_in_the_reward_answers_for_later_tokens(name):
    report = verify(next(row for row in ROWS if row.name == name), quick=True)
    assert report is not None
    assert report.bias_kl < 1e-6
    assert report.reason == "the gradient of the objective"


MINE = """
def zero(scores, group_ids):
    return scores * 0

def mean(scores, group_ids):
    return (scores.view(-1, 2) - scores.view(-1, 2).mean(dim=1, keepdim=True)).flatten()

def own(scores, group_ids):
    return scores.sign() * scores.abs() * 1.5

def reinforce(logprobs, old_logprobs, advantages, weights):
    return -(weights * advantages * logprobs.where(weights > 0, 0.0)).sum()

def upside_down(logprobs, old_logprobs, advantages, weights):
    return -reinforce(logprobs, old_logprobs, advantages, weights)
"""


@pytest.fixture
def mine(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    return lambda name: [verify(row, quick=True) for row in rows_of(f"{file}:{name}")]


def test_a_baseline_of_the_user_is_judged_by_the_true_gradient(mine):
    (zero,), (own,) = mine("zero"), mine("own")
    assert zero.faults == ()
    assert zero.factor == pytest.approx(1.0, abs=1e-6)
    assert zero.reason == "1.0000 times the true gradient of the scores, by an estimator of its own"
    (mean,) = mine("mean")
    assert mean.faults == ()
    assert mean.reason.startswith("0.5000 times the true gradient")
    assert mean.reason.endswith("an own score in the baseline makes such a factor")
    assert own.cosine < 0
    assert [fault.name for fault in own.faults] == ["wrong sign"]


def test_a_loss_of_the_user_is_judged_on_policy(mine):
    for report in mine("reinforce"):
        assert report.faults == ()
        assert report.reason.endswith("is judged on-policy only, in the first optimizer step of a rollout")
    for report in mine("upside_down"):
        assert [fault.name for fault in report.faults] == ["wrong sign"]


OWN = """
import torch
from llmrl.algorithms.ppo import PPO
from llmrl.batches import Experience
from llmrl.metrics import Metrics
from llmrl.roles import Algorithm


class Plain(Algorithm):
    def __init__(self, config, *, actor, reference, max_response_tokens):
        self.actor, self.group_size = actor, config.group_size
        self.aggregation, self.max_redraws, self.max_response_tokens = "constant", 0, max_response_tokens

    def experience(self, rollout, scores):
        groups = scores.total.view(-1, self.group_size)
        advantages = (groups - groups.flip(1)).flatten()
        old = self.actor.logprobs(rollout.sequences).logprobs
        advantages = advantages[:, None].expand_as(old)
        return Experience(rollout=rollout, scores=scores, old_logprobs=old, advantages=advantages), Metrics()

    def losses(self, batch, weights):
        logprobs = self.actor.logprobs(batch.sequences).logprobs
        ratio = torch.where(batch.counted, logprobs - batch.old_logprobs, 0.0).exp()
        yield "actor", self.loss(weights * batch.advantages * ratio, batch.counted), Metrics()

    def loss(self, gains, counted):
        return -gains.sum()


class WithoutRatio(Plain):
    def losses(self, batch, weights):
        logprobs = self.actor.logprobs(batch.sequences).logprobs.where(batch.counted, 0.0)
        yield "actor", -(weights * batch.advantages * logprobs).sum(), Metrics()


class ShortOnesMore(Plain):
    def loss(self, gains, counted):
        return -(gains / counted.sum(dim=1, keepdim=True)).sum()


class UpsideDown(Plain):
    def loss(self, gains, counted):
        return gains.sum()


class Nothing(Plain):
    def loss(self, gains, counted):
        return gains.sum() * 0


class SlopeOfNaN(Plain):
    def loss(self, gains, counted):
        return -gains.sum() + 0 * (gains - gains).abs().sqrt().sum()


class OnlyPairs(Plain):
    def experience(self, rollout, scores):
        assert self.group_size == 2
        return super().experience(rollout, scores)


class ThreeFail(Plain):
    def __init__(self, config, **roles):
        super().__init__(config, **roles)
        self.config = config

    def experience(self, rollout, scores):
        [getattr(self.config, name) for name in ("baseline", "scale", "loss", "aggregation")]
        if self.group_size == 3:
            raise RuntimeError("three are too many")
        return super().experience(rollout, scores)


class Crashes(PPO):
    def losses(self, batch, weights):
        raise RuntimeError("oops")


class Detached(PPO):
    def losses(self, batch, weights):
        for module, loss, metrics in super().losses(batch, weights):
            yield module, loss.detach(), metrics
"""


@pytest.fixture
def rows_of_own(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(OWN)
    return lambda name: rows_of(f"{file}:{name}")


@pytest.mark.parametrize(
    ("name", "faults"),
    [
        ("Plain", []),
        ("WithoutRatio", []),
        ("OnlyPairs", []),
        ("SlopeOfNaN", ["unknown", "padding counted", "padding read", "local denominators", "order of groups"]),
        pytest.param("ShortOnesMore", ["aggregated by sequence"], marks=pytest.mark.slow),
        pytest.param("UpsideDown", ["wrong sign"], marks=pytest.mark.slow),
        pytest.param("Nothing", ["no policy gradient"], marks=pytest.mark.slow),
    ],
)
def test_what_a_class_does_not_read_is_its_own(rows_of_own, name, faults):
    rows = [row for row in rows_of_own(name) if row.name in ("grpo, defaults", "opo")]
    findings = verify_all(rows, quick=True)
    (report,) = findings.reports
    assert [fault.name for fault in report.faults] == faults
    assert findings.left_out == ["opo"]
    assert findings.hold == (not faults)
    if not faults:
        assert report.reason == "not the gradient of the objective: it has no KL"


def test_a_row_that_fails_leaves_the_others(rows_of_own):
    rows = [row for row in rows_of_own("ThreeFail") if row.name in ("opo", "reinforce")]
    findings = verify_all(rows, quick=True)
    assert [report.name for report in findings.reports] == ["reinforce"]
    assert list(findings.failures) == ["opo"]
    assert "three are too many" in str(findings.failures["opo"])
    assert not findings.hold


@pytest.mark.parametrize(
    ("name", "message"),
    [("Crashes", r"Crashes\.losses raised RuntimeError: oops"), ("Detached", "loss without gradient")],
)
def test_ppo_of_a_user_that_fails_says_so_in_a_line(rows_of_own, name, message):
    with pytest.raises(UserCodeFailure, match=message):
        verify_all(rows_of_own(name), quick=True)


def test_rows_whose_settings_a_class_does_not_read_are_left_out():
    code = f"{in_grpo.__file__}:BaselineOfTheBatch"
    dapo = Row(name="unread", algorithm="grpo", code=code, settings={**PLAIN, "overlong_buffer_tokens": 1})
    assert verify(dapo, quick=True) is not None
    ignorant = f"{in_grpo.__file__}:NoClip"
    assert verify(Row(name="unread", algorithm="grpo", code=ignorant, settings={"dual_clip": 2.0}), quick=True)
