"""Settings of each kind of run, composed of those of its parts. Checks that need two parts stand here."""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, ClassVar, Protocol, runtime_checkable

from llmrl.algorithms.config import GRPOConfig, PPOConfig
from llmrl.data.config import (
    ConversationsConfig,
    DataConfig,
    PairsConfig,
    PreferenceDataConfig,
    PromptDataConfig,
    PromptsConfig,
    ScoredDataConfig,
    SupervisedDataConfig,
)
from llmrl.distributed.config import DistributedConfig
from llmrl.elsewhere import EVERY_RUN, GRPO, PPO, REWARD_MODEL, RL, SFT
from llmrl.environments.config import EnvironmentConfig
from llmrl.messages import counted
from llmrl.models.config import CriticConfig, ModelConfig, MTPSettings
from llmrl.optim.config import OptimizerConfig
from llmrl.reports.trackers import TrackerConfig
from llmrl.rewards.config import ENVIRONMENT, RewardConfig
from llmrl.rollout.config import RolloutConfig
from llmrl.section import Like
from llmrl.trainers.config import (
    CriticTrainingConfig,
    EvaluationConfig,
    OutputConfig,
    RewardModelConfig,
    RLRunConfig,
    RunConfig,
    SFTConfig,
    UpdateConfig,
)

DEFAULT_MINIBATCH_SIZE = 128
LIKE_DATA = Like("data", own=("path", "num_rows", "mixed_with"))
"""Held-out rows are read as those of `data`, unless their section says otherwise."""
LIKE_OPTIMIZER = Like("optimizer", own=("learning_rate",))
"""The critic's optimizer is that of the actor at a learning rate of its own, unless its section says otherwise."""
MADE_BY = "name the command by the path that it makes, in the mapping made_by of the recipe"
BETAS = "write both of them as the list betas, as in [0.9, 0.999]"
MOVED: dict[str, str] = dict.fromkeys(("model.made_by", "data.made_by", "evaluation_data.made_by"), MADE_BY) | {
    "optimizer.beta1": BETAS,
    "optimizer.beta2": BETAS,
    "run.best_mode": "put a minus before the name in run.best_metric where less is better, as in -eval/loss",
}
"""Settings of every run that are gone, and what to write now."""


@dataclass(frozen=True, kw_only=True)
class SFTRun:
    """Supervised fine-tuning: `llmrl sft`."""

    model: ModelConfig
    """The model that is trained."""
    data: SupervisedDataConfig
    """Prompts with the responses to learn."""
    run: RunConfig
    """Length of the run, and its output folder."""
    sft: SFTConfig = field(default_factory=SFTConfig)
    """Batches of examples, and their evaluation."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=1e-5))
    """Optimizer of the model: learning rate, schedule, clipping."""
    evaluation_data: Annotated[ConversationsConfig | None, LIKE_DATA] = None
    """Held-out examples whose loss is measured."""
    trackers: TrackerConfig = field(default_factory=TrackerConfig)
    """Other places that receive the metrics."""
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    """Work of several processes together."""
    made_by: dict[str, str] = field(default_factory=dict)
    """Commands that make what the run reads, as in {runs/sft/final: llmrl sft sft.yaml}; printed if it is missing."""
    moved: ClassVar[dict[str, str]] = MOVED
    """Settings of other days, and what to write now."""
    elsewhere: ClassVar[dict[str, str]] = EVERY_RUN | SFT
    """Names of other frameworks, and what they are here."""

    def __post_init__(self) -> None:
        every = self.sft.evaluate_every
        if every and self.evaluation_data is None:
            raise ValueError(
                f"sft.evaluate_every ({every}) needs evaluation_data; name held-out examples, or set it to 0"
            )
        evaluates = self.evaluation_data is not None and every != 0
        _check_best(self.run, evaluates=evaluates, way_out=_way_to_evaluate("sft.evaluate_every", self.evaluation_data))

    def plan(self, num_rows: int | None) -> str:
        """Sentence on what an iteration does, with the number of epochs where the number of rows is known."""
        num_used = self.run.num_iterations * self.sft.batch_size
        return (
            f"Each of {self.run.num_iterations} iterations is one optimizer step on {self.sft.batch_size} examples"
            f"{_epochs(num_used, 'examples', num_rows)}."
        )

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest example that the run may have."""
        return max(data.max_tokens for data in (self.data, self.evaluation_data) if data is not None)


