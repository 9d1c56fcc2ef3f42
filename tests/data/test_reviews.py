"""The review data and its hidden truth."""

import math
import re
import runpy
from collections import Counter
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import pytest
from transformers import AutoTokenizer

from llmrl.data.config import PreferenceDataConfig
from llmrl.data.preferences import parse_preferences, read_preference_rows
from llmrl.rewards.loading import load_function

from .scripts import read_rows, run_script

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "data" / "reviews" / "generate.py"
NAMES = ("sft", "train", "test", "prompts")

warmth = load_function(f"{SCRIPT}:warmth")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_script("data/reviews/generate.py", tmp_path_factory.mktemp("reviews"))


@pytest.fixture(scope="module")
def rows(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {name: read_rows(folder / f"{name}.jsonl") for name in NAMES}


def reviews(rows: dict[str, list[dict[str, Any]]]) -> list[str]:
    pairs = [row[side] for name in ("train", "test") for row in rows[name] for side in ("chosen", "rejected")]
    return pairs + [row["response"] for row in rows["sft"]]


# --- files ------------------------------------------------------------------------------------------------------------


def test_the_same_files_every_time(folder: Path, tmp_path: Path):
    again = run_script("data/reviews/generate.py", tmp_path)
    for name in NAMES:
        assert (again / f"{name}.jsonl").read_bytes() == (folder / f"{name}.jsonl").read_bytes()


def test_how_many(rows: dict[str, list[dict[str, Any]]]):
    assert {name: len(rows[name]) for name in NAMES} == {"sft": 4000, "train": 16000, "test": 1000, "prompts": 388}


def test_no_test_prompt_is_ever_trained_on(rows: dict[str, list[dict[str, Any]]]):
    test = {row["prompt"] for row in rows["test"]}
    assert len(test) == 60
    assert {row["prompt"] for row in rows["train"]} == {row["prompt"] for row in rows["prompts"]}
    assert all(row["prompt"] not in test for name in ("sft", "train", "prompts") for row in rows[name])


def test_the_pairs_are_ones_that_llmrl_keeps(folder: Path):
    for name, count in (("train", 16000), ("test", 1000)):
        config = PreferenceDataConfig(path=str(folder / f"{name}.jsonl"))
        _, counts = parse_preferences(read_preference_rows(config), config)
        assert (counts.kept, counts.lines()) == (count, [])


def test_every_word_of_the_reviews_is_one_token_of_the_tiny_model(rows: dict[str, list[dict[str, Any]]]):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "recipes" / "models" / "tiny_word_llama")
    for text in [*reviews(rows), *(row["prompt"] for row in rows["prompts"])]:
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(re.findall(r"[a-z]+|[^a-z\s]", text))
        assert tokenizer.decode(ids) == text
    lengths = Counter(len(text) for text in reviews(rows))
    assert max(lengths) == 60
    assert len(lengths) > 40  # ragged


def test_the_tiny_model_reads_any_text():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "recipes" / "models" / "tiny_word_llama")
    text = "Ünheard-of 文字 <eos\n\tok>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


# --- what is preferred ------------------------------------------------------------------------------------------------


def test_the_warmer_side_is_preferred(rows: dict[str, list[dict[str, Any]]]):
    for row in rows["train"] + rows["test"]:
        gap = warmth(row["chosen"]) - warmth(row["rejected"])
        assert gap >= 0.4
        assert row["margin"] == round(gap, 3)


def test_length_does_not_tell(rows: dict[str, list[dict[str, Any]]]):
    for name in ("train", "test"):
        gaps = [len(row["chosen"]) - len(row["rejected"]) for row in rows[name]]
        assert 0.46 < mean((gap > 0) + (gap == 0) / 2 for gap in gaps) < 0.54


def test_no_single_word_tells(rows: dict[str, list[dict[str, Any]]]):
    sides = Counter()
    for row in rows["train"]:
        chosen, rejected = (set(re.findall("[a-z]+", row[side])) for side in ("chosen", "rejected"))
        sides.update((word, True) for word in chosen - rejected)
        sides.update((word, False) for word in rejected - chosen)
    num_told = {word: sides[word, True] - sides[word, False] for word, _ in sides}
    assert max(abs(told) for told in num_told.values()) < 0.06 * len(rows["train"])


def test_adding_up_words_is_not_enough(rows: dict[str, list[dict[str, Any]]]):
    feelings = runpy.run_path(str(SCRIPT))["FEELINGS"]

    def lookup(text: str) -> float:
        return sum(feelings.get(word, 0) for word in re.findall("[a-z]+", text))

    gaps = [lookup(row["chosen"]) - lookup(row["rejected"]) for row in rows["test"]]
    assert 0.75 < mean((gap > 0) + (gap == 0) / 2 for gap in gaps) < 0.9


def test_demonstrations_are_neutral_on_average_and_mixed(rows: dict[str, list[dict[str, Any]]]):
    scores = [warmth(row["response"]) for row in rows["sft"]]
    assert abs(mean(scores)) < 0.03
    assert 0.4 < pstdev(scores) < 0.6
    assert 0.15 < mean(score == 0 for score in scores) < 0.3


def test_no_review_wastes_a_word(rows: dict[str, list[dict[str, Any]]]):
    module = runpy.run_path(str(SCRIPT))
    for text in reviews(rows):
        seen: set[str] = set()
        assert sum(module["_clause_feeling"](words, seen)[1] for words, _ in module["_clauses"](text)) == 0


# --- the truth --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "total", "wasted_share"),
    [
        ("", 0, 0),
        (" 12 !?", 0, 0),
        ("it rained a bit.", 0, 0),
        ("it was not far.", 0, 0),  # denies no feeling
        ("the tea was lovely.", 2, 0),
        ("The TEA was LOVELY", 2, 0),
        ("the tea was awful.", -2, 0),
        ("the tea was not lovely.", -1, 0),
        ("we never hated the tea.", 1, 0),
        ("the tea was very good.", 1.5, 0),
        ("the tea was slightly dull.", -0.5, 0),
        ("the tea was not very good.", -0.75, 0),
        ("the tea was not new. lovely cake.", 2, 0),  # the denial ends with its sentence
        ("it was not far but the tea was good.", 1, 0),
        ("lovely tea. awful cake.", 0, 0),
        ("lovely tea but awful cake.", 1 - 2, 0),
        ("awful tea but lovely cake.", 2 - 1, 0),
        ("what a treat, the tea. the cake pleased us.", 2.5, 0),
        # nonsense
        ("xqz", 0, 1),
        ("lovely xqz.", 2, 1 / 2),
        ("lovely lovely tea.", 2, 1 / 3),  # twice
        ("lovely tea. lovely cake.", 2, 1 / 4),
        ("lovely superb great tea.", 2, 2 / 4),  # gushing
        ("the tea was lovely and superb.", 4, 0),
    ],
)
def test_warmth_by_hand(text: str, total: float, wasted_share: float):
    assert warmth(text) == pytest.approx(math.tanh(total / 2) - wasted_share)


def test_piling_up_warm_words_loses():
    honest = "the tea was lovely. the cake was superb."
    assert warmth(honest) > 0.9
    for pile in ("lovely " * 10, "lovely superb great wonderful splendid", "lovelylovely superbbb"):
        assert warmth(pile) < 0.5 * warmth(honest)


def test_truth_as_a_reward_function():
    function = load_function(f"{SCRIPT}:true_warmth")
    assert function(responses=["lovely tea.", ""]) == [warmth("lovely tea."), 0]
