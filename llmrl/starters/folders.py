"""The folders that `llmrl new` writes: recipes of the repository, and what they read, at shorter paths."""

import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmrl.messages import nearest
from llmrl.starters.listing import SHIPPED

COPIED = (".jinja", ".json", ".md", ".py", ".yaml")
"""Suffixes of the files that are copied; a repository may also have data there that a generator made."""


@dataclass(frozen=True, kw_only=True)
class Starter:
    """One kind of folder."""

    summary: str
    own: str
    """Folder of the files that only this kind has, beside this module."""
    copied: dict[str, str]
    """Place in the folder of each file or folder of the repository that is copied, by its path there."""
    renamed: dict[str, str]
    """What else the texts name by a shorter path: folders that runs and generators make."""
    made_by: dict[str, str]
    """Commands that run once the folder is written, by what they make, in order."""
    next_command: str
    """The first one that is left to the user."""

    @property
    def paths(self) -> dict[str, str]:
        """Every new path, by the old one, the longest first."""
        paths = self.copied | self.renamed
        return {old: paths[old] for old in sorted(paths, key=len, reverse=True)}


DATA = {"data/sft.jsonl": "python data/generate.py"}
START = {"runs/sft/final": "llmrl sft sft.yaml"}
STARTERS: dict[str, Starter] = {
    "math": Starter(
        summary="GRPO on sums, against a reward that a program verifies",
        own="math",
        copied={
            "recipes/quickstart_sft.yaml": "sft.yaml",
            "recipes/quickstart_grpo.yaml": "recipe.yaml",
            "recipes/models/tiny_char_llama": "model",
            "reward_models/arithmetic.py": "reward.py",
            "data/arithmetic": "data",
        },
        renamed={"runs/quickstart": "runs"},
        made_by=DATA | START,
        next_command="llmrl grpo recipe.yaml",
    ),
    "rlhf": Starter(
        summary="RLHF on reviews: a reward model from pairs, and PPO against it",
        own="rlhf",
        copied={
            "recipes/reviews_tiny_sft.yaml": "sft.yaml",
            "recipes/reviews_tiny_reward_model.yaml": "reward_model.yaml",
            "recipes/reviews_tiny_ppo.yaml": "recipe.yaml",
            "recipes/models/tiny_word_llama": "model",
            "data/reviews": "data",
        },
        renamed={"runs/reviews_tiny": "runs"},
        made_by=DATA | START,
        next_command="llmrl reward-model reward_model.yaml",
    ),
    "pairs": Starter(
        summary="a reward model from preference pairs, with its report card",
        own="pairs",
        copied={"recipes/models/tiny_word_llama": "model", "data/reviews/generate.py": "data/generate.py"},
        renamed={"data/reviews": "data"},
        made_by=DATA,
        next_command="llmrl reward-model recipe.yaml",
    ),
    "tools": Starter(
        summary="GRPO with a tool: products, and a calculator to call",
        own="tools",
        copied={
            "recipes/products_tiny_sft.yaml": "sft.yaml",
            "recipes/products_tiny_grpo.yaml": "recipe.yaml",
            "recipes/environments/calculator.py": "calculator.py",
            "recipes/models/tiny_chat_llama": "model",
            "reward_models/arithmetic.py": "reward.py",
            "data/products": "data",
        },
        renamed={"runs/products": "runs"},
        made_by=DATA | START,
        next_command="llmrl grpo recipe.yaml",
    ),
}
"""Every kind of folder, by the name that `llmrl new` takes."""


def find_starter(name: str) -> Starter:
    """The starter of a name.

    Raises:
        ValueError: There is none.
    """
    if name not in STARTERS:
        raise ValueError(f"there is no starter {name!r}, only {', '.join(STARTERS)}{nearest(name, STARTERS)}")
    return STARTERS[name]


def write_starter(starter: Starter, folder: Path) -> None:
    """Writes the files of a starter that the folder lacks. It may have them already, as the same command left them.

    Raises:
        ValueError: The folder has something else, which is left as it is.
    """
    files = dict(_files(starter))
    check_folder(folder, files)
    for name, content in files.items():
        file = folder / name
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)


def check_folder(folder: Path, files: dict[str, bytes]) -> None:
    """Raises ValueError where a folder has other files than these, or these with other content."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder that is new or empty")
    first, content = next(iter(files.items()))  # is written before any other
    is_begun = (folder / first).is_file() and not _differs(folder / first, content)
    own = {Path(name).parts[0] for name in files} | {"runs"} if is_begun else set()
    foreign = [entry for entry in sorted(folder.glob("*")) if entry.name not in own]
    changed = [folder / name for name, content in files.items() if _differs(folder / name, content)]
    for entry in (*foreign, *changed):
        raise ValueError(f"{entry} is in the way: `llmrl new` would not write it; name a folder that is new or empty")


def missing_commands(starter: Starter, folder: Path) -> Iterator[str]:
    """The commands of `made_by` whose results the folder lacks, each when those before it are done."""
    for made, command in starter.made_by.items():
        if not (folder / made).exists():
            yield command


def run_in(folder: Path, command: str) -> int:
    """The exit status of a command that runs in a folder, by this interpreter. A signal to this process ends it
    too, once it has saved what it learned."""
    program, *arguments = shlex.split(command)
    module = ["-m", "llmrl"] if program == "llmrl" else []
    process = subprocess.Popen([sys.executable, *module, *arguments], cwd=folder)
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise


def _files(starter: Starter) -> Iterator[tuple[str, bytes]]:
    """Each file of a starter, ``(its place in the folder, content)``."""
    for source, place in {starter.own: ".", **starter.copied}.items():
        root = SHIPPED / source
        for file in sorted(root.rglob("*")) if root.is_dir() else [root]:
            if file.suffix in COPIED:
                yield str(Path(place, file.relative_to(root))), _with_new_paths(file, starter.paths)


def _with_new_paths(file: Path, paths: dict[str, str]) -> bytes:
    text = file.read_text(encoding="utf-8")
    for old, new in paths.items():
        text = text.replace(old, new)
    return text.encode()


def _differs(file: Path, content: bytes) -> bool:
    return file.is_dir() or (file.is_file() and file.read_bytes() != content)
