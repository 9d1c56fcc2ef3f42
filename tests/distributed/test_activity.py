import signal

import pytest

from llmrl.distributed.activity import Activity, FollowedProgress
from llmrl.distributed.stop import Interrupted, Stop
from llmrl.reports.progress import Silent


class Calls(Silent):
    """Progress that remembers what it is told."""

    def __init__(self):
        self.told = []

    def begin(self, *arguments):
        self.told.append(("begin", *arguments))

    def phase(self, *arguments):
        self.told.append(("phase", *arguments))

    def advance(self, *arguments):
        self.told.append(("advance", *arguments))

    def iteration(self, *arguments):
        self.told.append(("iteration", *arguments))

    def message(self, *arguments):
        self.told.append(("message", *arguments))


def followed() -> tuple[FollowedProgress, Activity, Calls]:
    calls, activity = Calls(), Activity()
    return FollowedProgress(calls, activity), activity, calls


def test_everything_is_passed_on():
    progress, _, calls = followed()
    progress.begin(4, 2)
    progress.phase("rollout", 8)
    progress.advance(3)
    progress.iteration(3, {"loss": 1.0})
    progress.message("text")
    told = [("begin", 4, 2), ("phase", "rollout", 8), ("advance", 3), ("iteration", 3, {"loss": 1.0})]
    assert calls.told == [*told, ("message", "text")]


def test_a_phase_belongs_to_the_iteration_that_is_under_way():
    """And a checkpoint to the one that is done; before the first, and in an evaluation alone, there is none."""
    progress, activity, _ = followed()
    places = [(activity.phase, activity.iteration)]

    def go(phase):
        progress.phase(phase, 1)
        places.append((activity.phase, activity.iteration))

    go("evaluation")
    progress.begin(9, 5)  # a resumed run
    go("rollout")
    go("update")
    progress.iteration(6, {})
    go("checkpoint")
    go("rollout")
    progress.iteration(7, {})
    go("saving")
    expected = [("start", 0), ("evaluation", 0), ("rollout", 6), ("update", 6), ("checkpoint", 6), ("rollout", 7)]
    assert places == [*expected, ("saving", 7)]


def test_phases_of_one_name_are_told_apart():
    progress, activity, _ = followed()
    progress.phase("update", 1)
    first = activity.num_phases
    progress.phase("update", 1)
    assert activity.num_phases != first


def test_waiting_ends_with_the_collective_however_that_ends():
    activity = Activity()
    assert not activity.is_waiting
    with activity.waiting():
        assert activity.is_waiting
    assert not activity.is_waiting
    with pytest.raises(KeyError), activity.waiting():
        raise KeyError
    assert not activity.is_waiting


@pytest.mark.parametrize("work", [lambda progress: progress.phase("reward", 4), lambda progress: progress.advance(0)])
def test_a_signal_is_told_once_and_obeyed_where_the_process_may_leave(work):
    calls, stop = Calls(), Stop()
    progress = FollowedProgress(calls, Activity(), stop)
    stop.note(signal.SIGTERM)
    work(progress)
    work(progress)
    assert [text for kind, text, *_ in calls.told if kind == "message"] == [
        "SIGTERM: stops as soon as everything is saved; a second signal stops at once"
    ]
    with stop.leaving(lambda: True, alone=True):
        progress.message("text")
        progress.iteration(3, {})
        with pytest.raises(Interrupted):
            work(progress)
