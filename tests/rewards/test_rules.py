"""Verifiers: what counts as the same answer."""

import json
import re
import time
from fractions import Fraction
from pathlib import Path

import pytest

from llmrl.rewards.rules import exact_answer, gsm8k_answer, matches_pattern, numeric_answer, right_equations

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


WILD = [
    ("She pays 12 400 euros.", 12400, 1.0),
    (r"That makes \boxed{12\,400}.", "12400", 1.0),
    (r"$12{,}400$", "12,400", 1.0),
    ("12\u202f400,", "12400", 1.0),
    ("12'400 francs", 12400, 1.0),
    ("12 400", "400", 0.0),
    ("He has 5 100-dollar bills.", "100", 1.0),
    ("25", float("nan"), None),
    ("In 2020 100 people came.", "100", 1.0),
    ("They are 1 2 3", "3", 1.0),
    (r"\boxed{48} eggs, in 4 boxes of 12", "48", 1.0),
    (r"\boxed{48}, no: \boxed{36}", "48", 0.0),
    (r"\boxed{48}, no: \boxed{36}", "36", 1.0),
    (r"\boxed{48", "48", 0.0),
    (r"\boxed{}", "48", 0.0),
    ("<think>maybe 48</think>It is 36.", "36", 1.0),
    ("<think>It is 36", "36", 1.0),
    (r"\$36", r"\$36", 1.0),
    (r"\boxed{\$36}", 36, 1.0),
    (r"\boxed{\frac{3}{8}}", "0.375", 1.0),
    (r"\boxed{2\frac{1}{4}}", "9/4", 1.0),
    ("2 1/4 cups", "2.25", 1.0),
    ("2 1/4 cups", "0.25", 0.0),
    (r"3.2 \times 10^4", "32000", 1.0),
    ("about 3.2e4", 32000, 1.0),
    ("3.2e4", "4", 0.0),
    ("1e999", "1", 0.0),
    ("1e9999999999", "1", 0.0),
    ("(-8)", "-8", 1.0),
    ("it falls by \u20138", "-8", 1.0),
    ("pages 5\u20138", "8", 1.0),
    ("It costs $18 or $20.", 20, 1.0),
    ("between $18 and $20", "18", 0.0),
    ("75 %", "75", 1.0),
    ("25.0", 25, 1.0),
    ("25", 25.0, 1.0),
    ("25", [25], 1.0),
    ("25", None, None),
    ("25", "none of them", None),
    ("room 101", "110", 0.0),
    ("24 hours * 60 = 1,440 minutes", "1440", 1.0),
]
"""Responses, answers of the data, and what a person says."""


@pytest.mark.parametrize("rule", [numeric_answer, gsm8k_answer])
def test_numbers_are_judged_as_a_person_does(rule):
    given = rule([response for response, _, _ in WILD], [answer for _, answer, _ in WILD])
    assert [row for row, score in zip(WILD, given, strict=True) if score != row[2]] == []


@pytest.mark.parametrize("rule", [exact_answer, numeric_answer, gsm8k_answer])
def test_answers_may_be_numbers_and_a_row_without_one_is_not_scored(rule):
    assert rule(["5", "5", "0.5", "5"], [5, 6, 0.5, None]) == [1.0, 0.0, 1.0, None]


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
        ("#### 7 200", 0.0),
        (r"#### \$72", 1.0),
        ("<think>#### 5</think> so #### 72", 1.0),
        (r"The answer is \boxed{72}, from 3 steps", 1.0),
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


