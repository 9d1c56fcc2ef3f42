"""First losses and gradient norms of GRPO or PPO in llmrl and in TRL, on identical rollouts.

    python benchmarks/learning.py MODEL_DIR --dtype bfloat16
    python benchmarks/learning.py MODEL_DIR --algorithm ppo

Both get the same prompts and the same responses, token for token. What is compared is everything after the rollout:
rewards, advantages, log-probabilities, the losses and their gradients, and from the second step of GRPO on the
optimizer too. Ends with an error where the first losses differ by more than 1e-3, or the gradient norms by more than
1 %.

GRPO's responses are of mixed lengths. Those of PPO are of one length: to shorter ones TRL gives the score one token
after the end. TRL's critic gets a head of zeros, as llmrl's has, and TRL clips no gradient there: later steps differ.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from common import Clock, largest, store, take_turns
from peers import check_peer
from steps import build_llmrl, prepare_folder
from transformers import AutoTokenizer
from trl_steps import TRL, TRLGRPO, TRLPPO, import_trainer
from workloads import Workload

from llmrl.batches import Row
from llmrl.distributed.device import pick_device, prepare_device
from llmrl.rollout.scripted import ScriptedEngine

SIDES = ("llmrl", "trl_tuned")
WORKLOADS = {
    "grpo": Workload(algorithm="grpo", num_prompts=2, group_size=8, prompt_tokens=64, response_tokens=32, mixed=True),
    "ppo": Workload(algorithm="ppo", num_prompts=8, group_size=1, prompt_tokens=64, response_tokens=32, kl_coef=0.05),
}
LOSSES = {"grpo": {"actor": "policy/loss"}, "ppo": {"actor": "policy/loss", "critic": "value/loss"}}
"""Metric of each module's loss."""
LOSS_TOLERANCE, NORM_TOLERANCE = 1e-3, 1e-2

Responses = dict[str, list[list[int]]]
"""Token ids of the responses to each prompt."""

Learned = dict[str, dict[str, list[float]]]
"""Losses and gradient norms of the steps, by module."""


def main() -> None:
    args = parse()
    workload = WORKLOADS[args.algorithm]
    check_peer(workload.trl)
    if args.worker:
        print(json.dumps(measure(args, workload)))
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare_folder(args, workload, Path(folder))
        samples = take_turns(SIDES, (), turns=1, arguments=("--folder", folder))
    steps = {side: of_side[0] for side, of_side in samples.items()}
    record = {"describes": workload.describes, "steps": steps, **differences(**steps)}
    if args.output is not None:
        args.output.write_text(json.dumps(record))
    else:
        versions = {"trl": workload.trl}
        store(f"learning-{args.algorithm}", args, record, packages=("torch", "transformers"), versions=versions)
    print(f"first losses differ by {record['loss_difference']:.2g}", end=", ")
    print(f"gradient norms by {100 * record['grad_norm_difference']:.3f} %")
    if not (record["loss_difference"] <= LOSS_TOLERANCE and record["grad_norm_difference"] <= NORM_TOLERANCE):
        raise SystemExit(f"llmrl and TRL do not learn the same: {steps}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Losses and gradients on the same rollout: llmrl beside TRL.")
    parser.add_argument("model", type=Path, help="folder of a causal language model")
    parser.add_argument("--algorithm", choices=WORKLOADS, default="grpo")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="writes the record there instead of to the results")
    parser.add_argument("--worker", choices=SIDES, help="train one side in this process and print JSON")
    parser.add_argument("--folder", type=Path, help="of the files that the sides share; for workers")
    parser.set_defaults(device=str(pick_device()))
    return parser.parse_args()


def differences(llmrl: Learned, trl_tuned: Learned) -> dict[str, float]:
    """Difference of the first losses, and of the first gradient norms over TRL's: the largest of all modules."""
    firsts = {
        name: [(llmrl[module][name][0], theirs[name][0]) for module, theirs in trl_tuned.items()]
        for name in ("losses", "grad_norms")
    }
    return {
        "loss_difference": largest(abs(ours - theirs) for ours, theirs in firsts["losses"]),
        "grad_norm_difference": largest(abs(ours - theirs) / theirs for ours, theirs in firsts["grad_norms"]),
    }


