"""Time per optimizer step and peak memory of reward-model training beside TRL's `RewardTrainer`, on the same machine.

    python benchmarks/reward_model.py MODEL_DIR --pairs PAIRS --batch-size 4

PAIRS is a file of preference pairs as `llmrl reward-model` reads them; without it there are pairs of words, with
prompts of 32 to 160 tokens and responses of 16 to 128, drawn from the seed. Same weights, same new head, same token ids
in the same order and batches, same AdamW and precision for all; every weight is trained, and each step is one forward
and one backward pass over the whole batch. Pairs longer than the limit are left out. TRL stands there as shipped, with
gradient checkpointing, and tuned: without, and with the same memory allocator as llmrl. That all do the same work is
checked: they must count the same tokens and have the same loss at every step.

Every measurement is a fresh process that loads the model, takes some steps to warm up and some for the record; the
sides take turns. A step lasts from the end of the one before to its own, with the making of its batch. Tokens are those
of both sequences of each pair, padding left out, whether or not a trainer computes the prompt they share twice. Tokens
per second of CPU time say more than those of wall time where other programs compete for the cores. Memory is the
highest resident size (on a GPU: allocated size) after loading, less what stood there right then.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import MIB, Clock, Samples, compare, memory, reset_memory, store, take_turns
from datasets import Dataset
from peers import GRPO_AND_REWARD, check_peer, import_peer
from roofline import best, describe, measure_limits, pairs_floor, read_shape
from texts import Words
from transformers import AutoTokenizer, TrainerCallback

from llmrl.data.config import PreferenceDataConfig
from llmrl.data.preferences import EncodedPair, PairSource, read_preference_rows
from llmrl.distributed.collectives import OneProcess, make_context
from llmrl.distributed.device import pick_device, prepare_device
from llmrl.models.config import ModelConfig
from llmrl.models.loaded import LoadedRewardModel
from llmrl.optim.config import OptimizerConfig
from llmrl.optim.local import LocalTrainable
from llmrl.reports.progress import Silent
from llmrl.trainers.batch import BatchTrainer
from llmrl.trainers.config import RewardModelConfig
from llmrl.trainers.reward_model import RewardModelObjective
from llmrl.wiring.reward_model import load_trained_reward_model
from llmrl.wiring.trunks import budget_of

SIDES = ("llmrl", "trl_tuned", "trl")
COLUMNS = ("step_s", "step_cpu_s", "tokens_per_s", "tokens_per_cpu_s", "peak_mib")
OPTIMIZER = OptimizerConfig(learning_rate=1e-5)
LOSS_TOLERANCE = {"float32": 1e-2, "bfloat16": 5e-2}

Losses = list[float]


def main() -> None:
    args = parse()
    check_peer(GRPO_AND_REWARD)
    if args.worker:
        print(json.dumps(measure(args)))
        return
    load_before, limits = os.getloadavg(), measure_limits(args.dtype, args.device)
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--folder", folder]
        if args.pairs is None:
            arguments += ["--pairs", str(draw_pairs(args, Path(folder))), "--template", "none"]
        samples = take_turns(SIDES, COLUMNS, turns=args.turns, arguments=arguments, as_shipped=("trl",))
    limits = best(limits, measure_limits(args.dtype, args.device))
    check_same_work(samples, tolerance=LOSS_TOLERANCE[args.dtype])
    results = compare(samples, COLUMNS)
    floor = pairs_floor(read_shape(args.model, args.dtype), limits, samples["llmrl"][0]["lengths"]) / args.steps
    roofline = describe(limits, {"step": floor}, results["summary"])
    print(f"load average before {load_before[0]:.2f}, after {os.getloadavg()[0]:.2f}")
    record = {
        "describes": f"reward model step, {args.batch_size} pairs of mixed lengths",
        **results,
        "roofline": roofline,
        "load_average_before": load_before,
        "load_average_after": os.getloadavg(),
        "samples": samples,
    }
    packages = ("torch", "transformers", "accelerate")
    store(args.record, args, record, packages=packages, versions={"trl": GRPO_AND_REWARD})


def draw_pairs(args: argparse.Namespace, folder: Path) -> Path:
    """A file with as many pairs as the steps take."""
    words = Words(AutoTokenizer.from_pretrained(args.model), seed=args.seed)
    count = (args.warmup_steps + args.steps) * args.batch_size
    rows = [json.dumps(words.pair(prompt=(32, 160), response=(16, 128))) for _ in range(count)]
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(rows) + "\n")
    return path


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Training of reward models: llmrl beside TRL.")
    parser.add_argument("model", type=Path, help="folder of a causal language model")
    parser.add_argument("--pairs", type=Path, help="file of preference pairs; without it they are drawn")
    parser.add_argument("--template", choices=("auto", "chat", "none"), default="auto", help="as data.template")
    parser.add_argument("--batch-size", type=int, default=4, help="pairs per optimizer step")
    parser.add_argument("--max-tokens", type=int, default=512, help="of a prompt and the longer response to it")
    parser.add_argument("--warmup-steps", type=int, default=1, help="before the steps for the record")
    parser.add_argument("--steps", type=int, default=8, help="for the record")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--turns", type=int, default=3, help="measurements of each trainer")
    parser.add_argument("--record", default="reward_model", help="first part of the name of the file with the results")
    parser.add_argument("--worker", choices=SIDES, help="measure one trainer in this process and print JSON")
    parser.add_argument("--folder", type=Path, help="of the files of the trainers; for workers")
    parser.set_defaults(device=str(pick_device()))
    args = parser.parse_args()
    for name in ("batch_size", "warmup_steps", "steps", "turns"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return args


def measure(args: argparse.Namespace) -> dict[str, Any]:
    prepare_device()  # for both sides
    settings = RewardModelConfig(
        batch_size=args.batch_size,
        microbatch_tokens=2 * args.max_tokens * args.batch_size,  # the whole batch
    )
    config = ModelConfig(path=str(args.model), dtype=args.dtype)
    loaded = load_trained_reward_model(config, settings, torch.device(args.device), seed=args.seed)
    data = PreferenceDataConfig(path=str(args.pairs), max_tokens=args.max_tokens, template=args.template)
    source = PairSource(read_preference_rows(data), loaded.tokenizer, data, seed=args.seed)
    num_steps = args.warmup_steps + args.steps
    pairs = deal(source, num_steps * args.batch_size)
    clock = Clock(args.device)
    if args.worker == "llmrl":
        run = prepare_llmrl(settings, loaded, source, num_steps=num_steps, clock=clock)
    else:
        run = prepare_trl(args, loaded, pairs, num_steps=num_steps, clock=clock)
    baseline = reset_memory(args.device)
    losses, num_counted = run()
    peak_mib = (memory(args.device)[1] - baseline) / MIB
    if num_counted != num_tokens(pairs):
        raise RuntimeError(f"{args.worker} counted {num_counted} tokens where there were {num_tokens(pairs)}")
    timed, figures = pairs[args.warmup_steps * args.batch_size :], clock.figures(after=args.warmup_steps)
    return {
        **figures,
        "tokens_per_s": num_tokens(timed) / figures["elapsed_s"],
        "tokens_per_cpu_s": num_tokens(timed) / (args.steps * figures["step_cpu_s"]),
        "num_tokens": num_tokens(timed),
        "peak_mib": peak_mib,
        "losses": losses,
        "lengths": [(len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids)) for pair in timed],
    }


def deal(source: PairSource, count: int) -> list[EncodedPair]:
    """The next pairs of the source, whose position is restored."""
    place = source.state_dict()
    pairs = source.take(count)
    source.load_state_dict(place)
    return pairs


def num_tokens(pairs: Sequence[EncodedPair]) -> int:
    """Tokens of both sequences of each pair, the prompt in each."""
    return sum(2 * len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs)


def prepare_llmrl(
    settings: RewardModelConfig, loaded: LoadedRewardModel, source: PairSource, *, num_steps: int, clock: Clock
) -> Callable[[], tuple[Losses, int]]:
    trainer = BatchTrainer(
        objective=RewardModelObjective(settings, scorer=loaded.scorer),
        trained={"reward_model": LocalTrainable(loaded.module, OPTIMIZER, num_steps=num_steps)},
        source=source,
        held_out=None,
        batch_size=settings.batch_size,
        budget=budget_of(
            [loaded.model],
            settings.microbatch_tokens,
            loaded.module.dtype,
            loaded.model.device,
            section="reward_model",
        ),
        context=make_context(OneProcess(), Silent()),
    )

    def run() -> tuple[Losses, int]:
        logged = []
        for _ in range(num_steps):
            logged.append(trainer.iterate().values())
            clock.step_ended()
        counted = sum(round(values["tokens/trained_per_s"] * values["time/iteration_s"]) for values in logged)
        return [values["loss"] for values in logged], counted

    return run


def prepare_trl(
    args: argparse.Namespace,
    loaded: LoadedRewardModel,
    pairs: Sequence[EncodedPair],
    *,
    num_steps: int,
    clock: Clock,
) -> Callable[[], tuple[Losses, int]]:
    class ClockCallback(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.step_ended()

    trl = import_peer("trl", GRPO_AND_REWARD)
    rows = [
        {
            "chosen_ids": pair.prompt_ids + pair.chosen_ids,
            "rejected_ids": pair.prompt_ids + pair.rejected_ids,
            "margin": pair.margin,
        }
        for pair in pairs
    ]
    trainer = trl.RewardTrainer(
        model=loaded.model,
        args=trl_settings(args, trl.RewardConfig, num_steps=num_steps),
        train_dataset=Dataset.from_list(rows),
        processing_class=loaded.tokenizer,
        callbacks=[ClockCallback()],
    )

    def run() -> tuple[Losses, int]:
        trainer.train()
        logged = [values for values in trainer.state.log_history if "loss" in values]
        return [values["loss"] for values in logged], round(logged[-1]["num_tokens"])

    return run


def trl_settings(args: argparse.Namespace, config: Callable[..., Any], *, num_steps: int) -> Any:
    """What llmrl does, in TRL's words. Nothing is saved or reported; the loss of each step is kept in memory."""
    return config(
        output_dir=str(args.folder / args.worker),
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=1,
        max_steps=num_steps,
        max_length=args.max_tokens,
        train_sampling_strategy="sequential",
        bf16=args.dtype == "bfloat16",
        gradient_checkpointing=args.worker == "trl",
        optim="adamw_torch_fused",
        learning_rate=OPTIMIZER.learning_rate,
        lr_scheduler_type=OPTIMIZER.schedule,
        weight_decay=OPTIMIZER.weight_decay,
        adam_beta1=OPTIMIZER.betas[0],
        adam_beta2=OPTIMIZER.betas[1],
        max_grad_norm=OPTIMIZER.max_grad_norm,
        use_cpu=args.device == "cpu",
        seed=args.seed,
        logging_steps=1,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
    )


def check_same_work(samples: Samples, *, tolerance: float) -> None:
    """All must have had the same loss at every step: the same scores of the same pairs, the same updates.

    Raises:
        RuntimeError: They had not.
    """
    losses = {side: torch.tensor([sample["losses"] for sample in of_side]) for side, of_side in samples.items()}
    for side, theirs in losses.items():
        difference = (losses["llmrl"] - theirs).abs().max()
        if not difference <= tolerance:
            raise RuntimeError(
                f"the losses differ by up to {difference:.2g}, llmrl {losses['llmrl'].tolist()}, {side} "
                f"{theirs.tolist()}. TRL reads a score one token too early where the vocabulary has no token to spare "
                "for padding: choose another model then"
            )


if __name__ == "__main__":
    main()
