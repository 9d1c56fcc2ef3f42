"""Equality of mathematics through math-verify."""

import signal
import sys
import threading
import time

import pytest

from llmrl.rewards.loading import load_function
from llmrl.user_code import UserCodeError

WILD = [
    (r"The sum is $\boxed{12{,}600}$.", "12600", 1.0),
    (r"\boxed{12,600}", "12{,}600", 1.0),
    (r"\boxed{1\ 250\ 000}", "1,250,000", 1.0),
    ("\\boxed{4\u202f096}", "4096", 1.0),
    (r"\boxed{640}", r"\$640", 1.0),
    (r"\boxed{\$6.40}", "6.4", 1.0),
    (r"\boxed{\$ 640}", "640", 1.0),
    (r"\boxed{640 \text{ dollars}}", r"\$640", 1.0),
    (r"\boxed{640 dollars}", "640", 1.0),
    (r"\boxed{€25}", "25", 1.0),
    (r"\boxed{-7}", "-7", 1.0),
    ("\\boxed{\u2212" + "7}", "-7", 1.0),
    (r"\boxed{7}", "-7", 0.0),
    (r"\boxed{+7}", "7", 1.0),
    (r"\boxed{07}", "7", 1.0),
    (r"\boxed{7.0}", "7", 1.0),
    (r"\boxed{7.}", 7, 1.0),
    (r"\boxed{0.125}", r"\frac18", 1.0),
    (r"\boxed{.125}", r"\frac{1}{8}", 1.0),
    (r"\boxed{0.333}", r"\frac13", 0.0),
    (r"\boxed{0.0000002}", "0.0000001", 0.0),
    (r"\boxed{1234567}", "1234568", 0.0),
    (r"\boxed{2.5}", 2.5, 1.0),
    (r"\boxed{3}", ["3"], 1.0),
    (r"\boxed{10^{-7}}", 1e-07, 1.0),
    (r"\boxed{2\frac{1}{3}}", r"\frac{7}{3}", 1.0),
    (r"\boxed{2 1/3}", r"\frac{7}{3}", 1.0),
    (r"\boxed{\frac{2}{3}}", r"\frac{4}{6}", 1.0),
    (r"\boxed{\frac{3}{2}}", r"\frac{2}{3}", 0.0),
    (r"\boxed{\tfrac{5}{9}}", "5/9", 1.0),
    (r"\boxed{4.2 \times 10^5}", "420000", 1.0),
    (r"\boxed{2.5\text{ million}}", "2500000", 1.0),
    (r"\boxed{2.5}", "2500000", 0.0),
    (r"\boxed{35\%}", "35", 1.0),
    (r"\boxed{35}", r"35\%", 1.0),
    (r"\boxed{0.35}", r"35\%", 1.0),
    (r"\boxed{35 \text{ percent}}", r"35\%", 1.0),
    (r"\boxed{53\%}", r"35\%", 0.0),
    (r"\boxed{60^{\circ}}", "60", 1.0),
    (r"\boxed{60\text{ degrees}}", r"60^\circ", 1.0),
    (r"\boxed{60°}", r"60^\circ", 1.0),
    (r"\boxed{18\text{ cm}^2}", "18", 1.0),
    (r"\boxed{18 \, \text{cm}^{2}}", r"18\text{ cm}^2", 1.0),
    (r"\boxed{18 cm^2}", "18", 1.0),
    (r"\boxed{65 \text{ mph}}", "65", 1.0),
    (r"\boxed{65\ \mathrm{km/h}}", "65", 1.0),
    (r"\boxed{9\pi \text{ square units}}", r"9\pi", 1.0),
    (r"\boxed{2\sqrt{5}\text{ m}}", r"\sqrt{20}", 1.0),
    (r"\boxed{5 \text{ hours}}", "6", 0.0),
    (r"\boxed{2c}", "2", 0.0),
    (r"\boxed{\frac{1}{e}}", "e^{-1}", 1.0),
    (r"\boxed{2 - \frac{1}{\mathrm{e}}}", r"2 + \frac{1}{\mathrm{e}}", 0.0),
    (r"\boxed{\frac{1}{101!}}", r"\frac{1}{103!}", 0.0),
    (r"\boxed{(x-2)(x+2)}", "x^2-4", 1.0),
    (r"\boxed{x^2+4}", "x^2-4", 0.0),
    (r"\boxed{n = 9}", "9", 1.0),
    (r"\boxed{9}", "n = 9", 1.0),
    (r"\boxed{n=8}", "n = 9", 0.0),
    (r"\boxed{f(x) = 3x - 1}", "3x-1", 1.0),
    (r"\boxed{y=3x-1}", "y=3x+1", 0.0),
    (r"\boxed{x > 4}", r"(4,\infty)", 1.0),
    (r"\boxed{\sin^2 x + \cos^2 x}", "1", 1.0),
    (r"\boxed{3^4}", "81", 1.0),
    (r"\boxed{\log_3 81}", "4", 1.0),
    (r"\boxed{\binom{5}{2}}", "10", 1.0),
    (r"\boxed{5!}", "120", 1.0),
    (r"\boxed{\sqrt[3]{27}}", "3", 1.0),
    (r"\boxed{|{-3}|}", "3", 1.0),
    (r"\boxed{xyz}", "zyx", 1.0),
    (r"\boxed{a+b}", "b+a", 1.0),
    (r"\boxed{a-b}", "b-a", 0.0),
    (r"\boxed{4 - 3i}", "-3i+4", 1.0),
    (r"\boxed{4 + 3i}", "4-3i", 0.0),
    (r"\boxed{\pm 6}", r"\pm 6", 1.0),
    (r"\boxed{6, -6}", r"\pm 6", 1.0),
    (r"\boxed{6}", r"\pm 6", 0.0),
    (r"\boxed{2 \pm \sqrt{3}}", r"2+\sqrt{3}, 2-\sqrt{3}", 1.0),
    (r"\boxed{\{4, 1, 9\}}", r"\{1,4,9\}", 1.0),
    (r"\boxed{1,4,9}", "1, 4, 9", 1.0),
    (r"\boxed{1, 4}", "1, 4, 9", 0.0),
    (r"\boxed{100,200,300}", "100, 200, 300", 1.0),
    (r"$\boxed{2}$ or $\boxed{5}$", "2, 5", 1.0),
    (r"\boxed{5 \text{ or } 2}", "2,5", 1.0),
    (r"\boxed{2 and 5}", "2, 5", 1.0),
    (r"\boxed{x=2, x=5}", "2,5", 1.0),
    (r"\boxed{(3, -1)}", "(3,-1)", 1.0),
    (r"\boxed{(-1, 3)}", "(3,-1)", 0.0),
    (r"\boxed{\left(3, \frac{\pi}{2}\right)}", r"\left( 3, \frac{\pi}{2} \right)", 1.0),
    (r"\boxed{[0, 5)}", "[0,5)", 1.0),
    (r"\boxed{[0, 5]}", "[0,5)", 0.0),
    (r"\boxed{(-\infty, -2) \cup (2, \infty)}", r"(-\infty,-2)\cup(2,\infty)", 1.0),
    (r"\boxed{(-\infty, -2)}", r"(-\infty,-2)\cup(2,\infty)", 0.0),
    (r"\boxed{\begin{pmatrix} 2 & 0 \\ 0 & 3 \end{pmatrix}}", r"\begin{pmatrix} 2 & 0 \\ 0 & 3 \end{pmatrix}", 1.0),
    (r"\boxed{\begin{bmatrix} 2 & 0 \\ 0 & 3 \end{bmatrix}}", r"\begin{pmatrix} 2 & 0 \\ 0 & 3 \end{pmatrix}", 1.0),
    (r"\boxed{\begin{pmatrix} 2 & 0 \\ 0 & -3 \end{pmatrix}}", r"\begin{pmatrix} 2 & 0 \\ 0 & 3 \end{pmatrix}", 0.0),
    (r"\boxed{1011_2}", "1011_2", 1.0),
    (r"\boxed{1011_{3}}", "1011_2", 0.0),
    (r"\boxed{1011}", "1011_2", 1.0),
    (r"\boxed{\text{Thursday}}", "thursday", 1.0),
    (r"\boxed{\text{no}}", r"\text{on}", 0.0),
    ("The answer is Thursday.", r"\text{Thursday}", 1.0),
    ("The answer is Friday.", r"\text{Thursday}", 0.0),
    (r"\boxed{\text{no solution}}", r"\text{No solution}", 1.0),
    (r"\boxed{\text{neither}}", r"\text{odd}", 0.0),
    (r"\boxed{east}", "seat", 0.0),
    (r"\boxed{\text{Sue}}", r"\text{Sue}", 1.0),
    (r"\boxed{\text{Use}}", r"\text{Sue}", 0.0),
    (r"\boxed{false}", "False", 1.0),
    (r"\boxed{Yes}", "yes", 1.0),
    (r"\boxed{\textbf{(D)}}", "D", 1.0),
    (r"\boxed{\textbf{(D)}\ 48}", "D", 1.0),
    (r"\boxed{\textbf{(D)}\ 48}", "48", 1.0),
    (r"\boxed{\textbf{(D)}\ 48}", "E", 0.0),
    (r"\boxed{d}", r"\text{(D)}", 1.0),
    ("So the answer is (D).", "D", 1.0),
    ("The answer is (C)", "D", 0.0),
    (r"\boxed{D. 48}", "D", 1.0),
    (r"\boxed{48}", "D", 0.0),
    (r"\boxed{4:45}", "4:45", 1.0),
    (r"\boxed{4:45 \text{ p.m.}}", r"4:45 \text{ p.m.}", 1.0),
    (r"\boxed{4:45 \text{ PM}}", r"4:45 \text{ p.m.}", 1.0),
    (r"\boxed{4:45 \text{ a.m.}}", r"4:45 \text{ p.m.}", 0.0),
    (r"\boxed{5:45}", "4:45", 0.0),
    (r"\boxed{04:45}", "4:45", 1.0),
    (r"\boxed{4:45}", r"4:45\text{ p.m.}", 1.0),
    (r"\boxed{3:2}", "3:2", 1.0),
    (r"\boxed{2:3}", "3:2", 0.0),
    (r"\boxed{5} no wait, recheck: \boxed{6}", "6", 1.0),
    (r"\boxed{5} no wait, recheck: \boxed{6}", "5", 0.0),
    (r"<think>\boxed{5}</think>The answer is 6.", "6", 1.0),
    (r"so \boxed{6} for 3 of the 8 boys", "6", 1.0),
    (r"\fbox{6}", "6", 1.0),
    (r"$\boxed 6$", "6", 1.0),
    (r"The answer is \boxed{6", "6", 0.0),
    (r"\boxed{6}. Let me verify: \boxed{", "6", 1.0),
    (r"Therefore, $x = \boxed{\frac{\sqrt{2}}{2}}$", r"\frac{1}{\sqrt{2}}", 1.0),
    (r"\[ \boxed{ 6 } \]", "6", 1.0),
    ("**Answer:** 6", "6", 1.0),
    ("#### 6", "6", 1.0),
    ("We get $a=2$ and $b=3$, so $a+b = 5$.", "5", 1.0),
    ("It cannot be done.", "6", 0.0),
    ("", "6", 0.0),
    (r"\boxed{}", "6", 0.0),
    (r"\boxed{?}", "6", 0.0),
    (r"\boxed{6}", "", None),
    (r"\boxed{6}", None, None),
    (r"\boxed{6}", "so it is $6$.", 1.0),
    (r"\boxed{6}", r"Thus \boxed{6}", 1.0),
    (r"\boxed{6}", "reasoning 2+4 #### 6", 1.0),
    (r"\boxed{6}", "2+3=5\n#### 5", 0.0),
    (r"\boxed{\frac{1}{0}}", "6", 0.0),
    (r"\boxed{6\\", "6", 0.0),
    (r"\boxed{\frac{6}", "6", 0.0),
    (r"\boxed{\infty}", r"\infty", 1.0),
    (r"\boxed{-\infty}", r"\infty", 0.0),
    (r"\boxed{\emptyset}", r"\varnothing", 1.0),
    (r"\boxed{6.283}", r"2\pi", 0.0),
    (r"\boxed{1/3}", "0.333333", 1.0),
    (r"\boxed{2π}", r"2\pi", 1.0),
    (r"\boxed{√2}", r"\sqrt{2}", 1.0),
    (r"\boxed{3√2}", r"3\sqrt{2}", 1.0),
    (r"\boxed{∞}", r"\infty", 1.0),
    (r"\boxed{x ≤ 3}", r"x \le 3", 1.0),
    (r"\boxed{x≥3}", r"x \leq 3", 0.0),
    (r"\boxed{∅}", r"\emptyset", 1.0),
    (r"\boxed{½}", "1/2", 1.0),
    (r"\boxed{x²}", "x^2", 1.0),
    ("They sold 10 000 tickets.", "10000", 1.0),
    ("He has 5 100-dollar bills.", "5100", 0.0),
    ("He has 5 100-dollar bills.", "100", 1.0),
    ("25", float("nan"), None),
    ("They sold 9{,}500 tickets.", 9500, 1.0),
    ("x = -5", "-5", 1.0),
    ("so the final answer is 3/4.", r"\frac34", 1.0),
    ("The total is 15 + 3 = 18", "18", 1.0),
    (r"The final answer is $\frac{7}{2}$. I hope it is correct.", "3.5", 1.0),
    (r"so $x\in(2,5]$", "(2,5]", 1.0),
    (r"\boxed{(2,5]}", r"x\in(2,5]", 1.0),
    (r"\boxed{2<x\le5}", "(2,5]", 1.0),
    (r"\boxed{k \geq 3}", r"[3,\infty)", 1.0),
    (r"\boxed{x^2 = 4}", "2", 0.0),
    (r"\boxed{5x}", "5", 0.0),
    (r"\boxed{5 m}", "5", 1.0),
    (r"\boxed{30 s}", r"30\text{ s}", 1.0),
    (r"\boxed{3:00}", r"3\text{:}00", 1.0),
    (r"\boxed{A, C}", "A,C", 1.0),
    (r"\boxed{C,A}", "A,C", 1.0),
    (r"\boxed{A, B}", "A,C", 0.0),
    (r"\boxed{\text{B, D}}", r"\text{B, D}", 1.0),
    (r"\boxed{\text{I and III}}", r"\text{I and III}", 1.0),
    (r"\boxed{\text{I and II}}", r"\text{I and III}", 0.0),
    (r"\boxed{12\text{ and }13}", "12,13", 1.0),
    (r"\boxed{\text{12 and 13}}", "12,13", 1.0),
    (r"\boxed{17^{\text{th}}}", "17", 1.0),
    (r"\boxed{17\text{th}}", "17", 1.0),
    (r"\boxed{\text{Team A}}", r"\text{Team B}", 0.0),
    (r"\boxed{\text{June 20}}", r"\text{June 20}", 1.0),
    (r"\boxed{\text{July 20}}", r"\text{June 20}", 0.0),
    (r"\boxed{\text{June 21}}", r"\text{June 20}", 0.0),
    (r"\boxed{a=1,b=2}", "a=1, b=2", 1.0),
    (r"\boxed{(a,b)=(1,2)}", "(1,2)", 1.0),
    (r"\boxed{a=2, b=1}", "a=1, b=2", 0.0),
    (r"\boxed{1:2:3}", "1:2:3", 1.0),
    (r"\boxed{1:2:4}", "1:2:3", 0.0),
    (r"\boxed{5\sqrt{13}}", r"5\sqrt{13}", 1.0),
    (r"\boxed{\dfrac{3+\sqrt{5}}{2}}", r"\frac{3+\sqrt5}{2}", 1.0),
    (r"\boxed{0}", "0", 1.0),
    (r"\boxed{-0}", "0", 1.0),
    (r"\boxed{.5}", r"50\%", 1.0),
    (r"\boxed{5\%}", "0.5", 0.0),
    (r"\boxed{66.67\%}", "66.67", 1.0),
    (r"\boxed{2021}", r"\boxed{2021}", 1.0),
    (r"\boxed{\$1,234.50}", "1234.5", 1.0),
    (r"\boxed{3,\!628,\!800}", "10!", 1.0),
    (r"\boxed{ \text{The answer is } 5}", "5", 1.0),
    (r"\boxed{\textbf{5}}", "5", 1.0),
    (r"\boxed{\mathbf{5}}", "5", 1.0),
    (r"\boxed{x=5 \text{ or } x=-1}", "-1, 5", 1.0),
    (r"\boxed{5}", "-1,5", 0.0),
    (r"\boxed{\frac{x+1}{x-1}}", r"\frac{-x-1}{1-x}", 1.0),
    (r"\boxed{7 \pmod{11}}", "7", 1.0),
    (r"\boxed{2^{100}}", "1267650600228229401496703205376", 1.0),
    (r"\boxed{2^{100}}", "1267650600228229401496703205377", 0.0),
    (r"\boxed{1267650600228229401496703205377}", "2^{100}", 0.0),
    (r"\boxed{\left\lfloor 3.7 \right\rfloor}", "3", 1.0),
    ("\\boxed{5}\n\n\\boxed{7}", "7", 1.0),
    ("$5", "5", 1.0),
    (r"It is \$5.", "5", 1.0),
    (r"\boxed{\text{Answer: }42}", "42", 1.0),
]
"""Responses, answers of the data, and what a person says: of the kinds of MATH, AIME and AMC, and of models."""


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


