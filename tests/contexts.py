"""The context of a test: this process, with the ranks and the listener that a test gives it."""

import torch

from llmrl.distributed.collectives import OneProcess, make_context
from llmrl.distributed.context import Context
from llmrl.functional.streams import Purpose
from llmrl.reports.progress import Silent
from llmrl.roles import Collectives, Progress, Sampling

CPU = torch.device("cpu")


def context_of(collectives: Collectives | None = None, progress: Progress | None = None) -> Context:
    """As the environment says that the process was launched."""
    return make_context(collectives or OneProcess(), progress or Silent())


def on_cpu(module: torch.nn.Module) -> torch.nn.Module:
    return module.to(CPU)


def sampling_of(num_responses: int, *, seed: int, max_response_tokens: int) -> Sampling:
    """How a trainer draws at temperature 1."""
    return Sampling(
        temperature=1.0,
        num_responses=num_responses,
        max_response_tokens=max_response_tokens,
        greedy=False,
        seed=seed,
        purpose=Purpose.TRAINING,
        first_response=0,
    )