@dataclass(frozen=True, kw_only=True)
class RewardModelRun:
    """A Bradley-Terry reward model: `llmrl reward-model`."""

    model: ModelConfig
    """The model that is trained: a causal language model, which gets a new head, or a reward model."""
    data: PreferenceDataConfig
    """Pairs of responses, one of which was preferred."""
    evaluation_data: Annotated[PairsConfig, LIKE_DATA]
    """Held-out pairs: what the report card is about."""
    run: OutputConfig
    """Output folder; the length of the run is `reward_model.num_epochs`."""
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
    """Batches of pairs, their loss and its evaluation."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=1e-5))
    """Optimizer of the model: learning rate, schedule, clipping."""
    trackers: TrackerConfig = field(default_factory=TrackerConfig)
    """Other places that receive the metrics."""
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    """Work of several processes together."""
    made_by: dict[str, str] = field(default_factory=dict)
    """Commands that make what the run reads, as in {runs/sft/final: llmrl sft sft.yaml}; printed if it is missing."""
    moved: ClassVar[dict[str, str]] = MOVED
    """Settings of other days, and what to write now."""
    elsewhere: ClassVar[dict[str, str]] = EVERY_RUN | REWARD_MODEL
    """Names of other frameworks, and what they are here."""

    def __post_init__(self) -> None:
        evaluates = self.reward_model.evaluate_every != 0
        _check_best(self.run, evaluates=evaluates, way_out="reward_model.evaluate_every")

    def plan(self, num_rows: int | None) -> str:
        """Sentence on what an iteration does, with the number of epochs where the number of rows is known."""
        epochs = counted(self.reward_model.num_epochs, "epoch")
        rows = f" over {counted(num_rows, 'row')}" if num_rows else ""
        return f"Each iteration is one optimizer step on {self.reward_model.batch_size} pairs; {epochs}{rows}."

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest prompt with one response that the run may have."""
        return max(self.data.max_tokens, self.evaluation_data.max_tokens)


@dataclass(frozen=True, kw_only=True)
class CriticRun:
    """A critic trained on responses and their scores, before PPO: `llmrl critic`."""

    model: ModelConfig
    """The policy that the critic is for, as which it begins; with model.lora it is an adapter on that."""
    data: ScoredDataConfig
    """Prompts with responses and their scores."""
    run: RunConfig
    """Length of the run, and its output folder."""
    critic: CriticTrainingConfig = field(default_factory=CriticTrainingConfig)
    """Targets of the values; batches of responses, and their evaluation."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=1e-5))
    """Optimizer of the critic: learning rate, schedule, clipping."""
    evaluation_data: Annotated[ScoredDataConfig | None, LIKE_DATA] = None
    """Held-out responses, on which the explained variance is measured."""
    trackers: TrackerConfig = field(default_factory=TrackerConfig)
    """Other places that receive the metrics."""
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    """Work of several processes together."""
    made_by: dict[str, str] = field(default_factory=dict)
    """Commands that make what the run reads, as in {runs/sft/final: llmrl sft sft.yaml}; printed if it is missing."""
    moved: ClassVar[dict[str, str]] = MOVED
    """Settings of other days, and what to write now."""
    elsewhere: ClassVar[dict[str, str]] = EVERY_RUN
    """Names of other frameworks, and what they are here."""

    def __post_init__(self) -> None:
        if self.model.lora is not None and self.model.lora.modules_to_save:
            raise ValueError(
                f"model.lora.modules_to_save ({', '.join(self.model.lora.modules_to_save)}) are layers of an actor or "
                "a reward model: a critic that is an adapter trains none whole; leave them out"
            )
        every = self.critic.evaluate_every
        if every and self.evaluation_data is None:
            raise ValueError(
                f"critic.evaluate_every ({every}) needs evaluation_data; name held-out responses, or set it to 0"
            )
        evaluates = self.evaluation_data is not None and every != 0
        way_out = _way_to_evaluate("critic.evaluate_every", self.evaluation_data)
        _check_best(self.run, evaluates=evaluates, way_out=way_out)

    def plan(self, num_rows: int | None) -> str:
        """Sentence on what an iteration does, with the number of epochs where the number of rows is known."""
        num_used = self.run.num_iterations * self.critic.batch_size
        return (
            f"Each of {self.run.num_iterations} iterations is one optimizer step on {self.critic.batch_size} responses"
            f"{_epochs(num_used, 'responses', num_rows)}."
        )

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest prompt with its response that the run may have."""
        return max(data.max_tokens for data in (self.data, self.evaluation_data) if data is not None)


