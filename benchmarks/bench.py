"""Runs workloads by name, one after another, and writes the README's table from all results that are stored.

    python benchmarks/bench.py MODEL_DIR W1 W4 W9
    python benchmarks/bench.py MODEL_DIR W6 W7 --turns 5

W1 is a rollout, W9 a step of a reward model, the others are training steps, see `workloads.py`; learning compares the
first losses and gradients with TRL's. Without names it runs the short set.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from workloads import WORKLOADS

HERE = Path(__file__).parent
SHORT = ("learning", "W1", "W4", "W9")
TURNS = 2


def main() -> None:
    args = parse()
    for name in args.workloads or SHORT:
        print(f"--- {name}", flush=True)
        script, *arguments = command(name, args)
        subprocess.run([sys.executable, HERE / script, *arguments, "--dtype", args.dtype], check=True)
    if not args.keep_table:
        subprocess.run([sys.executable, HERE / "table.py"], check=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Benchmarks by name.")
    parser.add_argument("model", help="folder of a causal language model")
    parser.add_argument("workloads", nargs="*", help=f"of {', '.join(names())}; none for {', '.join(SHORT)}")
    parser.add_argument("--turns", type=int, default=TURNS, help="measurements of each side")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--keep-table", action="store_true", help="leaves the README's table as it is")
    args = parser.parse_args()
    if unknown := [name for name in args.workloads if name not in names()]:
        parser.error(f"unknown workloads {unknown}; known are {', '.join(names())}")
    return args


def names() -> list[str]:
    return ["learning", *sorted(["W1", "W9", *WORKLOADS])]


def command(name: str, args: argparse.Namespace) -> list[str]:
    """Script and arguments that measure a workload."""
    turns = ["--turns", str(args.turns)]
    if name == "learning":
        return ["learning.py", args.model]
    if name == "W1":
        return ["rollout.py", args.model, "--record", name, *turns]
    if name == "W9":
        return ["reward_model.py", args.model, "--record", name, "--batch-size", "8", "--steps", "3", *turns]
    return ["steps.py", name, args.model, *turns]


if __name__ == "__main__":
    main()
