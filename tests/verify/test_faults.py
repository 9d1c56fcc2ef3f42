from dataclasses import replace

import pytest

from llmrl.verify.claims import Terms, expected_gradient
from llmrl.verify.faults import FAULTS, with_faults
from llmrl.verify.verdict import probes

GROUPS = Terms(baseline="leave_one_out", clip_low=0.2, clip_high=0.28, kl_form="k2")
SCALED = Terms(baseline="mean", scale="std", aggregation="sequence", clip_low=0.2, clip_high=0.28, kl_form="k2")
CRITIC = Terms(
    baseline="critic",
    scale="batch",
    clip_low=0.2,
    clip_high=0.28,
    gamma=0.9,
    trace=0.45,
    value_trace=0.45,
    value_clip=0.2,
)
CISPO = Terms(baseline="mean", scale="std", loss="cispo", clip_low=0.2, clip_high=0.28, kl_form="k2")
REINFORCE = Terms(baseline="constant", baseline_value=1.0, aggregation="constant", kl_form="k1_reward")
STEPS = Terms(baseline="critic", num_steps=2, value_num_steps=2, clip_low=0.2, clip_high=0.28, value_clip=0.2)
TRUNCATED = Terms(baseline="leave_one_out", importance="truncated", importance_cap=1.2, kl_form="k2")
MASKED = replace(TRUNCATED, importance="masked")
OF_RESPONSES = replace(TRUNCATED, importance_level="sequence")
V_TRACE = replace(CRITIC, importance="v_trace", importance_cap=1.2)
OPTIMAL = Terms(baseline="leave_one_out", length_power=1.0, group_size=3, aggregation="constant", kl_form="k2")
OF_BATCH = Terms(baseline="leave_one_out", siblings="rollout", aggregation="constant", kl_form="k2")
IN_TIME = replace(OF_BATCH, credit="token")
MASKING = replace(CRITIC, mask_truncated=True, value_proximal_coef=0.5, step_kl_coef=1.0)
BOOTSTRAPPED = replace(CRITIC, bootstrap_truncated=True)
SHAPED = replace(CRITIC, score_clip=1.5, missing_eos_penalty=0.5, overlong_buffer_tokens=2)
DAPO = replace(SCALED, overlong_buffer_tokens=2, mask_truncated=True, aggregation="token")
GSPO = Terms(baseline="mean", aggregation="sequence", ratio="sequence", clip_low=0.1, clip_high=0.1)
DISTINCT = (GROUPS, SCALED, CRITIC, CISPO, REINFORCE, STEPS)
DISTINCT += (TRUNCATED, MASKED, OF_RESPONSES, V_TRACE, OPTIMAL, OF_BATCH, IN_TIME, MASKING, BOOTSTRAPPED, SHAPED, DAPO)


def test_every_fault_is_one_of_some_estimator():
    several = (*DISTINCT, GSPO)
    found = {fault for terms in several for fault, _ in with_faults(terms)}
    assert [fault.name for fault in FAULTS if fault not in found] == []
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


@pytest.mark.parametrize("terms", DISTINCT)
def test_no_two_estimators_have_one_gradient_in_all_games(terms):
    """So that a gradient which is not as claimed has one name."""
    several = {"as claimed": terms} | {fault.name: wrong for fault, wrong in with_faults(terms)}
    gradients = {
        name: [expected_gradient(each, game).flat for game in probes(exact_critic=False).values()]
        for name, each in several.items()
    }
    names = list(gradients)
    for number, one in enumerate(names):
        for other in names[:number]:
            gap = max((a - b).abs().max() for a, b in zip(gradients[one], gradients[other], strict=True))
            assert gap > 1e-4, (one, other)


def test_a_fault_that_changes_nothing_is_none():
    assert all(wrong != GROUPS for _, wrong in with_faults(GROUPS))
    names = {fault.name for fault, _ in with_faults(Terms(baseline="mean"))}
    assert not names & {"own score in the baseline", "k1 as a loss", "KL without gradient", "value after the token"}