def measure(args: argparse.Namespace, workload: Workload) -> Learned:
    """What one side learned."""
    prepare_device()
    responses = draw_responses(args, workload)
    if args.worker == "llmrl":
        return learn_by_llmrl(args, workload, responses)
    return (learn_by_trl if workload.algorithm == "grpo" else learn_by_trl_ppo)(args, workload, responses)


def draw_responses(args: argparse.Namespace, workload: Workload) -> Responses:
    """Random responses of the workload's lengths, which end by EOS."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    draw = random.Random(args.seed)
    ids = [token for token in range(len(tokenizer)) if token not in tokenizer.all_special_ids]
    groups = workload.lengths(args.seed).view(workload.num_prompts, -1).tolist()
    prompts = workload.prompts(tokenizer, args.seed)
    return {
        prompt: [[*draw.choices(ids, k=length - 1), tokenizer.eos_token_id] for length in lengths]
        for prompt, lengths in zip(prompts, groups, strict=True)
    }


def learn_by_llmrl(args: argparse.Namespace, workload: Workload, responses: Responses) -> Learned:
    trainer, _ = build_llmrl(args, workload, args.steps)

    def script(row: Row, number: int) -> tuple[list[int], list[float], bool]:
        ids = responses[row["prompt"]][number % workload.group_size]
        return ids, [0.0] * len(ids), True

    trainer.engine = ScriptedEngine(script)
    logged = [trainer.iterate().values() for _ in range(args.steps)]
    return {
        module: {
            "losses": [values[loss] for values in logged],
            "grad_norms": [values[f"{module}/grad_norm"] for values in logged],
        }
        for module, loss in LOSSES[workload.algorithm].items()
    }


def learn_by_trl(args: argparse.Namespace, workload: Workload, responses: Responses) -> Learned:
    peer = TRLGRPO(args, workload, Clock(args.device), [])
    trainer = peer.trainer(args.steps)

    def generate(_: Any, input_ids: torch.Tensor, **__: Any) -> torch.Tensor:
        return with_responses(peer, input_ids, responses)

    trainer.model.generate = MethodType(generate, trainer.model)
    trainer.train()
    logged = [values for values in trainer.state.log_history if "loss" in values]
    keys = {"losses": "loss", "grad_norms": "grad_norm"}
    return {"actor": {name: [values[key] for values in logged] for name, key in keys.items()}}


def learn_by_trl_ppo(args: argparse.Namespace, workload: Workload, responses: Responses) -> Learned:
    peer = TRLPPO(args, workload, Clock(args.device), [])
    module = import_trainer(workload)
    trainer, policy = peer.trainer(args.steps)
    trainer.value_model.score.weight.data.zero_()
    modules = {"actor": (policy, 1.0), "critic": (trainer.value_model, trainer.args.vf_coef)}
    norms: dict[str, list[float]] = {name: [] for name in modules}
    step = trainer.optimizer.step

    def generate(_: Any, queries: torch.Tensor, *__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        ids = with_responses(peer, queries, responses)
        return ids, policy(ids).logits[:, queries.shape[1] - 1 : -1]

    def step_and_note() -> None:
        for name, (trained, coef) in modules.items():
            gradients = [p.grad for p in trained.parameters() if p.grad is not None]
            norms[name].append(float(torch.nn.utils.get_total_norm(gradients)) / coef)
        step()

    module.batch_generation, trainer.optimizer.step = torch.no_grad()(generate), step_and_note
    trainer.train()
    logged = [values for values in trainer.state.log_history if "loss/policy_avg" in values]
    losses = {"actor": "loss/policy_avg", "critic": "loss/value_avg"}
    return {
        name: {"losses": [values[key] for values in logged], "grad_norms": norms[name]} for name, key in losses.items()
    }


def with_responses(peer: TRL, prompts: torch.Tensor, responses: Responses) -> torch.Tensor:
    """Prompts (B, P) and after each the next of the responses to it."""
    texts = [str(peer.tokenizer.decode(row)) for row in prompts]
    ids = [torch.tensor(responses[text][n % peer.workload.group_size]) for n, text in enumerate(texts)]
    rows = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=peer.eos_id)
    return torch.cat([prompts, rows.to(prompts.device)], dim=1)


if __name__ == "__main__":
    main()
