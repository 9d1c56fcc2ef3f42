"""Writes the tables of docs/sizing.md: what fits where, by `llmrl.sizing`. `python docs/sizing.py`"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import LlamaConfig, Qwen2Config

from llmrl.algorithms.config import GRPOConfig, PPOConfig
from llmrl.config import GRPORun, PPORun
from llmrl.data.config import PromptDataConfig
from llmrl.distributed.config import DistributedConfig
from llmrl.models.config import CriticConfig, LoraSettings, ModelConfig
from llmrl.rewards.config import LearnedRewardConfig, RewardConfig, RewardFunctionConfig
from llmrl.rollout.config import RolloutConfig
from llmrl.sizing import Estimate, ModelShape, Strategy, estimate_memory, shape_of
from llmrl.trainers.config import RLRunConfig, UpdateConfig

GUIDE = Path(__file__).with_name("sizing.md")
GIB = 2**30
OF_THE_DEVICE, FOR_THE_CONTEXT = 0.10, 2.0
"""What is left free: a share for fragments, and GiB for context, libraries, buffers of communication, workspaces."""


def qwen(hidden: int, layers: int, heads: int, keys: int, feed_forward: int, vocab: int, *, tied: bool) -> Qwen2Config:
    return Qwen2Config(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=keys,
        intermediate_size=feed_forward, vocab_size=vocab, tie_word_embeddings=tied,
    )  # fmt: skip


def llama(hidden: int, layers: int, heads: int, keys: int, feed_forward: int, vocab: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=keys,
        intermediate_size=feed_forward, vocab_size=vocab, tie_word_embeddings=False,
    )  # fmt: skip


MODELS = {
    "0.5B": qwen(896, 24, 14, 2, 4864, 151936, tied=True),
    "1.5B": qwen(1536, 28, 12, 2, 8960, 151936, tied=True),
    "3B": qwen(2048, 36, 16, 2, 11008, 151936, tied=True),
    "8B": llama(4096, 32, 32, 8, 14336, 128256),
    "14B": qwen(5120, 48, 40, 8, 13824, 152064, tied=False),
    "32B": qwen(5120, 64, 40, 8, 27648, 152064, tied=False),
    "70B": llama(8192, 80, 64, 8, 28672, 128256),
}
"""Qwen2.5, and Llama 3 at 8B and 70B."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """GPUs, as many on each node as there are, with this many GiB each, as torch reports them."""

    name: str
    num_devices: int
    gib: float
    per_node: int

    @property
    def usable(self) -> float:
        return self.gib * (1 - OF_THE_DEVICE) - FOR_THE_CONTEXT


MACHINES = (
    Machine(name="1 x 24 GB", num_devices=1, gib=23.6, per_node=1),
    Machine(name="1 x 80 GB", num_devices=1, gib=79.1, per_node=1),
    Machine(name="8 x 80 GB", num_devices=8, gib=79.1, per_node=8),
    Machine(name="2 x 8 x 80 GB", num_devices=16, gib=79.1, per_node=8),
)
MODEL = ModelConfig(path="model", dtype="bfloat16", gradient_checkpointing=True)
LORA = replace(MODEL, lora=LoraSettings(rank=16))
PROMPTS = PromptDataConfig(path="prompts", max_prompt_tokens=512)
ROLLOUT = RolloutConfig(prompts_per_iteration=64, max_response_tokens=1024, max_rows=64)
UPDATE = UpdateConfig(minibatch_size=64, microbatch_tokens=4096)
RUN = RLRunConfig(output_dir="out", num_iterations=1)


def grpo(model: ModelConfig) -> GRPORun:
    return GRPORun(
        model=model,
        data=PROMPTS,
        reward=RewardConfig(functions=(RewardFunctionConfig(name="rule.py:rule"),)),
        run=RUN,
        rollout=ROLLOUT,
        algorithm=GRPOConfig(group_size=8),
        update=UPDATE,
    )


def ppo(model: ModelConfig) -> PPORun:
    """Actor, critic, reference and a reward model of the same size."""
    return PPORun(
        model=model,
        data=PROMPTS,
        reward=RewardConfig(model=LearnedRewardConfig(path="reward", microbatch_tokens=4096)),
        run=RUN,
        rollout=ROLLOUT,
        algorithm=PPOConfig(kl_coef=0.05),
        update=UPDATE,
    )


def adapted(run: GRPORun | PPORun) -> GRPORun | PPORun:
    """With adapters in place of full fine-tuning: in PPO all four roles on one frozen base."""
    if isinstance(run, GRPORun):
        return replace(run, model=LORA)
    assert run.reward.model is not None, "see above"
    reward = replace(run.reward, model=replace(run.reward.model, on_actor_base=True))
    return replace(run, model=LORA, critic=CriticConfig(network="adapter"), reward=reward)


def ways(machine: Machine) -> Iterator[tuple[str, Strategy]]:
    """From the simplest to the slowest."""
    number = machine.num_devices
    zero = Strategy(sharding="deepspeed", zero_stage=3, num_devices=number)
    yield "replicated", Strategy(num_devices=number)
    if number > 1:
        yield "ZeRO 2", replace(zero, zero_stage=2)
        yield "FSDP2", Strategy(sharding="fsdp", num_devices=number)
        yield "ZeRO 3", zero
    yield "ZeRO 2, optimizer on the CPU", replace(zero, zero_stage=2, offloads_optimizer=True)
    yield "ZeRO 3, optimizer on the CPU", replace(zero, offloads_optimizer=True)
    yield "ZeRO 3, optimizer and weights on the CPU", replace(zero, offloads_optimizer=True, offloads_weights=True)


def shares_base(run: GRPORun | PPORun) -> bool:
    """Whether several roles read one frozen base."""
    return isinstance(run, PPORun) and run.critic.network == "adapter"


def choices(run: GRPORun | PPORun, machine: Machine, shape: ModelShape) -> Iterator[tuple[str, Estimate]]:
    """Every way in order; after those of full fine-tuning, those of adapters."""
    for name, strategy in ways(machine):
        if shares_base(run) and strategy.splits_weights:
            continue  # which llmrl refuses
        yield name, estimate_memory(run, shape, strategy, reward_shape=shape)
        if isinstance(run, PPORun) and not shares_base(run) and machine.num_devices > 1:
            split = replace(run, distributed=DistributedConfig(frozen="split"))
            yield f"{name}, frozen split", estimate_memory(split, shape, strategy, reward_shape=shape)
    if run.model.lora is None:
        for name, estimate in choices(adapted(run), machine, shape):
            yield f"LoRA, {name}", estimate


def cell(run: GRPORun | PPORun, machine: Machine, shape: ModelShape) -> str:
    """The first that fits, with its GiB on a device and on the CPU of a node; else the least there is."""
    least = float("inf")
    for name, estimate in choices(run, machine, shape):
        gib = estimate.peak / GIB
        if gib <= machine.usable:
            host = machine.per_node * max(estimate.host_loading, estimate.host_training) / GIB
            return f"{name}: {gib:.0f} (CPU {host:,.0f})"
        least = min(least, gib)
    return f"does not fit: {least:.0f}"


def table(run: GRPORun | PPORun, shapes: dict[str, ModelShape]) -> str:
    lines = ["| model | " + " | ".join(machine.name for machine in MACHINES) + " |", "|---" * (1 + len(MACHINES)) + "|"]
    for name, shape in shapes.items():
        lines.append(f"| {name} | " + " | ".join(cell(run, machine, shape) for machine in MACHINES) + " |")
    return "\n".join(lines)


def sizes(shapes: dict[str, ModelShape]) -> str:
    """Exact numbers of parameters, and what of a model no way of splitting makes smaller."""
    lines = ["| model | parameters | copy to sample from, GiB | keys and values of 64 rows, GiB |", "|---" * 4 + "|"]
    for name, shape in shapes.items():
        estimate = estimate_memory(grpo(MODEL), shape, Strategy(sharding="fsdp", num_devices=8))
        parts = {item.name: item.num_bytes / GIB for item in estimate.items}
        copy, keys = parts["copy to sample from"], parts["keys and values"]
        lines.append(f"| {name} | {shape.num_parameters:,} | {copy:.1f} | {keys:.1f} |")
    return "\n".join(lines)


def tables() -> dict[str, str]:
    """By the name of the place in the guide where it belongs."""
    shapes = {name: shape_of(config) for name, config in MODELS.items()}
    return {
        "sizes": sizes(shapes),
        "grpo": table(grpo(MODEL), shapes),
        "grpo-lora": table(adapted(grpo(MODEL)), shapes),
        "ppo": table(ppo(MODEL), shapes),
        "ppo-lora": table(adapted(ppo(MODEL)), shapes),
    }


def filled(text: str) -> str:
    """The guide with every table as it is computed now."""
    for name, rows in tables().items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        text = re.sub(f"{begin}.*{end}", f"{begin}\n{rows}\n{end}", text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    GUIDE.write_text(filled(GUIDE.read_text()))
