"""Settings of the trainers and of what a run leaves."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from llmrl.paths import UserPath
from llmrl.section import Bound, Section


@dataclass(frozen=True, kw_only=True)
class OutputConfig(Section, place="run"):
    """Output folder of a run: what is written there, and when."""

    output_dir: UserPath
    """Folder that the run writes everything to."""
    seed: Annotated[int, Bound(least=0, below=2**32)] = 0
    """Seed of every random stream: the order of the data, what is sampled, how minibatches are shuffled."""
    resume: Literal["auto", True, False] = "auto"
    """auto goes on with the run in the folder, unless it differs from this one, and begins one where there is none;
    true goes on with it though it differs, and refuses a folder without a checkpoint; false refuses one with a run."""
    checkpoint_every: Annotated[int, Bound(least=0)] = 50
    """Iterations between checkpoints, beside those after the first and the last one; 0 for no more than these."""
    checkpoint_every_s: Annotated[float, Bound(least=0)] = 600.0
    """Seconds after which an iteration ends with a checkpoint, whatever their number; 0 for no limit."""
    keep_checkpoints: Annotated[int, Bound(least=1)] = 2
    """Newest checkpoints that are kept: two, so that a damaged one costs what lies between them."""
    best_metric: str | None = None
    """The model with the greatest value of this metric is kept in best/, or with a minus before the name, as in
    -eval/loss, that with the least; null keeps none."""
    deterministic: bool = False
    """Makes a GPU compute the same bits each time, which it otherwise does not; slower. A CPU always does."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.output_dir:
            raise ValueError("run.output_dir is empty; name a folder")

    @property
    def folder(self) -> Path:
        """The output folder, as it stands now: a reward function may change the working directory later."""
        return Path(self.output_dir).absolute()


@dataclass(frozen=True, kw_only=True)
class RunConfig(OutputConfig):
    """Length of a run, and its output folder."""

    num_iterations: Annotated[int, Bound(least=1)]
    """Iterations in all, those before a resume included."""


@dataclass(frozen=True, kw_only=True)
class RLRunConfig(RunConfig):
    """Length of a run of reinforcement learning, and its output folder."""

    samples_per_iteration: Annotated[int, Bound(least=0)] = 4
    """Responses of an iteration that are written to samples.jsonl."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Section, place="evaluation"):
    """Sampling and scoring of held-out prompts: how often, how many responses, what counts as correct."""

    every: Annotated[int | None, Bound(least=0)] = None
    """Iterations between evaluations during training; before the first and after the last too. null for these two only,
    where `evaluation_data` is named; 0 for none."""
    num_responses: Annotated[int, Bound(least=1)] = 1
    """Responses per prompt: 1 takes the greedy one, more are sampled."""
    temperature: Annotated[float, Bound(above=0, way_out="evaluation.num_responses 1 takes the likeliest token")] = 1.0
    """Sampling temperature where responses are sampled."""
    pass_at: tuple[int, ...] = ()
    """Every k for which pass@k is estimated: the share of prompts that k sampled responses would solve."""
    correct_above: float = 0.5
    """A response is correct if it gets more than this, weights left aside: from the first reward function, or, where
    there is none, from the reward model, whose normalized scores have mean 0 and standard deviation 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for k in self.pass_at:
            if not 1 <= k <= self.num_responses:
                raise ValueError(
                    f"evaluation.pass_at ({k}) must be between 1 and evaluation.num_responses ({self.num_responses})"
                )


