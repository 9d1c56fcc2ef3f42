"""python -m tests.reliability [KIND ...] [--trials N] [--seed S] [--table FILE]: plants faults, prints what came out.

The trials of a soak are its seconds.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.reliability import damage, folders, kills, signals, soak

KINDS: dict[str, tuple[Callable[[int, int, Path], Iterator[dict[str, Any]]], int]] = {
    "kills": (kills.trials, 200),
    "damage by function": (damage.by_function, 1000),
    "damage by command": (damage.by_command, 60),
    "folders": (folders.trials, 100),
    "signals": (signals.trials, 100),
    "soak": (soak.trials, 600),
}
"""Trials of each kind of fault, and how many a whole run makes."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.reliability", description=__doc__)
    parser.add_argument("kinds", nargs="*", help="kinds of faults; all where none is named")
    parser.add_argument("--trials", type=int, help="trials of each kind, in place of the numbers of a whole run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", type=Path, help="file that gets a line for each trial")
    asked = parser.parse_args()
    if unknown := set(asked.kinds) - KINDS.keys():
        parser.error(f"{', '.join(unknown)}: choose of {', '.join(KINDS)}")
    if asked.table is not None:
        asked.table.parent.mkdir(parents=True, exist_ok=True)
    wrong = sum(plant(kind, asked.trials, asked.seed, asked.table) for kind in asked.kinds or KINDS)
    sys.exit(1 if wrong else 0)


def plant(kind: str, num: int | None, seed: int, table: Path | None) -> int:
    """Plants faults of a kind, with a line in the table for each. Returns how many came out wrong."""
    trials, whole = KINDS[kind]
    started, lines = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="reliability") as work:
        for number, trial in enumerate(trials(seed, num or whole, Path(work))):
            lines.append({"kind": kind, "seed": seed, "trial": number, **trial})
            if table is not None:
                with table.open("a") as file:
                    file.write(json.dumps(lines[-1]) + "\n")
            if trial["wrong"] is not None:
                print(f"WRONG {json.dumps(lines[-1])}", flush=True)
    wrong = sum(line["wrong"] is not None for line in lines)
    print(f"{kind}: {len(lines)} trials in {time.monotonic() - started:.0f} s, {wrong} wrong", flush=True)
    return wrong


if __name__ == "__main__":
    main()
