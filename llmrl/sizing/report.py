"""Report of the memory estimate in a few lines, printed before a run is launched."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from llmrl.config import AnyRun, CriticRun, RLRun, SFTRun
from llmrl.distributed.launch import number, read_launch
from llmrl.messages import in_units
from llmrl.models.config import LoraSettings, ModelConfig
from llmrl.models.folders import is_adapter
from llmrl.sizing.estimate import PHASES, Estimate, estimate_memory
from llmrl.sizing.machine import this_machine
from llmrl.sizing.shape import ModelShape, read_shape
from llmrl.sizing.strategy import launched_strategy

UNKNOWN = "cannot be read here, or its layers carry states along the row"


def describe_memory(config: AnyRun) -> list[str]:
    """Lines on the memory of a run under the launch of this process, or a sentence on why it is not known.

    Raises:
        LaunchError: The launcher asks for what llmrl does not do.
    """
    shape, strategy = read_shape(config.model), launched_strategy(read_launch())
    if shape is None:
        return [f"Memory is not estimated: the config.json of model.path ({config.model.path}) {UNKNOWN}."]
    reward_shape, unknown = _reward_shape(config)
    estimate = estimate_memory(config, shape, strategy, reward_shape=reward_shape)
    has_rollouts = isinstance(config, RLRun)
    lines = [f"Memory, estimated with {strategy.name}:", *_lines(estimate, has_rollouts), *unknown]

    def estimated(other: AnyRun) -> Estimate:
        return estimate_memory(other, shape, strategy, reward_shape=reward_shape)

    fit = _fit(config, estimate, estimated, beside="the reward model" if unknown else None)
    return [*lines, *fit, *_left_out(config.model, shape)]


def _left_out(config: ModelConfig, shape: ModelShape) -> list[str]:
    """A sentence on routers, which adapters leave out unless they are named."""
    routers = sorted({linear.name.rpartition(".")[2] for linear in shape.linears if linear.routes})
    if config.lora is None or config.lora.targets or not routers:
        return []
    return [
        f"model.lora leaves out the routers of the mixture of experts ({', '.join(routers)}); name them in "
        "model.lora.targets, beside the others, to train them too."
    ]


def _reward_shape(config: AnyRun) -> tuple[ModelShape | None, list[str]]:
    if not isinstance(config, RLRun) or config.reward.model is None:
        return None, []
    path = config.reward.model.path
    shape = read_shape(ModelConfig(path=path))
    return shape, [] if shape else [f"  The reward model is not counted: the config.json of {path} {UNKNOWN}."]


def _lines(estimate: Estimate, has_rollouts: bool) -> list[str]:
    """The phases, then the items from the largest on."""
    reported = PHASES if has_rollouts else ("update",)
    phases = ", ".join(f"{phase} {in_units(estimate.of(phase))}" for phase in reported)
    listed = sorted(estimate.items, key=lambda item: -item.num_bytes)
    of_peak = (item for item in listed if estimate.peak_phase in item.phases)
    lines = [
        f"  Each device has {in_units(estimate.peak)} in tensors at its peak, in the {estimate.peak_phase}. "
        f"Phases: {phases}. The device's own context, fragments and buffers of communication come on top.",
        f"  The peak: {', '.join(f'{item.name} {in_units(item.num_bytes)}' for item in of_peak)}.",
    ]
    kept = f", and keeps {in_units(estimate.host_training)} there in training" if estimate.host_training else ""
    return [*lines, f"  Each process loads {in_units(estimate.host_loading)} into the memory of the CPU{kept}."]


def _fit(
    config: AnyRun, estimate: Estimate, estimated: Callable[[AnyRun], Estimate], *, beside: str | None
) -> list[str]:
    """Lines on whether the run fits this machine, and what would lower its memory; `beside`: what was not counted."""
    machine = this_machine()
    num_processes = number("LOCAL_WORLD_SIZE", least=1, otherwise=number("WORLD_SIZE", least=1, otherwise=1))
    has, where = (machine.cpu, "CPU, as torch sees no GPU on it,") if machine.gpu is None else (machine.gpu, "GPU")

    def taken(by: Estimate) -> int:
        return num_processes * (by.peak + by.host_training) if machine.gpu is None else by.peak

    needed = taken(estimate)
    memory = f"  This machine's {where} has {in_units(has)}"
    if needed <= has:
        without = f" without {beside}" if beside else ""
        return [f"{memory}: the run fits{without}, with {in_units(has - needed)} to spare."]
    lower = dict(_lowered(config, needed, lambda other: taken(estimated(other))))
    ways = ", ".join(f"{setting} to {in_units(num_bytes)}" for setting, num_bytes in lower.items())
    return [
        f"{memory}, and the run takes {in_units(needed)} of it: it does not fit."
        + (f" These lower it: {ways}." if ways else "")
        + " Other ways: a smaller model, or more devices with weights split over them; see docs/sizing.md."
    ]


def _lowered(config: AnyRun, needed: int, peak: Callable[[AnyRun], int]) -> Iterator[tuple[str, int]]:
    """Yields each setting that lowers the peak, with the peak that it gives; last all of them together."""
    together, names = config, []
    for setting, (path, value) in _levers(config).items():
        try:
            if peak(_with(config, path, value)) < needed:
                yield setting, peak(_with(config, path, value))
                together, names = _with(together, path, value), [*names, setting]
        except ValueError:  # which does not go with other settings of this recipe
            continue
    if len(names) > 1:
        yield "all of these together", peak(together)


def _levers(config: AnyRun) -> dict[str, tuple[str, Any]]:
    """Settings that may lower the peak: as an override, as a path and its value."""
    levers: dict[str, tuple[str, Any]] = {
        "model.gradient_checkpointing=true": ("model.gradient_checkpointing", True),
        "model.dtype=bfloat16": ("model.dtype", "bfloat16"),
    }
    if config.model.lora is None and not is_adapter(config.model.path):
        levers["model.lora.rank=16"] = ("model.lora", LoraSettings())
    if isinstance(config, RLRun):
        section, length = "update", config.data.max_prompt_tokens + config.rollout.max_response_tokens
        rows = max(config.algorithm.group_size, config.evaluation.num_responses)
        levers[f"rollout.max_rows={rows}"] = ("rollout.max_rows", rows)
    else:
        sections = {SFTRun: "sft", CriticRun: "critic"}
        section, length = sections.get(type(config), "reward_model"), config.data.max_tokens
    levers[f"{section}.microbatch_tokens={length}"] = (f"{section}.microbatch_tokens", length)
    return levers


def _with(config: Any, path: str, value: Any) -> Any:
    """The same settings with another value of one of them."""
    name, _, rest = path.partition(".")
    return replace(config, **{name: _with(getattr(config, name), rest, value) if rest else value})
