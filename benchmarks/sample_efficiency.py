"""Sampled tokens until held-out accuracies are reached: any recipes of `llmrl grpo` and `llmrl ppo`, over seeds.

    python benchmarks/sample_efficiency.py grpo:recipes/quickstart_grpo.yaml ppo:recipes/quickstart_ppo.yaml

Each recipe is trained once per seed, by its own command in a process of its own, and evaluated after every iteration;
a run that is in the folder already is not repeated. The tokens that its rollouts sampled are counted up to the first
evaluation that reaches an accuracy. Printed are the mean over seeds and its 95 % interval, of Student's t, of those
that reached it, and how many did.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STUDENT = (math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Half-width of a 95 % interval of a mean in standard errors, by the number of seeds minus 1."""


def main() -> None:
    args = parse()
    runs = {recipe: [metrics_of(recipe, seed, args) for seed in range(args.seeds)] for recipe in args.recipes}
    tokens = {
        recipe: {accuracy: [tokens_until(accuracy, lines) for lines in seeds] for accuracy in args.accuracy}
        for recipe, seeds in runs.items()
    }
    for recipe, counts in tokens.items():
        for accuracy, of_seeds in counts.items():
            print(f"{recipe}  {accuracy}: {summary(of_seeds)}")
    if args.output is not None:
        record = {"describes": __doc__, "overrides": args.overrides, "tokens": tokens}
        args.output.write_text(json.dumps(record) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Sampled tokens to a fixed held-out accuracy, by recipe and seed.")
    parser.add_argument(
        "recipes", nargs="+", metavar="COMMAND:RECIPE", help="such as grpo:recipes/quickstart_grpo.yaml"
    )
    parser.add_argument("--accuracy", type=float, nargs="+", default=[0.9, 0.98])
    parser.add_argument("--seeds", type=int, choices=range(1, 1 + len(STUDENT)), default=5)
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/sample_efficiency"), help="of the runs; they are kept"
    )
    parser.add_argument(
        "--overrides", nargs="*", default=[], help="settings of all runs, such as run.num_iterations=20"
    )
    parser.add_argument("--output", type=Path, help="writes the record there")
    return parser.parse_args()


def metrics_of(recipe: str, seed: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl of a recipe's run with this seed."""
    command, _, path = recipe.partition(":")
    folder = args.folder / f"{Path(path).stem}_{seed}"
    settings = ["evaluation.every=1", *args.overrides, f"run.seed={seed}", f"run.output_dir={folder}"]
    subprocess.run([sys.executable, "-m", "llmrl", command, path, *settings], check=True, stdout=subprocess.DEVNULL)
    print(f"{recipe}  seed {seed} is trained", flush=True)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def tokens_until(accuracy: float, lines: Sequence[dict[str, Any]]) -> int | None:
    """Tokens sampled up to the first evaluation with this accuracy, by the lines of metrics.jsonl; None without one."""
    sampled = 0
    for line in lines:
        sampled += int(line.get("tokens/sampled", 0))
        if line.get("eval/accuracy", 0.0) >= accuracy:
            return sampled
    return None


def summary(counts: Sequence[int | None]) -> str:
    """Mean and 95 % interval of the runs that reached the accuracy."""
    reached = [count for count in counts if count is not None]
    share = f"{len(reached)} of {len(counts)} seeds reached it"
    if len(reached) < 2:
        return share + (f", after {reached[0]:,} tokens" if reached else "")
    mean = statistics.mean(reached)
    half = STUDENT[len(reached) - 1] * statistics.stdev(reached) / math.sqrt(len(reached))
    return f"{mean:,.0f} tokens [{mean - half:,.0f}, {mean + half:,.0f}]; {share}"


if __name__ == "__main__":
    main()
