import signal
import time
from datetime import timedelta

import pytest
import torch

from llmrl.distributed import collectives
from llmrl.distributed.activity import HERE
from llmrl.distributed.collectives import OneProcess, ProcessGroup, join_ranks, leave_ranks
from llmrl.distributed.launch import LaunchError
from llmrl.distributed.stop import Interrupted, Stop
from tests.distributed.threads import on_ranks
from tests.processes import free_port


def test_one_process_talks_to_itself():
    alone = OneProcess()
    x = torch.tensor([1.0, -2.0])
    assert (alone.rank, alone.world_size) == (0, 1)
    assert torch.equal(alone.sum(x), torch.tensor([1.0, -2.0]))


def test_what_one_process_gathers_is_its_own():
    assert OneProcess().gather({"a": 1}) == [{"a": 1}]
    assert OneProcess().from_first({"a": 1}) == {"a": 1}


def test_every_rank_gets_the_object_of_the_first():
    assert on_ranks(3, lambda ranks: ranks.from_first(ranks.rank + 5)) == [5, 5, 5]
    assert on_ranks(3, lambda ranks: ranks.is_first) == [True, False, False]


def test_no_rank_passes_a_barrier_before_all_have_come():
    arrived = []

    def pass_it(ranks):
        time.sleep(0.05 * ranks.rank)
        arrived.append(ranks.rank)
        ranks.barrier()
        return len(arrived)

    assert on_ranks(3, pass_it) == [3, 3, 3]


@pytest.mark.parametrize("world_size", [None, "1"])
def test_without_a_launch_there_is_one_process(monkeypatch, world_size):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world_size is not None:
        monkeypatch.setenv("WORLD_SIZE", world_size)
    assert isinstance(join_ranks(), OneProcess)
    leave_ranks()  # which has nothing to end


def test_a_rank_waits_until_the_sum_is_there(monkeypatch):
    """NCCL only queues it: others have to see that this rank waits for them."""
    seen = []
    monkeypatch.setattr(collectives.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(collectives.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(collectives.dist, "all_reduce", lambda x: x.mul_(2))
    monkeypatch.setattr(collectives, "synchronize", lambda device: seen.append((device.type, HERE.is_waiting)))
    x = torch.tensor([1.0, 3.0])
    assert ProcessGroup().sum(x).tolist() == [2.0, 6.0]
    assert x.tolist() == [1.0, 3.0]
    assert seen == [("cpu", True)]
    assert not HERE.is_waiting


def test_a_signal_to_one_rank_reaches_all_by_what_they_gather(monkeypatch):
    def all_gather_object(gathered, x):
        gathered[:] = [x, ("theirs", signal.SIGTERM)]

    stop = Stop()
    monkeypatch.setattr(collectives, "STOP", stop)
    monkeypatch.setattr(collectives.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(collectives.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(collectives.dist, "all_gather_object", all_gather_object)
    ranks = ProcessGroup()
    assert ranks.gather("mine") == ["mine", "theirs"]
    with stop.leaving(lambda: True, alone=False), pytest.raises(Interrupted, match="stopped by SIGTERM"):
        ranks.gather("mine")


def test_a_number_of_processes_alone_is_no_launch(monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LaunchError, match="RANK and MASTER_ADDR and MASTER_PORT not"):
        join_ranks()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_without_others_does_not_wait_for_ever(monkeypatch, rank):
    port = str(free_port())
    launch = {"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    for name, value in launch.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(collectives, "JOIN_TIMEOUT", timedelta(seconds=1))
    with pytest.raises(LaunchError, match=rf"did not meet at localhost:{port} .* within 1 s: its launcher or a rank"):
        join_ranks()
