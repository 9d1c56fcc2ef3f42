"""The mathematics once more, as slow loops straight from the papers. Imports nothing of llmrl.

Matrices are lists of rows; masks are lists of rows of bools. Everything is in Python floats, which are float64.
"""

import itertools
import math

Matrix = list[list[float]]
Mask = list[list[bool]]


def gae_double_sum(
    rewards: Matrix,
    values: Matrix,
    response_mask: Mask,
    bootstrap_values: list[float],
    *,
    gamma: float,
    gae_lambda: float,
) -> Matrix:
    """A_t = Σ_l (γλ)^l δ_{t+l} over the chosen tokens of each row (arXiv:1506.02438, eq. 16), 0 elsewhere."""
    advantages = [[0.0] * len(row) for row in rewards]
    for b, mask in enumerate(response_mask):
        chosen = [t for t, counts in enumerate(mask) if counts]
        v = [values[b][t] for t in chosen] + [bootstrap_values[b]]
        deltas = [rewards[b][t] + gamma * v[i + 1] - v[i] for i, t in enumerate(chosen)]
        for i, t in enumerate(chosen):
            advantages[b][t] = sum((gamma * gae_lambda) ** (j - i) * deltas[j] for j in range(i, len(chosen)))
    return advantages


def n_step_advantages(
    rewards: Matrix,
    values: Matrix,
    response_mask: Mask,
    bootstrap_values: list[float],
    *,
    gamma: float,
    num_steps: int,
) -> Matrix:
    """A_t = Σ_{k<n} γ^k r_{t+k} + γ^n V_{t+n} - V_t over the chosen tokens of each row, where n ends with the row
    (arXiv:1602.01783, section 3), 0 elsewhere."""
    advantages = [[0.0] * len(row) for row in rewards]
    for b, mask in enumerate(response_mask):
        chosen = [t for t, counts in enumerate(mask) if counts]
        v = [values[b][t] for t in chosen] + [bootstrap_values[b]]
        for i, t in enumerate(chosen):
            n = min(num_steps, len(chosen) - i)
            paid = sum(gamma**k * rewards[b][chosen[i + k]] for k in range(n))
            advantages[b][t] = paid + gamma**n * v[i + n] - v[i]
    return advantages


def discounted_returns(rewards: Matrix, response_mask: Mask, *, gamma: float) -> Matrix:
    """R_t = Σ_l γ^l r_{t+l} over the chosen tokens of each row, 0 elsewhere."""
    returns = [[0.0] * len(row) for row in rewards]
    for b, mask in enumerate(response_mask):
        chosen = [t for t, counts in enumerate(mask) if counts]
        for i, t in enumerate(chosen):
            returns[b][t] = sum(gamma**j * rewards[b][later] for j, later in enumerate(chosen[i:]))
    return returns


def group_relative(scores: list[float], group_ids: list[int], *, scale: str) -> list[float]:
    """Score minus the mean of the scored of its group, over their population std + 1e-6 (arXiv:2402.03300)."""
    advantages = []
    for score, group in zip(scores, group_ids, strict=True):
        scored = [s for s, g in zip(scores, group_ids, strict=True) if g == group and not math.isnan(s)]
        if math.isnan(score) or len(set(scored)) == 1:
            advantages.append(0.0)
            continue
        mean = sum(scored) / len(scored)
        std = math.sqrt(sum((s - mean) ** 2 for s in scored) / len(scored))
        advantages.append((score - mean) / (std + 1e-6 if scale == "std" else 1.0))
    return advantages


def decoupled_group_relative(parts: list[list[float]], weights: list[float], group_ids: list[int]) -> list[float]:
    """Weighted sum of the standardized rewards, then minus its mean over all scored responses and over their
    population std + 1e-6 (arXiv:2601.05242)."""
    relative = [group_relative(part, group_ids, scale="std") for part in parts]
    sums = [sum(w * of[i] for w, of in zip(weights, relative, strict=True)) for i in range(len(group_ids))]
    scored = [s for i, s in enumerate(sums) if not all(math.isnan(part[i]) for part in parts)]
    mean = sum(scored) / len(scored)
    std = math.sqrt(sum((s - mean) ** 2 for s in scored) / len(scored))
    unscored = [all(math.isnan(part[i]) for part in parts) for i in range(len(group_ids))]
    return [0.0 if missing else (s - mean) / (std + 1e-6) for s, missing in zip(sums, unscored, strict=True)]


