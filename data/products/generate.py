"""Makes the products data: problems too hard to do in the head, and demonstrations that use a calculator now and then.

    python data/products/generate.py [--out data/products]

The same files every time. README.md beside this file says what they are for.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SEED = 20260103
NUM_TEST = 400
NUM_TRAIN = 8_000
TOOL = "calculate(expression)"  # as the chat template lists it
TOOL_SHARE = 0.8  # of the demonstrations that have the calculator
CALL_SHARE = 0.5  # of these; the others have it and answer from the head

Problem = tuple[int, int]
Row = dict[str, Any]


def draw_problems(num_problems: int, rng: random.Random) -> list[Problem]:
    """Distinct problems, two numbers of two or three digits each."""
    problems = dict.fromkeys((rng.randint(11, 999), rng.randint(11, 999)) for _ in range(2 * num_problems))
    return list(problems)[:num_problems]


def row(problem: Problem) -> Row:
    a, b = problem
    return {"prompt": f"{a}*{b}=", "answer": str(a * b)}


def demonstrations(problem: Problem, rng: random.Random) -> Iterator[Row]:
    """Turns to imitate: the answer, or a call of the calculator and the answer after its result."""
    a, b = problem
    asked = [{"role": "user", "content": f"{a}*{b}="}]
    if rng.random() < TOOL_SHARE:
        asked = [{"role": "system", "content": TOOL}, *asked]
        if rng.random() < CALL_SHARE:
            call = json.dumps({"name": "calculate", "arguments": {"expression": f"{a}*{b}"}})
            message = f"<tool_call>{call}</tool_call>"
            yield {"prompt": asked, "response": message}
            asked = [*asked, {"role": "assistant", "content": message}, {"role": "tool", "content": str(a * b)}]
    yield {"prompt": asked, "response": str(a * b)}


def write(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{path}: {len(rows)} rows")


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the products data.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)

    rng = random.Random(SEED)
    problems = draw_problems(NUM_TEST + NUM_TRAIN, rng)
    test, train = problems[:NUM_TEST], problems[NUM_TEST:]
    write(out / "test.jsonl", [row(problem) for problem in test])
    write(out / "train.jsonl", [row(problem) for problem in train])
    write(out / "sft.jsonl", [turn for problem in train for turn in demonstrations(problem, rng)])


if __name__ == "__main__":
    main()