@pytest.mark.parametrize(
    "response",
    [
        "48/2=24!",
        "She sold 48/2 = <<48/2=24!>>24.",
        "5 + 4 = 9! and 5 + 4 = 8 and (6 - 2 = 4!)",
        "$1,000 - 20 x 5.5 = $890!, 0.2×50=10!.",
        "2+3*4=14! 2*3+4=10! 20-6-4=10! 20/5/2=2! 20-8/4*2=16! 20-8/(4*2)=19",
        "1/3+1/6=.5! 10/3=3.33, 5-8=-3",
        "3*2=60/10, 2+2=4=4, 1+1=2+0, 2+2=41, 2+2=4.5, 2+2=4,000",  # the right side goes on
        "(1+2)*2+1=3, x2+2=4, 5-(2)*1+2=3, =1+1=2, 3.1+1=2, 3 x 1+1=2",  # and so does the left side
        "5 = 5, 5/0=0, one + one = two, 1 + = 1, ",
        "",
    ],
)
def test_right_equations(response):
    """A mark stands behind the last digit of each that holds."""
    assert right_equations([response]) == [[(mark.start() - 1, 1.0) for mark in re.finditer("!", response)]]


def test_equations_of_thousands_of_digits_or_terms_are_read():
    digits, terms = "9" * 5000, "+".join("1" * 5000)
    responses = [f"{digits}-0={digits}", f"{terms}=5000", f"{terms}=5001"]
    assert right_equations(responses) == [[(10_002, 1.0)], [(10_003, 1.0)], []]


@pytest.mark.skipif(not GSM8K.is_file(), reason=f"{GSM8K} is missing")
def test_steps_of_gsm8k_hold_unless_they_are_rounded():
    steps = re.findall(r"<<([\d.]+[-+*/][^>()]*)>>", GSM8K.read_text(encoding="utf-8"))
    right = [step for step, given in zip(steps, right_equations(steps), strict=True) if given == [(len(step) - 1, 1.0)]]
    assert len(right) / len(steps) > 0.999
    assert right_equations([f"{step}1" for step in right]) == [[]] * len(right)


ARABIC, FULL_WIDTH, BOLD = "\u0664\u0662", "\uff14\uff12", "\U0001d7d2\U0001d7d0"
LOOKALIKES = [ARABIC, FULL_WIDTH, BOLD, "4\u0662", "\u06642", "\uff12 42/1", "42.\uff10", "4,\u0662"]
"""42 in other scripts and in look-alikes of 4 and 2, whole and in part."""


@pytest.mark.parametrize("rule", [numeric_answer, gsm8k_answer])
@pytest.mark.parametrize("number", LOOKALIKES)
def test_digits_are_0_to_9(rule, number):
    said = [f"It is {number}.", f"#### {number}", rf"\boxed{{{number}}}"]
    assert rule(said, ["42"] * 3) == [0.0] * 3
    assert rule(["42"], [number]) == [None]
    assert rule([f"{number} or 42"], ["42"]) == [1.0]


def test_an_equation_in_other_digits_is_none():
    assert right_equations(["\uff11+1=2", "1+\uff11=2", "1+1=\uff12", "1+1=2\uff10"]) == [[]] * 4


N = 100_000
LONG = {
    "digits": "9" * N,
    "thousands": "1" + ",000" * (N // 4),
    "thousands by blanks": "1" + " 000" * (N // 4) + "0",
    "a fraction": "9" * (N // 2) + "/" + "7" * (N // 2),
    "a mixed number": "1 2/" + "3" * N,
    "boxes in boxes": "\\boxed{" * (N // 7),
    "words in boxes": "\\boxed" * (N // 6) + "x" * 9,
    "a sum": "1  +  " * (N // 6),
    "a product": "99999*" * (N // 6) + "1=1",
    "a quotient": "1/" + "/".join(map(str, range(3, N // 7))) + "=1",
    "marks": "####" * (N // 4),
}
"""Responses on which a rule could take time that grows faster than they do."""


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_long_responses_take_little_time(text):
    started = time.process_time()
    for rule in (numeric_answer, gsm8k_answer):
        rule([text, "5"], ["5", text])
    right_equations([text])
    assert time.process_time() - started < 5


@pytest.mark.parametrize("rule", [exact_answer, numeric_answer, gsm8k_answer])
def test_each_response_has_its_own_answer(rule):
    assert rule(["1", "2", "3"], ["1", "3", "3"]) == [1.0, 0.0, 1.0]
    with pytest.raises(ValueError, match="shorter"):
        rule(["1", "2"], ["1"])