@runtime_checkable
class AlgorithmConfig(Protocol):
    """Settings that every algorithm has."""

    @property
    def group_size(self) -> int:
        """Responses per prompt, G."""
        ...

    @property
    def overlong_buffer_tokens(self) -> int:
        """In this many tokens before the length limit, a response loses up to 1 point."""
        ...

    @property
    def kl_coef(self) -> float:
        """Weight of the KL to the reference; 0 where there is none."""
        ...

    @property
    def reference_refresh_every(self) -> int | None:
        """Iterations between two moves of the reference; None where it stays."""
        ...

    @property
    def reference_mixing(self) -> float:
        """Share of the actor when it moves."""
        ...

    @property
    def importance(self) -> str:
        """How samples of another policy are corrected for; none where they are not."""
        ...

    @property
    def balance_coef(self) -> float:
        """Weight of the loss that keeps the experts of a mixture evenly used."""
        ...

    @property
    def balance_bias_rate(self) -> float:
        """Step of the bias by which its routers choose."""
        ...

    def warnings(self) -> list[str]:
        """Sentences on settings that are allowed, but seldom meant."""
        ...


@dataclass(frozen=True, kw_only=True)
class RLRun:
    """Settings of a run of reinforcement learning, whatever the algorithm."""

    model: ModelConfig
    """The model that is trained."""
    data: PromptDataConfig
    """Prompts."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """Rewards of the responses: functions, a reward model, or both. An environment gives rewards of its own too."""
    environment: EnvironmentConfig | None = None
    """What answers the actor, for responses of several turns; null: a response is one turn."""
    run: RLRunConfig
    """Length of the run, and its output folder."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """Sampling of responses."""
    algorithm: AlgorithmConfig
    """The algorithm: advantages and losses."""
    update: UpdateConfig = field(default_factory=UpdateConfig)
    """Epochs and minibatches of an experience."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer of the model: learning rate, schedule, clipping."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Evaluation on held-out prompts."""
    evaluation_data: Annotated[PromptsConfig | None, LIKE_DATA] = None
    """Held-out prompts."""
    trackers: TrackerConfig = field(default_factory=TrackerConfig)
    """Other places that receive the metrics."""
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    """Work of several processes together."""
    made_by: dict[str, str] = field(default_factory=dict)
    """Commands that make what the run reads, as in {runs/sft/final: llmrl sft sft.yaml}; printed if it is missing."""
    moved: ClassVar[dict[str, str]] = MOVED | {
        "reward.model.made_by": MADE_BY,
        "reward.model.dtype": "leave it out: a reward model computes in model.dtype",
        "reward.model.trust_remote_code": "set model.trust_remote_code, which holds for every model folder of the run",
    }
    """Settings of other days, and what to write now."""
    elsewhere: ClassVar[dict[str, str]] = EVERY_RUN | RL
    """Names of other frameworks, and what they are here."""

    def __post_init__(self) -> None:
        _check_rewards(self.reward, self.environment)
        _check_turns(self)
        if self.update.minibatch_size is None:
            fitting = replace(self.update, minibatch_size=self._sizes_near(DEFAULT_MINIBATCH_SIZE)[0])
            object.__setattr__(self, "update", fitting)
        group, size = self.algorithm.group_size, self.minibatch_size
        if size % group:
            raise ValueError(
                f"update.minibatch_size ({size}) must be a multiple of algorithm.group_size ({group}): groups are not "
                f"torn apart; try {self._fitting_sizes()}"
            )
        if self.num_responses % size:
            raise ValueError(
                f"update.minibatch_size ({size}) must divide the {self.num_responses} responses of a rollout "
                f"({self.rollout.prompts_per_iteration} prompts x {group}); try {self._fitting_sizes()}"
            )
        most = max(group, self.evaluation.num_responses)
        if self.rollout.engine == "native" and self.rollout.max_rows < most:
            raise ValueError(
                f"rollout.max_rows ({self.rollout.max_rows}) must hold every response to a prompt, in training "
                f"({group}) and in evaluation ({self.evaluation.num_responses}); set it to at least {most}"
            )
        if self.algorithm.overlong_buffer_tokens > self.rollout.max_response_tokens:
            raise ValueError(
                f"algorithm.overlong_buffer_tokens ({self.algorithm.overlong_buffer_tokens}) must be at most "
                f"rollout.max_response_tokens ({self.rollout.max_response_tokens})"
            )
        if self.reward.model is not None and self.reward.model.on_actor_base:
            _check_base(self.model)
        if self.evaluation.every and self.evaluation_data is None:
            raise ValueError(
                f"evaluation.every ({self.evaluation.every}) needs evaluation_data; "
                "name held-out prompts, or set it to 0"
            )
        way_out = _way_to_evaluate("evaluation.every", self.evaluation_data)
        _check_best(self.run, evaluates=self.evaluates, way_out=way_out)

    def plan(self, num_rows: int | None) -> str:
        """Sentence on what an iteration does, with the number of epochs where the number of rows is known."""
        num_prompts = (self.run.num_iterations + self.update.num_waiting) * self.rollout.prompts_per_iteration
        return (
            f"Each of {self.run.num_iterations} iterations samples {self.rollout.prompts_per_iteration} prompts x "
            f"{self.algorithm.group_size} responses = {self.num_responses} responses of at most "
            f"{self.rollout.max_response_tokens} tokens and learns from them in "
            f"{counted(self.optimizer_steps_per_iteration, 'optimizer step')}: "
            f"{counted(self.update.num_epochs, 'epoch')} of minibatches of {self.minibatch_size} responses"
            f"{_epochs(num_prompts, 'prompts', num_rows)}."
            f"{self._plan_of_stale()}"
        )

    def _plan_of_stale(self) -> str:
        if not self.learns_from_stale:
            return ""
        num_learned = counted(1 + self.update.num_replayed, "rollout")
        return (
            f" The first one samples {1 + self.update.num_waiting} times as many; each learns from {num_learned}, "
            f"the newest sampled {counted(self.update.staleness, 'iteration')} before."
        )

    def _sizes_near(self, wanted: int) -> list[int]:
        """The sizes of a minibatch that both rules allow, whole groups that divide a rollout, from the nearest on."""
        group, total = self.algorithm.group_size, self.num_responses
        fitting = [size for size in range(group, total + 1, group) if total % size == 0]
        return sorted(fitting, key=lambda size: abs(size - wanted))

    def _fitting_sizes(self) -> str:
        """Sizes of a minibatch next to the one that was asked for, for messages."""
        return " or ".join(str(size) for size in sorted(self._sizes_near(self.minibatch_size)[:2]))

    @property
    def minibatch_size(self) -> int:
        """Responses of one optimizer step, over all ranks."""
        assert self.update.minibatch_size is not None, "set with the run"
        return self.update.minibatch_size

    @property
    def criterion(self) -> str:
        """Part of a score that decides in an evaluation what is correct."""
        return ENVIRONMENT if self.opens_prompts else self.reward.labels[0]

    @property
    def reward_weights(self) -> dict[str, float]:
        """Weight of each part of a score that is learned from, by its name."""
        return ({ENVIRONMENT: 1.0} if self.opens_prompts else {}) | self.reward.weights

    @property
    def opens_prompts(self) -> bool:
        """Whether an environment makes the prompts, and gives rewards."""
        return self.environment is not None and self.environment.name is not None

    @property
    def evaluates(self) -> bool:
        """Whether training measures held-out prompts."""
        return self.evaluation_data is not None and self.evaluation.every != 0

    def warnings(self) -> list[str]:
        """Sentences on settings that are allowed, but seldom meant."""
        warnings = self.algorithm.warnings()
        if self.learns_from_stale and self.algorithm.importance == "none":
            warnings.append(
                f"update.staleness {self.update.staleness} and update.num_replayed {self.update.num_replayed} learn "
                "from responses of an earlier policy as if they were of this one; algorithm.importance truncated "
                "corrects that"
            )
        if self.update.staleness >= self.run.num_iterations > 0:
            warnings.append(
                f"update.staleness ({self.update.staleness}) is not less than run.num_iterations "
                f"({self.run.num_iterations}), so every response is of the first policy"
            )
        return warnings

    @property
    def learns_from_stale(self) -> bool:
        """Whether iterations learn from rollouts of earlier ones."""
        return self.update.num_waiting > 0

    @property
    def warmup_iterations(self) -> int:
        """Iterations at the start in which the model does not learn yet."""
        return 0

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest prompt with its response that the run may have."""
        prompts = [data.max_prompt_tokens for data in (self.data, self.evaluation_data) if data is not None]
        return max(prompts) + self.rollout.max_response_tokens

    @property
    def num_responses(self) -> int:
        """Responses of one rollout, over all ranks."""
        return self.rollout.prompts_per_iteration * self.algorithm.group_size

    @property
    def num_learned(self) -> int:
        """Responses that an iteration learns from, over all ranks."""
        return self.num_responses * (1 + self.update.num_replayed)

    @property
    def optimizer_steps_per_iteration(self) -> int:
        return self.update.num_epochs * self.num_learned // self.minibatch_size

    @property
    def num_optimizer_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.run.num_iterations * self.optimizer_steps_per_iteration


