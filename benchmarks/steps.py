"""Time, phases and peak memory of a training step of llmrl beside TRL's, on the same machine.

    python benchmarks/steps.py MODEL_DIR --workload W4 --dtype bfloat16

The workloads and their names are in `workloads.py`. Same weights, tokenizer, prompt ids, group size, reward, fused
AdamW, precision (float32 weights, passes in --dtype) and number of optimizer steps for all. Response lengths are forced
in the logits, and drawn from a seed where they are mixed. That all do the same work is checked: they must read the same
prompts and make the same number of tokens at every step.

TRL stands there twice: as shipped, with its own defaults, and tuned: one batch for the whole step, no gradient
checkpointing, the same memory allocator as llmrl, one autocast context for the whole of a rollout, in which weights are
cast once, and for PPO frozen models and scoring in --dtype.

Every measurement is a fresh process that takes some steps to warm up and some for the record; the sides take turns.
CPU seconds say more than wall seconds where other programs compete for the cores, most of all with OMP_NUM_THREADS=1.
Phases, in wall seconds: the rollout; scoring, which is rewards, log-probabilities, values and advantages; the update,
which is the rest. Of llmrl there is also the overhead: what lies in none of the phases that it counts itself, the
publishing of weights among it. Memory is the highest resident size (on a GPU: allocated size), less what stood there
after the imports.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import MIB, Clock, Samples, compare, memory, reset_memory, store, take_turns
from lengths import force_sampler
from peers import check_peer
from roofline import Limits, best, describe, forward_floor, measure_limits, read_shape, rollout_floor
from transformers import AutoTokenizer
from trl_steps import import_trainer, prepare_trl
from workloads import WORKLOADS, Workload, checksum

from llmrl.batches import Prompts, Rollout
from llmrl.distributed.collectives import join_ranks, make_context
from llmrl.distributed.device import pick_device, prepare_device
from llmrl.metrics import Metrics
from llmrl.models.config import LoraSettings, ModelConfig
from llmrl.models.saving import save_policy
from llmrl.reports.progress import Silent
from llmrl.reports.trackers import TrackerConfig, Trackers
from llmrl.roles import Sampling
from llmrl.settings import read_recipe
from llmrl.trainers.config import RewardModelConfig
from llmrl.trainers.rl import RLTrainer
from llmrl.wiring.reward_model import load_trained_reward_model
from llmrl.wiring.runs import RUNS

SIDES = ("llmrl", "trl_tuned", "trl")
COLUMNS = ("step_s", "step_cpu_s", "rollout_s", "scoring_s", "update_s", "peak_mib")
LEARNING_RATE = 1e-6


def main() -> None:
    args = parse()
    workload = WORKLOADS[args.workload]
    check_peer(workload.trl)
    if args.worker:
        print(json.dumps(measure(args, workload)))
        return
    load_before, limits = os.getloadavg(), measure_limits(args.dtype, args.device)
    with tempfile.TemporaryDirectory() as folder:
        prepare_folder(args, workload, Path(folder))
        arguments = ("--folder", folder)
        samples = take_turns(args.sides, COLUMNS, turns=args.turns, arguments=arguments, as_shipped=("trl",))
    limits = best(limits, measure_limits(args.dtype, args.device))
    check_same_work(samples)
    results = compare(samples, COLUMNS)
    roofline = describe(limits, floors_of(args, workload, limits), results["summary"])
    print(f"load average before {load_before[0]:.2f}, after {os.getloadavg()[0]:.2f}")
    record = {
        "describes": workload.describes,
        **results,
        "roofline": roofline,
        "load_average_before": load_before,
        "load_average_after": os.getloadavg(),
        "samples": samples,
    }
    packages = ("torch", "transformers", "accelerate")
    store(args.workload, args, record, packages=packages, versions={"trl": workload.trl})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Training steps: llmrl beside TRL.")
    parser.add_argument("model", type=Path, help="folder of a causal language model")
    parser.add_argument("--workload", choices=WORKLOADS, required=True, help="name of a workload, see workloads.py")
    parser.add_argument("--warmup-steps", type=int, default=1, help="before the steps for the record")
    parser.add_argument("--steps", type=int, default=2, help="for the record")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--turns", type=int, default=3, help="measurements of each side")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--worker", choices=SIDES, help="measure one side in this process and print JSON")
    parser.add_argument("--folder", type=Path, help="of the files that the sides share; for workers")
    parser.set_defaults(device=str(pick_device()))
    return parser.parse_args()


def prepare_folder(args: argparse.Namespace, workload: Workload, folder: Path) -> None:
    """Writes what all sides read: the prompts, and for PPO a reward model with a random head."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = [json.dumps({"prompt": prompt}) for prompt in workload.prompts(tokenizer, args.seed)]
    (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    if workload.algorithm == "ppo":
        lora = LoraSettings(rank=workload.lora_rank) if workload.lora_rank else None
        config = ModelConfig(path=str(args.model), lora=lora)
        loaded = load_trained_reward_model(config, RewardModelConfig(), torch.device("cpu"), seed=args.seed)
        save_policy(
            folder / "reward_model",
            model=loaded.model,
            adapted=loaded.adapted,
            tokenizer=loaded.tokenizer,
            dtype=torch.float32,
        )


def measure(args: argparse.Namespace, workload: Workload) -> dict[str, Any]:
    """Times of the steps for the record, the work of each step, and peak memory, of one side."""
    prepare_device()  # for all sides
    clock, num_steps = Clock(args.device), args.warmup_steps + args.steps
    work: list[dict[str, int]] = []
    if args.worker == "llmrl":
        RUNS[workload.algorithm].builder()
        baseline = reset_memory(args.device)
        prepare_llmrl(args, workload, clock, work, num_steps)()
    else:
        import_trainer(workload)
        baseline = reset_memory(args.device)
        prepare_trl(args, workload, clock, work, num_steps)()
    figures = clock.figures(after=args.warmup_steps)
    figures["update_s"] = figures["step_s"] - figures["rollout_s"] - figures["scoring_s"]
    return figures | {"peak_mib": (memory(args.device)[1] - baseline) / MIB, "work": work}


def prepare_llmrl(
    args: argparse.Namespace, workload: Workload, clock: Clock, work: list[dict[str, int]], num_steps: int
) -> Callable[[], list[Metrics]]:
    """A run of llmrl, as its recipe says; the same way as its command line builds it."""
    trainer, eos_id = build_llmrl(args, workload, num_steps)
    force_sampler(workload.lengths(args.seed).to(args.device), eos_id=eos_id)
    generate = trainer.engine.generate

    def generate_and_count(prompts: Prompts, sampling: Sampling) -> Rollout:
        rollout = generate(prompts, sampling)
        ids = [row[mask].tolist() for row, mask in zip(prompts.ids, prompts.mask, strict=True)]
        work.append({"prompts": checksum(ids), "response_tokens": int(rollout.sequences.response_lengths.sum())})
        return rollout

    trainer.engine.generate = generate_and_count  # type: ignore[method-assign]

    def step() -> Metrics:
        started = clock.now()
        metrics = trainer.iterate()
        clock.phases["rollout"] = trainer.seconds["rollout"]
        clock.phases["scoring"] = trainer.seconds["reward"] + trainer.seconds["logprobs"]
        clock.phases["overhead"] = clock.now() - started - sum(trainer.seconds.values())
        clock.step_ended()
        return metrics

    return lambda: [step() for _ in range(num_steps)]


def build_llmrl(args: argparse.Namespace, workload: Workload, num_steps: int) -> tuple[RLTrainer, int]:
    """The trainer that the workload's recipe describes, and its EOS; on every rank, under a launcher."""
    kind = RUNS[workload.algorithm]
    config = read_recipe(kind.settings, write_recipe(args, workload, num_steps), [])
    checked = kind.checker()(config, dry=False)
    context = make_context(join_ranks(), Silent())
    run = kind.builder()(config, checked, context, Trackers(TrackerConfig(), output_dir=args.folder))
    return run.trainer, AutoTokenizer.from_pretrained(args.model).eos_token_id


def write_recipe(args: argparse.Namespace, workload: Workload, num_steps: int) -> Path:
    """The recipe of the workload, in the shared folder; whatever it does not name has its default."""
    scoring = Path(__file__).with_name("scoring.py")
    lora = {"rank": workload.lora_rank} if workload.lora_rank else None
    reward: dict[str, Any] = {"functions": [{"name": f"{scoring}:score"}]}
    algorithm: dict[str, Any] = {"kl_coef": workload.kl_coef}
    sections: dict[str, Any] = {}
    if workload.algorithm == "grpo":
        algorithm |= {"group_size": workload.group_size, "scale": "none"}
    else:
        scorer = {"path": str(args.folder / "reward_model"), "normalize": False, "on_actor_base": lora is not None}
        reward, sections = {"model": scorer}, {"critic": {"network": workload.critic}}
    recipe = {
        "model": {"path": str(args.model), "dtype": args.dtype, "lora": lora},
        "data": {"path": str(args.folder / "prompts.jsonl"), "template": "none"},
        "reward": reward,
        "rollout": {
            "prompts_per_iteration": workload.num_prompts,
            "max_response_tokens": workload.response_tokens,
        },
        "algorithm": algorithm,
        "update": {"num_epochs": 1, "minibatch_size": workload.num_responses},
        "optimizer": {"learning_rate": LEARNING_RATE},
        "run": {
            "output_dir": str(args.folder / "run"),
            "num_iterations": num_steps,
            "samples_per_iteration": 0,
            "seed": args.seed,
        },
        **sections,
    }
    path = args.folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))  # which is YAML too
    return path


