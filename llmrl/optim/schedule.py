"""Learning-rate schedule, and the limit on consecutive gradients that are not finite."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from llmrl.optim.config import OptimizerConfig

MAX_SKIPPED_STEPS = 5


SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


class StepSchedule:
    """Learning-rate schedule: its position, and the number of consecutive skipped steps."""

    def __init__(self, config: OptimizerConfig, num_steps: int) -> None:
        from transformers import get_scheduler

        placeholder = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = get_scheduler(
            SCHEDULES[config.schedule],
            placeholder,
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
        """Learning rate of the next optimizer step."""
        return self.peak_learning_rate * self.share_of_peak(self.num_steps_done + 1)

    def begin_step(self, groups: Iterable[dict[str, Any]]) -> None:
        """Sets the learning rate of the groups of an optimizer; from here on the step counts as begun."""
        for group in groups:
            group["lr"] = group["peak"] * self.share_of_peak(self.num_steps_done + 1)
        self.num_steps_done += 1

    def accept(self, norm: Tensor) -> bool:
        """Whether a gradient of this norm can be used.

        Raises:
            FloatingPointError: `MAX_SKIPPED_STEPS` in a row could not.
        """
        finite = bool(norm.isfinite())
        self.num_skipped = 0 if finite else self.num_skipped + 1
        if self.num_skipped >= MAX_SKIPPED_STEPS:
            self.num_skipped = 0  # so that a run that goes on afterwards gets as many again
            raise FloatingPointError(
                f"the gradient was not finite in {MAX_SKIPPED_STEPS} optimizer steps one after another; "
                "resume from the last checkpoint with a lower learning_rate of its optimizer"
            )
        return finite

    def steps(self) -> dict[str, int]:
        """State of the schedule, for `set_steps`."""
        return {"num_steps_done": self.num_steps_done, "num_skipped": self.num_skipped}

    def set_steps(self, state: Mapping[str, Any]) -> None:
        """Continues from a state of `steps`, on the schedule configured now."""
        self.num_steps_done = state["num_steps_done"]
        self.num_skipped = state["num_skipped"]