def leave_one_out(scores: list[float], group_ids: list[int]) -> list[float]:
    """Score minus the mean of the other scored ones of its group (arXiv:2402.14740)."""
    advantages = []
    for i, (score, group) in enumerate(zip(scores, group_ids, strict=True)):
        others = [
            s
            for j, (s, g) in enumerate(zip(scores, group_ids, strict=True))
            if g == group and j != i and not math.isnan(s)
        ]
        advantages.append(0.0 if math.isnan(score) or not others else score - sum(others) / len(others))
    return advantages


def masked_entries(x: Matrix, mask: Mask) -> list[float]:
    """The entries that count, in reading order."""
    return [v for row, counts in zip(x, mask, strict=True) for v, c in zip(row, counts, strict=True) if c]


def log_softmax(logits: list[float], temperature: float) -> list[float]:
    """log p_i = z_i / τ - log Σ exp(z_j / τ)."""
    scaled = [z / temperature for z in logits]
    top = max(scaled)
    normalizer = top + math.log(sum(math.exp(z - top) for z in scaled))
    return [z - normalizer for z in scaled]


def entropy(logits: list[float], temperature: float) -> float:
    """H = -Σ p log p, where 0 log 0 = 0."""
    return -sum(math.exp(lp) * lp for lp in log_softmax(logits, temperature) if lp > -math.inf)


def clipped_policy_token(
    logprob: float, old_logprob: float, advantage: float, *, clip_low: float, clip_high: float, dual_clip: float | None
) -> float:
    """The loss of one token: arXiv:1707.06347, eq. 7, and arXiv:1912.09729, eq. 5."""
    ratio = math.exp(logprob - old_logprob)
    clipped = min(max(ratio, 1 - clip_low), 1 + clip_high)
    loss = max(-advantage * ratio, -advantage * clipped)
    if dual_clip is not None and advantage < 0:
        loss = min(loss, -dual_clip * advantage)
    return loss


def cispo_slope(logprob: float, old_logprob: float, advantage: float, *, clip_low: float, clip_high: float) -> float:
    """dL/d log π of L = -A clip(ρ, 1 - ε, 1 + ε) log π, the ratio a constant (arXiv:2506.13585, eq. 4 and 5)."""
    ratio = math.exp(logprob - old_logprob)
    return -advantage * min(max(ratio, 1 - clip_low), 1 + clip_high)


def clipped_value_token(value: float, old_value: float, target: float, *, value_clip: float | None) -> float:
    """Half the larger of the squared errors of the value and of the value kept near the old one."""
    kept = value if value_clip is None else min(max(value, old_value - value_clip), old_value + value_clip)
    return 0.5 * max((value - target) ** 2, (kept - target) ** 2)


def token_weight(mask: Mask, b: int, t: int, *, aggregation: str, max_response_tokens: int) -> float:
    """What one token counts when the mask is all there is."""
    if not mask[b][t]:
        return 0.0
    num_responses = sum(any(row) for row in mask)
    return {
        "token": 1 / sum(sum(row) for row in mask),
        "sequence": 1 / num_responses / sum(mask[b]),
        "constant": 1 / (num_responses * max_response_tokens),
    }[aggregation]


def inverse_cdf(probabilities: list[float], u: float) -> int:
    """The smallest id whose cumulative probability exceeds u times the total."""
    target = u * math.fsum(probabilities)
    cumulative = 0.0
    for i, p in enumerate(probabilities):
        cumulative += p
        if cumulative > target:
            return i
    return max(i for i, p in enumerate(probabilities) if p > 0)


def pass_at_k(num_correct: int, num_samples: int, k: int) -> float:
    """The fraction of all k-subsets of the samples that hold a correct one."""
    subsets = list(itertools.combinations(range(num_samples), k))
    return sum(any(i < num_correct for i in subset) for subset in subsets) / len(subsets)


def wilson_bound(num_successes: int, num_trials: int, z: float, *, upper: bool) -> float:
    """Solves |p̂ - p| = z sqrt(p (1 - p) / n) for p on one side of p̂, by bisection."""
    observed = num_successes / num_trials
    inside, outside = observed, 1.0 if upper else 0.0
    for _ in range(200):
        middle = (inside + outside) / 2
        if abs(observed - middle) <= z * math.sqrt(middle * (1 - middle) / num_trials):
            inside = middle
        else:
            outside = middle
    return inside
