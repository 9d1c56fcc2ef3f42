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
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from common import MIB, Clock, compare, memory, reset_memory, store, take_turns
from lengths import ForcedLengths, draw_lengths, force_sampler
from roofline import best, describe, measure_limits, read_shape, rollout_floor
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, LogitsProcessorList, PreTrainedModel

from llmrl.batches import Prompts
from llmrl.distributed.device import prepare_device
from llmrl.functional.streams import Purpose
from llmrl.reports.progress import Silent
from llmrl.roles import Sampling
from llmrl.rollout.graphs import GraphDecoder
from llmrl.rollout.native import NativeEngine

ENGINES = ("native", "generate")
EOS = 2
COLUMNS = ("step_s", "step_cpu_s", "tokens_per_s", "tokens_per_cpu_s", "peak_mib")


def main() -> None:
    args = parse()
    if args.worker:
        print(json.dumps(measure(args)))
        return
    load_before, limits = os.getloadavg(), measure_limits(args.dtype, args.device)
    samples = take_turns(ENGINES, COLUMNS, turns=args.turns)
    limits = best(limits, measure_limits(args.dtype, args.device))
    results = compare(samples, COLUMNS)
    prompts, lengths = [args.prompt_tokens] * args.prompts, drawn(args)[1].tolist()
    floor = rollout_floor(read_shape(args.model, args.dtype), limits, prompts=prompts, lengths=lengths)
    roofline = describe(limits, {"step": floor}, results["summary"])
    print(f"load average before {load_before[0]:.2f}, after {os.getloadavg()[0]:.2f}")
    record = {
        "describes": f"rollout, {args.prompts} x {args.group} responses of {args.prompt_tokens} + up to "
        f"{args.max_response_tokens}",
        **results,
        "roofline": roofline,
        "load_average_before": load_before,
        "load_average_after": os.getloadavg(),
        "samples": samples,
    }
    store(args.record, args, record, packages=("torch", "transformers"))


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
    parser.add_argument("--record", default="rollout", help="first part of the name of the file with the results")
    parser.add_argument("--worker", choices=ENGINES, help="measure one engine in this process and print JSON")
    return parser.parse_args()


def drawn(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Prompt ids (N, P) and response lengths (B,), from the seed."""
    generator = torch.Generator().manual_seed(args.seed)
    rows = args.prompts * args.group
    lengths = draw_lengths(rows, args.max_response_tokens, mixed=True, generator=generator)
    vocab_size = AutoConfig.from_pretrained(args.model).vocab_size
    ids = torch.randint(3, vocab_size, (args.prompts, args.prompt_tokens), generator=generator)
    return ids, lengths


def measure(args: argparse.Namespace) -> dict[str, float]:
    prepare_device()  # for both engines
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).to(args.device).eval()
    ids, lengths = drawn(args)
    prepare = prepare_native if args.worker == "native" else prepare_generate
    run = prepare(args, model, ids.to(args.device), lengths.to(args.device))
    baseline, clock = reset_memory(args.device), Clock(args.device)
    run()  # to warm up
    clock.step_ended()
    num_tokens = run()
    clock.step_ended()
    if num_tokens != int(lengths.sum()):
        raise RuntimeError(f"{args.worker} made {num_tokens} tokens where {int(lengths.sum())} were forced")
    figures = clock.figures(after=1)
    return figures | {
        "tokens_per_s": num_tokens / figures["step_s"],
        "tokens_per_cpu_s": num_tokens / figures["step_cpu_s"],
        "peak_mib": (memory(args.device)[1] - baseline) / MIB,
    }


def prepare_native(args: argparse.Namespace, model: PreTrainedModel, ids: Tensor, lengths: Tensor) -> Callable[[], int]:
    force_sampler(lengths, eos_id=EOS)
    engine = NativeEngine(
        model,
        eos_ids=(EOS,),
        vocab_size=model.config.vocab_size,
        dtype=model.dtype,
        max_rows=args.max_rows,
        progress=Silent(),
    )
    if model.device.type == "cuda":
        engine.graphs = GraphDecoder(eos_ids=engine.eos_ids, vocab_size=engine.vocab_size)
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
    forced = LogitsProcessorList([ForcedLengths(lengths, eos_id=EOS, width=ids.shape[1])])
    model.generation_config = GenerationConfig(
        do_sample=True,
        top_k=0,
        num_return_sequences=args.group,
        max_new_tokens=args.max_response_tokens,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )

    def run() -> int:
        output = cast(Any, model).generate(ids, attention_mask=torch.ones_like(ids), logits_processor=forced)
        ended = (output[:, ids.shape[1] :] == EOS).int()
        return int((ended.argmax(dim=1) + 1).sum())

    return run


if __name__ == "__main__":
    main()
