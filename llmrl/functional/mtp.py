"""Mathematics of the implicit critic: values at the heads of multi-token prediction.

Head k, of 0 to K, reads the trunk's state h_t before token t. It predicts token t+k and the value of the state before
that token, as it is expected at h_t:

    v_k(h_t)  ->  E[V(s_{t+k}) | s_t],    V = 0 after the end of a response

Head 0 is the policy's own, and its v_0 the critic. Each head learns from the one of the next step; the last head has
none, and learns from itself one token later. "The next token" is always the next one under the mask.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.nn.functional import huber_loss

from llmrl.functional.masking import check_shapes, masked_sum, next_positions, taken_at
from llmrl.functional.statistics import Mean, Statistic


def next_chosen(x: Shaped[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Shaped[Tensor, "B T"]:
    """At each token under the mask the entry of `x` at the next one of its row; 0 at the last one, and outside the
    mask.

    Raises:
        ValueError: Shapes differ.
    """
    check_shapes(x=(x, "B T"), mask=(mask, "B T"))
    return taken_at(x, next_positions(mask), beyond=x.new_zeros(len(x))).masked_fill(~mask, 0)


def head_targets(
    rewards: Float[Tensor, "B T"],
    target_values: Sequence[Float[Tensor, "B T"]],
    response_mask: Bool[Tensor, "B T"],
    bootstrap_values: Float[Tensor, " B"],
    *,
    gamma: float,
) -> list[Float[Tensor, "B T"]]:
    """TD targets of the values of all heads, each from the head of the next step.

        y_k(t) = r_{t+k} + γ v̄_{k+1}(t)    for k < K
        y_K(t) = r_{t+K} + γ v̄_K(t+1)

    Rewards and values after the end are 0. v̄_{k+1}(t) is an expectation at h_t that includes the responses which have
    ended by then, so it stands in the target of those that have, too. The fixed point is v_k = P^k V: see
    `tests/functional/test_mtp.py`.

    Args:
        rewards: Per-token rewards, KL penalty included.
        target_values: v̄_0 to v̄_K, by the target heads.
        response_mask: True on the tokens the policy chose.
        bootstrap_values: Value after the last token, which γ times it adds to that token's reward; 0 where the response
            ended, or where a truncated one counts as ended.
        gamma: Discount per token, in [0, 1].

    Returns:
        y_0 to y_K, each 0 outside the mask.

    Raises:
        ValueError: Shapes differ.
    """
    shapes = {f"target_values[{k}]": (values, "B T") for k, values in enumerate(target_values)}
    check_shapes(
        rewards=(rewards, "B T"),
        response_mask=(response_mask, "B T"),
        bootstrap_values=(bootstrap_values, "B"),
        **shapes,
    )
    is_last = response_mask & ~next_chosen(response_mask, response_mask)
    coming = torch.where(is_last, rewards + gamma * bootstrap_values[:, None], rewards)
    further = [*target_values[1:], next_chosen(target_values[-1], response_mask)]
    targets = []
    for values in further:
        targets.append(torch.where(response_mask, coming + gamma * values, 0.0))
        coming = next_chosen(coming, response_mask)
    return targets


def clamped_value_loss(
    values: Float[Tensor, "B T"],
    targets: Float[Tensor, "B T"],
    weights: Float[Tensor, "B T"],
    *,
    grad_clamp: float,
) -> tuple[Float[Tensor, ""], dict[str, Statistic]]:
    """Half the squared error of values, whose gradient by a value, the error, is clamped: Huber's loss.

        dL_t / dV_t = clamp(V_t - y_t, -grad_clamp, grad_clamp)

    The clamp is per token and before the weights, so that no split into microbatches changes it. Where targets spread
    further than the clamp, the value that it settles at lies between their mean and their median.

    Args:
        values: Values of the current head.
        targets: From `head_targets`.
        weights: From `token_weights`.
        grad_clamp: Largest size of the gradient, in units of the rewards; greater than 0.

    Returns:
        ``(loss, metrics)``: fraction of tokens whose gradient is clamped.

    Raises:
        ValueError: `grad_clamp` is not positive, or shapes differ.

    Reference: Huber 1964, "Robust estimation of a location parameter"; as a clamp of TD errors Mnih et al. 2015,
    "Human-level control through deep reinforcement learning", methods.
    """
    if grad_clamp <= 0:
        raise ValueError(f"grad_clamp ({grad_clamp}) must be greater than 0, or no value learns")
    check_shapes(values=(values, "B T"), targets=(targets, "B T"), weights=(weights, "B T"))
    counted = weights != 0
    values, targets = (torch.where(counted, x, 0.0) for x in (values, targets))
    clamped = (values - targets).detach().abs() > grad_clamp
    metrics: dict[str, Statistic] = {"value/clamp_fraction": Mean(clamped.sum(), counted.sum())}
    return masked_sum(weights * huber_loss(values, targets, reduction="none", delta=grad_clamp), counted), metrics
