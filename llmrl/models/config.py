"""Settings of models: which one, in which arithmetic, whole or by adapters; and the critic's network."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from llmrl.paths import UserPath
from llmrl.section import Bound, Section

HeadInit = Literal["zero", "normal"]
CriticNetwork = Literal["own", "reward_model", "adapter", "shared", "mtp"]


@dataclass(frozen=True, kw_only=True)
class LoraSettings(Section, place="model.lora"):
    """Low-rank adapters in place of full fine-tuning. Hu et al. 2021, arXiv:2106.09685."""

    rank: Annotated[int, Bound(least=1)] = 16
    """Rank of each update."""
    alpha: Annotated[int, Bound(above=0)] = 32
    """The update is scaled by alpha / rank, or as `use_rslora` says."""
    targets: tuple[str, ...] | Literal["all-linear"] = ()
    """Names of the layers that get an adapter; none named, or all-linear: every linear layer except the LM head and the
    routers of mixtures of experts."""
    use_rslora: bool = False
    """Scales the update by alpha / sqrt(rank), which keeps it from fading at high ranks. Kalajdzievski 2023,
    arXiv:2312.03732."""
    use_dora: bool = False
    """Learns the length of each row of the merged weight apart from its direction. Liu et al. 2024,
    arXiv:2402.09353."""
    modules_to_save: tuple[str, ...] = ()
    """Names of layers that are trained whole, beside the adapters, as in [embed_tokens, lm_head]; not those of an
    embedding that is also the LM head."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if "all-linear" in self.targets:
            object.__setattr__(self, "targets", ())
        if both := [name for name in self.modules_to_save if name in self.targets]:
            raise ValueError(
                f"model.lora.modules_to_save ({', '.join(both)}) are trained whole, and model.lora.targets names them "
                "for an adapter; leave them out of one of the two"
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model is trained, and in which arithmetic."""

    path: UserPath
    """A folder in the form of transformers, or a name on the Hugging Face hub. A folder with a peft adapter continues
    that adapter."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Arithmetic of forward passes and sampling, a reward model's too; null: bfloat16 on a GPU, float32 on a CPU.
    Trained weights are always kept in float32."""
    lora: LoraSettings | None = None
    """Trains low-rank adapters and freezes the model; null trains every weight."""
    quantization: Literal["nf4"] | None = None
    """With adapters, stores the frozen linear layers in 4 bits (QLoRA, by bitsandbytes): an eighth of the memory, and
    slower. Dettmers et al. 2023, arXiv:2305.14314. null: in float32."""
    gradient_checkpointing: bool = False
    """Recomputes activations in the backward pass: less memory, about a third more time."""
    packing: bool = True
    """Forward passes of every model of the run read a prompt once for all its responses, and no padding, where the
    model's attention allows it; false: a padded row for each response. Changes time and memory, never the result."""
    from_scratch: bool = False
    """Random weights in the shape of the folder's config.json, instead of the folder's weights."""
    trust_remote_code: bool = False
    """Allows the model folders of this run, a reward model's too, to bring and run their own Python code."""


@dataclass(frozen=True, kw_only=True)
class MTPSettings(Section, place="critic.mtp"):
    """The implicit critic: heads of multi-token prediction on the actor's trunk, each with a value."""

    num_heads: Annotated[int, Bound(least=1)] = 1
    """Heads beyond the actor's own; head k predicts the token k after the next, and its value."""
    prediction_coef: Annotated[float, Bound(least=0)] = 0.1
    """Weight of the loss of what they predict, beside the actor's loss and value_coef times that of the values."""
    target_rate: Annotated[float, Bound(above=0, most=1)] = 0.1
    """Share of the heads when the target heads move, after each iteration: target = rate * head + (1 - rate) * target
    (Polyak averaging). 1 copies them."""
    value_grad_clamp: Annotated[float, Bound(above=0)] = 1.0
    """Largest gradient of a value's loss by the value, that is, of its TD error, in units of the reward. Below the
    spread of the rewards values move from their mean towards their median."""


@dataclass(frozen=True, kw_only=True)
class CriticConfig(Section, place="critic"):
    """The network that predicts rewards still to come."""

    network: CriticNetwork = "own"
    """own: a network of its own, every weight trained, that begins as the actor. reward_model: the same, beginning as
    the reward model. adapter: with model.lora, an adapter of its own on the actor's frozen base, which stands in memory
    once. shared: a head on the actor's own trunk, trained by both losses' sum. mtp: heads on that trunk which predict
    further tokens too; they begin fresh and are not saved with the model."""
    path: UserPath | None = None
    """Folder of a critic to begin from, as PPO saves one in final/critic and `llmrl critic` makes one; null: the head
    begins at zero, and so every value."""
    warmup_iterations: Annotated[int, Bound(least=0)] = 0
    """Iterations at the start in which the critic learns alone; not for a shared trunk."""
    value_coef: Annotated[float, Bound(above=0)] = 0.5
    """Weight of the critic's loss beside the actor's, where they share a trunk; read by nothing else."""
    mtp: MTPSettings = field(default_factory=MTPSettings)
    """Settings of network mtp; read by no other."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.path is not None and self.network == "reward_model":
            raise ValueError(
                f"critic.path ({self.path}) is a critic that is already there, and critic.network reward_model makes "
                "one of the reward model; leave one of them out"
            )
        if self.path is not None and self.network == "mtp":
            raise ValueError(
                f"critic.path ({self.path}) is a critic that is already there, and critic.network mtp begins with "
                "fresh heads; leave critic.path out, or choose another critic.network"
            )
        if self.shares_trunk and self.warmup_iterations:
            raise ValueError(
                f"critic.warmup_iterations ({self.warmup_iterations}) needs a critic that can learn alone, and "
                f"critic.network {self.network} is the actor's trunk; set it to 0, or choose another critic.network"
            )

    @property
    def shares_trunk(self) -> bool:
        """Whether actor and critic are heads on one trunk, trained by one loss."""
        return self.network in ("shared", "mtp")
