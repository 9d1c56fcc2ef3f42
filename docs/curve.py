"""Draws the learning curve of a run: `python docs/curve.py runs/mine/metrics.jsonl curve.svg`. Needs matplotlib."""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot
from matplotlib.axes import Axes

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "llmrl"  # the same file every time

Rows = list[dict[str, Any]]


def column(rows: Rows, name: str) -> tuple[list[int], list[float]]:
    """Iterations and values of a metric, where it was logged."""
    known = [(row["iteration"], row[name]) for row in rows if row.get(name) is not None]
    return [iteration for iteration, _ in known], [value for _, value in known]


def draw_accuracy(axes: Axes, rows: Rows) -> None:
    """The share of right responses in training, and on held-out prompts with its 95 % interval."""
    axes.plot(*column(rows, "score/correct"), color="tab:gray", linewidth=0.8, label="training, sampled")
    iterations, accuracy = column(rows, "eval/accuracy")
    low, high = (column(rows, f"eval/accuracy_{side}")[1] for side in ("low", "high"))
    axes.fill_between(iterations, low, high, color="tab:blue", alpha=0.25, linewidth=0)
    axes.plot(iterations, accuracy, color="tab:blue", marker="o", markersize=3, label="held out, greedy, 95 %")
    axes.set(xlabel="iteration", ylabel="accuracy", ylim=(0, None))
    axes.legend(frameon=False)


def draw_length(axes: Axes, rows: Rows) -> None:
    """Tokens of a response and the entropy of a token."""
    axes.plot(*column(rows, "response/length"), color="tab:green")
    axes.set(xlabel="iteration", ylim=(0, None))
    axes.set_ylabel("tokens of a response", color="tab:green")
    entropy = axes.twinx()
    entropy.plot(*column(rows, "policy/entropy"), color="tab:red")
    entropy.set_ylim(0, None)
    entropy.set_ylabel("entropy, nats per token", color="tab:red")


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws the learning curve of a run.")
    parser.add_argument("metrics", type=Path, help="metrics.jsonl of a run with `score/correct` and evaluations")
    parser.add_argument("out", type=Path, help="picture to write, .svg")
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.metrics.read_text().splitlines()]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3), layout="constrained")
    draw_accuracy(left, rows)
    draw_length(right, rows)
    figure.savefig(arguments.out, metadata={"Date": None})


if __name__ == "__main__":
    main()
