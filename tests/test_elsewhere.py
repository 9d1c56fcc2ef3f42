"""Names of other frameworks: what a refusal says of one, that it exists, and that the page has the same."""

import re
from collections import defaultdict
from pathlib import Path

import pytest

from llmrl.elsewhere import EVERY_RUN, GRPO, PPO, REWARD_MODEL, RL, SFT
from llmrl.settings import SettingError, describe, read_recipe
from llmrl.wiring.runs import RUNS
from tests.docs.pages import ROOT

TABLES = (EVERY_RUN, SFT, REWARD_MODEL, RL, GRPO, PPO)
PAGE = (ROOT / "docs" / "trl.md").read_text().partition("## Every run")[2]


def settings_in(text: str) -> set[str]:
    """Dotted names, those of functions and commands left out."""
    return set(re.findall(r"\b[a-z_]+(?:\.[a-z_<>]+)+", text))


def rows_of_page() -> dict[str, set[str]]:
    """The settings beside each name in the tables of the page."""
    rows = defaultdict(set)
    for line in PAGE.partition("## Metrics")[0].splitlines():
        match line.split("|"):
            case ["", names, here, *_]:
                for name in re.findall(r"`(?:[A-Z]\w+\.)?([a-z_]\w*\*?)[^`]*`", names):
                    rows[name] |= settings_in(here)
    return rows


@pytest.mark.parametrize("verb", RUNS)
def test_what_they_are_here_is_a_setting_of_that_run(verb: str):
    cls = RUNS[verb].settings
    known = {setting.path for setting in describe(cls)}
    assert {name for text in cls.elsewhere.values() for name in settings_in(text)} - known == set()


def test_the_page_has_the_same_names_and_settings():
    ours = defaultdict(set)
    for table in TABLES:
        for name, here in table.items():
            ours[name] |= settings_in(here)
    assert rows_of_page() == ours


def test_settings_and_names_of_a_row_are_found():
    assert settings_in("update.num_epochs, or `run.num_iterations`; reward.functions.<n>.weight (verl)") == {
        "update.num_epochs",
        "run.num_iterations",
        "reward.functions.<n>.weight",
    }
    assert rows_of_page()["beta"] == {"algorithm.kl_coef"}


@pytest.mark.parametrize(
    ("verb", "override", "said"),
    [
        ("grpo", "algorithm.beta=0.1", "what other frameworks call beta is algorithm.kl_coef; known here: "),
        (
            "grpo",
            "run.num_generations=8",
            "what other frameworks call num_generations is algorithm.group_size; did you mean run.num_iterations?",
        ),
        ("grpo", "algorithm.vllm_mode=x", "what other frameworks call vllm_mode is not needed: the engine samples"),
        ("sft", "run.max_steps=10", "what other frameworks call max_steps is run.num_iterations; "),
        ("reward-model", "run.max_steps=10", "what other frameworks call max_steps is reward_model.num_epochs; "),
        ("critic", "optimizer.bf16=true", "what other frameworks call bf16 is model.dtype; "),
    ],
)
def test_a_name_of_another_framework_is_refused_with_the_one_here(tmp_path: Path, verb: str, override: str, said: str):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{}")
    with pytest.raises(SettingError) as raised:
        read_recipe(RUNS[verb].settings, recipe, [override])
    name = override.partition("=")[0]
    assert str(raised.value).startswith(f"{recipe}:\n  {name} is not a setting; {said}")
