"""A function is asked again where a service failed, and about fewer responses where it failed on some."""

import math
import time

import pytest

from llmrl.rewards.asking import SEARCH_CALLS, Asker, halves
from llmrl.rewards.calls import Calls, Failure
from llmrl.rewards.config import RewardFunctionConfig
from tests.rewards.said import Said


class Judge:
    """Scores each response by its number; fails where one of `bad` is in the batch. Keeps the sizes of its calls."""

    def __init__(self, *bad, kind=ValueError, times=math.inf):
        self.bad, self.kind, self.times = set(bad), kind, times
        self.calls = []

    def __call__(self, responses):
        self.calls.append(responses)
        if self.bad & set(responses) and self.times > 0:
            self.times -= 1
            raise self.kind("bad")
        return [float(number) for number in responses]


def asker_of(function, said=None, **settings):
    config = RewardFunctionConfig(name="judge.py:judge", **settings)
    return Asker(Calls({config.name: function}), config, place="reward.functions.0", progress=said or Said())


def columns(number):
    return {"responses": list(range(number))}


def failed(asker, number):
    failure = asker.ask(columns(number))
    assert isinstance(failure, Failure)
    return failure


def read(answer, num):
    assert len(answer) == num
    return answer


@pytest.fixture
def pauses(monkeypatch):
    """No pause; the seconds that each would have taken."""
    seconds = []
    monkeypatch.setattr(Asker, "_pause", lambda self, pause: seconds.append(pause))
    return seconds


def test_a_service_is_asked_again_after_pauses_that_double(pauses):
    said, judge = Said(), Judge(0, kind=ConnectionError, times=8)
    asker = asker_of(judge, said, retries=9)
    assert asker.repeat(failed(asker, 2), columns(2)) == [0.0, 1.0]
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]
    assert said.messages[0].startswith("reward function judge.py:judge raised ConnectionError: bad at ")
    assert said.messages[0].endswith("; it is called again in 1 s")


@pytest.mark.parametrize(
    ("kind", "retries", "calls"), [(ConnectionError, 2, 3), (ConnectionError, 0, 1), (KeyError, 2, 1)]
)
def test_it_is_asked_as_often_as_is_set_and_only_if_it_may_help(pauses, kind, retries, calls):
    judge = Judge(0, kind=kind)
    asker = asker_of(judge, retries=retries)
    assert isinstance(asker.repeat(failed(asker, 2), columns(2)), Failure)
    assert len(judge.calls) == calls


def test_a_pause_ends_where_the_run_is_to_stop():
    class Stops(Said):
        def advance(self, amount=1):
            raise KeyboardInterrupt

    asker = asker_of(Judge(0, kind=ConnectionError), Stops())
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        asker._pause(1000.0)
    assert time.monotonic() - started < 100


@pytest.mark.parametrize("bad", [0, 1, 255, 256, 300, 511])
def test_a_failing_row_is_found_by_halves(bad):
    judge = Judge(bad)
    asker = asker_of(judge)
    failure = failed(asker, 512)
    assert asker.failing_row(failure, columns(512)) == bad
    assert len(judge.calls) - 1 <= math.log2(512) + 1
    assert sum(map(len, judge.calls[1:])) <= 512  # about the work of one more call


def test_the_first_of_several_failing_rows_is_found():
    asker = asker_of(Judge(70, 300, 301))
    assert asker.failing_row(failed(asker, 512), columns(512)) == 70


def test_a_failure_of_another_kind_is_not_the_one_that_is_looked_for():
    def fails(responses):
        raise (ValueError if len(responses) > 1 else KeyError)("x")

    asker = asker_of(fails)
    assert asker.failing_row(failed(asker, 4), columns(4)) is None


def test_a_search_takes_no_longer_than_its_time(monkeypatch):
    monkeypatch.setattr("llmrl.rewards.asking.SEARCH_S", 0.0)

    def slow(responses):
        time.sleep(0.02 if len(responses) == 512 else 0.2)
        if 300 in responses:
            raise ValueError
        return [0.0] * len(responses)

    asker = asker_of(slow)
    with pytest.raises(TimeoutError):
        asker.failing_row(failed(asker, 512), columns(512))


def groups_of(size, number):
    return [list(range(begin, begin + size)) for begin in range(0, number, size)]


@pytest.mark.parametrize("bad", [(), (3,), (0, 63), (8, 9, 10, 11, 12, 13, 14, 15), tuple(range(64))])
@pytest.mark.parametrize("size", [1, 4, 8])
def test_all_but_the_failing_rows_are_spared(bad, size, monkeypatch):
    monkeypatch.setattr("llmrl.rewards.asking.SEARCH_CALLS", 10_000)
    asker = asker_of(Judge(*bad))
    failure = Failure(what="", kind="builtins.ValueError", seconds=0.0)
    found = asker.spare(failure, columns(64), groups_of(size, 64), read)
    assert found == {row: float(row) for row in range(64) if row not in bad}


def test_a_group_is_scored_in_one_call_without_its_failing_rows():
    def best(responses):
        if 5 in responses:
            raise ValueError("bad")
        if len(responses) == 1:
            raise ZeroDivisionError  # of a spread
        return [float(number == max(responses)) for number in responses]

    asker = asker_of(best)
    found = asker.spare(failed(asker, 12), columns(12), groups_of(4, 12), read)
    in_groups = {row: 0.0 for row in range(12) if row != 5}
    assert found.keys() == in_groups.keys()
    assert found[7] == 1.0
    assert (found[4], found[6]) == (0.0, 0.0)


def test_a_search_for_all_failing_rows_is_bounded_in_calls():
    judge = Judge(*range(0, 512, 2))
    asker = asker_of(judge)
    found = asker.spare(failed(asker, 512), columns(512), groups_of(4, 512), read)
    assert len(judge.calls) - 1 == SEARCH_CALLS
    assert all(row % 2 for row in found)


@pytest.mark.parametrize("kind", ["is_transient", "is_stuck"])
def test_a_service_that_is_down_and_a_call_that_hung_are_not_searched(kind):
    judge = Judge(0)
    failure = Failure(what="", kind="", seconds=0.0, **{kind: True})
    assert asker_of(judge).spare(failure, columns(4), groups_of(2, 4), read) == {}
    assert judge.calls == []


def test_halves_have_all_items_and_the_first_is_never_empty():
    for number in range(1, 10):
        first, second = halves(range(number))
        assert [*first, *second] == list(range(number))
        assert len(first) == max(number // 2, 1)
