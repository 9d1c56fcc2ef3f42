"""Ranks of one process, that share a store in memory and a clock which moves when a test says so."""

import signal
import time
from threading import Event

import pytest
import torch.distributed as dist

from llmrl.distributed import heartbeat
from llmrl.distributed.activity import Activity
from llmrl.distributed.collectives import OneProcess
from llmrl.distributed.config import DistributedConfig
from llmrl.distributed.heartbeat import LOOK_S, SUSPECT_S, Failure, Heartbeat, watched
from llmrl.distributed.stop import SIGNALS, Stop

LOST = RuntimeError("[gloo/transport/tcp/pair.cc:537] Connection closed by peer [127.0.0.1]:2987")
BROKEN = AssertionError("planted")


class Ranks:
    """So many heartbeats, which beat when time passes, but for those that are gone."""

    def __init__(self, num_ranks: int, **settings: float) -> None:
        self.now = 1000.0
        self.exits: list[int] = []
        store = dist.HashStore()
        self.hearts = [
            Heartbeat(
                store,
                rank=rank,
                world_size=num_ranks,
                config=DistributedConfig(**{name: float(value) for name, value in settings.items()}),
                activity=Activity(),
                clock=lambda: self.now,
                exit_now=self.exits.append,
            )
            for rank in range(num_ranks)
        ]
        self.gone: set[int] = set()

    def enter(self, phase: str, iteration: int, ranks: tuple[int, ...] = (0, 1)) -> None:
        for rank in ranks:
            self.hearts[rank].activity.enter(phase, iteration)

    def pass_s(self, seconds: float) -> None:
        for _ in range(round(seconds)):
            self.now += 1.0
            for rank, heart in enumerate(self.hearts):
                if rank not in self.gone and heart.failure is None:
                    heart.beat()

    @property
    def told(self) -> list[str | None]:
        return [heart.failure.text if heart.failure else None for heart in self.hearts]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch):
    """Threads that do not let a test wait."""
    monkeypatch.setattr(heartbeat, "BEAT_S", 0.02)
    monkeypatch.setattr(heartbeat, "WORKING_S", 1.0)
    monkeypatch.setattr(heartbeat, "WAITING_S", 0.1)
    monkeypatch.setattr(heartbeat, "HEARD_S", 0.1)


# --- silence ----------------------------------------------------------------------------------------------------------


def test_a_silent_rank_is_named_with_the_place_where_it_was_last_seen():
    ranks = Ranks(3, silent_after_s=10)
    ranks.enter("rollout", 7, (0, 1, 2))
    ranks.pass_s(3)
    ranks.gone = {1}
    ranks.enter("reward", 7, (0, 1, 2))
    ranks.pass_s(9)
    assert ranks.told == [None, None, None]
    ranks.pass_s(2)
    text = "rank 1 gave no sign of life for 10 s; it was last seen in the phase rollout of iteration 7"
    assert ranks.told == [text, None, text]


def test_a_rank_that_was_never_seen_is_named_too():
    ranks = Ranks(2, silent_after_s=5)
    ranks.gone = {0}
    ranks.pass_s(7)
    assert ranks.told == [None, "rank 0 gave no sign of life for 5 s"]


def test_whoever_is_suspended_blames_nobody():
    """Neither for silence nor for the length of a phase: a terminal that stops all ranks stops their clocks too."""
    ranks = Ranks(2, silent_after_s=5, phase_timeout_s=60)
    ranks.enter("rollout", 1)
    for _ in range(20):
        ranks.pass_s(1)
        ranks.now += 3600.0
    assert ranks.told == [None, None]


def test_clocks_of_two_ranks_are_never_compared():
    ranks = Ranks(2, silent_after_s=5)
    ranks.hearts[1].clock = lambda: ranks.now - 1e6
    ranks.hearts[1].last_tick = ranks.now - 1e6
    ranks.pass_s(30)
    assert ranks.told == [None, None]


# --- a phase that does not end ----------------------------------------------------------------------------------------


def test_a_phase_that_lasts_too_long_shows_where_every_rank_is():
    ranks = Ranks(2, phase_timeout_s=20)
    ranks.enter("rollout", 2)
    ranks.pass_s(19)
    ranks.enter("reward", 2, (1,))
    ranks.pass_s(1)
    ranks.enter("reward", 2, (0,))
    ranks.pass_s(19)
    with ranks.hearts[0].activity.waiting():
        ranks.pass_s(1)
        assert ranks.told == [None, None]
        ranks.pass_s(3)
    text = (
        "a phase has lasted longer than distributed.phase_timeout_s (20 s): rank 0 waits for others, 20 s in the phase "
        "reward of iteration 2; rank 1 works, 21 s in the phase reward of iteration 2"
    )
    assert ranks.told == [text, text]
    assert all(heart.failure.is_stuck for heart in ranks.hearts)


def test_many_phases_of_one_name_are_not_one_that_is_long():
    ranks = Ranks(2, phase_timeout_s=5)
    for _ in range(20):
        ranks.enter("update", 1)
        ranks.pass_s(2)
    assert ranks.told == [None, None]


