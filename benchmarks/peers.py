"""The trainers of TRL, which llmrl is compared with and does not depend on: each version in a folder of its own."""

import importlib
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / ".peers"
GRPO_AND_REWARD, PPO = "1.16.0", "1.12.0"
"""Versions of TRL; PPO is not in later ones."""


def folder_of(trl: str) -> Path:
    """Folder of this version of TRL."""
    return FOLDER / f"trl-{trl}"


def check_peer(trl: str) -> None:
    """Ends the program with the command that is missing, where this version of TRL is not there."""
    folder = folder_of(trl)
    if not (folder / "trl").is_dir():
        sys.exit(
            f"this benchmark compares with TRL {trl}, which is not in {folder}; install it there, where it changes "
            f"nothing that llmrl uses: {sys.executable} -m pip install --no-deps --target {folder} trl=={trl}"
        )


def import_peer(module: str, trl: str) -> Any:
    """The module of this version of TRL."""
    check_peer(trl)
    sys.path.insert(0, str(folder_of(trl)))
    imported = importlib.import_module(module)
    if version("trl") != trl:
        sys.exit(f"TRL {version('trl')} was imported where {trl} was asked for; uninstall it")
    return imported
