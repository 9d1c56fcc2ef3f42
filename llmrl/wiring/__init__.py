"""From settings to a wired run: the only package that knows every class.

Everything that can be wrong is found by `check_*` before any weights load; `build_*` then wires what was checked.
"""

from llmrl.wiring.actors import Actor, load_actor, reference_of
from llmrl.wiring.checks import Checked, check_ppo, check_reward_run, check_rl, check_scorer, check_sft
from llmrl.wiring.engines import build_engine, load_for_sampling, respond
from llmrl.wiring.precision import with_dtypes
from llmrl.wiring.reward_model import build_reward_model, load_trained_reward_model
from llmrl.wiring.rewards import load_scorer, score_rows
from llmrl.wiring.rl import build_evaluator, build_grpo, build_ppo
from llmrl.wiring.sft import build_sft

__all__ = [
    "Actor",
    "Checked",
    "build_engine",
    "build_evaluator",
    "build_grpo",
    "build_ppo",
    "build_reward_model",
    "build_sft",
    "check_ppo",
    "check_reward_run",
    "check_rl",
    "check_scorer",
    "check_sft",
    "load_actor",
    "load_for_sampling",
    "load_scorer",
    "load_trained_reward_model",
    "reference_of",
    "respond",
    "score_rows",
    "with_dtypes",
]