@dataclass(frozen=True, kw_only=True)
class GRPORun(RLRun):
    """GRPO and its kin: `llmrl grpo`."""

    algorithm: GRPOConfig = field(default_factory=GRPOConfig)
    elsewhere = RLRun.elsewhere | GRPO

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.algorithm.baseline == "batch" and self.num_responses == 1:
            raise ValueError(
                "algorithm.baseline batch compares with the other responses of a rollout, and there is one; raise "
                "rollout.prompts_per_iteration or algorithm.group_size"
            )
        if self.reward.combine == "standardized":
            _check_standardized(self.algorithm)


@dataclass(frozen=True, kw_only=True)
class PPORun(RLRun):
    """PPO with an actor, a critic, a frozen reference and any reward: `llmrl ppo`."""

    algorithm: PPOConfig = field(default_factory=PPOConfig)
    rollout: RolloutConfig = field(default_factory=lambda: RolloutConfig(prompts_per_iteration=128))
    update: UpdateConfig = field(default_factory=lambda: UpdateConfig(num_epochs=2))
    elsewhere = RLRun.elsewhere | PPO
    moved = RLRun.moved | {
        "algorithm.kl_horizon": "leave it out: algorithm.kl_target steers algorithm.kl_coef over 10,000 responses",
        "algorithm.step_kl_coef": "leave it out: the price of a step begins at 1 and is steered by step_kl_target",
        "critic_optimizer.beta1": BETAS,
        "critic_optimizer.beta2": BETAS,
        "critic.head_init": "leave it out: the critic's head begins at zero",
        "critic.body": "set critic.network to reward_model for a critic that begins as one, else leave it out",
    }
    critic: CriticConfig = field(default_factory=CriticConfig)
    """The network that predicts the rewards to come."""
    critic_optimizer: Annotated[OptimizerConfig, LIKE_OPTIMIZER] = field(
        default_factory=lambda: OptimizerConfig(learning_rate=1e-5)
    )
    """Optimizer of the critic. In a shared trunk only the head has this learning rate; the rest is not read."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reward.combine == "standardized":
            raise ValueError(
                "reward.combine standardized compares each reward within the group of a prompt, and llmrl ppo has no "
                "groups; set it to sum, or train with llmrl grpo"
            )
        if self.critic.network == "adapter" and self.model.lora is None:
            raise ValueError(
                "critic.network adapter needs model.lora: it is an adapter on the actor's frozen base; where model.path"
                " is an adapter, so that there is no model.lora, set critic.network to own, or merge that adapter first"
            )
        if self.critic.network == "own" and self.critic.path is None and self.model.quantization is not None:
            raise ValueError(
                "critic.network own begins as the actor and trains every weight, and model.quantization "
                f"({self.model.quantization}) stores the actor's in 4 bits; set critic.network to adapter or shared, "
                "or leave model.quantization out"
            )
        if self.critic.network == "reward_model" and self.reward.model is None:
            raise ValueError("critic.network reward_model needs reward.model; name one, or set critic.network to own")
        if self.critic.warmup_iterations >= self.run.num_iterations:
            raise ValueError(
                f"critic.warmup_iterations ({self.critic.warmup_iterations}) must be less than run.num_iterations "
                f"({self.run.num_iterations}), or the actor never learns"
            )
        if self.critic.shares_trunk and self.algorithm.auxiliary_every is not None:
            raise ValueError(
                f"algorithm.auxiliary_every ({self.algorithm.auxiliary_every}) distils the values of a critic with a "
                f"trunk of its own into the actor's, which critic.network {self.critic.network} trains by them anyway; "
                "choose another critic.network, or set this to null"
            )
        if self.critic.network == "mtp" and self.algorithm.importance == "v_trace":
            raise ValueError(
                "algorithm.importance v_trace corrects the returns that a critic learns, and critic.network mtp learns "
                "from targets of its own; set algorithm.importance to truncated, or choose another critic.network"
            )

    @property
    def warmup_iterations(self) -> int:
        return self.critic.warmup_iterations

    def warnings(self) -> list[str]:
        """Sentences on settings that are allowed, but seldom meant."""
        warnings, is_shared = super().warnings(), self.critic.shares_trunk
        rate = self.critic_optimizer.learning_rate
        unread = [replace(optimizer, learning_rate=rate) for optimizer in (OptimizerConfig(), self.optimizer)]
        if is_shared and self.critic_optimizer not in unread:
            warnings.append(
                f"critic.network {self.critic.network} reads nothing of critic_optimizer but its learning_rate"
            )
        if not is_shared and self.critic.value_coef != CriticConfig.value_coef:
            warnings.append("critic.value_coef is read only where critic.network is shared or mtp")
        if self.algorithm.auxiliary_every is not None and not self.num_auxiliary_steps:
            warnings.append(
                f"algorithm.auxiliary_every ({self.algorithm.auxiliary_every}) is more than the iterations of the run "
                "after critic.warmup_iterations, so no auxiliary phase comes"
            )
        return warnings + self._unread_of_values()

    def _unread_of_values(self) -> list[str]:
        """Settings of values that the critic does not read."""
        if self.critic.network != "mtp":
            unread = self.critic.mtp != MTPSettings()
            return ["critic.mtp is read only where critic.network is mtp"] if unread else []
        names = ("value_clip", "value_lambda", "value_proximal_coef")
        changed = [name for name in names if getattr(self.algorithm, name) != getattr(PPOConfig, name)]
        return [f"algorithm.{name} is not read where critic.network is mtp" for name in changed]

    @property
    def num_actor_steps(self) -> int:
        """Optimizer steps of the actor in the whole run."""
        num_iterations = self.run.num_iterations - self.critic.warmup_iterations
        return num_iterations * self.optimizer_steps_per_iteration + self.num_auxiliary_steps

    @property
    def num_optimizer_steps(self) -> int:
        return super().num_optimizer_steps + self.num_auxiliary_steps

    @property
    def num_auxiliary_steps(self) -> int:
        """Optimizer steps of actor and critic, each, in auxiliary phases, in the whole run."""
        every = self.algorithm.auxiliary_every
        if every is None:
            return 0
        num_phases = (self.run.num_iterations - self.critic.warmup_iterations) // every
        steps = every * self.num_learned // self.minibatch_size
        return num_phases * self.algorithm.auxiliary_epochs * steps


AnyRun = SFTRun | RewardModelRun | CriticRun | RLRun
"""Settings of any kind of run."""


def command_for(path: str, run: AnyRun) -> str | None:
    """The command that a run names for a file or folder which it reads."""
    commands = {Path(os.path.expanduser(made)): command for made, command in run.made_by.items()}
    return commands.get(Path(path))


def _epochs(num_used: int, what: str, num_rows: int | None) -> str:
    if not num_rows:
        return ""
    return f"; {num_used:,} {what} in all, {num_used / num_rows:.2f} epochs of {counted(num_rows, 'row')}"


def _check_standardized(algorithm: GRPOConfig) -> None:
    """Refuses settings that read one score of a response, where each reward is standardized by itself."""
    needed = {
        "name": "grpo",
        "baseline": "mean",
        "scale": "std",
        "credit": "response",
        "overlong_buffer_tokens": 0,
        "max_redraws": 0,
    }
    for name, value in needed.items():
        if (ours := getattr(algorithm, name)) != value:
            raise ValueError(
                f"algorithm.{name} ({ours}) is about the sum of rewards, and reward.combine standardized compares each "
                f"by itself; set algorithm.{name} to {value}, or reward.combine to sum"
            )
    if algorithm.kl_form == "k1_reward":
        raise ValueError(
            "algorithm.kl_form k1_reward adds the KL to the sum of rewards, and reward.combine standardized compares "
            "each by itself; set algorithm.kl_form to k2, or reward.combine to sum"
        )


def _check_base(actor: ModelConfig) -> None:
    if actor.lora is None:
        raise ValueError("reward.model.on_actor_base needs model.lora: it is an adapter on the actor's frozen base")
    if actor.from_scratch:
        raise ValueError(
            "reward.model.on_actor_base needs the base that the reward model was trained on, and model.from_scratch "
            "draws another; leave one of them out"
        )
    if actor.quantization is not None:
        raise ValueError(
            "reward.model.on_actor_base needs the base that the reward model was trained on, and model.quantization "
            f"({actor.quantization}) rounds the actor's; leave one of them out"
        )


def _check_rewards(reward: RewardConfig, environment: EnvironmentConfig | None) -> None:
    if reward.teaches or (environment is not None and environment.name is not None):
        return
    raise ValueError(
        "there is nothing to learn from: no reward.functions with a weight other than 0, no reward.model and no "
        "environment.name; name at least one function, such as {name: rule.py:score}, a reward model, or an environment"
    )


def _check_turns(run: RLRun) -> None:
    """Refuses settings of episodes without an environment, or an engine that has no turns."""
    environment = run.environment
    if environment is None:
        if getattr(run.algorithm, "credit", "response") == "turn":
            raise ValueError(
                "algorithm.credit turn compares turns, and without environment a response has one; set it to response"
            )
        return
    if run.rollout.engine != "native":
        raise ValueError(
            f"rollout.engine ({run.rollout.engine}) samples responses of one turn, and environment has several; set it "
            "to native"
        )
    turn, response = environment.max_turn_tokens, run.rollout.max_response_tokens
    if turn is not None and turn > response:
        raise ValueError(
            f"environment.max_turn_tokens ({turn}) must be at most rollout.max_response_tokens ({response}), which "
            "counts all turns and what is read between them"
        )


def _way_to_evaluate(setting: str, data: DataConfig | None) -> str:
    return setting if data is not None else f"evaluation_data and {setting}"


def _check_best(run: OutputConfig, *, evaluates: bool, way_out: str) -> None:
    name = (run.best_metric or "").removeprefix("-")
    if name.startswith("eval/") and not evaluates:
        raise ValueError(
            f"run.best_metric ({name}) is never measured: set {way_out}, run.best_metric=null, or name another metric"
        )
