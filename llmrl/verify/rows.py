"""The table: which algorithms, with which settings, are verified by default. A new estimator is one more row."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Row:
    """An estimator: an algorithm and its settings."""

    name: str
    algorithm: Literal["grpo", "ppo"]
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the section `algorithm`, except `kl_coef` and `entropy_coef`, which the probes set."""
    exact_critic: bool = False
    """Whether the critic is right about the actor, or is noise."""
    code: str | None = None
    """A user's class, ``path/to/file.py:Class``, in place of GRPO or PPO."""

    @property
    def group_size(self) -> int:
        """Responses per prompt: every group of them is enumerated."""
        return self.settings.get("group_size", 2) if self.algorithm == "grpo" else 1

    @property
    def compares_prompts(self) -> bool:
        """Whether a response is compared with those to other prompts, so that every rollout is enumerated."""
        return self.settings.get("baseline") == "batch"


def _grpo(name: str, **settings: Any) -> Row:
    return Row(name=name, algorithm="grpo", settings=settings)


def _ppo(name: str, *, exact_critic: bool = False, **settings: Any) -> Row:
    return Row(name=name, algorithm="ppo", settings=settings, exact_critic=exact_critic)


PLAIN = {"scale": "none", "aggregation": "constant"}
"""Settings under which nothing but baseline and loss decides about the gradient."""
RLOO = {**PLAIN, "baseline": "leave_one_out"}
REINFORCE = {**PLAIN, "loss": "policy_gradient"}
CAPPED: Mapping[str, Any] = {"importance_cap": 1.2}
"""A cap that the probes go past."""
WHOLE = {"importance_level": "sequence", "importance_cap": 100.0}
"""Importance weights without bias: no cap is reached."""
ROWS = (
    _grpo("grpo, defaults"),
    _grpo("grpo, sequence", aggregation="sequence"),
    _grpo("grpo, as its paper", aggregation="sequence", kl_form="k3_paper"),
    _grpo("dr. grpo", **PLAIN),
    _grpo("rloo", **RLOO),
    _grpo("rloo, k3", kl_form="k3", **RLOO),
    _grpo("dapo", clip_high=0.28, overlong_buffer_tokens=2, mask_truncated=True),
    _grpo("gspo", aggregation="sequence", ratio="sequence", clip_low=3e-4, clip_high=4e-4),
    _grpo("dual clip", dual_clip=1.1),
    _grpo("cispo", loss="cispo"),
    _grpo("rloo, KL in the reward", kl_form="k1_reward", **RLOO),
    _grpo("reinforce", baseline="none", **REINFORCE),
    _grpo("reinforce, constant baseline", baseline="constant", baseline_value=1.0, **REINFORCE),
    _grpo("reinforce, mean of the batch", baseline="batch", group_size=1, **REINFORCE),
    _grpo("reinforce, baseline in time", baseline="batch", credit="token", group_size=1, **REINFORCE),
    _grpo("opo", baseline="optimal", group_size=3, **REINFORCE),
    _grpo("reinforce, KL in the reward", baseline="none", kl_form="k1_reward", **REINFORCE),
    _grpo("reinforce++", baseline="none", scale="batch", credit="token", kl_form="k1_reward"),
    _grpo("rloo, truncated importance", importance="truncated", **CAPPED, **RLOO),
    _grpo("rloo, masked importance", importance="masked", **CAPPED, **RLOO),
    _grpo("rloo, importance of responses", importance="truncated", **WHOLE, **RLOO),
    _ppo("ppo, defaults"),
    _ppo("ppo, exact critic", exact_critic=True),
    _ppo("ppo, lambda 0, exact critic", gae_lambda=0.0, exact_critic=True),
    _ppo("ppo, lambda 1", gae_lambda=1.0),
    _ppo("ppo, value_lambda 1", value_lambda=1.0),
    _ppo("ppo, gamma 0.9", gamma=0.9, gae_lambda=0.9),
    _ppo("ppo, sequence", aggregation="sequence", gae_lambda=1.0),
    _ppo("ppo, 2 steps, exact critic", num_return_steps=2, exact_critic=True),
    _ppo("ppo, v-trace", importance="v_trace", **CAPPED),
    _ppo("ppo, proximal critic", value_proximal_coef=0.5, value_clip=None),
    _ppo("ppo, penalized trpo", step_kl_target=0.01),
    _ppo("ppo, truncated bootstrapped", bootstrap_truncated=True),
    _ppo("ppo, truncated masked", mask_truncated=True, gae_lambda=1.0),
    _ppo("ppo, penalties", score_clip=1.5, missing_eos_penalty=0.5, overlong_buffer_tokens=2, gae_lambda=1.0),
    _ppo("reinforce with value baseline", gae_lambda=1.0, loss="policy_gradient", value_clip=None, scale="none"),
)
