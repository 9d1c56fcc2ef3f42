"""Advantages: per token with a critic (GAE), per response against the other responses to its prompt (GRPO, RLOO)."""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Float64, Int, Num
from torch import Tensor

from llmrl.functional.masking import check_shapes, next_positions, taken_at

STD_FLOOR = 1e-6
"""Added to a group's standard deviation before `group_relative` divides by it."""


def gae(
    rewards: Float[Tensor, "B T"],
    values: Float[Tensor, "B T"],
    response_mask: Bool[Tensor, "B T"],
    bootstrap_values: Float[Tensor, " B"],
    *,
    gamma: float,
    gae_lambda: float,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Generalized advantage estimates (GAE), and the returns that the critic learns.

        δ_t = r_t + γ V_{t+1} - V_t
        A_t = δ_t + γ λ A_{t+1}
        R_t = A_t + V_t

    Positions outside the mask are skipped: t+1 means the next token the policy chose, whatever tool output or padding
    lies between.

    Args:
        rewards: Per-token rewards, KL penalty included.
        values: The critic's V(s_t), *before* token t is chosen.
        response_mask: True on the tokens the policy chose.
        bootstrap_values: V after the last token; 0 where the response ended, or where a truncated one counts as ended.
        gamma: Discount per token, in [0, 1].
        gae_lambda: λ in [0, 1]; 0 is one-step TD, 1 is Monte Carlo minus V.

    Returns:
        ``(advantages, returns)``, both 0 outside the mask. Not standardized.

    Raises:
        ValueError: Shapes differ.

    Reference: Schulman et al. 2016, arXiv:1506.02438, eq. 11-16.
    """
    deltas, _ = _td_errors(rewards, values, response_mask, bootstrap_values, gamma)
    advantages = _discounted_sums(deltas, response_mask, gamma * gae_lambda)
    return advantages, torch.where(response_mask, advantages + values, 0.0)


def n_step_returns(
    rewards: Float[Tensor, "B T"],
    values: Float[Tensor, "B T"],
    response_mask: Bool[Tensor, "B T"],
    bootstrap_values: Float[Tensor, " B"],
    *,
    gamma: float,
    num_steps: int,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """n-step returns, and the advantages over the critic that they give.

        R_t = r_t + γ r_{t+1} + ... + γ^{n-1} r_{t+n-1} + γ^n V_{t+n}
        A_t = R_t - V_t = δ_t + γ δ_{t+1} + ... + γ^{n-1} δ_{t+n-1},    δ_t = r_t + γ V_{t+1} - V_t

    A sum that reaches the end of the response stops there, with V after the last token. n = 1 is one-step TD, `gae`
    with λ 0; from the number of tokens on it is Monte Carlo, `gae` with λ 1. Positions outside the mask are skipped.

    Args:
        rewards: Per-token rewards, KL penalty included.
        values: The critic's V(s_t), *before* token t is chosen.
        response_mask: True on the tokens the policy chose.
        bootstrap_values: V after the last token; 0 where the response ended.
        gamma: Discount per token, in [0, 1].
        num_steps: n, at least 1.

    Returns:
        ``(advantages, returns)``, both 0 outside the mask. Not standardized.

    Raises:
        ValueError: `num_steps` is below 1, or shapes differ.

    Reference: Mnih et al. 2016, arXiv:1602.01783, section 3; Sutton and Barto 2018, eq. 7.1.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps ({num_steps}) must be at least 1")
    deltas, following = _td_errors(rewards, values, response_mask, bootstrap_values, gamma)
    advantages = torch.zeros_like(deltas)
    for _ in range(min(num_steps, deltas.shape[1])):
        after = taken_at(advantages, following, beyond=torch.zeros_like(bootstrap_values))
        advantages = torch.where(response_mask, deltas + gamma * after, 0.0)
    return advantages, torch.where(response_mask, advantages + values, 0.0)


def discounted_returns(
    rewards: Float[Tensor, "B T"], response_mask: Bool[Tensor, "B T"], *, gamma: float
) -> Float[Tensor, "B T"]:
    """Monte Carlo returns R_t = r_t + γ R_{t+1}, where t+1 is the next token under the mask; 0 outside it.

    Args:
        rewards: Per-token rewards.
        response_mask: True on the tokens the policy chose.
        gamma: Discount per token, in [0, 1].

    Raises:
        ValueError: Shapes differ.

    Reference: Sutton and Barto 2018, "Reinforcement learning: an introduction", eq. 3.9.
    """
    check_shapes(rewards=(rewards, "B T"), response_mask=(response_mask, "B T"))
    return _discounted_sums(rewards, response_mask, gamma)


def group_relative(
    scores: Float[Tensor, " B"], group_ids: Int[Tensor, " B"], *, scale: Literal["std", "none"] = "std"
) -> Float[Tensor, " B"]:
    """Advantage over the mean score of the group: (score - mean) / (population std + 1e-6).

    Args:
        scores: One per response; NaN means "could not be scored" and is left out of mean and std.
        group_ids: The group of each response, in any order; each group has at least two.
        scale: ``"none"`` leaves the division out (Dr. GRPO, arXiv:2503.20783).

    Returns:
        Advantages, computed in float64, in the dtype of `scores`. Exactly 0 where all scored responses of the group
        have the same score, where only one is scored, and for a response without a score.

    Raises:
        ValueError: A group has one response, `scale` is unknown, or shapes differ.

    Reference: Shao et al. 2024, arXiv:2402.03300, section 4.1.2.
    """
    if scale not in ("std", "none"):
        raise ValueError(f"scale ({scale!r}) must be 'std' or 'none'")
    scored, shifted, group = _by_group(scores, group_ids)
    count = _group_sums(scored.double(), group)
    deviation = torch.where(scored, shifted - _group_sums(shifted, group) / count, 0.0)
    if scale == "std":
        std = (_group_sums(deviation.square(), group) / count).sqrt()
        deviation = torch.where(scored, deviation / (std + STD_FLOOR), 0.0)
    return deviation.to(scores)


def decoupled_group_relative(
    parts: Float[Tensor, "K B"], weights: Float[Tensor, " K"], group_ids: Int[Tensor, " B"]
) -> Float[Tensor, " B"]:
    """Advantage of several rewards, each standardized in its group before they are added (GDPO).

        A_k,i = (r_k,i - mean of r_k in the group) / (population std of r_k in the group + 1e-6)
        S_i = Σ_k w_k A_k,i
        A_i = S_i / (population std of S over all scored responses + 1e-6)

    Whatever its scale, a reward has a say as large as its weight, and the size of advantages does not grow with the
    number of rewards. The paper also subtracts the mean of S, which is 0 by construction; without that, a group whose
    rewards are all flat has advantages of exactly 0.

    Args:
        parts: K rewards of each response; NaN where one could not score it, which leaves it out of that reward's mean
            and std, and that reward out of its sum.
        weights: Weight of each reward.
        group_ids: The group of each response, in any order; each group has at least two.

    Returns:
        Advantages, computed in float64, in the dtype of `parts`; 0 for a response without a score.

    Raises:
        ValueError: A group has one response, or shapes differ.

    Reference: Liu et al. 2026, arXiv:2601.05242.
    """
    check_shapes(parts=(parts, "K B"), weights=(weights, "K"), group_ids=(group_ids, "B"))
    exact = parts.cpu().double()
    relative = torch.stack([group_relative(part, group_ids) for part in exact])
    total = (weights.cpu().double()[:, None] * relative).sum(dim=0)
    num_scored = (~exact.isnan()).any(dim=0).sum().clamp(min=1)
    std = (total.square().sum() / num_scored).sqrt()
    return (total / (std + STD_FLOOR)).to(parts)


def rewards_to_go(
    scores: Float[Tensor, " B"],
    per_token: Float[Tensor, "B T"],
    turn_of_token: Int[Tensor, "B T"],
    response_mask: Bool[Tensor, "B T"],
) -> Float[Tensor, "B K"]:
    """Rewards of each turn and those after it, R_k = r_k + R_{k+1}, R_K = the score; no discount.

    Compared among the turns k of a group they are group-relative advantages of turns.

    Args:
        scores: Score of each response as a whole, which comes at its end; NaN where it has none.
        per_token: Rewards of tokens.
        turn_of_token: Number of the turn of each token under the mask, from 0.
        response_mask: True on the tokens that the policy chose.

    Returns:
        In float64. NaN for turns that a response does not have, and for a response without a score.

    Raises:
        ValueError: Shapes differ.
    """
    check_shapes(
        scores=(scores, "B"),
        per_token=(per_token, "B T"),
        turn_of_token=(turn_of_token, "B T"),
        response_mask=(response_mask, "B T"),
    )
    of_turn = torch.where(response_mask, turn_of_token, 0).cpu()  # a GPU adds up in another order each time
    exact = torch.where(response_mask, per_token, 0.0).cpu().double()
    is_empty = of_turn.shape[1] == 0  # no episode of the rollout has begun
    last = of_turn.new_zeros(len(of_turn)) if is_empty else of_turn.amax(dim=1)
    num_turns = int(last.max()) + 1
    rewards = exact.new_zeros(len(exact), num_turns).scatter_add(1, of_turn, exact)
    to_go = rewards.flip(1).cumsum(1).flip(1) + scores.cpu().double()[:, None]
    return to_go.masked_fill(torch.arange(num_turns) > last[:, None], torch.nan).to(scores.device)


def leave_one_out(
    scores: Float[Tensor, " B"], group_ids: Int[Tensor, " B"], *, weights: Num[Tensor, " B"] | None = None
) -> Float[Tensor, " B"]:
    """Score minus the mean score of the *other* scored responses in the group (RLOO).

    NaN scores, dtypes, exact zeros and errors are as in `group_relative`.

    Args:
        scores: One per response.
        group_ids: The group of each response, in any order; each group has at least two.
        weights: Weight of each response in the mean, 0 or greater. With the squared norm of its gradient it is the
            baseline of least variance, E[|g|^2 s] / E[|g|^2]; OPO takes the length for that. None: all the same.

    Reference: Ahmadian et al. 2024, arXiv:2402.14740, section 3. With weights Greensmith et al. 2004, "Variance
    reduction techniques for gradient estimates in reinforcement learning", and Hao et al. 2025, arXiv:2505.23585, whose
    mean includes the response itself.
    """
    scored, shifted, group = _by_group(scores, group_ids)
    weight = torch.where(scored, 1.0 if weights is None else weights.cpu().double(), 0.0).double()
    of_others = _group_sums(weight, group) - weight
    others_mean = (_group_sums(weight * shifted, group) - weight * shifted) / of_others
    return torch.where(scored & (of_others > 0), shifted - others_mean, 0.0).to(scores)


def flat_groups(scores: Float[Tensor, " B"], group_ids: Int[Tensor, " B"]) -> Bool[Tensor, " B"]:
    """True for each response whose group has no advantages: all its scores are equal, or none of it is scored."""
    _, shifted, group = _by_group(scores, group_ids)
    return (_group_sums(shifted, group) == 0).to(scores.device)


def _td_errors(
    rewards: Float[Tensor, "B T"],
    values: Float[Tensor, "B T"],
    response_mask: Bool[Tensor, "B T"],
    bootstrap_values: Float[Tensor, " B"],
    gamma: float,
) -> tuple[Float[Tensor, "B T"], Int[Tensor, "B T"]]:
    """``(δ, next)``: errors of one-step TD, r_t + γ V_{t+1} - V_t, and the position of t+1, T where there is none."""
    check_shapes(
        rewards=(rewards, "B T"),
        values=(values, "B T"),
        response_mask=(response_mask, "B T"),
        bootstrap_values=(bootstrap_values, "B"),
    )
    following = next_positions(response_mask)
    return rewards + gamma * taken_at(values, following, beyond=bootstrap_values) - values, following


def _discounted_sums(x: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], decay: float) -> Float[Tensor, "B T"]:
    """y_t = x_t + decay * y_{t+1} along the mask, 0 outside it.

    In log2(T) steps: before each, entry t holds its sum over the next `reach` positions and the decay across them.
    """
    sums = torch.where(mask, x, 0.0)
    decays = torch.where(mask, torch.full_like(x, decay), 1.0)
    reach = 1
    while reach < x.shape[1]:
        head = sums[:, :-reach] + decays[:, :-reach] * sums[:, reach:]
        sums = torch.cat([head, sums[:, -reach:]], dim=1)
        decays = torch.cat([decays[:, :-reach] * decays[:, reach:], decays[:, -reach:]], dim=1)
        reach *= 2
    return torch.where(mask, sums, 0.0)


