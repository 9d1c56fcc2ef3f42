"""References that follow the actor: every few iterations their weights move towards the actor's.

    ref <- mixing * actor + (1 - mixing) * ref

With mixing 1 that is a copy, as in iterative GRPO (Shao et al. 2024, arXiv:2402.03300, algorithm 1); below 1 it is an
average, as in the soft update of TR-DPO (Gorbatovski et al. 2024, arXiv:2404.09656).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llmrl.functional.statistics import Total
from llmrl.metrics import Metrics
from llmrl.optim.local import laid_out, whole_tensor
from llmrl.roles import Trainable


class FollowingReference(ABC):
    """`MovingReference` that moves after every `every` iterations."""

    def __init__(self, *, every: int) -> None:
        self.every = every

    @property
    @abstractmethod
    def holds_all(self) -> bool:
        """See `MovingReference`."""

    def finish_iteration(self, number: int) -> Metrics:
        """See `MovingReference`."""
        moves = number % self.every == 0
        if moves:
            self.move()
        return Metrics({"reference/moved": Total(float(moves))})

    @abstractmethod
    def move(self) -> None:
        """Moves every weight. Collective: every rank must call it."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Full weights by name, at least on the first rank."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` returned."""


class WeightsReference(FollowingReference):
    """A frozen module with weights of its own, whole on every rank or split over them.

    Args:
        module: The reference.
        actor: Part of the trained module with the same parameters by the same names.
        trained: The actor's `Trainable`.
        every: Iterations between two moves.
        mixing: Share of the actor's weights after a move, above 0 and at most 1.
        keeps_state: Whether this rank keeps the state of a split module: the first does.
    """

    def __init__(
        self,
        module: nn.Module,
        actor: nn.Module,
        trained: Trainable,
        *,
        every: int,
        mixing: float,
        keeps_state: bool,
    ) -> None:
        super().__init__(every=every)
        self.module = module
        self.actor = actor
        self.trained = trained
        self.mixing = mixing
        self.keeps_state = keeps_state

    @property
    def holds_all(self) -> bool:
        return not any(isinstance(p, DTensor) for p in self.module.parameters())

    @torch.no_grad()
    def move(self) -> None:
        """Moves weight by weight: no second full copy is ever in memory."""
        weights = dict(self.module.named_parameters())
        for name, weight in self.trained.whole(self.actor):
            _mix(weights[name], weight, self.mixing)

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        if self.holds_all:
            return {name: p.detach() for name, p in self.module.named_parameters()}
        state = {}
        for name, p in self.module.named_parameters():
            whole = whole_tensor(p.detach())
            if self.keeps_state:
                state[name] = whole.cpu()
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, p in self.module.named_parameters():
            _mix(p, state[name], 1.0)


class AdapterCopy(FollowingReference):
    """A frozen adapter in the trained module itself, to which the actor's adapter is copied.

    Args:
        trained: The actor's `Trainable`.
        sources: Names in its module of the actor's adapter weights, by the names of the frozen ones.
        every: Iterations between two moves.
    """

    def __init__(self, trained: Trainable, sources: Mapping[str, str], *, every: int) -> None:
        super().__init__(every=every)
        self.trained = trained
        self.sources = sources

    @property
    def holds_all(self) -> bool:
        return self.trained.holds_all

    def move(self) -> None:
        """Copies the actor's adapter."""
        learned = self._read(frozenset(self.sources.values()))
        self.load_state_dict({name: learned[source] for name, source in self.sources.items()})

    def state_dict(self) -> dict[str, Any]:
        return self._read(self.sources.keys())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in self.sources:
            self.trained.assign(name, state[name])

    def _read(self, names: Set[str]) -> dict[str, Tensor]:
        """Full weights of these names."""
        return {name: weight.clone() for name, weight in self.trained.whole(self.trained.module) if name in names}


def _mix(p: Tensor, weight: Tensor, share: float) -> None:
    """Moves a parameter, of which this rank may hold a part, towards a full weight, by this share of the way."""
    part = laid_out(weight.to(p.dtype), p)
    if isinstance(p, DTensor) and isinstance(part, DTensor):
        p, part = p.to_local(), part.to_local()
    p.lerp_(part, share)