def check_same_work(samples: Samples) -> None:
    """Every side must have read the same prompts and made the same number of tokens at every step.

    Raises:
        RuntimeError: Some did not.
    """
    steps = {side: [step for sample in of_side for step in sample["work"]] for side, of_side in samples.items()}
    if len({json.dumps(work) for of_side in steps.values() for work in of_side}) != 1:
        raise RuntimeError(f"the sides did not do the same work: {steps}")


def floors_of(args: argparse.Namespace, workload: Workload, limits: Limits) -> dict[str, float]:
    """Seconds that rollout, update and the whole step take at least."""
    shape = read_shape(args.model, args.dtype)
    prompts, lengths = [workload.prompt_tokens] * workload.num_prompts, workload.lengths(args.seed).tolist()
    rollout = rollout_floor(shape, limits, prompts=prompts, lengths=lengths)
    actor = forward_floor(shape, limits, prompts=prompts, lengths=lengths)
    other = forward_floor(shape, limits, prompts=prompts, lengths=lengths, head=False)
    passes = 2 if workload.lora_rank else 3  # frozen weights have no gradient
    if workload.algorithm == "grpo":
        scoring, update = actor if workload.kl_coef else 0.0, passes * actor
    elif workload.critic == "shared":
        scoring, update = actor + other, passes * actor  # reference and reward model; values come with the rollout
    else:
        scoring, update = actor + 2 * other, passes * (actor + other)
    return {"rollout": rollout, "update": update, "step": rollout + scoring + update}


if __name__ == "__main__":
    main()
