"""Whatever is wrong with a user's files, settings and rules, the command line answers in its own words.

FUZZ_COMBINATIONS says how many combinations of faults are tried and FUZZ_SEED which; `make fuzz` tries 400.
"""

import multiprocessing
import os
import random
import shutil
import sys
import traceback
from pathlib import Path

import pytest

from tests.fuzz.faults import FAMILIES
from tests.fuzz.workspace import COMMANDS, Workspace, make_template

NUM_COMBINATIONS = int(os.environ.get("FUZZ_COMBINATIONS", "60"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
TIMEOUT_S = 120
STATUSES = (0, 1, 2)
WITHOUT_RULES = ("sft", "reward-model", "score", "generate")
WITHOUT_RECIPE = ("score", "generate")

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.fuzz.preload"])


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """Everything in order."""
    folder = tmp_path_factory.mktemp("template")
    make_template(folder)
    return folder


def run(work: Workspace) -> tuple[int | None, str]:
    """Exit status, None where it does not end, and everything that was printed."""
    process = SERVER.Process(target=_as_a_command, args=(work.folder, work.arguments(), work.environment))
    process.start()
    process.join(TIMEOUT_S)
    if process.exitcode is None:
        process.kill()
        process.join()
        return None, (work.folder / "printed.txt").read_text(errors="replace")
    return process.exitcode, (work.folder / "printed.txt").read_text(errors="replace")


def _as_a_command(folder: Path, arguments: list[str], environment: dict[str, str]) -> None:
    """What `python -m llmrl` does in that folder, in a process of its own."""
    from llmrl.cli import main

    os.environ.update(environment)
    os.chdir(folder)
    printed = os.open(folder / "printed.txt", os.O_CREAT | os.O_WRONLY, 0o600)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    sys.stdout = os.fdopen(1, "w", errors="backslashreplace", closefd=False)
    sys.stderr = os.fdopen(2, "w", errors="backslashreplace", closefd=False, buffering=1)
    sys.argv = ["llmrl", *arguments]
    status: int | str | None = 0
    try:
        main()
    except SystemExit as done:
        status = done.code
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))


def complaint(status: int | None, printed: str) -> str | None:
    """What a user would complain about; None where the answer is one of ours."""
    if status is None:
        return "it does not end"
    if "Traceback (most recent call last)" in printed:
        return "a traceback"
    if status not in STATUSES:
        return f"it ends with status {status}"
    if status and "error:" not in printed.lower() and "Usage:" not in printed:
        return f"it ends with status {status} and without a word"
    return None


def draw(number: int, template: Path, folder: Path) -> tuple[Workspace, list[str]]:
    """Combination `number`: a command, and one to three faults of different families planted in its workspace."""
    rng = random.Random(f"{SEED}/{number}")
    command = rng.choice(COMMANDS)
    shutil.copytree(template, folder)
    work = Workspace(folder, command, dry=command not in ("evaluate", *WITHOUT_RECIPE) and rng.random() < 0.4)
    families = [name for name in FAMILIES if fits(name, command)]
    planted = []
    for family in rng.sample(families, k=min(rng.choice([1, 1, 2, 3]), len(families))):
        fault = rng.choice(FAMILIES[family])
        try:
            fault(work, rng)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # an earlier fault left nothing to damage
            continue
        planted.append(fault.__name__)
    return work, planted


def fits(family: str, command: str) -> bool:
    if family == "rule":
        return command not in WITHOUT_RULES
    if family in ("setting", "data"):
        return command not in WITHOUT_RECIPE or (family == "data" and command == "score")
    return True


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_without_faults_every_command_does_its_work(command, template, tmp_path):
    shutil.copytree(template, tmp_path / "work")
    status, printed = run(Workspace(tmp_path / "work", command))
    assert status == 0, printed


@pytest.mark.slow
@pytest.mark.parametrize("number", range(NUM_COMBINATIONS))
def test_faults_are_answered_in_our_own_words(number, template, tmp_path):
    work, planted = draw(number, template, tmp_path / "work")
    status, printed = run(work)
    if problem := complaint(status, printed):
        pytest.fail(f"{problem}: {' '.join(work.arguments())}, with {', '.join(planted)}\n{printed}", pytrace=False)


def test_a_complaint_is_made_of_what_users_must_not_see():
    assert complaint(1, "Traceback (most recent call last):\n  ...\nKeyError: 3") == "a traceback"
    assert complaint(None, "") == "it does not end"
    assert complaint(139, "error: x") == "it ends with status 139"
    assert complaint(2, "nothing that helps") == "it ends with status 2 and without a word"
    assert complaint(2, "error: model.path (x) is no folder") is None
    assert complaint(0, "The model is in out/final") is None
