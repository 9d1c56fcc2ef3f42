"""Runs workloads by name, one after another, and writes the table of docs/figures.md from all results that are stored.

    python benchmarks/bench.py MODEL_DIR W1 W4 W9
    python benchmarks/bench.py MODEL_DIR W6 W7 --turns 5

W1 is a rollout, W9 a step of a reward model, W17 a step on two processes, the others are training steps, see
`workloads.py`; W10, W11 and W18 are lines of the table that follow from other workloads, which they stand for. learning
and learning-ppo compare the first losses and gradients with TRL's. Without names it runs the short set.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from workloads import DERIVED, WORKLOADS

HERE = Path(__file__).parent
SHORT = ("learning", "W1", "W4", "W9")
TURNS = 2


def main() -> None:
    args = parse()
    for name in expand(args.workloads or SHORT):
        print(f"--- {name}", flush=True)
        script, *arguments = command(name, args)
        subprocess.run([sys.executable, HERE / script, args.model, *arguments], check=True)
    if not args.keep_table:
        subprocess.run([sys.executable, HERE / "table.py"], check=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Benchmarks by name.")
    parser.add_argument("model", help="folder of a causal language model")
    parser.add_argument("workloads", nargs="*", help=f"of {', '.join(names())}; none for {', '.join(SHORT)}")
    parser.add_argument("--turns", type=int, default=TURNS, help="measurements of each side")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--keep-table", action="store_true", help="leaves the table of docs/figures.md as it is")
    args = parser.parse_args()
    if unknown := [name for name in args.workloads if name not in names()]:
        parser.error(f"unknown workloads {unknown}; known are {', '.join(names())}")
    return args


def names() -> list[str]:
    return ["learning", "learning-ppo", *sorted(["W1", "W9", "W17", *WORKLOADS, *DERIVED])]


def expand(names: Sequence[str]) -> list[str]:
    """What is measured for these names, each once."""
    return list(dict.fromkeys(measured for name in names for measured in DERIVED.get(name, (name,))))


def command(name: str, args: argparse.Namespace) -> list[str]:
    """Script and arguments that measure a workload."""
    dtype, turns = ["--dtype", args.dtype], ["--turns", str(args.turns)]
    if name == "learning":
        return ["learning.py", *dtype]
    if name == "learning-ppo":
        return ["learning.py", "--algorithm", "ppo", "--steps", "1", *dtype]
    if name == "W17":
        return ["data_parallel.py", *turns]
    if name == "W1":
        return ["rollout.py", "--record", name, *dtype, *turns]
    if name == "W9":
        return ["reward_model.py", "--record", name, "--batch-size", "8", "--steps", "3", *dtype, *turns]
    return ["steps.py", "--workload", name, *dtype, *turns]


if __name__ == "__main__":
    main()