def _by_group(
    scores: Float[Tensor, " B"], group_ids: Int[Tensor, " B"]
) -> tuple[Bool[Tensor, " B"], Float64[Tensor, " B"], Int[Tensor, " B"]]:
    """``(scored, shifted, group)``: True where scored; scores minus the lowest of their group, 0 where unscored; group
    numbers from 0.

    The shift makes a flat group all zeros, which no rounding of a mean can disturb. All three are on the CPU: a GPU
    adds up in another order each time.
    """
    check_shapes(scores=(scores, "B"), group_ids=(group_ids, "B"))
    scores, group_ids = scores.cpu(), group_ids.cpu()
    ids, group, sizes = group_ids.unique(return_inverse=True, return_counts=True)
    alone = ids[sizes < 2]
    if len(alone):
        raise ValueError(f"group_ids: group {int(alone[0])} has one response; a group needs at least two to compare")
    scored = ~scores.isnan()
    exact = torch.where(scored, scores.double(), torch.inf)
    lowest = exact.new_full((len(ids),), torch.inf).scatter_reduce(0, group, exact, "amin")
    return scored, torch.where(scored, exact - lowest[group], 0.0), group


def _group_sums(x: Float64[Tensor, " B"], group: Int[Tensor, " B"]) -> Float64[Tensor, " B"]:
    """Sum over the group of each response."""
    return torch.zeros_like(x).index_add(0, group, x)[group]
