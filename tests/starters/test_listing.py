"""The recipes that come with llmrl, as a user without the repository gets them."""

import re
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from llmrl.settings import owner
from llmrl.starters.listing import RECIPES, SHIPPED, list_recipes, read_recipe_text
from llmrl.wiring.runs import RUNS

ROOT = Path(__file__).parents[2]
TRAINING = [recipe for recipe in list_recipes() if "/" not in recipe.name]
REPOSITORY = re.compile(r"(?<![\w/])(?:recipes|reward_models)/|\bpython data/|\bllmrl [\w-]+ recipes/")
"""A path that only a clone of the repository has."""


def test_every_recipe_of_the_repository_is_listed_once():
    names = [recipe.name for recipe in list_recipes()]
    files = {str(path.relative_to(ROOT / "recipes")) for path in (ROOT / "recipes").rglob("*.yaml")}
    assert {f"{name}.yaml" for name in names} == files
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("recipe", TRAINING, ids=lambda recipe: recipe.name)
def test_the_command_is_the_one_whose_settings_the_recipe_has(recipe):
    verbs = {verb: kind.settings for verb, kind in RUNS.items()}
    assert f"llmrl {owner(verbs, RECIPES / f'{recipe.name}.yaml')}" == recipe.command


def test_a_launch_file_is_one_of_accelerate():
    [one] = [recipe for recipe in list_recipes() if recipe.name == "accelerate/cpu_one"]
    assert one.command == "accelerate launch"
    assert one.summary == "One process on the CPU: the same as without a launcher."


def test_a_summary_is_the_first_sentence_over_all_its_lines():
    [hh] = [recipe for recipe in TRAINING if recipe.name == "hh_smollm2_reward_model"]
    assert hh.summary.startswith("A reward model of 135M")
    assert hh.summary.endswith("less harmful (HH-RLHF).")
    assert all(1 <= len(recipe.summary) < 160 for recipe in list_recipes())


@pytest.mark.parametrize("recipe", TRAINING, ids=lambda recipe: recipe.name)
def test_a_printed_recipe_names_nothing_of_the_repository(recipe):
    printed = yaml.safe_load(read_recipe_text(recipe.name))
    assert not REPOSITORY.search(yaml.safe_dump(printed).replace(str(SHIPPED), ""))
    assert printed.keys() == yaml.safe_load((RECIPES / f"{recipe.name}.yaml").read_text()).keys()


@pytest.mark.parametrize("recipe", TRAINING, ids=lambda recipe: recipe.name)
def test_every_module_and_model_that_a_printed_recipe_names_is_there(recipe):
    text = read_recipe_text(recipe.name)
    for module, name in re.findall(r"\b(llmrl\.starters(?:\.\w+)+):(\w+)", text):
        assert callable(getattr(import_module(module), name))
    for module in re.findall(r"-m (llmrl\.starters(?:\.\w+)+)", text):
        assert import_module(module).main
    for model in re.findall(rf"{SHIPPED}/recipes/models/\w+", text):
        assert Path(model, "tokenizer.json").is_file()


def test_what_is_rewritten_by_hand():
    text = read_recipe_text("hh_smollm2_ppo")
    assert "  data/hh/prompts.jsonl: python -m llmrl.starters.data.hh.prompts --out data/hh\n" in text
    name = "hh_smollm2_reward_model"
    made = f"llmrl recipes {name} > {name}.yaml && llmrl reward-model {name}.yaml"
    assert f"  runs/hh_smollm2_reward_model/final: {made}\n" in text
    assert "    - name: llmrl.starters.reward_models.gsm8k:correct\n" in read_recipe_text("gsm8k_smollm2_grpo")
    assert f"  path: {SHIPPED}/recipes/models/tiny_char_llama\n" in read_recipe_text("digits_tiny_grpo")


def test_an_unknown_name():
    with pytest.raises(
        ValueError, match="no recipe 'quickstart_gpro' comes with llmrl; did you mean 'quickstart_grpo'"
    ):
        read_recipe_text("quickstart_gpro")
    with pytest.raises(ValueError, match="`llmrl recipes` lists them"):
        read_recipe_text("../../pyproject")
