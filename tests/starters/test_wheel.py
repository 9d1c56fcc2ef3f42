"""The wheel alone: built from the repository, unpacked, and used in an empty folder."""

import os
import re
import shlex
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from llmrl.starters.folders import STARTERS
from llmrl.starters.listing import list_recipes

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
SHORT = {"sft": ["run.num_iterations=2"], "grpo": ["run.num_iterations=1"], "ppo": ["run.num_iterations=3"]}
SMALL = {
    "reward-model": ["run.num_iterations=2", "evaluation_data.num_rows=20"],
    "grpo": ["evaluation_data.num_rows=20", "rollout.prompts_per_iteration=4", "update.minibatch_size=32"],
    "ppo": ["evaluation_data.num_rows=4", "rollout.prompts_per_iteration=4", "update.minibatch_size=4"],
    "evaluate": ["evaluation_data.num_rows=20"],
}
"""Settings with which a command of a page takes seconds."""


def run(command: list[str], folder: Path, **environment: str) -> str:
    variables = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=variables)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with what the wheel has, and nothing else."""
    folder = tmp_path_factory.mktemp("wheel")
    build = ["pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)]
    run([sys.executable, "-m", *build], folder)
    [wheel] = folder.glob("llmrl-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


@pytest.fixture(scope="module")
def llmrl(installed):
    """Runs a command of the wheel in a folder, and returns what it prints."""
    others = str(Path(find_spec("torch").origin).parents[1])  # its neighbours: whatever llmrl depends on

    def command(arguments: str, folder: Path, **environment: str) -> str:
        call = [sys.executable, "-P", "-m", "llmrl", *shlex.split(arguments)]
        return run(call, folder, PYTHONPATH=os.pathsep.join([str(installed), others]), **environment)

    return command
