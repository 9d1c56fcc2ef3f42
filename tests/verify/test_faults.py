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
GSPO = Terms(baseline="mean", aggregation="sequence", ratio="sequence", clip_low=0.1, clip_high=0.1)


def test_every_fault_is_one_of_some_estimator():
    several = (GROUPS, SCALED, CRITIC, CISPO, REINFORCE, STEPS, GSPO)
    found = {fault for terms in several for fault, _ in with_faults(terms)}
    assert [fault.name for fault in FAULTS if fault not in found] == []
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


def test_no_two_estimators_have_one_gradient_in_all_games():
    """So that a gradient which is not as claimed has one name."""
    for terms in (GROUPS, SCALED, CRITIC, CISPO, REINFORCE, STEPS):
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
