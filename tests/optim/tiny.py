"""Small modules that learn, and how they learn."""

import math

import torch
from torch import nn

from llmrl.optim.config import OptimizerConfig
from llmrl.optim.local import LocalTrainable

PEAK = 0.1


def trainable_of(module, *, num_steps=10, peaks=None, **settings):
    config = OptimizerConfig(**({"learning_rate": PEAK, "max_grad_norm": math.inf} | settings))
    return LocalTrainable(module, config, num_steps=num_steps, peaks=peaks)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def learn(trainable, num_steps, *, first=0):
    """Steps on data that depends on the step alone."""
    for n in range(first, first + num_steps):
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(n))
        trainable.backward((trainable.module(x) - x.sum(dim=1, keepdim=True)).square().mean())
        trainable.optimizer_step()


class Scalar(nn.Module):
    """A matrix and a vector of one number each; the loss is a sum whose gradient is named."""

    def __init__(self, matrix=2.0, vector=1.0):
        super().__init__()
        self.matrix = nn.Parameter(torch.tensor([[matrix]]))
        self.vector = nn.Parameter(torch.tensor([vector]))

    def loss(self, matrix_slope, vector_slope):
        return (matrix_slope * self.matrix).sum() + (vector_slope * self.vector).sum()


WARM_UP = [1 / 3, 2 / 3]
SCHEDULES = {
    "constant": [*WARM_UP, 1, 1, 1, 1],
    "linear": [*WARM_UP, 1, 3 / 4, 2 / 4, 1 / 4],
    "cosine": [*WARM_UP, 1, (1 + math.sqrt(0.5)) / 2, 1 / 2, (1 - math.sqrt(0.5)) / 2],
}
