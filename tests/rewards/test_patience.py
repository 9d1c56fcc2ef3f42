"""What is said while a reward function is waited for, and when the wait is over."""

import pytest

from llmrl.rewards.patience import Loading, Patience
from tests.rewards.said import Said


def patience(said, *, timeout_s=600.0, limit_s=None):
    return Patience(
        said,
        name="judge.py:judge",
        setting="reward.functions.1",
        timeout_s=timeout_s,
        limit_s=limit_s,
        num_responses=64,
    )


def looks(waiting, seconds):
    """Looks twice a second for so long; whether the limit was exceeded at any."""
    return sum(waiting.look(0.5) for _ in range(int(2 * seconds))) > 0


def test_a_long_call_is_mentioned_after_half_a_minute_and_then_each_minute():
    said = Said()
    assert not looks(patience(said), 29.5)
    assert said.messages == []
    assert not looks(patience(said), 200)
    line = "reward function judge.py:judge: 64 responses, still scoring after {} s; reward.functions.1.timeout_s is 600"
    assert said.messages == [line.format(seconds) for seconds in (30, 90, 150)]


def test_without_a_limit_it_waits_on():
    said = Said()
    assert not looks(patience(said, timeout_s=None), 5000)
    assert said.messages[-1].endswith("reward.functions.1.timeout_s is null")


def test_the_lower_limit_counts():
    assert not looks(patience(Said(), timeout_s=3.0), 3.0)
    assert looks(patience(Said(), timeout_s=3.0), 3.5)
    assert looks(patience(Said(), timeout_s=3.0, limit_s=1.0), 1.5)
    assert patience(Said(), timeout_s=3.0, limit_s=1.5).limit() == "1.5 s (reward.functions.1.timeout_s)"


def test_a_file_that_loads_for_long_is_mentioned_once_and_has_ten_minutes(capsys):
    waiting = Loading("judge.py:judge")
    assert not looks(waiting, 600)
    assert capsys.readouterr().err == "reward function judge.py:judge is still loading after 30 s; its limit is 600 s\n"
    assert looks(waiting, 1)


def test_a_signal_that_progress_raises_comes_through():
    class Stops(Said):
        def advance(self, amount=1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        patience(Stops()).look(0.1)
