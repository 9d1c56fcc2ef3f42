"""A module with its optimizer and learning-rate schedule where every process holds all weights."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from llmrl.distributed.launch import BUCKET_ELEMENTS
from llmrl.optim.config import OptimizerConfig
from llmrl.optim.schedule import StepSchedule
from llmrl.roles import Collectives, StateMismatch


class LocalTrainable(StepSchedule):
    """`Trainable` for a module whose weights are whole in every process."""

    holds_all = True

    def __init__(
        self,
        module: nn.Module,
        config: OptimizerConfig,
        *,
        num_steps: int,
        collectives: Collectives | None = None,
        peaks: Mapping[str, float] | None = None,
    ) -> None:
        """`collectives`: those of the ranks that hold the same weights; None: a single process. `peaks` gives
        parameters, by name, a peak learning rate of their own.

        Raises:
            ValueError: There are several ranks, and no collectives.
        """
        if collectives is None and dist.is_initialized() and dist.get_world_size() > 1:
            raise ValueError("world_size > 1 needs `collectives`; without them every rank would train its own model")
        super().__init__(config, num_steps)
        self.module = self.wrapped = module
        self.collectives = collectives
        self.parameters = learning_parameters(module)
        self.device = next(iter(self.parameters.values())).device
        self.max_grad_norm = config.max_grad_norm
        self.optimizer = adamw(self.parameters, config, peaks or {})

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def optimizer_step(self) -> Tensor:
        """Clips by the global norm, steps, clears the gradient, advances the schedule.

        A gradient that is not finite changes nothing but the schedule; the caller sees it in the norm.

        Raises:
            FloatingPointError: That happened several times in a row.
        """
        self.add_up_gradients()
        norm = whole_tensor(nn.utils.clip_grad_norm_(self.parameters.values(), self.max_grad_norm).detach())
        finite = self.accept(norm)
        self.begin_step(self.optimizer.param_groups)  # before the step, so that one that fails halfway counts as begun
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def add_up_gradients(self) -> None:
        """Sums gradients over ranks. A parameter without one on any rank keeps none; a rank without one adds 0."""
        if self.collectives is None or self.collectives.world_size == 1:
            return
        parameters = list(self.parameters.values())
        has_gradient = torch.tensor([float(p.grad is not None) for p in parameters], device=self.device)
        anywhere = self.collectives.sum(has_gradient).tolist()
        learning = [p for p, num_ranks in zip(parameters, anywhere, strict=True) if num_ranks]
        for bucket in in_buckets(learning, BUCKET_ELEMENTS):
            own = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in bucket])
            for p in bucket:
                p.grad = None  # makes room for the sum
            for p, total in zip(bucket, self.collectives.sum(own).split([p.numel() for p in bucket]), strict=True):
                p.grad = total.view_as(p)

    def whole(self, part: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """See `Trainable`."""
        for name, p in part.named_parameters():
            yield name, p.detach()

    @torch.no_grad()
    def assign(self, name: str, value: Tensor) -> None:
        """See `Trainable`."""
        p = self.module.get_parameter(name)
        p.copy_(laid_out(value, p))

    def state_dict(self) -> dict[str, Any]:
        """The state by name, tensors and plain numbers only, so that safetensors and JSON can hold it."""
        moments = {
            name: {key: value.detach() for key, value in self.optimizer.state[p].items()}
            for name, p in self.parameters.items()
            if p in self.optimizer.state
        }
        parameters = {name: p.detach() for name, p in self.parameters.items()}
        return {"parameters": parameters, "optimizer": moments, **self.steps()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a state of the same parameters; the learning rate continues on the schedule configured now.

        Raises:
            StateMismatch: Names or shapes differ. Nothing has changed then.
        """
        check_same(shapes_of(state["parameters"]), shapes_of(self.parameters))
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(laid_out(state["parameters"][name], p))
        self.optimizer.state.clear()
        for name, moments in state["optimizer"].items():
            p = self.parameters[name]
            self.optimizer.state[p] = {key: laid_out(value, p) for key, value in moments.items()}
        self.set_steps(state)


def learning_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that are not frozen, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def adamw(
    parameters: Mapping[str, nn.Parameter], config: OptimizerConfig, peaks: Mapping[str, float]
) -> torch.optim.AdamW:
    """AdamW, its groups marked with their peak learning rates."""
    groups, (beta1, beta2) = _parameter_groups(parameters, config, peaks), config.betas
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(beta1, beta2), fused=True)


def in_buckets(parameters: Iterable[nn.Parameter], max_elements: int) -> Iterator[list[nn.Parameter]]:
    """Yields parameters in order, in buckets of at most `max_elements` elements; a larger parameter alone."""
    bucket, num_elements = list[nn.Parameter](), 0
    for p in parameters:
        if bucket and num_elements + p.numel() > max_elements:
            yield bucket
            bucket, num_elements = [], 0
        bucket.append(p)
        num_elements += p.numel()
    if bucket:
        yield bucket


def whole_tensor(x: Tensor) -> Tensor:
    """Full tensor of one that may be split over ranks. Collective in that case: every rank must call it."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def laid_out(value: Tensor, like: Tensor) -> Tensor:
    """Copy of a full weight, or of a moment of it, on the device and in the layout of `like`: where that is split over
    ranks, each takes its own part, and all of them must have the whole."""
    value = value.to(like.device, copy=True)
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def shapes_of(parameters: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in parameters.items()}


def check_same(saved: Mapping[str, tuple[int, ...]], ours: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses shapes that differ.

    Raises:
        StateMismatch: Names or shapes differ.
    """
    differing = sorted(name for name in saved.keys() | ours.keys() if saved.get(name) != ours.get(name))
    if differing:
        was, now = (of.get(differing[0], "not trained") for of in (saved, ours))
        raise StateMismatch(
            f"the saved state is of other weights: {len(differing)} differ, such as {differing[0]}, which was {was} "
            f"and is {now}; resume with the model and the model.lora that the run began with, or start a new run"
        )


def _parameter_groups(
    parameters: Mapping[str, nn.Parameter], config: OptimizerConfig, peaks: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Parameter groups: matrices with weight decay, vectors without, each by peak learning rate."""
    assert peaks.keys() <= parameters.keys(), "a learning rate of its own is for a parameter that learns"
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, p in parameters.items():
        key = (peaks.get(name, config.learning_rate), config.weight_decay if p.dim() >= 2 else 0.0)
        groups.setdefault(key, []).append(p)
    return [{"params": members, "peak": peak, "weight_decay": decay} for (peak, decay), members in groups.items()]
