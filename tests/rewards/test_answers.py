"""Where a text has its answer, and numbers written plainly."""

import pytest

from llmrl.rewards.answers import after_thinking, answer_text, boxed, plain_digits


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("no box", None),
        (r"\boxed{4}", "4"),
        (r"\boxed {4}", "4"),
        (r"\fbox{4}", "4"),
        (r"\boxed 4.", "4"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\boxed{4}}", "4"),
        (r"\boxed{3}, no: \boxed{4}", "4"),
        (r"\boxed{3}. \boxed{4}", "4"),
        (r"$\boxed{3}$, $\boxed{4}$, and $\boxed{5}$", "3, 4, 5"),
        (r"\boxed{3} \text{ or } \boxed{4}", "3, 4"),
        (r"\boxed{2} then \boxed{3} or \boxed{4}", "3, 4"),
        (r"\boxed{3}. Check: \boxed{4", "3"),
        (r"\boxed{4", ""),
        (r"\boxed", ""),
        (r"\boxed{}", ""),
    ],
)
def test_the_last_box_that_is_closed_is_the_answer(text, content):
    assert boxed(text) == content


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        (r"10\,000 and 1\;234\;567", "10000 and 1234567"),
        (r"32,\!348", "32348"),
        ("10{,}000.5", "10000.5"),
        ("10 000, 10\u00a0000, 10\u2009000, 10'000, 10\u2019000, 10~000", ", ".join(["10000"] * 6)),
        ("1,234", "1,234"),
        ("5 100-dollar bills, 2 500g bags, 3 1000 200-page", "5 100-dollar bills, 2 500g bags, 3 1000 200-page"),
        ("10 000-12 000 or 10 000 - 5", "10000-12000 or 10000 - 5"),
        (r"10\,000x", "10000x"),
        ("10 0000, 1000 000, 0.100 200, 1 2 3", "10 0000, 1000 000, 0.100 200, 1 2 3"),
        ("\u22125, \uff0d5", "-5, -5"),
        ("x\u2013y, 5\u20138, is \u20138", "x\u2013y, 5\u20138, is -8"),
    ],
)
def test_numbers_are_written_plainly(text, plain):
    assert plain_digits(text) == plain


def test_thinking_is_not_the_answer_unless_nothing_follows():
    assert after_thinking("<think>3</think> 4") == " 4"
    assert after_thinking("3</think>\n") == "3</think>\n"
    assert after_thinking("4") == "4"


def test_nan_is_no_answer():
    assert answer_text(float("nan")) is None
    assert answer_text("nan") == "nan"


def test_answers_are_texts():
    assert [answer_text(answer) for answer in ("4", 4, 0.5, True, ["4"], ("4", 5), None)] == [
        "4",
        "4",
        "0.5",
        "True",
        "4",
        "4, 5",
        None,
    ]
