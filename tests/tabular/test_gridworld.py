"""Maps: moves by hand, the cliff of the book, slips."""

import pytest
import torch

from llmrl.tabular import draw_policy, gridworld, objective, policy_iteration, value_iteration

CLIFF = "............\n............\n............\nSCCCCCCCCCCG"


def test_moves_by_hand():
    mdp = gridworld("S.\n#G", gamma=1.0, goal_reward=5.0)
    up, right, down, _ = range(4)
    assert mdp.transitions[0, right].argmax() == 1
    assert mdp.transitions[0, up].argmax() == 0
    assert mdp.transitions[0, down].argmax() == 0
    assert mdp.transitions[1, down].argmax() == 3
    assert mdp.expected_rewards[1].tolist() == [-1.0, -1.0, 5.0, -1.0]
    assert mdp.terminal.tolist() == [False, False, True, True]


def test_the_optimum_on_the_cliff_is_thirteen_steps():
    mdp = gridworld(CLIFF, gamma=1.0, goal_reward=-1.0)
    solution = value_iteration(mdp)
    assert objective(mdp, solution.policy).item() == pytest.approx(-13.0)
    assert draw_policy(CLIFF, solution.policy).splitlines()[2] == "→" * 11 + "↓"
    assert draw_policy(CLIFF, solution.policy).splitlines()[3] == "↑CCCCCCCCCCG"


def test_the_cliff_leads_back_to_the_start():
    mdp = gridworld("SC\n.G", gamma=0.9, cliff_reward=-7.0)
    assert mdp.transitions[0, 1].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert mdp.expected_rewards[0, 1] == -7.0


def test_a_slip_is_an_action_at_random():
    still, slippery = (gridworld("S.\n.G", gamma=0.9, slip=slip) for slip in (0.0, 0.4))
    assert torch.allclose(slippery.transitions, 0.6 * still.transitions + 0.1 * still.transitions.sum(1, keepdim=True))
    best = [objective(mdp, policy_iteration(mdp).policy) for mdp in (still, slippery)]
    assert best[0] > best[1]


@pytest.mark.parametrize(
    ("text", "slip", "message"),
    [
        ("S.\n.", 0.0, "rows of equal length"),
        ("..", 0.0, "and an S"),
        ("SX", 0.0, "letter 'X'"),
        ("S", 2.0, r"slip \(2.0\)"),
    ],
)
def test_what_is_no_map_is_refused(text, slip, message):
    with pytest.raises(ValueError, match=message):
        gridworld(text, gamma=0.9, slip=slip)
