"""The table of runs: what each verb of the command line reads, checks and builds.

The checks and the builders are named, not imported: they import models, and the command line answers without.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

from llmrl.config import CriticRun, GRPORun, PPORun, RewardModelRun, RLRun, SFTRun


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of run."""

    settings: type
    """Class of the settings in its recipe."""
    check: str
    """Function of the settings that finds what is wrong before any weights load: ``(config, *, dry) -> Checked``. Of a
    run that samples it takes ``engine`` too, in place of the one that the settings name."""
    build: str
    """Function that wires what was checked: ``(config, checked, context, trackers) -> Run``."""
    help: str

    @property
    def samples(self) -> bool:
        """Whether responses are sampled, so that its model can be evaluated on prompts."""
        return issubclass(self.settings, RLRun)

    def checker(self) -> Callable[..., Any]:
        """The function that `check` names."""
        return resolve_name(self.check)

    def builder(self) -> Callable[..., Any]:
        """The function that `build` names."""
        return resolve_name(self.build)


RUNS: dict[str, Kind] = {
    "sft": Kind(
        settings=SFTRun,
        check="llmrl.wiring.checks:check_sft",
        build="llmrl.wiring.sft:build_sft",
        help="Fine-tunes a model on prompts with given responses.",
    ),
    "reward-model": Kind(
        settings=RewardModelRun,
        check="llmrl.wiring.checks:check_reward_run",
        build="llmrl.wiring.reward_model:build_reward_model",
        help="Trains a reward model on pairs of responses, one of which was preferred.",
    ),
    "critic": Kind(
        settings=CriticRun,
        check="llmrl.wiring.checks:check_critic_run",
        build="llmrl.wiring.critic_run:build_critic",
        help="Trains a critic for PPO on responses and their scores.",
    ),
    "grpo": Kind(
        settings=GRPORun,
        check="llmrl.wiring.checks:check_rl",
        build="llmrl.wiring.rl:build_grpo",
        help="Improves a model by GRPO, or one of its kin, against rewards that programs verify.",
    ),
    "ppo": Kind(
        settings=PPORun,
        check="llmrl.wiring.checks:check_ppo",
        build="llmrl.wiring.rl:build_ppo",
        help="Improves a model by PPO: actor, critic, frozen reference and a reward, learned or by program.",
    ),
}
"""Every kind of run, by its verb."""
