"""Games and demonstrations of the guessing game, and the environment that plays it."""

from collections import Counter
from pathlib import Path
from random import Random

import pytest

from llmrl.environments.environment import Message, Turn
from llmrl.user_code import load_object

from .scripts import read_rows, run_script

ROOT = Path(__file__).parents[2]
OPENING = "Which number from 1 to 15?"
Guess = load_object(f"{ROOT}/recipes/environments/guess.py:Guess", role="environment")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_script("data/guessing/generate.py", tmp_path_factory.mktemp("guessing"))


def play(secret: int, guesses: list[str]) -> list[Turn]:
    environment = Guess()
    assert environment.start({"secret": secret}) == OPENING
    return [environment.respond(Message(text, number, [])) for number, text in enumerate(guesses, start=1)]


def test_the_same_files_every_time(folder: Path, tmp_path: Path):
    again = run_script("data/guessing/generate.py", tmp_path)
    for name in ("sft.jsonl", "train.jsonl", "test.jsonl"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_every_number_is_in_as_many_games(folder: Path):
    for name, times in (("train.jsonl", 1), ("test.jsonl", 16)):
        numbers = Counter(row["secret"] for row in read_rows(folder / name))
        assert numbers == dict.fromkeys(range(1, 16), times)


def test_a_demonstration_is_a_conversation_as_the_environment_leads_it(folder: Path):
    """The answers before a guess are those of one number, and at most four."""
    for row in read_rows(folder / "sft.jsonl"):
        asked, *rest = row["prompt"]
        assert asked == {"role": "user", "content": OPENING}
        guesses = [int(message["content"]) for message in rest[::2]]
        answers = [message["content"] for message in rest[1::2]]
        assert len(guesses) == len(answers) <= 3
        assert 1 <= int(row["response"]) <= 15
        left = [n for n in range(1, 16) if n not in guesses]
        assert any(answers == ["higher" if each < n else "lower" for each in guesses] for n in left)


def test_two_guesses_in_five_forget_the_answers(folder: Path):
    """After "higher" to g only a forgetful guess is g or less: 0.4 of the guesses forget, and g / 15 of these are."""
    kinds, expected = Counter(), 0.0
    for row in read_rows(folder / "sft.jsonl"):
        if len(row["prompt"]) == 3 and row["prompt"][2]["content"] == "higher":
            guess = int(row["prompt"][1]["content"])
            kinds[int(row["response"]) <= guess] += 1
            expected += 0.4 * guess / 15
    assert kinds[True] == pytest.approx(expected, rel=0.1)


def test_what_a_guess_is_answered():
    assert play(10, ["8", " 12", "10"]) == [
        Turn("higher", reward=-0.02),
        Turn("lower", reward=-0.02),
        Turn(done=True, reward=1.0),
    ]
    assert play(10, ["", "ten", "10!", "1010"]) == [Turn("a number", reward=-0.2)] * 4


def test_a_guess_that_forgets_an_answer_costs_more():
    guesses = ["8", "8", "12", "3", "15", "9"]
    assert [turn.reward for turn in play(10, guesses)] == [-0.02, -0.2, -0.02, -0.2, -0.2, -0.02]


def test_four_guesses_that_halve_find_every_number_and_three_do_not():
    found = Counter(secret_found_after(secret) for secret in range(1, 16))
    assert found == {1: 1, 2: 2, 3: 4, 4: 8}


def secret_found_after(secret: int) -> int:
    """Number of guesses of binary search, by the environment's answers alone."""
    environment, low, high = Guess(), 1, 15
    environment.random = Random(0)
    environment.start({"secret": secret})
    for turn in range(1, 5):
        guess = (low + high) // 2
        answer = environment.respond(Message(str(guess), turn, []))
        if answer.done:
            return turn
        low, high = (guess + 1, high) if answer.observation == "higher" else (low, guess - 1)
    raise AssertionError("binary search fails")