# --- an error ---------------------------------------------------------------------------------------------------------


def test_the_first_failure_is_everybodys():
    ranks = Ranks(3)
    ranks.enter("update", 4, (0, 1, 2))
    ranks.hearts[2].error = BROKEN
    ranks.hearts[1].error = ValueError("later")
    ranks.hearts[2].beat()
    ranks.pass_s(1)
    assert ranks.told == ["rank 2 failed in the phase update of iteration 4: AssertionError: planted"] * 3


def test_of_two_that_are_seen_at_once_one_is_the_first():
    ranks = Ranks(2)
    first, second = (Failure(rank, f"rank {rank} failed") for rank in (0, 1))
    assert ranks.hearts[0]._record(first) == first
    assert ranks.hearts[1]._record(second) == first


def test_a_lost_connection_is_put_down_to_whoever_is_gone():
    """Sooner than silence alone would be."""
    ranks = Ranks(2, silent_after_s=60)
    ranks.enter("update", 4)
    ranks.pass_s(2)
    ranks.gone = {1}
    ranks.hearts[0].error = LOST
    ranks.pass_s(SUSPECT_S - 1)
    assert ranks.told == [None, None]
    ranks.pass_s(2)
    assert ranks.told[0] == "rank 1 gave no sign of life for 4 s; it was last seen in the phase update of iteration 4"


def test_a_lost_connection_is_put_down_to_whoever_failed():
    ranks = Ranks(2)
    ranks.hearts[0].error = LOST
    ranks.pass_s(2)
    ranks.hearts[1].error = BROKEN
    ranks.pass_s(2)
    assert ranks.told == ["rank 1 failed in the phase start: AssertionError: planted"] * 2


def test_a_lost_connection_that_nobody_explains_is_the_failure():
    ranks = Ranks(2)
    ranks.hearts[0].error = LOST
    ranks.pass_s(LOOK_S + 2)
    assert ranks.told[0] is not None
    assert ranks.told[0].startswith("rank 0 failed in the phase start: RuntimeError: [gloo/")


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("gloo"), KeyboardInterrupt()])
def test_other_errors_are_told_at_once(error):
    ranks = Ranks(2)
    ranks.hearts[0].error = error
    ranks.pass_s(1)
    assert ranks.told[0] is not None
    assert ranks.told[0].startswith("rank 0 failed in the phase start: ")


def test_a_signal_from_the_launcher_is_put_down_to_whoever_is_gone():
    ranks = Ranks(2, silent_after_s=60)
    ranks.pass_s(2)
    ranks.gone = {1}
    ranks.hearts[0].terminate(signal.SIGTERM)
    ranks.pass_s(5)
    assert ranks.told[0] == "rank 1 gave no sign of life for 4 s; it was last seen in the phase start"


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_nothing_explains_ends_the_rank_with_its_status(number):
    ranks = Ranks(2)
    for heart in ranks.hearts:
        heart.terminate(number)
        heart.terminate(signal.SIGTERM)  # which the launcher sends after it
    ranks.pass_s(LOOK_S + 2)
    assert [heart.failure.status for heart in ranks.hearts] == [128 + number] * 2
    assert ranks.told[0] == f"{number.name} came, and no rank has failed"


# --- what is told -----------------------------------------------------------------------------------------------------


def test_each_rank_but_the_one_that_failed_tells_it_in_one_line(capsys):
    ranks = Ranks(3)
    ranks.hearts[1].error = BROKEN
    ranks.pass_s(2)
    for heart in ranks.hearts:
        heart.report(heart.failure)
    told = "ends: rank 1 failed in the phase start: AssertionError: planted"
    assert capsys.readouterr().err == f"rank 0 {told}\nrank 2 {told}\n"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (LOST, "rank 0 ends: rank 1 failed in the phase start: AssertionError: planted\n"),
        (
            ValueError("also"),
            "rank 0 ends: rank 1 failed in the phase start: AssertionError: planted\n"
            "rank 0 failed too, in the phase start: ValueError: also\n",
        ),
        (AssertionError("planted"), ""),
    ],
    ids=["a lost connection", "another error", "the same error"],
)
def test_what_a_rank_tells_that_fails_later(error, told, quick, capsys):
    """Nothing is swallowed, and nothing is told twice."""
    ranks = Ranks(2)
    ranks.hearts[0].error = error
    heart = failed(ranks)
    heart.start()
    assert not heart.failed_first(error)
    assert capsys.readouterr().err == told


def test_a_rank_that_works_where_a_phase_does_not_end_shows_its_stack(capsys):
    ranks = Ranks(2, phase_timeout_s=2)
    with ranks.hearts[0].activity.waiting():
        ranks.pass_s(5)
    for heart in ranks.hearts:
        heart.report(heart.failure)
    told = capsys.readouterr().err
    assert "rank 0 is at" not in told
    assert "rank 1 is at:\n" in told
    assert "test_a_rank_that_works" in told


