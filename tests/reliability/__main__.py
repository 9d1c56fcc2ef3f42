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
    for kind in asked.kinds:
        if kind not in KINDS:
            parser.error(f"{kind} is none of {', '.join(KINDS)}")
    wrong = 0
    for kind in asked.kinds or KINDS:
        trials, whole = KINDS[kind]
        started, done = time.monotonic(), 0
        with tempfile.TemporaryDirectory(prefix="reliability") as work:
            for number, trial in enumerate(trials(asked.seed, asked.trials or whole, Path(work))):
                done += 1
                wrong += trial["wrong"] is not None
                line = {"kind": kind, "seed": asked.seed, "trial": number, **trial}
                if asked.table is not None:
                    with asked.table.open("a") as table:
                        table.write(json.dumps(line) + "\n")
                if trial["wrong"] is not None:
                    print(f"WRONG {json.dumps(line)}", flush=True)
        print(f"{kind}: {done} trials in {time.monotonic() - started:.0f} s, wrong in all so far: {wrong}", flush=True)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