def test_answers_are_judged_as_a_person_does(math_equal):
    assert len(WILD) >= 100
    given = math_equal([response for response, _, _ in WILD], [answer for _, answer, _ in WILD])
    assert [row for row, score in zip(WILD, given, strict=True) if score != row[2]] == []


@pytest.mark.parametrize(
    "response",
    [
        r"$9^{9^{9^{9}}}$",
        r"\boxed{2^{2^{2^{2^{2^{2^2}}}}}}",
        r"\boxed{" + "(" * 300 + "6" + ")" * 300 + "}",
        "{" * 3000,
    ],
)
def test_a_runaway_response_is_wrong_after_a_while(math_equal, monkeypatch, response):
    monkeypatch.setattr("llmrl.rewards.math._TIMEOUT_S", 0.5)
    started = time.perf_counter()
    assert math_equal([response, "10"], ["10", "10"]) == [0.0, 1.0]
    assert time.perf_counter() - started < 3


def test_an_alarm_of_the_caller_keeps_its_handler(math_equal):
    before = signal.signal(signal.SIGALRM, print)
    try:
        math_equal(["1"], ["1"])
        assert signal.getsignal(signal.SIGALRM) is print
    finally:
        signal.signal(signal.SIGALRM, before)


def test_the_end_of_a_long_response_is_read_in_time(math_equal):
    started = time.perf_counter()
    assert math_equal(["We try $x_1 = 3$, then 4 (see \\[2\\]).\n" * 5000 + "So it is $9$."], ["9"]) == [1.0]
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize("number", ["\u0664\u0662", "\uff14\uff12", "\U0001d7d2\U0001d7d0", "4\u0662"])
def test_digits_are_0_to_9(math_equal, number):
    assert math_equal([rf"\boxed{{{number}}}", f"It is ${number}$.", number], ["42"] * 3) == [0.0] * 3


@pytest.mark.parametrize("box", ["9" * 100_000, "(" * 50_000 + ")" * 50_000, "1+" * 50_000 + "1"])
def test_a_box_that_is_longer_than_any_answer_is_not_read(math_equal, monkeypatch, box):
    monkeypatch.setattr("llmrl.rewards.math._same_mathematics", None)
    assert math_equal([rf"\boxed{{{box}}}"], ["10"]) == [0.0]


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
    with pytest.raises(UserCodeError, match=r'math-verify is not installed: pip install "llmrl\[math\]"$'):
        load_function("llmrl.rewards.math:math_equal")
