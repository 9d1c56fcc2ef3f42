"""The word problems: the same files every time, right answers, and no story both trained on and held out."""

import re
import runpy
from pathlib import Path

import pytest

from llmrl.rewards.rules import gsm8k_answer

from .scripts import read_rows, run_script

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "data" / "word_problems" / "generate.py"
NAMES = "|".join(runpy.run_path(str(SCRIPT))["NAMES"])


def story(question: str) -> str:
    return re.sub(rf"\b({NAMES}|\d+)\b", "_", question)


def numbers(question: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", question)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_script("data/word_problems/generate.py", tmp_path_factory.mktemp("word_problems"))


def test_the_same_files_every_time(folder: Path, tmp_path: Path):
    again = run_script("data/word_problems/generate.py", tmp_path)
    for name in ("train.jsonl", "test.jsonl"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_no_held_out_story_is_trained_on(folder: Path):
    train, test = ([row["question"] for row in read_rows(folder / name)] for name in ("train.jsonl", "test.jsonl"))
    assert (len(set(train)), len(set(test))) == (len(train), len(test)) == (2400, 400)
    told, held_out = ({story(question) for question in questions} for questions in (train, test))
    assert (len(told), len(held_out)) == (24, 8)
    assert told.isdisjoint(held_out)


WORKED = {
    "_ picked _ tomatoes": lambda a, b: a + b,
    "A shop had _ lamps": lambda a, b: a - b,
    "Each of _ shelves": lambda a, b: a * b,
    "A teacher deals _ cards": lambda total, pupils: total / pupils,
    "_ wrote _ letters": lambda a, b, c: a + b + c,
    "A hotel has _ floors": lambda floors, rooms, empty: floors * rooms - empty,
    "_ had _ dollars": lambda had, earned, paid: had + earned - paid,
    "_ orders _ plates": lambda plates, price, sending: plates * price + sending,
    "_ has _ apples": lambda a, b: a + b,
    "A tank holds _ liters": lambda liters, rate, minutes: liters + rate * minutes,
    "_ cookies are shared": lambda total, children: total / children,
    "_ walks _ km": lambda km: km + 2 * km,
}


def test_answers_follow_from_the_numbers_in_the_question(folder: Path):
    checked = set()
    for row in [*read_rows(folder / "test.jsonl"), *read_rows(folder / "train.jsonl")]:
        for opening, solve in WORKED.items():
            if story(row["question"]).startswith(opening):
                assert float(row["answer"]) == solve(*numbers(row["question"])) > 0, row
                checked.add(opening)
        assert str(int(row["answer"])) == row["answer"]
    assert checked == set(WORKED)


def test_the_reward_reads_the_answers(folder: Path):
    answers = [row["answer"] for row in read_rows(folder / "test.jsonl")]
    assert gsm8k_answer([f"It is {answer}.\n#### {answer}" for answer in answers], answers) == [1.0] * len(answers)
    assert gsm8k_answer([f"#### {int(answer) + 1}" for answer in answers], answers) == [0.0] * len(answers)
