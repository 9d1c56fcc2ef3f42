"""The workloads of training steps, by name: how many prompts and responses, of which lengths, and which settings."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from lengths import draw_lengths
from peers import GRPO_AND_REWARD, PPO
from texts import Words
from torch import Tensor
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A training step: one rollout, one epoch, one optimizer step."""

    algorithm: Literal["grpo", "ppo"]
    num_prompts: int
    group_size: int
    prompt_tokens: int
    response_tokens: int
    """Of every response, or the most where lengths are mixed."""
    mixed: bool = False
    """Lengths are uniform from 1 on."""
    kl_coef: float = 0.0
    critic: Literal["own", "shared", "adapter"] = "own"
    """The critic of PPO in llmrl; TRL's always has a network of its own."""
    lora_rank: int | None = None
    """Trains adapters. In llmrl all roles stand on the actor's frozen base; in TRL only the reference does."""

    @property
    def num_responses(self) -> int:
        return self.num_prompts * self.group_size

    @property
    def trl(self) -> str:
        """Version of TRL that has the algorithm."""
        return GRPO_AND_REWARD if self.algorithm == "grpo" else PPO

    @property
    def describes(self) -> str:
        """In words, for a table."""
        tokens = f"up to {self.response_tokens}" if self.mixed else str(self.response_tokens)
        responses = f"{self.num_prompts} x {self.group_size}" if self.group_size > 1 else str(self.num_prompts)
        more = f", KL {self.kl_coef}" if self.algorithm == "grpo" and self.kl_coef else self.roles
        return f"{self.algorithm.upper()} step, {responses} responses of {self.prompt_tokens} + {tokens}{more}"

    @property
    def roles(self) -> str:
        """How the roles of PPO share weights, in words."""
        return {"own": "", "shared": ", shared trunk", "adapter": ", LoRA roles"}[self.critic]

    def lengths(self, seed: int) -> Tensor:
        """Tokens of each response (B,), EOS included."""
        generator = torch.Generator().manual_seed(seed)
        return draw_lengths(self.num_responses, self.response_tokens, mixed=self.mixed, generator=generator)

    def prompts(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> list[str]:
        """The prompts, which every step reads again."""
        words = Words(tokenizer, seed=seed)
        return [words.draw(self.prompt_tokens) for _ in range(self.num_prompts)]


WORKLOADS: dict[str, Workload] = {
    "W4": Workload(algorithm="grpo", num_prompts=2, group_size=8, prompt_tokens=64, response_tokens=32),
    "W5": Workload(
        algorithm="grpo",
        num_prompts=2,
        group_size=8,
        prompt_tokens=128,
        response_tokens=128,
        mixed=True,
        kl_coef=0.04,
    ),
    "W6": Workload(algorithm="grpo", num_prompts=2, group_size=8, prompt_tokens=256, response_tokens=64),
    "W7": Workload(algorithm="ppo", num_prompts=16, group_size=1, prompt_tokens=64, response_tokens=32, kl_coef=0.05),
    "W8": Workload(
        algorithm="ppo",
        num_prompts=16,
        group_size=1,
        prompt_tokens=64,
        response_tokens=32,
        kl_coef=0.05,
        critic="shared",
    ),
    "W8-lora": Workload(
        algorithm="ppo",
        num_prompts=16,
        group_size=1,
        prompt_tokens=64,
        response_tokens=32,
        kl_coef=0.05,
        critic="adapter",
        lora_rank=16,
    ),
}
"""The steps of `steps.py`. W1 is the rollout of `rollout.py`, W9 the reward model of `reward_model.py`."""

PARALLEL = Workload(algorithm="grpo", num_prompts=4, group_size=8, prompt_tokens=64, response_tokens=32)
"""W17, of `data_parallel.py`."""

DERIVED: dict[str, tuple[str, ...]] = {
    "W10": ("W7", "W8", "W8-lora"),
    "W11": ("W4", "W6"),
    "W18": ("W4", "W7"),
}
"""Measured with other workloads: peak memory of PPO and of GRPO, and what a step takes beside its phases."""


def checksum(ids: Sequence[Sequence[int]]) -> int:
    """Number that differs for other prompts; their order does not count."""
    return sum(hash(tuple(row)) for row in ids) % 2**32
