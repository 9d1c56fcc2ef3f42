"""Equality of mathematics through math-verify."""

import sys
import threading

import pytest

from llmrl.rewards.loading import RewardLoadError, load_function


@pytest.fixture(scope="module")
def math_equal():
    pytest.importorskip("math_verify")
    return load_function("llmrl.rewards.math:math_equal")


@pytest.mark.parametrize(
    ("response", "answer", "score"),
    [
        (r"so \boxed{0.5}", r"\frac{1}{2}", 1.0),
        ("the answer is 1/2", r"$\frac{1}{2}$", 1.0),
        ("$1+x$", "x+1", 1.0),
        (r"\boxed{\{2,1\}}", r"Thus \boxed{\{1,2\}}", 1.0),
        ("72", 72, 1.0),
        ("71", 72, 0.0),
        ("no mathematics here", "72", 0.0),
        ("", "72", 0.0),
        ("72", "", None),
    ],
)
def test_math_equal(math_equal, response, answer, score):
    assert math_equal([response], [answer]) == [score]


def test_a_runaway_response_is_wrong_after_a_while(math_equal, monkeypatch):
    monkeypatch.setattr("llmrl.rewards.math._TIMEOUT_S", 1)
    assert math_equal([r"$9^{9^{9^{9}}}$", "10"], ["10", "10"]) == [0.0, 1.0]


def test_outside_the_main_thread_it_says_so(math_equal):
    raised = []

    def run():
        try:
            math_equal(["1"], ["1"])
        except RuntimeError as error:
            raised.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert raised == ["math_equal must run in the main thread: only there can a runaway comparison be stopped"]


def test_a_missing_extra_shows_at_load(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    monkeypatch.delitem(sys.modules, "llmrl.rewards.math", raising=False)
    with pytest.raises(RewardLoadError, match=r'math-verify is not installed: pip install "llmrl\[math\]"$'):
        load_function("llmrl.rewards.math:math_equal")
