"""The memory that runs take, beside the estimate of `llmrl.sizing`: on one process and on two.

    python benchmarks/memory.py MODEL_DIR

Runs every kind of training for two iterations, on random weights in the shape of MODEL_DIR: prompts and responses are
then as long as the settings allow, which is what the estimate is of. Measured is the highest number of bytes that live
in tensors, in each phase (`live_tensors.py`); and, where each case has a process of its own, the highest resident size
beyond that after the imports, which holds also what kernels, allocators and Python take. Two processes share the work
by gloo on the CPU. What DeepSpeed offloads is in the memory of the CPU either way there, and is counted with the rest.
"""

import argparse
import gc
import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import MIB, memory, reset_memory, store
from live_tensors import LiveTensors

from llmrl.distributed.collectives import join_ranks, leave_ranks, make_context
from llmrl.models.config import ModelConfig
from llmrl.models.loading import load_tokenizer
from llmrl.reports.progress import Silent
from llmrl.reports.trackers import Trackers
from llmrl.settings import read_recipe
from llmrl.sizing import estimate_memory, launched_strategy, read_shape
from llmrl.sizing.estimate import Phase
from llmrl.wiring.runs import RUNS

PHASES: dict[str, Phase] = {"rollout": "rollout", "reward": "scoring", "logprobs": "scoring", "update": "update"}
"""Phases of the estimate, by the names that trainers report."""

BFLOAT16, CHECKPOINTS, LORA = "model.dtype=bfloat16", "model.gradient_checkpointing=true", "model.lora.rank=8"
REFERENCE = "algorithm.kl_coef=0.1"
CASES = {
    "SFT": ("sft", ()),
    "SFT, bfloat16": ("sft", (BFLOAT16,)),
    "SFT, checkpointing": ("sft", (CHECKPOINTS,)),
    "SFT, bfloat16, checkpointing": ("sft", (BFLOAT16, CHECKPOINTS)),
    "SFT, LoRA": ("sft", (LORA,)),
    "reward model": ("reward-model", ()),
    "GRPO": ("grpo", ()),
    "GRPO, bfloat16, reference": ("grpo", (BFLOAT16, REFERENCE)),
    "GRPO, bfloat16, LoRA": ("grpo", (BFLOAT16, LORA)),
    "PPO": ("ppo", ()),
    "PPO, bfloat16": ("ppo", (BFLOAT16,)),
    "PPO, shared trunk": ("ppo", ("critic.network=shared",)),
    "PPO, adapters on one base": ("ppo", (LORA, "critic.network=adapter")),
}
ON_TWO = ("GRPO, bfloat16, reference", "PPO")
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
STRATEGIES: dict[str, dict[str, Any]] = {
    "one process": {},
    "replicated": {},
    "ZeRO 1": {"stage": 1},
    "ZeRO 2": {"stage": 2},
    "ZeRO 2, offload": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "ZeRO 3": {"stage": 3},
    "FSDP2": {},
}
"""What a file of DeepSpeed says in its section zero_optimization."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Lengths and counts of a recipe: tokens, and responses of an iteration."""

    prompt: int
    response: int
    microbatch: int
    responses: int


