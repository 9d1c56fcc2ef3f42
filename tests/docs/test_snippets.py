"""Every command and every block of Python and YAML of the pages runs, in a folder that has what they speak of."""

import runpy
import sys
from pathlib import Path

import pytest
import yaml

from llmrl.data.files import FileRow, Rows
from llmrl.settings import SettingError, describe, read_either
from llmrl.wiring.runs import RUNS
from tests.docs import shell
from tests.docs.conftest import PAIRS, QUESTIONS
from tests.docs.pages import PAGES, ROOT, Block, blocks_of

BLOCKS = {page: blocks_of(page) for page in PAGES}
WITH_BLOCKS = [page for page, blocks in BLOCKS.items() if blocks]
EXCEPTIONS = Path(__file__).with_name("not_run.txt")
LEAST = {
    "model": {"path": "recipes/models/tiny_char_llama"},
    "data": {"path": "problems.jsonl"},
    "evaluation_data": {"path": "held_out.jsonl"},
    "reward": {"functions": [{"name": "reward_models/arithmetic.py:correct"}]},
    "run": {"output_dir": "runs/any"},
}
"""Sections that complete a fragment of a recipe; those that a kind of run does not have are left out."""
HUB = {"openai/gsm8k": QUESTIONS, "Anthropic/hh-rlhf": PAIRS}


def blocks_in(page: Path, language: str) -> list[Block]:
    return [block for block in BLOCKS[page] if block.language == language and block.not_run is None]


@pytest.fixture
def scratch(workshop, tmp_path, monkeypatch):
    """A folder for one page, in which its blocks run: the workshop's, with the files that the page shows."""

    def enter(page: Path) -> Path:
        for entry in workshop.iterdir():
            (tmp_path / entry.name).symlink_to(entry)
        for block in BLOCKS[page]:
            if block.file is not None and "/" not in block.file:
                (tmp_path / block.file).write_text(block.contents)
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(tmp_path)
        return tmp_path

    monkeypatch.setattr(
        "llmrl.data.rows._read_hub",
        lambda name, subset, split: Rows(FileRow(row, f"row {n}") for n, row in enumerate(HUB[name], 1)),
    )
    return enter


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", WITH_BLOCKS, ids=name_of)
def test_shell_commands_run(scratch, page):
    scratch(page)
    for block in blocks_in(page, "shell"):
        for command in block.commands:
            print(block.place, *command)
            shell.run(command)


def training_commands():
    """Each command that trains, once."""
    seen: set[str] = set()
    for page in WITH_BLOCKS:
        for block in blocks_in(page, "shell"):
            for command in block.commands:
                text = " ".join(command)
                if shell.is_run(command) and "--dry-run" not in command and text not in seen:
                    seen.add(text)
                    yield pytest.param(page, command, id=f"{block.place}")


@pytest.mark.slow
@pytest.mark.parametrize(("page", "command"), training_commands())
def test_commands_that_train_do_so(scratch, page, command):
    folder = scratch(page)
    shell.run(command, trains=True)
    assert (folder / "out" / "final" / "config.json").is_file()


@pytest.mark.parametrize("page", [page for page in WITH_BLOCKS if blocks_in(page, "python")], ids=name_of)
def test_python_runs(scratch, page):
    """The blocks of a page as one script; a block of a file of the repository is that file."""
    script = scratch(page) / "page.py"
    blocks = blocks_in(page, "python")
    shown = [block for block in blocks if block.file is not None and "/" in block.file]
    assert [block.place for block in shown if (ROOT / block.file).read_text() != block.contents] == []
    script.write_text("\n".join(f"# {block.place}\n{block.text}" for block in blocks if block not in shown))
    runpy.run_path(str(script))
    for block in BLOCKS[page]:  # another page may have another file of the same name
        sys.modules.pop(Path(block.file or "").stem, None)


@pytest.mark.parametrize("page", [page for page in WITH_BLOCKS if blocks_in(page, "yaml")], ids=name_of)
def test_settings_are_those_of_a_run(scratch, page):
    folder = scratch(page)
    for block in blocks_in(page, "yaml"):
        sections = yaml.safe_load(block.text)
        problems = [problem for kind in RUNS.values() if (problem := problem_of(sections, kind, folder / "part.yaml"))]
        assert len(problems) < len(RUNS), (block.place, problems)


def problem_of(sections, kind, recipe):
    """Why a fragment completes no recipe of this kind of run."""
    paths = {path for path, *_ in describe(kind.settings)}
    known = {name: dict(value) for name, value in LEAST.items() if name in paths}
    if "run.num_iterations" in paths:
        known["run"]["num_iterations"] = 10
    completed = {name: {**known.get(name, {}), **sections.get(name, {})} for name in known.keys() | sections.keys()}
    recipe.write_text(yaml.safe_dump(completed))
    try:
        read_either([kind.settings], recipe, [])
    except SettingError as error:
        return str(error)
    return None


def test_exceptions_are_listed():
    """Blocks that are not run are decisions: `python -m tests.docs` writes the list."""
    assert EXCEPTIONS.read_text() == exceptions()


def exceptions() -> str:
    """Page, command and reason of each block that is not run."""
    return "".join(
        f"{name_of(page)}: {block.text.splitlines()[0].strip()}: {block.not_run}\n"
        for page in WITH_BLOCKS
        for block in BLOCKS[page]
        if block.not_run is not None
    )
