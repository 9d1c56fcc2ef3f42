"""A module with its optimizer and learning-rate schedule: the settings of both, and how they are where every process
holds all weights."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from llmrl.roles import Collectives, StateMismatch

MAX_SKIPPED_STEPS = 5
BUCKET_ELEMENTS = 50_000_000
"""Gradients that are added up over ranks at once, unless a DeepSpeed file says how many."""
SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW on float32 weights. Loshchilov and Hutter 2019, arXiv:1711.05101."""

    learning_rate: float = 1e-6
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: stays, or falls in a line or in a half cosine and would be 0 one step after the last."""
    warmup_steps: int = 0
    """Optimizer steps before the learning rate reaches its peak, to which it rises evenly; none of them is at 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; vectors (norms, biases) are left alone."""
    beta1: float = 0.9
    """Decay of the running mean of gradients."""
    beta2: float = 0.999
    """Decay of the running mean of squared gradients."""
    max_grad_norm: float = 1.0
    """The global gradient norm above which the gradient is scaled down to it."""

    def __post_init__(self) -> None:
        if self.learning_rate < 0 or not math.isfinite(self.learning_rate):
            raise ValueError(f"optimizer.learning_rate ({self.learning_rate}) must be 0 or greater")
        if self.warmup_steps < 0:
            raise ValueError(f"optimizer.warmup_steps ({self.warmup_steps}) must be 0 or greater")
        if not self.weight_decay >= 0:
            raise ValueError(f"optimizer.weight_decay ({self.weight_decay}) must be 0 or greater")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name} ({getattr(self, name)}) must be at least 0 and less than 1")
        if not self.max_grad_norm > 0:
            raise ValueError(
                f"optimizer.max_grad_norm ({self.max_grad_norm}) must be greater than 0; .inf turns clipping off"
            )


class Stepping:
    """How far an optimizer is on its learning-rate schedule, and how often it had to pass over a gradient."""

    def __init__(self, config: OptimizerConfig, num_steps: int) -> None:
        from transformers import get_scheduler

        nobody = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = get_scheduler(
            SCHEDULES[config.schedule],
            nobody,
            num_warmup_steps=config.warmup_steps + 1,  # its step 0, where the rate is 0, is never taken
            num_training_steps=num_steps + 1,
        )
        assert isinstance(scheduler, LambdaLR), "constant, linear and cosine are functions of the step"
        self.peak_learning_rate = config.learning_rate
        self.share_of_peak = scheduler.lr_lambdas[0]
        self.num_steps_done = 0
        self.num_skipped = 0
        """Steps skipped one after another because the gradient was not finite."""

    @property
    def learning_rate(self) -> float:
        """Of the next optimizer step."""
        return self.peak_learning_rate * self.share_of_peak(self.num_steps_done + 1)

    def begin_step(self, groups: Iterable[dict[str, Any]]) -> None:
        """Sets the learning rate of the groups of an optimizer; from here on the step counts as begun."""
        for group in groups:
            group["lr"] = group["peak"] * self.share_of_peak(self.num_steps_done + 1)
        self.num_steps_done += 1

    def judge(self, norm: Tensor) -> bool:
        """Whether a gradient of this norm can be used.

        Raises:
            FloatingPointError: Several in a row could not, so it will not pass by itself.
        """
        finite = bool(norm.isfinite())
        self.num_skipped = 0 if finite else self.num_skipped + 1
        if self.num_skipped >= MAX_SKIPPED_STEPS:
            raise FloatingPointError(
                f"the gradient was not finite in {MAX_SKIPPED_STEPS} optimizer steps one after another; "
                "resume from the last checkpoint with a lower learning_rate of its optimizer"
            )
        return finite

    def steps(self) -> dict[str, int]:
        """What `set_steps` goes on from."""
        return {"num_steps_done": self.num_steps_done, "num_skipped": self.num_skipped}

    def set_steps(self, state: Mapping[str, Any]) -> None:
        """On the schedule configured now."""
        self.num_steps_done = state["num_steps_done"]
        self.num_skipped = state["num_skipped"]


class LocalTrainable(Stepping):
    """`Trainable` for a module that lives whole in this process, and in every other one."""

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
        """`collectives` reach the ranks that hold the same weights; None where there is one process. `peaks` gives
        parameters, by name, a peak learning rate of their own.

        Raises:
            ValueError: There are other ranks, and nothing reaches them.
        """
        if collectives is None and dist.is_initialized() and dist.get_world_size() > 1:
            raise ValueError("one of several ranks cannot learn without collectives: each would learn another model")
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
            FloatingPointError: That happened several times in a row, so it will not pass by itself.
        """
        self.add_up_gradients()
        norm = whole_tensor(nn.utils.clip_grad_norm_(self.parameters.values(), self.max_grad_norm).detach())
        finite = self.judge(norm)
        self.begin_step(self.optimizer.param_groups)  # before the step, so that one that fails halfway counts as begun
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def add_up_gradients(self) -> None:
        """Over ranks. A parameter that has none on any rank keeps none; a rank without one adds nothing."""
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

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers only, by name, so that safetensors and JSON can hold them."""
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
                p.copy_(self.laid_out(state["parameters"][name], p))
        self.optimizer.state.clear()
        for name, moments in state["optimizer"].items():
            p = self.parameters[name]
            self.optimizer.state[p] = {key: self.laid_out(value, p) for key, value in moments.items()}
        self.set_steps(state)

    def laid_out(self, value: Tensor, like: Tensor) -> Tensor:
        """A copy of a whole weight, or of what the optimizer remembers of it, where and how such are kept."""
        return value.to(like.device, copy=True)


def learning_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Those that are not frozen, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def adamw(
    parameters: Mapping[str, nn.Parameter], config: OptimizerConfig, peaks: Mapping[str, float]
) -> torch.optim.AdamW:
    """AdamW, its groups marked with their peak learning rates."""
    groups = _parameter_groups(parameters, config, peaks)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


def in_buckets(parameters: Iterable[nn.Parameter], max_elements: int) -> Iterator[list[nn.Parameter]]:
    """Parameters in their order, together so long as they have no more elements than that; a larger one alone."""
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
    """One that may be spread over ranks, put together; on all of them at once."""
    return x.full_tensor() if isinstance(x, DTensor) else x


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
    """Matrices with decay, vectors without, and by their peak learning rates."""
    assert peaks.keys() <= parameters.keys(), "a learning rate of its own is for a parameter that learns"
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, p in parameters.items():
        key = (peaks.get(name, config.learning_rate), config.weight_decay if p.dim() >= 2 else 0.0)
        groups.setdefault(key, []).append(p)
    return [{"params": members, "peak": peak, "weight_decay": decay} for (peak, decay), members in groups.items()]
