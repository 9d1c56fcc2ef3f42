"""Time of a GRPO step on two processes beside one, with the same total work, on the same CPU.

    python benchmarks/data_parallel.py MODEL_DIR

Two processes, launched by accelerate and connected by gloo, have one thread each; the one process has one thread. So in
an ideal world they take half of its time. Weights, prompts, forced response lengths and settings are the same; the
metrics of the first step must be too, as far as sums in another order allow. They are compared in float32, where the
same weights give the same responses. After an optimizer step weights differ by rounding, and now and then a response.

Every measurement is a fresh launch that takes some steps to warm up and some for the record; the sides take turns. CPU
seconds are those of a process, on average; memory is that of all processes together.
"""

import argparse
import json
import os
import socket
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import MIB, Clock, Samples, compare, largest, memory, reset_memory, store, take_turns
from steps import check_same_work, prepare_folder, prepare_llmrl
from workloads import PARALLEL

from llmrl.distributed.collectives import join_ranks, leave_ranks
from llmrl.distributed.device import prepare_device
from llmrl.wiring.runs import RUNS

SIDES = ("two", "one")
COLUMNS = ("step_s", "step_cpu_s", "rollout_s", "scoring_s", "update_s", "peak_mib")
LAUNCH_FILE = Path(__file__).parents[1] / "recipes" / "accelerate" / "cpu_two_processes.yaml"
TOLERANCE = 1e-4
"""Most that a metric may differ by, relative to the larger of it and 0.01."""


def main() -> None:
    args = parse()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    if args.worker:
        measure_and_leave(args)
    load_before = os.getloadavg()
    options = (f"--config_file={LAUNCH_FILE}", f"--main_process_port={free_port()}")
    launchers = {"two": ("-m", "accelerate.commands.launch", *options)}
    with tempfile.TemporaryDirectory() as folder:
        prepare_folder(args, PARALLEL, Path(folder))
        arguments = ("--folder", folder)
        samples = take_turns(SIDES, COLUMNS, turns=args.turns, arguments=arguments, launchers=launchers)
    check_same_work(samples)
    difference = largest_difference(samples)
    results = compare(samples, COLUMNS)
    print(f"metrics differ by {difference:.2g} at most")
    print(f"load average before {load_before[0]:.2f}, after {os.getloadavg()[0]:.2f}")
    record = {
        "describes": PARALLEL.describes,
        **results,
        "metrics_difference": difference,
        "load_average_before": load_before,
        "load_average_after": os.getloadavg(),
        "samples": samples,
    }
    store(args.record, args, record, packages=("torch", "transformers", "accelerate"))
    if not difference <= TOLERANCE:
        raise SystemExit(f"two processes do not learn what one does: metrics differ by {difference:.2g}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="GRPO on two processes of one thread each, beside one.")
    parser.add_argument("model", type=Path, help="folder of a causal language model")
    parser.add_argument("--warmup-steps", type=int, default=1, help="before the steps for the record")
    parser.add_argument("--steps", type=int, default=2, help="for the record")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--turns", type=int, default=3, help="measurements of each side")
    parser.add_argument("--record", default="W17", help="first part of the name of the file with the results")
    parser.add_argument("--worker", choices=SIDES, help="measure in this launch and print JSON")
    parser.add_argument("--folder", type=Path, help="of the files that the sides share; for workers")
    parser.set_defaults(device="cpu", dtype="float32")
    return parser.parse_args()


def measure_and_leave(args: argparse.Namespace) -> None:
    """Measures on every rank; the first one prints what all did."""
    collectives = join_ranks()
    prepare_device()
    RUNS[PARALLEL.algorithm].builder()
    clock = Clock(args.device, lambda: sum(collectives.gather(time.process_time())))
    work: list[dict[str, int]] = []
    baseline = reset_memory(args.device)
    logged = prepare_llmrl(args, PARALLEL, clock, work, args.warmup_steps + args.steps)()
    figures = clock.figures(after=args.warmup_steps)
    figures["step_cpu_s"] /= collectives.world_size
    figures["update_s"] = figures["step_s"] - figures["rollout_s"] - figures["scoring_s"]
    peak_mib = sum(collectives.gather((memory(args.device)[1] - baseline) / MIB))
    if collectives.is_first:
        print(json.dumps(figures | {"peak_mib": peak_mib, "work": work, "metrics": [x.values() for x in logged]}))
    leave_ranks()
    sys.stdout.flush()
    os._exit(0)  # threads of gloo may abort the interpreter at its end


def largest_difference(samples: Samples) -> float:
    """The most that a metric of two processes differs by from that of one in the first step, relative to the larger of
    it and 0.01."""
    ours, alone = (samples[side][0]["metrics"][0] for side in SIDES)
    return largest(
        abs(ours[name] - alone[name]) / max(abs(alone[name]), 0.01) for name in alone if not name.endswith("_s")
    )


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


if __name__ == "__main__":
    main()
