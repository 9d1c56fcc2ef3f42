"""The recipes that come with llmrl: their names, and their text as it works without the repository."""

import re
from pathlib import Path
from typing import NamedTuple

from llmrl.messages import nearest

SHIPPED = Path(__file__).parent
"""The folder that has `recipes`, `data` and `reward_models`."""
RECIPES = SHIPPED / "recipes"
COMMAND = re.compile(r"\b(llmrl [\w-]+|accelerate launch --config_file) recipes/([\w/]+)\.yaml")
GENERATOR = re.compile(r"\bpython (data/\w+)/(\w+)\.py")
CODE = re.compile(r"\b((?:data|recipes|reward_models)/[\w/]+)\.py:")
MODEL = re.compile(r"\brecipes/models/\w+")


class ShippedRecipe(NamedTuple):
    """One recipe as `llmrl recipes` lists it."""

    name: str
    """Path below `recipes`, without the suffix."""
    command: str
    """Command that takes it, such as ``llmrl grpo``."""
    summary: str
    """First sentence of its comment."""


def list_recipes() -> list[ShippedRecipe]:
    """Every recipe and every launch file, by name."""
    names = sorted(str(file.relative_to(RECIPES).with_suffix("")) for file in RECIPES.glob("**/*.yaml"))
    return [_describe(name) for name in sorted(names, key=lambda name: ("/" in name, name))]


def read_recipe_text(name: str) -> str:
    """A recipe as a file that works in any folder: it names functions and generators by their module, other recipes by
    the command that prints them, and the tiny models by their place in this installation.

    Raises:
        ValueError: No recipe has this name.
    """
    known = [recipe.name for recipe in list_recipes()]
    if name not in known:
        raise ValueError(f"no recipe {name!r} comes with llmrl{nearest(name, known)}; `llmrl recipes` lists them")
    text = _read(name)
    text = COMMAND.sub(lambda found: _printed_first(found[1], found[2]), text)
    text = GENERATOR.sub(lambda found: f"python -m {_module(f'{found[1]}/{found[2]}')} --out {found[1]}", text)
    text = CODE.sub(lambda found: f"{_module(found[1])}:", text)
    return MODEL.sub(lambda found: str(SHIPPED / found[0]), text)


def _describe(name: str) -> ShippedRecipe:
    text = _read(name)
    command = next(found[1] for found in COMMAND.finditer(text) if found[2] == name)
    comment = re.match(r"(?:# \S.*\n)+", text)
    assert comment is not None, f"{name} begins with no comment"
    words = " ".join(line.removeprefix("# ") for line in comment[0].splitlines())
    return ShippedRecipe(name, command.removesuffix(" --config_file"), re.split(r"(?<=\.)\s", words)[0])


def _read(name: str) -> str:
    return RECIPES.joinpath(f"{name}.yaml").read_text(encoding="utf-8")


def _printed_first(command: str, name: str) -> str:
    file = f"{name.rpartition('/')[2]}.yaml"
    return f"llmrl recipes {name} > {file} && {command} {file}"


def _module(path: str) -> str:
    return f"llmrl.starters.{path.replace('/', '.')}"
