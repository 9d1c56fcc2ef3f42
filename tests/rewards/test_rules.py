"""Verifiers: what counts as the same answer."""

import json
import re
from fractions import Fraction
from pathlib import Path

import pytest

from llmrl.rewards.rules import exact_answer, gsm8k_answer, matches_pattern, numeric_answer

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k_train.jsonl"


@pytest.mark.parametrize(
    ("response", "answer", "score"),
    [("  a\n b ", "a b", 1.0), ("ab", "a b", 0.0), ("A b", "a b", 0.0), ("", "", 1.0), ("7", 7, 1.0)],
)
def test_exact_answer(response, answer, score):
    assert exact_answer([response], [answer]) == [score]


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("72", "72"),
        ("The answer is 72.", "72"),
        ("48 + 24 = 72", "72"),
        ("1,080", "1080"),
        ("it is $2,520,000!", "2520000"),
        ("1080.00", "1,080"),
        ("$1,080.50", "1080.5"),
        ("-5", "-5"),
        ("\u22125", "-5"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("x = -5", "-5"),
        ("10-5", "5"),
        ("covid-19", "19"),
        ("50%", "50"),
        (r"50\%", "50"),
        (".5", "0.5"),
        ("0.75", "3/4"),
        ("6/8", "3/4"),
        ("-3/4", "-0.75"),
        ("1,000/2", "500"),
        ("either 1,2,3", "3"),
        ("007", "7"),
        ("-0", "0"),
        ("0.1", 0.1),
        ("12", 12),
        ("9" * 5000, "9" * 5000),
        ("100000000000000000000000000000001", "100000000000000000000000000000001"),
    ],
)
def test_numbers_that_are_equal(response, answer):
    assert numeric_answer([response], [answer]) == [1.0]


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("7", "72"),
        ("72 and then 73", "72"),
        ("5", "-5"),
        ("10-5", "-5"),
        ("0.333333333333333333333333", "1/3"),
        ("0.30000000000000004", "0.3"),
        ("100000000000000000000000000000001", "100000000000000000000000000000002"),
        ("1/0", "0"),
        ("none", "0"),
        ("", "0"),
        ("__import__('os').getpid()", "0"),
    ],
)
def test_numbers_that_differ(response, answer):
    assert numeric_answer([response], [answer]) == [0.0]


def test_every_fraction_equals_itself_and_not_its_neighbour():
    fractions = [Fraction(n, d) for n in range(-20, 21) for d in range(1, 9)]
    texts = [f"so {f.numerator}/{f.denominator}." for f in fractions]
    nearby = [f"{(f + 1).numerator}/{(f + 1).denominator}" for f in fractions]
    assert set(numeric_answer(texts, [str(f) for f in fractions])) == {1.0}
    assert set(numeric_answer(texts, nearby)) == {0.0}


@pytest.mark.parametrize("rule", [numeric_answer, gsm8k_answer])
@pytest.mark.parametrize("answer", ["", "no number", "1/0"])
def test_an_answer_without_a_number_cannot_be_scored(rule, answer):
    assert rule(["5", ""], [answer, answer]) == [None, None]


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("48 + 24 = 72\n#### 72", 1.0),
        ("#### 72\n\nQuestion: 5 apples ... #### 5", 1.0),
        ("#### $72.00", 1.0),
        ("####72", 1.0),
        ("the answer is 72", 1.0),
        ("#### Step 1\nthe answer is 72", 1.0),
        ("#### 5, no, 72", 0.0),
        ("72 or 73", 0.0),
        ("#### -72", 0.0),
        ("####", 0.0),
        ("", 0.0),
    ],
)
def test_gsm8k_answer(response, score):
    assert gsm8k_answer([response], ["She sold 48/2 = <<48/2=24>>24.\n#### 72"]) == [score]


@pytest.mark.skipif(not GSM8K.is_file(), reason=f"{GSM8K} is missing")
def test_every_gsm8k_answer_equals_its_own_number_and_not_the_next():
    answers = [json.loads(line)["answer"] for line in GSM8K.read_text(encoding="utf-8").splitlines()]
    numbers = [int(answer.rpartition("\n#### ")[2].replace(",", "")) for answer in answers]
    assert len(answers) == 7473
    assert gsm8k_answer(answers, answers) == [1.0] * 7473
    assert gsm8k_answer([f"The answer is {number:,}." for number in numbers], answers) == [1.0] * 7473
    assert gsm8k_answer([f"#### {number + 1}" for number in numbers], answers) == [0.0] * 7473


def test_matches_pattern_searches():
    pattern = re.compile(r"####\s*-?\d+$")
    assert matches_pattern(["so\n#### 5", "#### 5 apples", "#### five"], pattern) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("rule", [exact_answer, numeric_answer, gsm8k_answer])
def test_each_response_has_its_own_answer(rule):
    assert rule(["1", "2", "3"], ["1", "3", "3"]) == [1.0, 0.0, 1.0]
    with pytest.raises(ValueError, match="shorter"):
        rule(["1", "2"], ["1"])
