"""Tokens per second and peak memory of the native engine beside plain `model.generate`, on the same machine.

    python benchmarks/rollout.py MODEL_DIR --prompts 4 --group 8

Same weights, precision, prompt ids and response lengths for both. The lengths are drawn from a seed, uniformly from 1
to the limit: EOS is forbidden before a row's length and forced at it, in the logits, by the same function. Every
measurement is a fresh process that loads the model, runs once to warm up and once for the record; the two engines take
turns. Tokens per second of CPU time say more than those of wall time where other programs compete for the cores. Memory
is the highest resident size (on a GPU: allocated size) after loading, less what stood there right then.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from llmrl.experience import Prompts
from llmrl.functional.streams import Purpose
from llmrl.roles import Sampling
from llmrl.rollout import sampler
from llmrl.rollout.native import NativeEngine

ENGINES = ("native", "generate")
RESULTS = Path(__file__).parent / "results"
EOS = 2
MIB = 2**20
COLUMNS = ("tokens_per_s", "tokens_per_cpu_s", "peak_mib")


def main() -> None:
    args = parse()
    if args.worker:
        print(json.dumps(measure(args)))
        return
    load_before = os.getloadavg()
    samples: dict[str, list[dict[str, float]]] = {engine: [] for engine in ENGINES}
    for turn in range(args.turns):
        for engine in ENGINES:
            sample = run_worker(engine)
            samples[engine].append(sample)
            print(f"turn {turn + 1}  {engine:8s}  " + "  ".join(f"{name} {sample[name]:.1f}" for name in COLUMNS))
    summary = {engine: summarize(of_engine) for engine, of_engine in samples.items()}
    ratios = {name: summary["native"][f"{name}_median"] / summary["generate"][f"{name}_median"] for name in COLUMNS}
    for engine, numbers in summary.items():
        print(f"{engine:8s}  " + "  ".join(f"{name} {number:.1f}" for name, number in numbers.items()))
    print("native over generate, of the medians: " + "  ".join(f"{name} x {x:.2f}" for name, x in ratios.items()))
    print(f"load average before {load_before[0]:.2f}, after {os.getloadavg()[0]:.2f}")
    store(args, {"summary": summary, "ratios": ratios, "samples": samples, "load_average_before": load_before})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Native engine beside plain generate of transformers.")
    parser.add_argument("model", type=Path, help="folder of a causal language model")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group", type=int, default=8, help="responses per prompt")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--max-response-tokens", type=int, default=128)
    parser.add_argument(
        "--max-rows", type=int, default=64, help="of the native engine; generate decodes all rows at once"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--turns", type=int, default=3, help="measurements of each engine")
    parser.add_argument("--worker", choices=ENGINES, help="measure one engine in this process and print JSON")
    return parser.parse_args()


def run_worker(engine: str) -> dict[str, float]:
    command = [sys.executable, *sys.argv, "--worker", engine]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def measure(args: argparse.Namespace) -> dict[str, float]:
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).to(args.device).eval()
    generator = torch.Generator().manual_seed(args.seed)
    lengths = torch.randint(1, args.max_response_tokens + 1, (args.prompts * args.group,), generator=generator)
    ids = torch.randint(3, model.config.vocab_size, (args.prompts, args.prompt_tokens), generator=generator)
    prepare = prepare_native if args.worker == "native" else prepare_generate
    run = prepare(args, model, ids.to(args.device), lengths.to(args.device))
    baseline = reset_memory(args.device)
    run()
    started, cpu_started = time.perf_counter(), time.process_time()
    num_tokens = run()
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    if num_tokens != int(lengths.sum()):
        raise RuntimeError(f"{args.worker} made {num_tokens} tokens where {int(lengths.sum())} were forced")
    peak_mib = (memory(args.device)[1] - baseline) / MIB
    return {
        "seconds": seconds,
        "tokens_per_s": num_tokens / seconds,
        "tokens_per_cpu_s": num_tokens / cpu_seconds,
        "peak_mib": peak_mib,
    }


def force_length(logits: Tensor, remaining: Tensor) -> None:
    """Forbids EOS in rows with more than one token to go, and everything else in rows with one; in place."""
    logits[:, EOS] = -torch.inf
    last = remaining == 1
    logits[last] = -torch.inf
    logits[last, EOS] = 0.0


def prepare_native(args: argparse.Namespace, model: PreTrainedModel, ids: Tensor, lengths: Tensor) -> Callable[[], int]:
    draw = sampler.draw

    def draw_with_forced_length(logits: Tensor, numbers: Tensor, tokens: Tensor, sampling: Sampling):
        force_length(logits, lengths[numbers] - tokens)
        return draw(logits, numbers, tokens, sampling)

    sampler.draw = draw_with_forced_length
    engine = NativeEngine(
        model,
        eos_ids=(EOS,),
        vocab_size=model.config.vocab_size,
        dtype=model.dtype,
        max_rows=args.max_rows,
        progress=Silent(),
    )
    prompts = Prompts(ids=ids, mask=torch.ones_like(ids, dtype=torch.bool), rows=tuple({} for _ in ids))
    sampling = Sampling(
        temperature=1.0,
        num_responses=args.group,
        max_response_tokens=args.max_response_tokens,
        greedy=False,
        seed=args.seed,
        purpose=Purpose.GENERATION,
        first_response=0,
    )
    return lambda: int(engine.generate(prompts, sampling).sequences.response_lengths.sum())


def prepare_generate(
    args: argparse.Namespace, model: PreTrainedModel, ids: Tensor, lengths: Tensor
) -> Callable[[], int]:
    class ForcedLength(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            force_length(scores, lengths - (input_ids.shape[1] - ids.shape[1]))
            return scores

    model.generation_config = GenerationConfig(
        do_sample=True,
        top_k=0,
        num_return_sequences=args.group,
        max_new_tokens=args.max_response_tokens,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )

    def run() -> int:
        output = cast(Any, model).generate(
            ids, attention_mask=torch.ones_like(ids), logits_processor=LogitsProcessorList([ForcedLength()])
        )
        ended = (output[:, ids.shape[1] :] == EOS).int()
        return int((ended.argmax(dim=1) + 1).sum())

    return run


class Silent:
    def iteration(self, number: int, values: Mapping[str, float]) -> None: ...

    def message(self, text: str) -> None: ...

    def phase(self, name: str, total: int) -> None: ...

    def advance(self, amount: int = 1) -> None: ...


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


def summarize(samples: list[dict[str, float]]) -> dict[str, float]:
    summary = {}
    for name in COLUMNS:
        values = [sample[name] for sample in samples]
        summary |= {f"{name}_median": statistics.median(values), f"{name}_min": min(values)}
    return summary


def store(args: argparse.Namespace, results: dict) -> None:
    settings = {name: value for name, value in vars(args).items() if name not in ("model", "worker")}
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    record = {"model": args.model.name, "settings": settings, "machine": machine, "versions": versions} | results
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"rollout_{args.model.name}_{args.dtype}_{args.device.partition(':')[0]}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
