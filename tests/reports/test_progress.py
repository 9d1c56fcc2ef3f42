import io
import sys

import pytest
from rich.console import Console

from llmrl.reports import progress
from llmrl.reports.progress import (
    LiveProgress,
    OfRank,
    PlainProgress,
    Silent,
    SteadyProgress,
    format_duration,
    format_headlines,
    format_number,
)

SHOW_CURSOR = "\x1b[?25h"


class Clock:
    """A monotonic clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "monotonic", clock)
    return clock


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Console:
    monkeypatch.setenv("TERM", "xterm-256color")
    return Console(file=io.StringIO(), force_terminal=True, width=100)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (0.0, "0"),
        (0.41234, "0.412"),
        (-0.01, "-0.01"),
        (1e-5, "1e-05"),
        (12.34, "12.3"),
        (99.96, "100"),
        (1234.5, "1,234"),
        (-12345678.0, "-12,345,678"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
    ],
)
def test_format_number(x: float, text: str):
    assert format_number(x) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0, "0:00"), (59.6, "1:00"), (451.0, "7:31"), (3599.4, "59:59"), (7651.0, "2:07:31")]
)
def test_format_duration(seconds: float, text: str):
    assert format_duration(seconds) == text


def test_headlines_come_in_their_own_order_and_nothing_else_does():
    values = {"policy/loss": 1.0, "tokens/per_s": 12345.0, "kl/sequence": 0.01, "score/mean": 0.41234}
    assert format_headlines(values) == "score/mean 0.412  kl/sequence 0.01  tokens/per_s 12,345"


def test_headlines_show_what_a_dead_run_shows():
    values = {"actor/grad_norm": 0.0, "response/finished_fraction": 0.5, "group/flat_fraction": 1.0, "score/std": 0.0}
    told = "score/std 0  group/flat_fraction 1  response/finished_fraction 0.5  actor/grad_norm 0"
    assert format_headlines(values) == told


def test_headlines_show_the_parts_of_the_score_where_there_are_several():
    whole = {"score/mean": 1.5, "score/std": 0.5, "score/unscored": 0.0}
    assert format_headlines(whole | {"score/right": 1.5}) == "score/mean 1.5  score/std 0.5"
    both = format_headlines(whole | {"score/right": 1.0, "score/short": 0.5, "kl/sequence": 2.0})
    assert both == "score/mean 1.5  score/std 0.5  score/right 1  score/short 0.5  kl/sequence 2"


# --- plain ------------------------------------------------------------------------------------------------------------


def test_plain_prints_a_line_per_iteration_with_its_time_and_the_time_left(clock: Clock):
    stream = io.StringIO()
    with PlainProgress(stream) as plain:
        plain.begin(4)
        clock.now += 10.0
        plain.iteration(1, {"score/mean": 0.25})
        clock.now += 20.04
        plain.iteration(2, {})
    assert stream.getvalue().splitlines() == [
        "iteration 1/4  score/mean 0.25  10.0 s  left 0:30",
        "iteration 2/4  20.0 s  left 0:30",  # the mean of 10 and 20 seconds, twice
    ]


def test_quick_iterations_share_a_line_a_second_and_the_last_has_its_own(clock: Clock):
    stream = io.StringIO()
    with PlainProgress(stream) as plain:
        plain.begin(13)
        for number in range(1, 14):
            clock.now += 0.25
            plain.iteration(number, {})
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["4/13", "8/13", "12/13", "13/13"]


def test_a_line_in_between_takes_no_iteration_its_own(clock: Clock):
    stream = io.StringIO()
    with PlainProgress(stream) as plain:
        plain.begin(3)
        plain.phase("update", 2)
        clock.now += 40.0
        plain.advance(2)
        clock.now += 0.25
        plain.iteration(1, {})
    assert [line.split()[:2] for line in stream.getvalue().splitlines()] == [["update", "2/2"], ["iteration", "1/3"]]


def test_a_resumed_run_is_timed_by_its_own_iterations(clock: Clock):
    stream = io.StringIO()
    with PlainProgress(stream) as plain:
        plain.begin(40)
        clock.now += 60.0
        plain.iteration(31, {})
    assert stream.getvalue() == "iteration 31/40  60.0 s  left 9:00\n"


def test_plain_says_every_half_minute_how_far_the_phase_is(clock: Clock):
    stream = io.StringIO()
    with PlainProgress(stream) as plain:
        plain.begin(1)
        plain.phase("rollout", 80)
        for _ in range(65):
            clock.now += 1.0
            plain.advance()
        plain.phase("update", 4)
        clock.now += 30.0
        plain.advance(2)
    assert stream.getvalue().splitlines() == [
        "rollout 30/80 in iteration 1/1  1/s  0:50 left in this phase",
        "rollout 60/80 in iteration 1/1  1/s  0:20 left in this phase",
        "update 2/4 in iteration 1/1  0.0667/s  0:30 left in this phase",
    ]


def test_plain_says_how_far_a_phase_is_where_there_are_no_iterations(clock: Clock):
    """An evaluation."""
    stream = io.StringIO()
    with PlainProgress(stream) as plain:
        plain.phase("evaluation", 8)
        clock.now += 40.0
        plain.advance(2)
    assert stream.getvalue() == "evaluation 2/8  0.05/s  2:00 left in this phase\n"


def test_a_phase_of_a_resumed_run_is_of_the_iteration_that_comes_next(clock: Clock):
    stream = io.StringIO()
    with PlainProgress(stream) as plain:
        plain.begin(9, 4)
        plain.iteration(5, {})
        plain.phase("reward", 2)
        clock.now += 60.0
        plain.advance()
    assert stream.getvalue().splitlines()[-1].startswith("reward 1/2 in iteration 6/9  ")


def test_a_phase_between_iterations_is_after_the_last_one(clock: Clock):
    stream = io.StringIO()
    with PlainProgress(stream) as plain:
        plain.begin(2)
        plain.iteration(2, {})
        plain.phase("saving", 1)
        clock.now += 60.0
        plain.advance()
    assert stream.getvalue().splitlines()[-1].startswith("saving 1/1 after iteration 2/2  ")


def test_any_line_holds_the_heartbeat_back(clock: Clock):
    stream = io.StringIO()
    with PlainProgress(stream) as plain:
        plain.begin(1)
        plain.phase("rollout", 80)
        clock.now += 29.0
        plain.message("saved")
        clock.now += 29.0
        plain.advance()
    assert stream.getvalue() == "saved\n"


# --- live -------------------------------------------------------------------------------------------------------------


def test_live_shows_iterations_phase_and_headlines(terminal: Console, clock: Clock):
    with LiveProgress(terminal) as live:
        live.begin(40)
        clock.now += 60.0
        live.iteration(3, {"score/mean": 0.41234, "policy/loss": 7.0})
        live.phase("rollout", 512)
        live.phase("update", 16)
        live.advance()
        live.advance(4)
    last = shown(terminal).rsplit("iteration", 1)[1]
    for text in ("3/40", "37:00 left", "update", "5/16", "score/mean 0.412"):
        assert text in last
    assert "rollout" not in last
    assert "policy/loss" not in last


def test_live_shows_where_a_resumed_run_begins(terminal: Console):
    with LiveProgress(terminal) as live:
        live.begin(40, 12)
    assert "12/40" in shown(terminal)


def test_live_messages_stay_and_are_taken_literally(terminal: Console):
    with LiveProgress(terminal) as live:
        live.begin(1)
        live.message("saved [bold]" + "x" * 200)
    assert "saved [bold]" + "x" * 200 in shown(terminal)


def test_the_terminal_is_given_back_after_an_exception(terminal: Console):
    def fail() -> None:
        with LiveProgress(terminal):
            assert SHOW_CURSOR not in shown(terminal)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert SHOW_CURSOR in shown(terminal)


# --- which ------------------------------------------------------------------------------------------------------------


def test_plain_lines_go_on_where_the_live_block_fails(terminal: Console, clock: Clock, monkeypatch: pytest.MonkeyPatch):
    stream = io.StringIO()
    with SteadyProgress(LiveProgress(terminal), PlainProgress(stream)) as steady:
        steady.begin(4)
        steady.phase("rollout", 10)
        steady.iteration(1, {})
        steady.message("all is well")
        assert stream.getvalue() == ""
        monkeypatch.setattr(steady.live.phases, "advance", lambda *_: 1 / 0)
        steady.phase("update", 2)
        clock.now += 40.0
        steady.advance()
        steady.iteration(2, {"score/mean": 0.5})
        steady.message("saved")
    assert stream.getvalue().splitlines() == [
        "warning: the live display failed (ZeroDivisionError: division by zero); plain lines follow",
        "iteration 2/4  score/mean 0.5  40.0 s  left 1:20",
        "saved",
    ]
    assert SHOW_CURSOR in shown(terminal)


@pytest.mark.parametrize("moment", ["start", "stop"])
def test_a_live_block_that_does_not_start_or_stop_ends_nothing(
    terminal: Console, monkeypatch: pytest.MonkeyPatch, moment: str
):
    stream, live = io.StringIO(), LiveProgress(terminal)
    monkeypatch.setattr(live.live, moment, lambda *_: 1 / 0)
    with SteadyProgress(live, PlainProgress(stream)) as steady:
        steady.message("hello")
    assert ("hello" in stream.getvalue()) == (moment == "start")
    assert stream.getvalue().startswith("warning: the live display failed")


@pytest.mark.parametrize(("is_terminal", "kind"), [(True, SteadyProgress), (False, PlainProgress)])
def test_the_live_block_is_for_terminals(monkeypatch: pytest.MonkeyPatch, is_terminal: bool, kind: type):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    assert type(progress.make_progress()) is kind


HOSTILE = "\x1b]0;title\x07\x1b[2J[red]\rx\u202e"
SEEN = r"\x1b]0;title\x07\x1b[2J[red]\rx\u202e"


def test_control_characters_of_a_message_are_shown_in_lines():
    stream = io.StringIO()
    PlainProgress(stream).message(HOSTILE)
    assert stream.getvalue() == SEEN + "\n"


def test_control_characters_of_a_message_are_shown_on_a_terminal(terminal: Console):
    with LiveProgress(terminal) as live:
        live.message(HOSTILE)
    assert SEEN in shown(terminal)


def test_messages_of_another_rank_have_its_number_and_all_else_passes_through(capsys):
    passed = []

    class Kept(Silent):
        def advance(self, amount: int = 1) -> None:
            passed.append(amount)

        def message(self, text: str) -> None:
            passed.append(text)

    progress = OfRank(Kept(), 3)
    progress.message("warning: reward function rules.py:judge\n failed")
    progress.advance(0)
    assert capsys.readouterr() == ("", "rank 3: warning: reward function rules.py:judge\n failed\n")
    assert passed == [0]
