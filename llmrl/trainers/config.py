"""Settings of the trainers and of what a run leaves."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llmrl.paths import UserPath


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """What a run leaves."""

    output_dir: UserPath
    """Folder of everything that the run leaves."""
    seed: int = 0
    """Of every random stream: the order of the data, what is sampled, how minibatches are shuffled."""
    resume: bool = False
    """Continues from the newest checkpoint in the folder, or starts where there is none."""
    checkpoint_every: int = 50
    """Iterations between checkpoints; 0 for one at the end only."""
    keep_checkpoints: int = 1
    """Newest checkpoints that are kept."""
    best_metric: str | None = None
    """The model with the best value of this metric is kept in best/; null keeps none."""
    best_mode: Literal["max", "min"] = "max"
    """Which direction of `best_metric` is better."""
    deterministic: bool = False
    """Makes a GPU compute the same bits each time, which it otherwise does not; slower. A CPU always does."""

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise ValueError("run.output_dir is empty; name a folder")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"run.seed ({self.seed}) must be at least 0 and less than 2**32")
        for name, least in (("checkpoint_every", 0), ("keep_checkpoints", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"run.{name} ({getattr(self, name)}) must be at least {least}")

    @property
    def folder(self) -> Path:
        """The output folder, as it stands now: a reward function may change the working directory later."""
        return Path(self.output_dir).absolute()


@dataclass(frozen=True, kw_only=True)
class RunConfig(OutputConfig):
    """How long a run is, and what it leaves."""

    num_iterations: int
    """Iterations in all, those before a resume included."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_iterations < 1:
            raise ValueError(f"run.num_iterations ({self.num_iterations}) must be at least 1")


@dataclass(frozen=True, kw_only=True)
class RLRunConfig(RunConfig):
    """What a run of reinforcement learning leaves beside that."""

    samples_per_iteration: int = 4
    """Responses of an iteration that are written to samples.jsonl."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples_per_iteration < 0:
            raise ValueError(f"run.samples_per_iteration ({self.samples_per_iteration}) must be at least 0")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How held-out prompts are answered, and what counts as correct."""

    every: int | None = None
    """Iterations between evaluations during training; before the first and after the last too. null for these two only,
    where `evaluation_data` is named; 0 for none."""
    num_responses: int = 1
    """Responses per prompt: 1 takes the greedy one, more are sampled."""
    temperature: float = 1.0
    """Sampling temperature where responses are sampled."""
    pass_at: tuple[int, ...] = ()
    """Every k for which pass@k is estimated: the share of prompts that k sampled responses would solve."""
    correct_above: float = 0.5
    """A response is correct if it gets more than this, weights left aside: from the first reward function, or, where
    there is none, from the reward model, whose normalized scores have mean 0 and standard deviation 1."""

    def __post_init__(self) -> None:
        if self.every is not None and self.every < 0:
            raise ValueError(f"evaluation.every ({self.every}) must be 0 or greater")
        if self.num_responses < 1:
            raise ValueError(f"evaluation.num_responses ({self.num_responses}) must be at least 1")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(
                f"evaluation.temperature ({self.temperature}) must be a finite number greater than 0; "
                "evaluation.num_responses 1 takes the likeliest token"
            )
        for k in self.pass_at:
            if not 1 <= k <= self.num_responses:
                raise ValueError(
                    f"evaluation.pass_at ({k}) must be between 1 and evaluation.num_responses ({self.num_responses})"
                )


@dataclass(frozen=True, kw_only=True)
class UpdateConfig:
    """How an experience is cut up for the optimizer."""

    num_epochs: int = 1
    """Passes over each experience."""
    minibatch_size: int | None = None
    """Responses per optimizer step, over all ranks; a multiple of the group size. null for the one nearest to
    128 that divides a rollout."""
    microbatch_tokens: int = 8192
    """Tokens per forward pass on one device, padding included. Changes memory, never the result."""

    def __post_init__(self) -> None:
        for name in ("num_epochs", "minibatch_size", "microbatch_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"update.{name} ({value}) must be at least 1")


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig:
    """How pairs are cut up for the optimizer, and what is learned from them. An iteration is one optimizer step."""

    num_epochs: int = 1
    """Passes over the pairs; a reward model learns them by heart in the second."""
    batch_size: int = 32
    """Pairs per optimizer step, over all ranks."""
    microbatch_tokens: int = 8192
    """Tokens per forward pass on one device, padding included. Changes memory, never the result."""
    head_init: Literal["zero", "normal"] = "normal"
    """A new head: zeros, or normal with variance 1 / (hidden size + 1) (Stiennon et al. 2020, arXiv:2009.01325)."""
    use_margin: bool = True
    """Asks for the margin that a pair brings (Touvron et al. 2023, arXiv:2307.09288); a pair without one asks for 0."""
    center_coef: float = 0.0
    """Pulls the sum of a pair's scores to 0 (Eisenstein et al. 2023, arXiv:2312.09244); 0.01 is usual; 0 for none."""
    evaluate_every: int | None = None
    """Iterations between evaluations on `evaluation_data`; before the first and after the last too. null for these two
    only; 0 for none."""
    num_reference_pairs: int = 512
    """Scores have mean 0 and standard deviation 1 on both responses of so many pairs, spread over the data."""

    def __post_init__(self) -> None:
        for name in ("num_epochs", "batch_size", "microbatch_tokens", "num_reference_pairs"):
            if getattr(self, name) < 1:
                raise ValueError(f"reward_model.{name} ({getattr(self, name)}) must be at least 1")
        if self.evaluate_every is not None and self.evaluate_every < 0:
            raise ValueError(f"reward_model.evaluate_every ({self.evaluate_every}) must be 0 or greater")
        if not 0 <= self.center_coef < math.inf:
            raise ValueError(f"reward_model.center_coef ({self.center_coef}) must be 0 or greater")


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """How examples are cut up for the optimizer. An iteration is one optimizer step."""

    batch_size: int = 32
    """Examples per optimizer step, over all ranks."""
    microbatch_tokens: int = 8192
    """Tokens per forward pass on one device, padding included. Changes memory, never the result."""
    evaluate_every: int | None = None
    """Iterations between evaluations of the loss on `evaluation_data`; before the first and after the last too. null
    for these two only, where `evaluation_data` is named; 0 for none."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "microbatch_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"sft.{name} ({getattr(self, name)}) must be at least 1")
        if self.evaluate_every is not None and self.evaluate_every < 0:
            raise ValueError(f"sft.evaluate_every ({self.evaluate_every}) must be 0 or greater")