# --- the end of a process ---------------------------------------------------------------------------------------------


def failed(ranks: Ranks, error: BaseException = BROKEN) -> Heartbeat:
    """Rank 0, after rank 1 failed."""
    ranks.hearts[1].error = error
    ranks.hearts[1].beat()
    ranks.hearts[0].beat()
    return ranks.hearts[0]


def test_a_main_thread_that_goes_on_is_ended_after_a_while(quick):
    ranks, started = Ranks(2), time.monotonic()
    heart = failed(ranks)
    heart.end(heart.failure)
    assert ranks.exits == [1]
    assert time.monotonic() - started >= 1.0


def test_one_that_waits_for_others_is_ended_sooner(quick):
    ranks, started = Ranks(2), time.monotonic()
    heart = failed(ranks)
    with heart.activity.waiting():
        heart.end(heart.failure)
    assert ranks.exits == [1]
    assert time.monotonic() - started < 0.8


def test_one_that_ends_by_itself_is_left_to_it(quick):
    ranks = Ranks(2)
    heart = failed(ranks)
    heart.error = LOST
    heart.end(heart.failure)
    assert ranks.exits == []


def test_where_a_phase_does_not_end_nobody_is_waited_for(monkeypatch):
    monkeypatch.setattr(heartbeat, "WORKING_S", 5.0)
    ranks, started = Ranks(2, phase_timeout_s=2), time.monotonic()
    ranks.pass_s(5)
    ranks.hearts[0].end(ranks.hearts[0].failure)
    assert ranks.exits == [1]
    assert time.monotonic() - started < 4.0


# --- threads ----------------------------------------------------------------------------------------------------------


class Store:
    """One that answers, or raises, or never returns."""

    def __init__(self, real: dist.Store) -> None:
        self.real = real
        self.is_gone = False
        self.is_frozen = False

    def __getattr__(self, name):
        if self.is_gone:
            raise RuntimeError("Connection was likely closed")
        if self.is_frozen:
            Event().wait()
        return getattr(self.real, name)


@pytest.fixture
def living(quick):
    """Two ranks whose threads run."""
    ranks = Ranks(2)
    for heart in ranks.hearts:
        heart.store = Store(heart.store)
        heart.clock = time.monotonic
        heart.start()
    yield ranks
    for heart in ranks.hearts:
        heart.stop()


def until(condition) -> None:
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("nothing happened for 5 s")


def test_a_failure_reaches_the_other_rank_and_ends_it(living, capsys):
    assert living.hearts[0].failed_first(BROKEN)
    until(lambda: living.exits == [1])
    assert capsys.readouterr().err == "rank 1 ends: rank 0 failed in the phase start: AssertionError: planted\n"


def test_the_first_stays_until_the_other_has_heard(living, monkeypatch):
    monkeypatch.setattr(heartbeat, "HEARD_S", 10.0)
    living.hearts[0].failed_first(BROKEN)
    assert living.hearts[1].failure is not None


def test_a_rank_that_ends_by_a_lost_connection_knows_why(living):
    assert living.hearts[0].failed_first(BROKEN)
    assert not living.hearts[1].failed_first(LOST)
    assert living.exits == []


def test_a_store_that_is_gone_ends_the_rank_and_asks_the_run_to_stop(living, monkeypatch, capsys):
    stop = Stop()
    monkeypatch.setattr(heartbeat, "STOP", stop)
    living.hearts[1].store.is_gone = True
    until(lambda: living.exits == [1])
    assert stop.number == signal.SIGTERM
    assert (
        "rank 1 ends: the store that connects the ranks is gone: it is part of the launcher" in capsys.readouterr().err
    )


def test_a_store_that_goes_when_all_are_done_is_no_failure(living, capsys):
    living.hearts[1].is_leaving = True
    living.hearts[1].store.is_gone = True
    living.hearts[1].threads[0].join(5)
    assert (living.hearts[1].failure, living.exits, capsys.readouterr().err) == (None, [], "")


def test_a_store_that_never_answers_ends_the_rank(living, capsys, monkeypatch):
    monkeypatch.setattr(heartbeat, "BEAT_S", 20.0)  # three of those are silence
    living.hearts[1].store.is_frozen = True
    monkeypatch.setattr(heartbeat.time, "sleep", lambda _: Event().wait(0.01))
    until(lambda: 1 in living.exits)
    assert "the store that connects the ranks has not answered for 60 s" in capsys.readouterr().err


def test_after_the_end_nothing_beats(living):
    for heart in living.hearts:
        heart.stop()
    until(lambda: not any(thread.is_alive() for heart in living.hearts for thread in heart.threads[:1]))
    assert living.exits == []


def test_one_process_has_nobody_to_watch(monkeypatch):
    monkeypatch.setattr(heartbeat, "Heartbeat", None)
    before = signal.getsignal(signal.SIGTERM)
    with watched(OneProcess(), DistributedConfig()):
        assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(AssertionError, match="planted"), watched(OneProcess(), DistributedConfig()):
        raise BROKEN
