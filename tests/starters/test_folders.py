"""The folders that `llmrl new` writes."""

import re
from pathlib import Path

import pytest
import yaml

from llmrl.starters import folders
from llmrl.starters.folders import STARTERS, find_starter, missing_commands, run_in, write_starter

NAMES = list(STARTERS)
REPOSITORY = re.compile(
    r"\b(?:recipes|reward_models|starters)/|\bdata/(?:arithmetic|products|reviews)|\bruns/(?:products|quickstart|reviews)|`make\b"
)
"""A path that only a clone of the repository has."""


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(params=NAMES)
def written(request, tmp_path):
    """``(starter, folder)``."""
    folder = tmp_path / "new" / "folder"
    write_starter(STARTERS[request.param], folder)
    return STARTERS[request.param], folder


def test_the_files_are_those_that_a_user_needs(written):
    _, folder = written
    names = contents(folder).keys()
    assert {"README.md", "recipe.yaml", "data/generate.py", "model/config.json", "model/tokenizer.json"} <= names
    assert not [name for name in names if name.endswith((".jsonl", ".safetensors", ".pyc"))]


def test_no_text_names_a_path_of_the_repository(written):
    _, folder = written
    found = {name: REPOSITORY.findall(text.decode()) for name, text in contents(folder).items()}
    assert {name: hits for name, hits in found.items() if hits} == {}


def test_every_path_of_a_recipe_is_there_or_made(written):
    _, folder = written
    for recipe in folder.glob("*.yaml"):
        settings = yaml.safe_load(recipe.read_text())
        made = settings["made_by"]
        functions = settings.get("reward", {}).get("functions", [])
        scorer = [settings["reward"]["model"]["path"]] if "model" in settings.get("reward", {}) else []
        sections = [settings[name]["path"] for name in ("model", "data", "evaluation_data") if name in settings]
        named = [*(rule["name"] for rule in functions), *settings.get("environment", {}).get("tools", [])]
        for path in [*sections, *scorer, *(name.partition(":")[0] for name in named)]:
            assert (folder / path).exists() or path in made, f"{recipe.name}: {path}"
        for command in made.values():
            assert (folder / command.split()[-1]).is_file(), command


def test_the_page_names_the_next_command_first(written):
    starter, folder = written
    commands = re.findall(r"^    (llmrl .*)$", (folder / "README.md").read_text(), re.MULTILINE)
    assert commands[0] == starter.next_command


def test_what_is_written_twice_is_as_it_was(written):
    starter, folder = written
    before = contents(folder)
    (folder / "model" / "config.json").unlink()
    write_starter(starter, folder)
    assert contents(folder) == before


def test_a_folder_with_something_else_is_left_as_it_is(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match=r"thesis\.tex is in the way: .* name a folder that is new"):
        write_starter(STARTERS["math"], tmp_path)
    assert contents(tmp_path) == {"thesis.tex": b"mine"}


def test_a_file_that_was_changed_is_left_as_it_is(written):
    starter, folder = written
    (folder / "recipe.yaml").write_text("mine")
    (folder / "data" / "generate.py").unlink()
    with pytest.raises(ValueError, match=r"recipe\.yaml is in the way"):
        write_starter(starter, folder)
    assert (folder / "recipe.yaml").read_text() == "mine"
    assert not (folder / "data" / "generate.py").exists()


def test_data_of_a_user_are_not_taken_for_those_of_a_folder_that_was_begun(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("mine")
    with pytest.raises(ValueError, match=r"data is in the way"):
        write_starter(STARTERS["math"], tmp_path)
    assert contents(tmp_path) == {"data/train.jsonl": b"mine"}


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "demo").write_text("")
    with pytest.raises(ValueError, match="demo is a file; name a folder"):
        write_starter(STARTERS["math"], tmp_path / "demo")


def test_data_that_a_generator_left_in_the_repository_is_not_copied(tmp_path, monkeypatch):
    for source in ("data/reviews", "recipes/models/tiny_word_llama", "pairs"):
        (tmp_path / "shipped" / source).mkdir(parents=True)
    (tmp_path / "shipped" / "data" / "reviews" / "generate.py").write_text("data/reviews/train.jsonl")
    (tmp_path / "shipped" / "recipes" / "models" / "tiny_word_llama" / "model.safetensors").write_text("")
    (tmp_path / "shipped" / "pairs" / "old.jsonl").write_text("")
    monkeypatch.setattr(folders, "SHIPPED", tmp_path / "shipped")
    write_starter(STARTERS["pairs"], tmp_path / "demo")
    assert contents(tmp_path / "demo") == {"data/generate.py": b"data/train.jsonl"}


def test_a_command_is_missing_until_its_result_is_there(tmp_path):
    commands = missing_commands(STARTERS["math"], tmp_path)
    assert next(commands) == "python data/generate.py"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "sft.jsonl").write_text("")
    assert next(commands) == "llmrl sft sft.yaml"
    assert list(missing_commands(STARTERS["math"], tmp_path)) == ["llmrl sft sft.yaml"]
    (tmp_path / "runs" / "sft" / "final").mkdir(parents=True)
    assert list(missing_commands(STARTERS["math"], tmp_path)) == []


@pytest.mark.parametrize("name", NAMES)
def test_the_last_file_of_a_generator_is_the_one_that_is_waited_for(name, tmp_path):
    """So that what a killed generator left is never taken for the whole."""
    write_starter(STARTERS[name], tmp_path)
    source = (tmp_path / "data" / "generate.py").read_text()
    assert re.findall(r'write\(out / "(\w+\.jsonl)"', source)[-1] == "sft.jsonl"


def test_a_command_runs_in_the_folder_and_its_status_comes_back(tmp_path):
    (tmp_path / "say.py").write_text("from pathlib import Path\nPath('here').write_text('')\nraise SystemExit(3)\n")
    assert run_in(tmp_path, "python say.py") == 3
    assert (tmp_path / "here").is_file()


def test_an_unknown_name_is_answered_by_the_known_ones():
    with pytest.raises(ValueError, match="no starter 'toys', only math, rlhf, pairs, tools"):
        find_starter("toys")
    with pytest.raises(ValueError, match="did you mean 'math'"):
        find_starter("maths")
