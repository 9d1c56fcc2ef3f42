"""What the tests do with a shell command of a page: each program is asked by its own parser, and run where that takes
a moment. Commands of llmrl run in this process."""

import os
import re
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from typer.testing import CliRunner

from llmrl.cli import app
from llmrl.distributed.device import torch_as_it_was
from llmrl.wiring.runs import RUNS
from tests.docs.pages import ROOT

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
CUTS = {
    "sft": ["run.num_iterations=2", "sft.batch_size=4"],
    "reward-model": ["data.num_rows=16", "reward_model.batch_size=8", "reward_model.num_reference_pairs=4"],
    "critic": ["run.num_iterations=2", "critic.batch_size=4"],
    "grpo": ["run.num_iterations=2", "rollout.prompts_per_iteration=2", "update.minibatch_size=null"],
    "ppo": [
        "run.num_iterations=2",
        "critic.warmup_iterations=1",
        "rollout.prompts_per_iteration=8",
        "update.minibatch_size=8",
    ],
}
"""Settings that make a run of a page take seconds."""
OUTPUT = "run.output_dir=out"
"""Elsewhere than where the models of other runs lie."""
SAMPLES = {"grpo", "ppo", "evaluate"}
SHORT = ["rollout.max_response_tokens=8", "evaluation_data.num_rows=4"]


def run(command: Sequence[str], *, trains: bool = False) -> None:
    """Runs a command in the working folder, or asserts that its program would take it."""
    program, *arguments = command
    assert program in PROGRAMS, f"{program}: no test knows it; mark the block as not run, with the reason"
    PROGRAMS[program](arguments, trains)


def llmrl(arguments: list[str], trains: bool) -> None:
    """In this process: a run is a dry run, or has a few small iterations; other commands run on a few rows."""
    arguments, output = _redirected(arguments)
    verb = arguments[0]
    if is_run(["llmrl", *arguments]):
        given = [argument for argument in arguments if argument != "--dry-run"]
        cuts = [*CUTS[verb], *cuts_of_data(arguments)] if trains else ["--dry-run"]
        arguments = [*given, OUTPUT, *cuts]
    elif verb == "evaluate":
        arguments = [*arguments, *cuts_of_data(arguments)]
    with torch_as_it_was():  # a command may have run.deterministic
        result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, f"{' '.join(arguments)}\n{result.output}\n{result.exception!r}"
    for path in output:
        Path(path).write_text(result.stdout)


def _redirected(words: list[str]) -> tuple[list[str], list[str]]:
    """The command, and the file that ``>`` sends its output to."""
    at = words.index(">") if ">" in words else len(words)
    return words[:at], words[at + 1 :]


def is_run(command: Sequence[str]) -> bool:
    """Whether a command would train, or would check a run."""
    return command[0] == "llmrl" and command[1] in RUNS and "-h" not in command


def cuts_of_data(arguments: list[str]) -> list[str]:
    verb, recipe, *_ = arguments
    text = Path(recipe).read_text()
    is_shortened = verb in SAMPLES and "environment:" not in text  # whose turns have limits of their own
    return [*SHORT[:is_shortened], *(SHORT[1:] if "evaluation_data:" in text else [])]


def python(arguments: list[str], trains: bool) -> None:
    """A script, in this process. Generators write elsewhere: the folder has fewer rows than they make."""
    script, *rest = arguments
    rest += ["--out", "made"] if script.startswith("data/") else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *rest])
        runpy.run_path(script, run_name="__main__")


def accelerate(arguments: list[str], trains: bool) -> None:
    """What is launched, in one process, if the launcher takes its arguments."""
    assert arguments[0] == "launch"
    launch = launch_command_parser().parse_args(arguments[1:])
    assert launch.module
    assert launch.training_script == "llmrl"
    assert launch.config_file is None or Path(launch.config_file).is_file()
    llmrl(launch.training_script_args, trains=False)


def make(arguments: list[str], trains: bool) -> None:
    """What make would do."""
    done = subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def pip(arguments: list[str], trains: bool) -> None:
    """That the files and extras are there; nothing is installed."""
    assert arguments[0] == "install"
    for named in re.findall(r"\[([\w,]+)\]", " ".join(arguments)):
        assert set(named.split(",")) <= EXTRAS.keys()
    if "-c" in arguments:
        assert Path(arguments[arguments.index("-c") + 1]).is_file()


def pytest_(arguments: list[str], trains: bool) -> None:
    assert Path(arguments[0]).is_file()


def source(arguments: list[str], trains: bool) -> None:
    assert arguments == [".venv/bin/activate"]


PROGRAMS = {
    "cd": lambda arguments, trains: os.chdir(arguments[0]),
    "llmrl": llmrl,
    "python": python,
    "accelerate": accelerate,
    "make": make,
    "pip": pip,
    "pytest": pytest_,
    "source": source,
}
