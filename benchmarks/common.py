"""What every comparison of programs on one machine does: turns of fresh processes, clocks, peak memory, the record."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
MIB = 2**20

ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31), "MALLOC_TOP_PAD_": str(2**28)}
"""Environment in which glibc keeps the memory that it has: mapping it anew costs more than much of the arithmetic."""

Samples = dict[str, list[dict[str, Any]]]
"""What each side measured, turn by turn."""


def take_turns(
    sides: Sequence[str],
    columns: Sequence[str],
    *,
    turns: int,
    arguments: Sequence[str] = (),
    as_shipped: Sequence[str] = (),
    launchers: Mapping[str, Sequence[str]] | None = None,
) -> Samples:
    """Measures each side this many times, each time in a process of its own.

    Args:
        sides: Names that the program takes as --worker.
        columns: Numbers to print of each.
        turns: Times that each is measured.
        arguments: Further arguments of the workers.
        as_shipped: Sides without the settings of `ALLOCATOR`.
        launchers: Arguments of Python before the program, by side, for those that a module launches.
    """
    samples: Samples = {side: [] for side in sides}
    for turn in range(turns):
        for side in sides:
            environment = os.environ | ({} if side in as_shipped else ALLOCATOR)
            launcher = (launchers or {}).get(side, ())
            sample = run_worker(["--worker", side, *arguments], environment, launcher)
            samples[side].append(sample)
            numbers = "  ".join(f"{name} {sample[name]:.2f}" for name in columns if name in sample)
            print(f"turn {turn + 1}  {side:9s}  {numbers}", flush=True)
    return samples


def run_worker(
    arguments: Sequence[str], environment: Mapping[str, str], launcher: Sequence[str] = ()
) -> dict[str, Any]:
    """The JSON that this program prints last when it is started again with further arguments."""
    command = [sys.executable, *launcher, *sys.argv, *arguments]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(samples: Samples, columns: Sequence[str]) -> dict[str, Any]:
    """Prints and returns the summary of all sides, and the first over each of the others."""
    summary = {side: summarize(of_side, columns) for side, of_side in samples.items()}
    for side, numbers in summary.items():
        print(f"{side:9s}  " + "  ".join(f"{name} {number:.2f}" for name, number in numbers.items()))
    first, *others = summary
    ratios = {other: _ratios(summary[first], summary[other]) for other in others}
    for other, of_other in ratios.items():
        numbers = "  ".join(f"{name} x {ratio:.2f}" for name, ratio in of_other.items())
        print(f"{first} over {other}, of the medians: {numbers}")
    return {"summary": summary, "ratios": ratios}


def largest(numbers: Iterable[float]) -> float:
    """The largest number; NaN where one is NaN, unlike `max`, which passes over it."""
    return torch.tensor([float(number) for number in numbers], dtype=torch.float64).max().item()


def summarize(samples: Sequence[dict[str, Any]], columns: Sequence[str]) -> dict[str, float]:
    summary = {}
    for name in columns:
        values = [sample[name] for sample in samples]
        summary |= {f"{name}_median": statistics.median(values), f"{name}_min": min(values)}
    return summary


def _ratios(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    medians = [name for name in first if name.endswith("_median")]
    return {name.removesuffix("_median"): first[name] / second[name] for name in medians if second[name]}


class Clock:
    """Wall seconds, CPU seconds and phases of optimizer steps, and the share of a core that other processes took."""

    def __init__(self, device: str, cpu_seconds: Callable[[], float] = time.process_time) -> None:
        self.device = device
        self.cpu_seconds = cpu_seconds
        """CPU seconds so far of all that is measured."""
        self.phases: dict[str, float] = defaultdict(float)
        """Seconds of each phase of the step under way."""
        self.ends: list[tuple[float, float, float]] = []
        """Wall, own CPU and the machine's CPU seconds at the end of each step."""
        self.steps: list[dict[str, float]] = []
        """Seconds of each phase of the steps that are done."""

    def now(self) -> float:
        """Seconds, once a GPU has done what is queued."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its seconds counted for this phase."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = self.now()
            result = function(*args, **kwargs)
            self.phases[phase] += self.now() - started
            return result

        return timed

    def step_ended(self) -> None:
        self.ends.append((self.now(), self.cpu_seconds(), machine_cpu_seconds()))
        self.steps.append(dict(self.phases))
        self.phases.clear()

    def figures(self, *, after: int) -> dict[str, Any]:
        """Seconds of the steps after the first `after`, and of their phases."""
        wall, cpu, machine = zip(*self.ends[after - 1 :], strict=True)
        seconds = [end - start for start, end in pairwise(wall)]
        elapsed, own = wall[-1] - wall[0], cpu[-1] - cpu[0]
        steps = self.steps[after:]
        phases = {f"{name}_s": statistics.median(step[name] for step in steps) for name in steps[0]}
        return {
            "step_s": statistics.median(seconds),
            "steps_s": seconds,
            **phases,
            "elapsed_s": elapsed,
            "step_cpu_s": own / len(seconds),
            "others_cpu_percent": max(0.0, 100 * (machine[-1] - machine[0] - own) / elapsed),
        }


def machine_cpu_seconds() -> float:
    """Seconds that all CPUs together have been busy, or kept away by the host, since the machine was started."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


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


def store(
    benchmark: str,
    args: argparse.Namespace,
    results: Mapping[str, Any],
    *,
    packages: Sequence[str],
    versions: Mapping[str, str] | None = None,
) -> None:
    """Writes what was measured, on which machine and with which versions, to the results folder.

    Args:
        benchmark: First part of the file's name.
        args: Settings; those named model, worker, folder, output and record are no settings.
        results: Whatever JSON can hold.
        packages: Installed packages whose versions are noted.
        versions: Versions of packages that are not installed beside llmrl.
    """
    settings = {
        name: value.name if isinstance(value, Path) else value
        for name, value in vars(args).items()
        if name not in ("model", "worker", "folder", "output", "record")
    }
    machine = {"processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if args.device.startswith("cuda"):
        machine["gpu"] = torch.cuda.get_device_name(args.device)
    known = {name: version(name) for name in packages} | dict(versions or {}) | {"python": platform.python_version()}
    record = {"model": args.model.name, "settings": settings, "machine": machine, "versions": known, **results}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{benchmark}_{args.model.name}_{args.dtype}_{args.device.partition(':')[0]}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(f"written to {path}")


def processor() -> str:
    """Name of the processor, and whether it multiplies matrices by AMX."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    name = fields.get("model name", platform.machine())
    return f"{name}, AMX" if "amx_tile" in fields.get("flags", "") else name
