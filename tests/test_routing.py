"""Codes of sets of experts, and what is kept of the choices of routers."""

import itertools
import math
import weakref

import pytest
import torch
from torch import nn

from llmrl.routing import RouteRecorder, route_of, watching


class Router(nn.Module):
    """Chooses what it is given."""

    def forward(self, chosen):
        return torch.zeros(len(chosen), 8), None, chosen


def test_the_order_of_a_choice_does_not_show():
    for chosen in ([5, 2, 7, 0], [511, 3, 128, 64]):
        codes = {int(route_of(torch.tensor([order]))) for order in itertools.permutations(chosen)}
        assert len(codes) == 1
        assert 0 <= codes.pop() < 2**15


@pytest.mark.parametrize(("num_experts", "num_chosen"), [(4, 1), (4, 2), (8, 2), (16, 2), (8, 4)])
def test_every_choice_of_few_experts_has_a_code_of_its_own(num_experts, num_chosen):
    sets = torch.tensor(list(itertools.combinations(range(num_experts), num_chosen)))
    codes = route_of(sets)
    assert codes.dtype == torch.int16
    assert len(codes.unique()) == math.comb(num_experts, num_chosen)


def test_sets_that_differ_in_one_expert_differ():
    assert len(route_of(torch.arange(2**15)[:, None]).unique()) == 2**15
    others = torch.tensor([[9, 70, 300, expert] for expert in range(512) if expert not in (9, 70, 300)])
    assert len(route_of(others).unique()) == len(others)


def test_other_sets_have_one_code_as_often_as_chance_has_it():
    drawn = torch.rand(2, 400_000, 128, generator=torch.Generator().manual_seed(0))
    sets, others = drawn.topk(8).indices
    equal = int((route_of(sets) == route_of(others)).sum())
    expected = 400_000 / 2**15
    assert abs(equal - expected) < 4 * math.sqrt(expected)


def test_a_recorder_keeps_the_last_column_of_the_last_pass_of_each_layer():
    routers = [Router(), Router()]
    recorder = RouteRecorder(routers)
    first, second = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]]), torch.tensor([[1, 2], [3, 4], [5, 6], [7, 0]])
    with recorder.recording():
        for router in routers:  # a pass that nothing was drawn from
            router(torch.tensor([[0, 0]]))
        for router, chosen in zip(routers, (first, second), strict=True):
            router(chosen)
        routes = recorder.take(2)
        expected = [[route_of(x[row]) for x in (first, second)] for row in (1, 3)]
        assert routes.tolist() == [[int(code) for code in row] for row in expected]
        for router in routers:
            router(first[:2])
        assert torch.equal(recorder.take(2)[:, 0], route_of(first[:2]))


def test_a_recorder_holds_no_pass_but_the_last():
    """Observations of an environment are read in many passes, and nothing is drawn between them."""
    routers, passes = [Router(), Router()], [torch.zeros(4, 2).long() for _ in range(3)]
    recorder, held = RouteRecorder(routers), [weakref.ref(each) for each in passes]
    with recorder.recording():
        while passes:
            for router in routers:
                router(passes[0])
            passes.pop(0)
        assert [each() is not None for each in held] == [False, False, True]
        recorder.take(2)
        assert held[-1]() is None


def test_nobody_watches_afterwards():
    router, seen = Router(), []

    def fail(*said):
        seen.append(said)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), watching([router], fail):
        router(torch.tensor([[1, 2]]))
    router(torch.tensor([[1, 2]]))
    assert len(seen) == 1
