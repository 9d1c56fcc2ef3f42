"""The wheel alone: built from the repository, unpacked, and used in an empty folder."""

import os
import re
import shlex
import subprocess
import sys
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from llmrl.starters.folders import STARTERS, missing_commands, write_starter

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
SHORT = {
    "sft": "run.num_iterations=2",
    "reward-model": "data.num_rows=64 evaluation_data.num_rows=20",
    "grpo": "run.num_iterations=1 evaluation_data.num_rows=20",
    "ppo": "run.num_iterations=3 evaluation_data.num_rows=4 rollout.prompts_per_iteration=64 update.minibatch_size=64",
    "evaluate": "evaluation_data.num_rows=20",
}
"""Settings with which each command of a page takes seconds."""


def run(command: list[str], folder: Path, **environment: str) -> str:
    variables = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=variables)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the wheel and the source archive."""
    folder = tmp_path_factory.mktemp("built")
    run([sys.executable, "-m", "hatchling", "build", "-d", str(folder)], ROOT)
    return folder


@pytest.fixture(scope="module")
def llmrl(built):
    """Runs a command of the wheel in a folder, and returns what it prints; its dependencies are those of the tests."""
    program = built / "llmrl"
    program.write_text("from llmrl.cli import main\n\nmain()\n")
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        wheel.extractall(built / "site")
    others = Path(find_spec("torch").origin).parents[1]
    path = os.pathsep.join([str(built / "site"), str(others)])

    def command(arguments: str, folder: Path, **environment: str) -> str:
        call = [sys.executable, str(program), *shlex.split(arguments)]
        return run(call, folder, PYTHONPATH=path, **environment)

    return command


@pytest.fixture(scope="module", params=list(STARTERS))
def folder(request, llmrl, tmp_path_factory):
    """A folder as `llmrl new` leaves it, but with a start that has learned next to nothing."""
    folder = tmp_path_factory.mktemp(request.param) / "demo"
    write_starter(STARTERS[request.param], folder)
    for command in missing_commands(STARTERS[request.param], folder):
        program, arguments = command.split(maxsplit=1)
        if program == "python":
            run([sys.executable, arguments], folder)
        else:
            llmrl(shortened(arguments), folder)
    assert llmrl(f"new {request.param} demo", folder.parent).startswith("demo is ready")
    return folder


def shortened(arguments: str) -> str:
    """The arguments of a command of llmrl, with settings that make it short."""
    return f"{arguments} {SHORT.get(arguments.split()[0], '')}"


def names(archive: Path) -> set[str]:
    if archive.suffix == ".whl":
        return set(zipfile.ZipFile(archive).namelist())
    with tarfile.open(archive) as opened:
        return {name.partition("/")[2] for name in opened.getnames()}


# --- what is in it ----------------------------------------------------------------------------------------------------


def test_the_wheel_has_every_file_of_the_three_folders_that_is_under_version_control(built):
    [wheel] = built.glob("*.whl")
    listed = run(["git", "ls-files", "data", "recipes", "reward_models"], ROOT).split()
    tracked = {f"llmrl/starters/{name}" for name in listed if not name.endswith(".gitignore")}
    links = ("llmrl/starters/data/", "llmrl/starters/recipes/", "llmrl/starters/reward_models/")
    assert {name for name in names(wheel) if name.startswith(links)} == tracked
    assert "llmrl/py.typed" in names(wheel)


def test_the_source_archive_makes_the_same_wheel(built, tmp_path):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    [source] = tmp_path.iterdir()
    run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)], source)
    assert names(next(tmp_path.glob("*.whl"))) == names(next(built.glob("*.whl")))


# --- what it does -----------------------------------------------------------------------------------------------------


def test_it_is_the_wheel_that_runs(llmrl, built, tmp_path):
    printed = llmrl("recipes digits_tiny_grpo", tmp_path)
    assert f"path: {built}/site/llmrl/starters/recipes/models/tiny_char_llama" in printed
    version = next(built.glob("*.whl")).name.split("-")[1]
    assert llmrl("--version", tmp_path) == f"llmrl {version}\n"


def test_the_shell_completes_commands_and_says_how(llmrl, tmp_path):
    completed = llmrl("", tmp_path, _LLMRL_COMPLETE="complete_bash", COMP_WORDS="llmrl re", COMP_CWORD="1")
    assert completed.split() == ["reward-model", "recipes"]


def test_a_printed_recipe_passes_its_checks_in_an_empty_folder(llmrl, tmp_path):
    (tmp_path / "mine.yaml").write_text(llmrl("recipes digits_tiny_grpo", tmp_path))
    assert "Memory, estimated" in llmrl("grpo mine.yaml --dry-run", tmp_path)


def test_every_recipe_of_a_new_folder_passes_its_checks(folder, llmrl):
    for recipe in folder.glob("*.yaml"):
        verb = re.search(rf"#   llmrl ([\w-]+) {recipe.name}|&& llmrl ([\w-]+) {recipe.name}", recipe.read_text())
        assert verb is not None
        assert "Memory, estimated" in llmrl(f"{verb[1] or verb[2]} {recipe.name} --dry-run", folder)


def test_the_commands_of_a_page_run_in_their_order(folder, llmrl):
    commands = re.findall(r"^    llmrl (.*)$", (folder / "README.md").read_text(), re.MULTILINE)
    assert len(commands) > 1
    for arguments in commands:
        llmrl(shortened(arguments), folder)
