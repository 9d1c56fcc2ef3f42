"""The rule files that users copy."""

from pathlib import Path

import pytest

from llmrl.rewards.loading import load_function

FOLDER = Path(__file__).parents[2] / "reward_models"


def load(name):
    return load_function(f"{FOLDER}/{name}")


def test_gsm8k_correct():
    responses = ["so 72\n#### 72", "72", "#### 71"]
    assert load("gsm8k.py:correct")(responses=responses, answer=["x\n#### 72"] * 3) == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("so\n#### 72", 1.0),
        ("#### -1,080.5 \n", 1.0),
        ("#### 72 apples", 0.0),
        ("72", 0.0),
        ("####", 0.0),
        ("#### ,", 0.0),
    ],
)
def test_gsm8k_shows_answer(response, score):
    assert load("gsm8k.py:shows_answer")(responses=[response]) == [score]


def test_gsm8k_steps_right():
    response = "Natalia sold 48/2 = <<48/2=24>>24 clips in May,\n48 + 24 = 73 altogether.\n#### 73"
    assert load("gsm8k.py:steps_right")(responses=[response, "#### 72"]) == [[(response.index("4>>"), 1.0)], []]


def test_arithmetic_correct():
    responses = [" 12\n", "12.", "the answer is 12", ""]
    assert load("arithmetic.py:correct")(responses=responses, answer=["12", "12", "12", ""]) == [1.0, 0.0, 0.0, 1.0]
