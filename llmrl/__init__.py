"""Post-training of language models by reinforcement learning: exact, small, fast, unkillable, legible.

Everything public stands in `__all__` and is imported when it is first used: ``import llmrl`` itself imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmrl.api.folder import RunFolder, load_run
    from llmrl.api.inference import evaluate, generate, score
    from llmrl.api.run import Run
    from llmrl.api.training import grpo, ppo, reward_model, sft
    from llmrl.environments.environment import Environment, Message, Turn
    from llmrl.errors import Error

__version__ = "0.2.0"
__all__ = [
    "Environment",
    "Error",
    "Message",
    "Run",
    "RunFolder",
    "Turn",
    "__version__",
    "evaluate",
    "generate",
    "grpo",
    "load_run",
    "ppo",
    "reward_model",
    "score",
    "sft",
]
_PLACES = {
    "Environment": "llmrl.environments.environment",
    "Error": "llmrl.errors",
    "Message": "llmrl.environments.environment",
    "Run": "llmrl.api.run",
    "RunFolder": "llmrl.api.folder",
    "Turn": "llmrl.environments.environment",
    "evaluate": "llmrl.api.inference",
    "generate": "llmrl.api.inference",
    "grpo": "llmrl.api.training",
    "load_run": "llmrl.api.folder",
    "ppo": "llmrl.api.training",
    "reward_model": "llmrl.api.training",
    "score": "llmrl.api.inference",
    "sft": "llmrl.api.training",
}
"""Module of each public name."""


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
