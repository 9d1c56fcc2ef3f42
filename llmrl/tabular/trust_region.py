"""Trust region policy optimization (TRPO) with nothing estimated: exact gradient, exact Fisher matrix, line search."""

from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from llmrl.tabular.bellman import check_stationary, objective, visitation
from llmrl.tabular.mdp import MDP
from llmrl.tabular.policy_gradient import exact_gradient, softmax_policy

MAX_HALVINGS = 30


@dataclass(frozen=True)
class Step:
    """Logits after a step, the mean KL(old, new) that it moved, its gain of J, and how often it was halved."""

    logits: Float64[Tensor, "S A"]
    kl: float
    gain: float
    num_halvings: int


def mean_kl(
    visits: Float64[Tensor, " S"], old_logits: Float64[Tensor, "S A"], logits: Float64[Tensor, "S A"]
) -> Float64[Tensor, ""]:
    """Mean over visits of KL(π_old(· | s), π(· | s)), in nats.

    Reference: Schulman et al. 2015, arXiv:1502.05477, eq. 12.
    """
    old, new = old_logits.log_softmax(dim=1), logits.log_softmax(dim=1)
    return visits / visits.sum() @ (old.exp() * (old - new)).sum(dim=1)


def fisher_matrix(visits: Float64[Tensor, " S"], logits: Float64[Tensor, "S A"]) -> Float64[Tensor, "SA SA"]:
    """Fisher information of the policy in its logits, the Hessian of `mean_kl` at no distance.

        F = Σ_s d(s) (diag π(· | s) - π(· | s) π(· | s)ᵀ) / Σ_s d(s), a block for each state

    It is singular: a constant added to the logits of a state changes nothing.

    Reference: Kakade 2001, "A natural policy gradient", section 3.
    """
    policy = softmax_policy(logits)
    blocks = torch.diag_embed(policy) - policy[:, :, None] * policy[:, None, :]
    return torch.block_diag(*(visits / visits.sum())[:, None, None] * blocks)


def natural_gradient(mdp: MDP, logits: Float64[Tensor, "S A"]) -> Float64[Tensor, "S A"]:
    """F^+ ∇J, the steepest ascent where distance is measured by the KL.

    For a softmax it is the advantages, times the sum of visits, where a state is visited at all.

    Reference: Kakade 2001, theorem 1; Agarwal et al. 2021, arXiv:1908.00261, lemma 5.1.
    """
    visits = visitation(mdp, softmax_policy(logits))
    gradient = exact_gradient(mdp, logits).flatten()
    return (torch.linalg.pinv(fisher_matrix(visits, logits), hermitian=True) @ gradient).view_as(logits)


def trpo_step(mdp: MDP, logits: Float64[Tensor, "S A"], *, max_kl: float) -> Step:
    """One step of TRPO: along the natural gradient x, as long as the KL allows, halved until J does rise.

        step = sqrt(2 max_kl / xᵀ F x) x,    then 1/2, 1/4, ... of it until KL(old, new) <= max_kl and J(new) > J(old)

    Args:
        mdp: The process, without a horizon.
        logits: Logits of the softmax policy.
        max_kl: Limit of the mean KL, in nats; greater than 0.

    Returns:
        The step; the logits as they were, and a gain of 0, at an optimum, or where no step helps.

    Raises:
        ValueError: `max_kl` is not positive, or the process has a horizon.

    Reference: Schulman et al. 2015, arXiv:1502.05477, section 6 and appendix C.
    """
    check_stationary(mdp)
    if not max_kl > 0:
        raise ValueError(f"max_kl ({max_kl}) must be greater than 0")
    policy = softmax_policy(logits)
    visits, before = visitation(mdp, policy), float(objective(mdp, policy))
    direction = natural_gradient(mdp, logits)
    squared_length = float((direction * exact_gradient(mdp, logits)).sum())
    for halvings in range(MAX_HALVINGS if squared_length > 0 else 0):
        step = (2 * max_kl / squared_length) ** 0.5 * 0.5**halvings
        new = logits + step * direction
        kl = float(mean_kl(visits, logits, new))
        gain = float(objective(mdp, softmax_policy(new))) - before
        if kl <= max_kl and gain > 0:
            return Step(new, kl, gain, halvings)
    return Step(logits, 0.0, 0.0, 0)
