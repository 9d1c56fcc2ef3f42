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
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from common import MIB, compare, memory, reset_memory, store, take_turns
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from llmrl.batches import Prompts
from llmrl.distributed.device import prepare_device
from llmrl.functional.streams import Purpose
from llmrl.reports.progress import Silent
from llmrl.roles import Sampling
from llmrl.rollout.native import NativeEngine
from llmrl.rollout.responses import Responses
from llmrl.rollout.sampler import Sampler

ENGINES = ("native", "generate")
EOS = 2
COLUMNS = ("tokens_per_s", "tokens_per_cpu_s", "peak_mib")


def main() -> None:
    args = parse()
    if args.worker:
        print(json.dumps(measure(args)))
        return
    load_before = os.getloadavg()
    samples = take_turns(ENGINES, COLUMNS, turns=args.turns)
    results = compare(samples, COLUMNS)
    print(f"load average before {load_before[0]:.2f}, after {os.getloadavg()[0]:.2f}")
    record = results | {"samples": samples, "load_average_before": load_before}
    store("rollout", args, record, packages=("torch", "transformers"))


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


def measure(args: argparse.Namespace) -> dict[str, float]:
    prepare_device()  # for both engines
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
    extend = Sampler.extend

    def extend_with_forced_length(self: Sampler, responses: Responses, rows: Tensor, logits: Tensor) -> list[int]:
        force_length(logits, lengths[responses.numbers[rows]] - responses.lengths[rows])
        return extend(self, responses, rows, logits)

    Sampler.extend = extend_with_forced_length
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


if __name__ == "__main__":
    main()
