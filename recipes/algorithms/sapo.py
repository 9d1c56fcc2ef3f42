"""A policy loss: SAPO (Gao et al. 2025, arXiv:2511.20347). A sigmoid gate takes the place of the clip: the gradient
of a token fades as its ratio leaves 1, faster where the advantage is negative.

    L_t = -A_t 4/τ sigmoid(τ (ρ_t - 1)),    ρ_t = exp(logprobs - old_logprobs),    τ = 1 for A_t > 0, else 1.05
"""

import torch

from llmrl.functional.statistics import Mean


def sapo(logprobs, old_logprobs, advantages, weights):
    counted = weights != 0
    ratio = torch.where(counted, logprobs - old_logprobs, 0.0).exp()
    slope = torch.where(advantages > 0, 1.0, 1.05)
    gate = torch.sigmoid(slope * (ratio - 1))
    loss = -(weights * advantages * gate * 4 / slope).sum()
    kept = 4 * gate.detach() * (1 - gate.detach())  # share of the gradient that the gate leaves
    return loss, {"policy/gate": Mean(kept[counted].sum(), counted.sum())}
