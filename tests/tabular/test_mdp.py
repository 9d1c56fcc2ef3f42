"""What a process must be, and its unrolled form."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from llmrl.tabular import evaluate, finite_horizon, value_iteration


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gamma": 1.5}, r"gamma \(1.5\) must lie in \[0, 1\]"),
        ({"horizon": 0}, r"horizon \(0\) must be at least 1"),
        ({"start": torch.full((6,), 0.5, dtype=torch.float64)}, "start must hold probabilities"),
        ({"start": torch.full((5,), 0.2, dtype=torch.float64)}, "shapes do not fit together"),
        ({"terminal": torch.arange(6) >= 4}, "terminal state 4 can be left or pays"),
        ({"rewards": torch.full((6, 3), torch.nan, dtype=torch.float64)}, "rewards must be finite"),
        ({"rewards": torch.ones(6, 3, dtype=torch.float64)}, "terminal state 5 can be left or pays"),
    ],
)
@pytest.mark.usefixtures("production")
def test_what_is_no_process_is_refused(random_mdp, change, message):
    with pytest.raises(ValueError, match=message):
        replace(random_mdp, **change)


@pytest.mark.usefixtures("production")
def test_float32_is_refused(random_mdp):
    with pytest.raises(ValueError, match="float64"):
        replace(random_mdp, transitions=random_mdp.transitions.float())


def test_rewards_of_actions_are_those_of_moves_in_the_mean(random_mdp, random_policy):
    by_action = replace(random_mdp, rewards=random_mdp.expected_rewards)
    assert_close(evaluate(by_action, random_policy), evaluate(random_mdp, random_policy))


def test_unrolled_is_the_recursion_over_steps(random_mdp):
    limited = replace(random_mdp, horizon=4)
    action_values, _ = finite_horizon(limited)
    solved = value_iteration(limited.unrolled()).action_values.view(5, 6, 3)
    assert_close(solved[:4], action_values, rtol=0, atol=1e-10)
    assert_close(solved[4], torch.zeros(6, 3, dtype=torch.float64))


def test_only_a_horizon_can_be_unrolled(random_mdp):
    with pytest.raises(ValueError, match="horizon"):
        random_mdp.unrolled()
