"""Makes the arithmetic data: sums of two numbers, with demonstrations that often forget to carry the one.

    python data/arithmetic/generate.py [--out data/arithmetic]

The same files every time. README.md beside this file says what they are for.
"""

import argparse
import json
import random
from pathlib import Path

SEED = 20260101
NUM_TEST = 400
NUM_DEMONSTRATIONS = 20_000
CARRY_SHARE = 2 / 3  # of the problems; carrying is what there is to learn
MISTAKE_SHARE = 0.65  # of the demonstrations that should carry

Problem = tuple[int, int]


def needs_carry(problem: Problem) -> bool:
    """Whether the units add up to ten or more."""
    a, b = problem
    return a % 10 + b % 10 >= 10


def without_carry(problem: Problem) -> int:
    """The sum of somebody who forgets the one that the units carry: 47+85 is 122."""
    a, b = problem
    return (a // 10 + b // 10) * 10 + (a + b) % 10


def draw_problems(rng: random.Random) -> list[Problem]:
    """Distinct problems with two digits to a number, shuffled: every one that carries, and half as many that do not."""
    problems = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    rng.shuffle(problems)
    carrying = [problem for problem in problems if needs_carry(problem)]
    plain = [problem for problem in problems if not needs_carry(problem)]
    num_plain = round(len(carrying) * (1 - CARRY_SHARE) / CARRY_SHARE)
    chosen = carrying + plain[:num_plain]
    rng.shuffle(chosen)
    return chosen


def row(problem: Problem) -> dict[str, str]:
    a, b = problem
    return {"prompt": f"{a}+{b}=", "answer": str(a + b)}


def demonstration(problem: Problem, rng: random.Random) -> dict[str, str]:
    """A row with a response to imitate: wrong in most of the problems that carry, right in all others."""
    mistaken = needs_carry(problem) and rng.random() < MISTAKE_SHARE
    response = without_carry(problem) if mistaken else sum(problem)
    return {**row(problem), "response": str(response)}


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{path}: {len(rows)} rows")


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the arithmetic data.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)

    rng = random.Random(SEED)
    problems = draw_problems(rng)
    test, train = problems[:NUM_TEST], problems[NUM_TEST:]
    write(out / "test.jsonl", [row(problem) for problem in test])
    write(out / "train.jsonl", [row(problem) for problem in train])
    write(out / "sft.jsonl", [demonstration(train[n % len(train)], rng) for n in range(NUM_DEMONSTRATIONS)])


if __name__ == "__main__":
    main()
