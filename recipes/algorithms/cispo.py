"""A policy loss: CISPO (MiniMax 2025, arXiv:2506.13585). The ratio is a detached weight, clipped from above, so that no
token loses its gradient.

    L_t = -A_t clip(ρ_t, max=2) log π_t,    ρ_t = exp(logprobs - old_logprobs), detached
"""

import torch

from llmrl.functional.statistics import Mean


def cispo(logprobs, old_logprobs, advantages, weights):
    counted = weights != 0
    logprobs, old_logprobs = (torch.where(counted, x, 0.0) for x in (logprobs, old_logprobs))
    ratio = (logprobs - old_logprobs).exp().detach()
    loss = -(weights * advantages * ratio.clamp(max=2.0) * logprobs).sum()
    return loss, {"policy/clip_fraction": Mean((ratio > 2.0).sum(), counted.sum())}
