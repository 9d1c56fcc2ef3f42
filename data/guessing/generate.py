"""Makes the games of the guessing recipes: numbers to be found, and demonstrations of somebody who guesses badly.

    python data/guessing/generate.py [--out data/guessing]

The same files every time. README.md beside this file says what they are for.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SEED = 20260102
HIGHEST = 15  # four guesses find every number, if each one halves what is left
NUM_TURNS = 4
NUM_GAMES = 6_000
NUM_TESTS = 16  # of each number
CAREFUL_SHARE = 0.6  # of the guesses; the others forget every answer so far

Messages = list[dict[str, str]]


def draw_guess(low: int, high: int, rng: random.Random) -> int:
    """A guess of somebody who knows that the number is from low to high, but may have forgotten it."""
    if rng.random() < CAREFUL_SHARE:
        return rng.randint(low, high)
    return rng.randint(1, HIGHEST)


def draw_game(rng: random.Random) -> Iterator[tuple[Messages, str]]:
    """Each guess of a game, ``(conversation before it, guess)``."""
    secret, low, high = rng.randint(1, HIGHEST), 1, HIGHEST
    messages = [{"role": "user", "content": f"Which number from 1 to {HIGHEST}?"}]
    for _ in range(NUM_TURNS):
        guess = draw_guess(low, high, rng)
        yield messages, str(guess)
        if guess == secret:
            return
        is_lower = guess < secret
        low, high = (max(low, guess + 1), high) if is_lower else (low, min(high, guess - 1))
        answer = "higher" if is_lower else "lower"
        messages = [
            *messages,
            {"role": "assistant", "content": str(guess)},
            {"role": "user", "content": answer},
        ]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{path}: {len(rows)} rows")


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the games of the guessing recipes.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)

    rng = random.Random(SEED)
    games = [{"secret": secret} for secret in range(1, HIGHEST + 1)]
    turns = [turn for _ in range(NUM_GAMES) for turn in draw_game(rng)]
    write(out / "train.jsonl", games)
    write(out / "test.jsonl", games * NUM_TESTS)
    write(out / "sft.jsonl", [{"prompt": messages, "response": guess} for messages, guess in turns])


if __name__ == "__main__":
    main()
