"""Makes word problems of one or two steps; the held-out ones tell stories that no training problem tells.

    python data/word_problems/generate.py [--out data/word_problems]

The same files every time. README.md beside this file says what they are for.
"""

import argparse
import json
import random
from pathlib import Path

SEED = 20261127
NUM_TRAIN = 2_400
NUM_TEST = 400
MOST = 12  # the largest number drawn

NAMES = ["Ana", "Ben", "Carla", "Dev", "Emma", "Finn", "Grace", "Hugo", "Ivy", "Jonas", "Kira", "Leo", "Mina", "Olga"]

SOLUTIONS = {
    "a + b": lambda a, b, c: a + b,
    "a - b": lambda a, b, c: a - b,
    "a * b": lambda a, b, c: a * b,
    "b": lambda a, b, c: b,
    "a + b + c": lambda a, b, c: a + b + c,
    "a + b - c": lambda a, b, c: a + b - c,
    "a * b + c": lambda a, b, c: a * b + c,
    "a - b + c": lambda a, b, c: a - b + c,
    "a * b - c": lambda a, b, c: a * b - c,
    "3 * a": lambda a, b, c: 3 * a,
    "4 * b": lambda a, b, c: 4 * b,
    "a - b - c": lambda a, b, c: a - b - c,
    "a + b * c": lambda a, b, c: a + b * c,
    "a": lambda a, b, c: a,
}
# Stories by their solution, with places for a name and the numbers; {ab} is a * b.
TRAIN = {
    "a + b": [
        "{name} has {a} apples and buys {b} more. How many apples does {name} have now?",
        "{name} is {a} years old. How old will {name} be in {b} years?",
    ],
    "a - b": [
        "{name} had {a} stickers and gave away {b}. How many stickers are left?",
        "A rope of {a} meters is cut by {b} meters. How long is what remains?",
        "{name} has {a} marbles, {b} more than a friend. How many has the friend?",
    ],
    "a * b": [
        "A box holds {a} pencils. How many pencils are in {b} boxes?",
        "{name} reads {a} pages a day. How many pages does {name} read in {b} days?",
        "{name} earns {a} dollars an hour. How much does {name} earn in {b} hours?",
        "{name} cuts {a} pizzas into {b} slices each. How many slices are there?",
        "A train makes {a} stops with {b} minutes each. How many minutes does it stand?",
    ],
    "b": [
        "{ab} cookies are shared equally among {a} children. How many does each child get?",
        "{name} bakes {ab} rolls and packs {a} into each bag. How many bags are filled?",
    ],
    "a + b + c": [
        "There are {a} red balls, {b} blue balls and {c} green balls. How many balls are there?",
    ],
    "a + b - c": [
        "{name} had {a} coins, found {b} more and spent {c}. How many coins are left?",
        "A class has {a} girls and {b} boys. {c} of the children are ill today. How many came?",
    ],
    "a * b + c": [
        "{name} buys {a} pens for {b} dollars each and a book for {c} dollars. How much is that?",
    ],
    "a - b + c": [
        "A bus has {a} passengers. {b} get off and {c} get on. How many are on it now?",
    ],
    "a * b - c": [
        "There are {a} rows of {b} chairs, and {c} chairs are taken. How many are free?",
        "{name} saves {a} dollars a week for {b} weeks, then spends {c}. How much is left?",
        "One ticket costs {a} dollars. {name} pays for {b} tickets with {c} dollars off. What is the price?",
    ],
    "3 * a": [
        "{name} walks {a} km on Monday and twice as far on Tuesday. How far is that in all?",
    ],
    "4 * b": [
        "A farmer has {a} hens and {b} cows. How many legs do the cows have?",
    ],
    "a - b - c": [
        "{a} birds sit on a tree. {b} fly away, and then {c} fly away. How many stay?",
    ],
    "a + b * c": [
        "A tank holds {a} liters and gets {b} liters each minute. How much is in it after {c} minutes?",
    ],
}
TEST = {
    "a + b": [
        "{name} picked {a} tomatoes and {b} peppers. How many vegetables is that?",
    ],
    "a - b": [
        "A shop had {a} lamps in stock and sold {b}. How many lamps are still there?",
    ],
    "a * b": [
        "Each of {a} shelves carries {b} jars. How many jars are there?",
    ],
    "a": [
        "A teacher deals {ab} cards to {b} pupils, the same number to each. How many cards has a pupil?",
    ],
    "a + b + c": [
        "{name} wrote {a} letters in May, {b} in June and {c} in July. How many letters were written?",
    ],
    "a * b - c": [
        "A hotel has {a} floors with {b} rooms each. {c} rooms are empty. How many are in use?",
    ],
    "a + b - c": [
        "{name} had {a} dollars, earned {b} by mowing and paid {c} for lunch. How much money is left?",
    ],
    "a * b + c": [
        "{name} orders {a} plates at {b} dollars apiece; sending them costs {c} dollars. What is the bill?",
    ],
}


def problem(solution: str, story: str, rng: random.Random) -> dict[str, str]:
    """A row with a question and its answer, a whole number above 0."""
    while True:
        a, b, c = (rng.randint(2, MOST) for _ in range(3))
        if (answer := SOLUTIONS[solution](a, b, c)) > 0:
            question = story.format(name=rng.choice(NAMES), a=a, b=b, c=c, ab=a * b)
            return {"question": question, "answer": str(answer)}


def distinct(stories: dict[str, list[str]], number: int, rng: random.Random) -> list[dict[str, str]]:
    """Problems of stories drawn at random; no question twice."""
    choices = [(solution, story) for solution, group in stories.items() for story in group]
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < number:
        row = problem(*rng.choice(choices), rng)
        rows[row["question"]] = row
    return list(rows.values())


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{path}: {len(rows)} rows")


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the word problems.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)

    rng = random.Random(SEED)
    write(out / "test.jsonl", distinct(TEST, NUM_TEST, rng))
    write(out / "train.jsonl", distinct(TRAIN, NUM_TRAIN, rng))


if __name__ == "__main__":
    main()
