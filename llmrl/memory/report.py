"""The estimate in a few lines, for whoever is about to launch a run."""

from llmrl.config import RewardModelRun, RLRun, SFTRun
from llmrl.distributed.launch import read_launch
from llmrl.memory.estimate import PHASES, Estimate, estimate_memory
from llmrl.memory.shape import ModelShape, read_shape
from llmrl.memory.strategy import launched_strategy
from llmrl.models.loading import ModelConfig

UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def describe_memory(config: SFTRun | RewardModelRun | RLRun) -> list[str]:
    """What a recipe takes, launched as this process was; or a sentence on why that is not known.

    Raises:
        LaunchError: The launcher asks for what llmrl does not do.
    """
    shape, strategy = read_shape(config.model), launched_strategy(read_launch())
    if shape is None:
        return [f"Memory is not estimated: the config.json of model.path ({config.model.path}) cannot be read here."]
    reward_shape, unknown = _reward_shape(config)
    estimate = estimate_memory(config, shape, strategy, reward_shape=reward_shape)
    has_rollouts = isinstance(config, RLRun)
    return [f"Memory, estimated with {strategy.name}:", *_lines(estimate, has_rollouts), *unknown]


def _reward_shape(config: SFTRun | RewardModelRun | RLRun) -> tuple[ModelShape | None, list[str]]:
    if not isinstance(config, RLRun) or config.reward.model is None:
        return None, []
    path = config.reward.model.path
    shape = read_shape(ModelConfig(path=path))
    return shape, [] if shape else [
        f"  The reward model is not counted: the config.json of {path} cannot be read here."
    ]


def _lines(estimate: Estimate, has_rollouts: bool) -> list[str]:
    """The phases, then the items from the largest on."""
    told = PHASES if has_rollouts else ("update",)
    phases = ", ".join(f"{phase} {in_units(estimate.of(phase))}" for phase in told)
    listed = sorted(estimate.items, key=lambda item: -item.num_bytes)
    of_peak = (item for item in listed if estimate.peak_phase in item.phases)
    lines = [
        f"  Each device has {in_units(estimate.peak)} in tensors at its peak, in the {estimate.peak_phase}. "
        f"Phases: {phases}. The device's own context, fragments and buffers of communication come on top.",
        f"  The peak: {', '.join(f'{item.name} {in_units(item.num_bytes)}' for item in of_peak)}.",
    ]
    offloaded = f", and {in_units(estimate.host_training)} in training" if estimate.host_training else ""
    return [*lines, f"  Each process loads {in_units(estimate.host_loading)} into the memory of the CPU{offloaded}."]


def in_units(num_bytes: int) -> str:
    """With three digits, in the unit that suits."""
    for unit, size in UNITS:
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes} B"