@dataclass(frozen=True, kw_only=True)
class UpdateConfig(Section, place="update"):
    """Epochs, minibatches and microbatches in which an experience is learned from."""

    num_epochs: Annotated[int, Bound(least=1)] = 1
    """Passes over each experience. Where one minibatch in one epoch is a whole rollout, GRPO makes no pass for old
    log-probabilities: those of its only step are the same. PPO makes it where a KL is measured, in the critic's
    warm-up, and where actor and critic share a trunk."""
    minibatch_size: Annotated[int | None, Bound(least=1)] = None
    """Responses per optimizer step, over all ranks; a multiple of the group size. null for the one nearest to
    128 that divides a rollout."""
    microbatch_tokens: Annotated[int, Bound(least=1)] = 8192
    """Tokens per forward pass on one device, padding included where it is not packed (`model.packing`). Changes memory,
    never the result."""
    staleness: Annotated[int, Bound(least=0)] = 0
    """Iterations between sampling a rollout and learning from it; above 0 set `algorithm.importance` too."""
    num_replayed: Annotated[int, Bound(least=0)] = 0
    """Earlier rollouts, the newest ones, that each iteration learns from again beside its own; above 0 set
    `algorithm.importance` too."""

    @property
    def num_waiting(self) -> int:
        """Rollouts that wait from one iteration to the next."""
        return self.staleness + self.num_replayed


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig(Section, place="reward_model"):
    """Batches of preference pairs, and the loss that is learned from them. An iteration is one optimizer step."""

    num_epochs: Annotated[int, Bound(least=1)] = 1
    """Passes over the pairs; a reward model learns them by heart in the second."""
    batch_size: Annotated[int, Bound(least=1)] = 32
    """Pairs per optimizer step, over all ranks."""
    microbatch_tokens: Annotated[int, Bound(least=1)] = 8192
    """Tokens per forward pass on one device, padding included where it is not packed (`model.packing`). Changes memory,
    never the result."""
    head_init: Literal["zero", "normal"] = "normal"
    """A new head: zeros, or normal with variance 1 / (hidden size + 1) (Stiennon et al. 2020, arXiv:2009.01325)."""
    use_margin: bool = True
    """Asks for the margin that a pair brings (Touvron et al. 2023, arXiv:2307.09288); a pair without one asks for 0."""
    center_coef: Annotated[float, Bound(least=0)] = 0.0
    """Pulls the sum of a pair's scores to 0 (Eisenstein et al. 2023, arXiv:2312.09244); 0.01 is usual; 0 for none."""
    evaluate_every: Annotated[int | None, Bound(least=0)] = None
    """Iterations between evaluations on `evaluation_data`; before the first and after the last too. null for these two
    only; 0 for none."""
    num_reference_pairs: Annotated[int, Bound(least=1)] = 512
    """Scores have mean 0 and standard deviation 1 on both responses of this many pairs, spread over the data."""


@dataclass(frozen=True, kw_only=True)
class SFTConfig(Section, place="sft"):
    """Batches of supervised examples. An iteration is one optimizer step."""

    batch_size: Annotated[int, Bound(least=1)] = 32
    """Examples per optimizer step, over all ranks."""
    microbatch_tokens: Annotated[int, Bound(least=1)] = 8192
    """Tokens per forward pass on one device, padding included where it is not packed (`model.packing`). Changes memory,
    never the result."""
    evaluate_every: Annotated[int | None, Bound(least=0)] = None
    """Iterations between evaluations of the loss on `evaluation_data`; before the first and after the last too. null
    for these two only, where `evaluation_data` is named; 0 for none."""


@dataclass(frozen=True, kw_only=True)
class CriticTrainingConfig(Section, place="critic"):
    """Targets of a critic that is trained before PPO, and batches of responses. An iteration is one optimizer step."""

    gamma: Annotated[float, Bound(least=0, most=1)] = 1.0
    """Discount per token of the score, which comes with the last one: what `algorithm.gamma` of PPO will be."""
    batch_size: Annotated[int, Bound(least=1)] = 32
    """Responses per optimizer step, over all ranks."""
    microbatch_tokens: Annotated[int, Bound(least=1)] = 8192
    """Tokens per forward pass on one device, padding included where it is not packed (`model.packing`). Changes memory,
    never the result."""
    evaluate_every: Annotated[int | None, Bound(least=0)] = None
    """Iterations between evaluations on `evaluation_data`; before the first and after the last too. null for these two
    only, where `evaluation_data` is named; 0 for none."""