def main() -> None:
    args = parse()
    if args.worker is not None:
        work(args)
        return
    rows: list[dict[str, Any]] = []
    for row in measure_all(args):
        rows.append(row)
        print_row(row)
        keep(args, rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measured memory beside the estimate of llmrl.sizing.")
    parser.add_argument("model", type=Path, help="folder with config.json and tokenizer; weights are random")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--response-tokens", type=int, default=32)
    parser.add_argument("--microbatch-tokens", type=int, default=256)
    parser.add_argument("--responses", type=int, default=8, help="of an iteration, all of them one optimizer step")
    parser.add_argument("--bucket-elements", type=int, default=20_000_000, help="reduce_bucket_size of DeepSpeed")
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--cases", nargs="+", choices=CASES, help="others than those that are usual for a strategy")
    parser.add_argument("--together", action="store_true", help="cases share a process, except DeepSpeed's")
    parser.add_argument("--output", type=Path, help="writes the rows there instead of to the results")
    parser.add_argument("--worker", type=Path, help="measure in this process and write rows to this file")
    parser.set_defaults(device="cpu", dtype="float32")
    return parser.parse_args()


def measure_all(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of each case, by processes of their own."""
    for strategy in args.strategies:
        cases = args.cases or (CASES if strategy == "one process" else ON_TWO)
        together = args.together and "stage" not in STRATEGIES[strategy]  # engines of DeepSpeed live as long as it does
        for group in [list(cases)] if together else [[case] for case in cases]:
            yield from run_worker(args, strategy, group)


def keep(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Writes what there is so far."""
    if args.output is not None:
        args.output.write_text(json.dumps(rows))
    else:
        store("memory", args, {"rows": rows}, packages=("torch", "transformers", "accelerate", "deepspeed", "peft"))


def run_worker(args: argparse.Namespace, strategy: str, cases: list[str]) -> list[dict[str, Any]]:
    """What this program measures when it is started again, under the launcher where it takes two."""
    launcher = [] if strategy == "one process" else ["-m", "torch.distributed.run", "--nproc_per_node=2"]
    port = [f"--master_port={free_port()}"] if launcher else []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        chosen = ["--strategies", strategy, "--worker", str(file), "--cases", *cases]
        lengths = [f"--{name}={getattr(args, name.replace('-', '_'))}" for name in LENGTHS]
        command = [sys.executable, *launcher, *port, __file__, str(args.model), *lengths, *chosen]
        environment = os.environ | launch_settings(args, strategy, Path(folder)) | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
        return json.loads(file.read_text())


def launch_settings(args: argparse.Namespace, strategy: str, folder: Path) -> dict[str, str]:
    """Environment variables that `accelerate launch` would set."""
    zero = STRATEGIES[strategy]
    if not zero:
        return FSDP if strategy == "FSDP2" else {}
    file = folder / "deepspeed.json"
    zero = zero | {"reduce_bucket_size": args.bucket_elements}
    file.write_text(json.dumps({"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}))
    return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}


LENGTHS = ("prompt-tokens", "response-tokens", "microbatch-tokens", "responses")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def work(args: argparse.Namespace) -> None:
    """Measures the cases one after another; the first rank writes what it found."""
    lengths = Lengths(
        prompt=args.prompt_tokens,
        response=args.response_tokens,
        microbatch=args.microbatch_tokens,
        responses=args.responses,
    )
    collectives = join_ranks()
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(case, args, lengths, Path(folder)) for case in args.cases]
    if collectives.is_first:
        args.worker.write_text(json.dumps(rows))
    collectives.barrier()
    leave_ranks()
    sys.stdout.flush()
    os._exit(0)  # threads of gloo may abort the interpreter at its end


def measure(case: str, args: argparse.Namespace, lengths: Lengths, folder: Path) -> dict[str, Any]:
    """One case: two iterations, so that the optimizer has its states in the second."""
    algorithm, settings = CASES[case]
    kind, live = RUNS[algorithm], LiveTensors()
    context = make_context(join_ranks(), PhaseRecorder(live))
    recipe = write_recipe(algorithm, args.model, lengths, Path(tempfile.mkdtemp(dir=folder)))
    config = read_recipe(kind.settings, recipe, list(settings))
    check, build = kind.checker(), kind.builder()
    checked = check(config, dry=False)
    if context.launch.sharding == "deepspeed":
        importlib.import_module("deepspeed")
    baseline = reset_memory("cpu")
    run = build(config, checked, context, Trackers(config.trackers, output_dir=folder))
    gc.collect()
    with live:
        for _ in range(2):
            run.trainer.iterate()
    resident = memory("cpu")[1] - baseline
    shape = read_shape(config.model)
    assert shape is not None, "the model is a folder"
    estimate = estimate_memory(config, shape, launched_strategy(context.launch))
    phases: dict[Phase, int] = {name: live.peaks[name] for name in PHASES.values() if name in live.peaks}
    return {
        "case": case,
        "strategy": args.strategies[0],
        "measured": phases,
        "estimated": {name: estimate.of(name) + estimate.host_training for name in phases},
        "resident": resident,
        "estimated_peak": estimate.peak + estimate.host_training,
    }


class PhaseRecorder(Silent):
    """`Progress` that begins a phase of the measurement with each phase of an iteration."""

    def __init__(self, live: LiveTensors) -> None:
        self.live = live

    def phase(self, name: str, total: int) -> None:
        self.live.begin_phase(PHASES.get(name, name))


def write_recipe(algorithm: str, model: Path, lengths: Lengths, folder: Path) -> Path:
    """A recipe whose every prompt and response is as long as it may be."""
    prompt, response, other = texts(model, lengths)
    row = {"prompt": prompt, "response": response, "chosen": response, "rejected": other}
    count = lengths.responses
    (folder / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * count)
    (folder / "rule.py").write_text("def rule(responses):\n    return [float(len(x) % 7) for x in responses]\n")
    (folder / "out").mkdir(exist_ok=True)
    tokens = lengths.prompt + lengths.response
    rows = f"path: {folder}/rows.jsonl, template: none"
    per_prompt = 4 if algorithm == "grpo" else 1
    parts = {
        "sft": f"sft: {{batch_size: {count}, microbatch_tokens: {lengths.microbatch}}}\n"
        f"data: {{{rows}, max_tokens: {tokens}}}\n",
        "reward-model": f"reward_model: {{batch_size: {count}, microbatch_tokens: {lengths.microbatch}}}\n"
        f"data: {{{rows}, max_tokens: {tokens}}}\nevaluation_data: {{{rows}, max_tokens: {tokens}}}\n",
    }
    loop = (
        f"data: {{{rows}, max_prompt_tokens: {lengths.prompt}}}\n"
        f"reward: {{functions: [{{name: '{folder}/rule.py:rule'}}]}}\n"
        f"rollout: {{prompts_per_iteration: {count // per_prompt}, max_response_tokens: {lengths.response}}}\n"
        f"update: {{minibatch_size: {count}, microbatch_tokens: {lengths.microbatch}, num_epochs: 1}}\n"
        + (f"algorithm: {{group_size: {per_prompt}}}\n" if algorithm == "grpo" else "")
    )
    iterations = "" if algorithm == "reward-model" else ", num_iterations: 2"
    file = folder / f"{algorithm}.yaml"
    file.write_text(
        f"model: {{path: {model}, from_scratch: true}}\n" + parts.get(algorithm, loop)
        + f"run: {{output_dir: {folder}/out{iterations}}}\n"
    )  # fmt: skip
    return file


def texts(model: Path, lengths: Lengths) -> tuple[str, str, str]:
    """A prompt and two responses of this many tokens; the EOS of a response is one of them."""
    tokenizer = load_tokenizer(ModelConfig(path=str(model)))
    prompt, response = ("the " * lengths.prompt).strip(), " the" * (lengths.response - 1)
    for text, count in ((prompt, lengths.prompt), (response, lengths.response - 1)):
        num_tokens = len(tokenizer.encode(text, add_special_tokens=False))
        if num_tokens != count:
            sys.exit(f"the tokenizer of {model} makes {num_tokens} tokens of {count} words 'the'")
    return prompt, response, response[: -len(" the")] + " a"


def print_row(row: dict[str, Any]) -> None:
    """Each phase in MiB: measured, estimated, and the one over the other."""
    print(f"{row['strategy']}: {row['case']}")
    for phase, measured in row["measured"].items():
        estimated = row["estimated"][phase]
        ratio = f"estimate x {estimated / measured:.2f}"
        print(f"    {phase:8s} measured {measured / MIB:8.1f}  estimated {estimated / MIB:8.1f}  {ratio}")
    resident = f"    resident size grew by {row['resident'] / MIB:.1f}, estimated {row['estimated_peak'] / MIB:.1f}"
    print(resident, flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
