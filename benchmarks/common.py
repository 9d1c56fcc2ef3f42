"""What every comparison of two programs on one machine does: turns of fresh processes, peak memory, the record."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
MIB = 2**20

Samples = dict[str, list[dict[str, Any]]]
"""What each side measured, turn by turn."""


def take_turns(sides: Sequence[str], columns: Sequence[str], *, turns: int) -> Samples:
    """Measures each side this many times, each time in a process of its own."""
    samples: Samples = {side: [] for side in sides}
    for turn in range(turns):
        for side in sides:
            sample = run_worker(side)
            samples[side].append(sample)
            print(f"turn {turn + 1}  {side:8s}  " + "  ".join(f"{name} {sample[name]:.1f}" for name in columns))
    return samples


def run_worker(side: str) -> dict[str, Any]:
    """The JSON that this program prints last when it is started again as the worker of one side."""
    command = [sys.executable, *sys.argv, "--worker", side]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def compare(samples: Samples, columns: Sequence[str]) -> dict[str, Any]:
    """Prints and returns the summary of both sides, and the first over the second."""
    summary = {side: summarize(of_side, columns) for side, of_side in samples.items()}
    first, second = summary
    ratios = {name: summary[first][f"{name}_median"] / summary[second][f"{name}_median"] for name in columns}
    for side, numbers in summary.items():
        print(f"{side:8s}  " + "  ".join(f"{name} {number:.1f}" for name, number in numbers.items()))
    print(f"{first} over {second}, of the medians: " + "  ".join(f"{name} x {x:.2f}" for name, x in ratios.items()))
    return {"summary": summary, "ratios": ratios}


def summarize(samples: Sequence[dict[str, Any]], columns: Sequence[str]) -> dict[str, float]:
    summary = {}
    for name in columns:
        values = [sample[name] for sample in samples]
        summary |= {f"{name}_median": statistics.median(values), f"{name}_min": min(values)}
    return summary


def reset_memory(device: str) -> int:
    """Forgets the peak so far. Returns the bytes in use."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")
    return memory(device)[0]


def memory(device: str) -> tuple[int, int]:
    """Bytes in use, and the most that were since `reset_memory`."""
    if device.startswith("cuda"):
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    in_use, peak = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return in_use, peak


def store(benchmark: str, args: argparse.Namespace, results: dict[str, Any], *, packages: Sequence[str]) -> None:
    """Writes what was measured, on which machine and with which versions, to the results folder."""
    settings = {
        name: value.name if isinstance(value, Path) else value
        for name, value in vars(args).items()
        if name not in ("model", "worker", "output")
    }
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    versions = {name: version(name) for name in packages} | {"python": platform.python_version()}
    record = {"model": args.model.name, "settings": settings, "machine": machine, "versions": versions} | results
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{benchmark}_{args.model.name}_{args.dtype}_{args.device.partition(':')[0]}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(f"written to {path}")
