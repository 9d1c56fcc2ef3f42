"""First losses and gradient norms of GRPO in llmrl and in TRL, on identical rollouts.

    python benchmarks/learning.py MODEL_DIR --dtype bfloat16

Both get the same prompts and the same responses, token for token, of mixed lengths. What is compared is everything
after the rollout: rewards, advantages, log-probabilities, the loss and its gradient, and from the second step on the
optimizer too. Ends with an error where the first losses differ by more than 1e-3, or the gradient norms by more than
1 %.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from common import Clock, store, take_turns
from peers import GRPO_AND_REWARD, check_peer
from steps import build_llmrl, prepare_folder
from transformers import AutoTokenizer
from trl_steps import TRLGRPO
from workloads import Workload

from llmrl.batches import Row
from llmrl.distributed.device import pick_device, prepare_device
from llmrl.rollout.scripted import ScriptedEngine

SIDES = ("llmrl", "trl_tuned")
COLUMNS = ("first_loss", "first_grad_norm")
WORKLOAD = Workload(algorithm="grpo", num_prompts=2, group_size=8, prompt_tokens=64, response_tokens=32, mixed=True)
LOSS_TOLERANCE, NORM_TOLERANCE = 1e-3, 1e-2

Responses = dict[str, list[list[int]]]
"""Token ids of the responses to each prompt."""


def main() -> None:
    args = parse()
    check_peer(GRPO_AND_REWARD)
    if args.worker:
        print(json.dumps(measure(args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare_folder(args, WORKLOAD, Path(folder))
        samples = take_turns(SIDES, COLUMNS, turns=1, arguments=("--folder", folder))
    steps = {side: of_side[0] for side, of_side in samples.items()}
    record = {"describes": WORKLOAD.describes, "steps": steps, **differences(**steps)}
    if args.output is not None:
        args.output.write_text(json.dumps(record))
    else:
        store("learning", args, record, packages=("torch", "transformers"), versions={"trl": GRPO_AND_REWARD})
    print(f"first losses differ by {record['loss_difference']:.2g}", end=", ")
    print(f"gradient norms by {100 * record['grad_norm_difference']:.3f} %")
    if not (record["loss_difference"] <= LOSS_TOLERANCE and record["grad_norm_difference"] <= NORM_TOLERANCE):
        raise SystemExit(f"llmrl and TRL do not learn the same: {steps}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Loss and gradient of GRPO on the same rollout: llmrl beside TRL.")
    parser.add_argument("model", type=Path, help="folder of a causal language model")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="writes the record there instead of to the results")
    parser.add_argument("--worker", choices=SIDES, help="train one side in this process and print JSON")
    parser.add_argument("--folder", type=Path, help="of the files that the sides share; for workers")
    parser.set_defaults(device=str(pick_device()))
    return parser.parse_args()


def differences(llmrl: dict[str, Any], trl_tuned: dict[str, Any]) -> dict[str, float]:
    """Difference of the first losses, and of the first gradient norms over TRL's."""
    norm = trl_tuned["first_grad_norm"]
    return {
        "loss_difference": abs(llmrl["first_loss"] - trl_tuned["first_loss"]),
        "grad_norm_difference": abs(llmrl["first_grad_norm"] - norm) / norm,
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Losses and gradient norms of each step of one side."""
    prepare_device()
    learn = learn_by_llmrl if args.worker == "llmrl" else learn_by_trl
    losses, norms = learn(args, draw_responses(args))
    return {"first_loss": losses[0], "first_grad_norm": norms[0], "losses": losses, "grad_norms": norms}


def draw_responses(args: argparse.Namespace) -> Responses:
    """Random responses of the workload's lengths, which end by EOS."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    draw = random.Random(args.seed)
    ids = [token for token in range(len(tokenizer)) if token not in tokenizer.all_special_ids]
    groups = WORKLOAD.lengths(args.seed).view(WORKLOAD.num_prompts, -1).tolist()
    prompts = WORKLOAD.prompts(tokenizer, args.seed)
    return {
        prompt: [[*draw.choices(ids, k=length - 1), tokenizer.eos_token_id] for length in lengths]
        for prompt, lengths in zip(prompts, groups, strict=True)
    }


def learn_by_llmrl(args: argparse.Namespace, responses: Responses) -> tuple[list[float], list[float]]:
    trainer, _ = build_llmrl(args, WORKLOAD, args.steps)

    def script(row: Row, number: int) -> tuple[list[int], list[float], bool]:
        ids = responses[row["prompt"]][number % WORKLOAD.group_size]
        return ids, [0.0] * len(ids), True

    trainer.engine = ScriptedEngine(script)
    logged = [trainer.iterate().values() for _ in range(args.steps)]
    return [values["policy/loss"] for values in logged], [values["actor/grad_norm"] for values in logged]


def learn_by_trl(args: argparse.Namespace, responses: Responses) -> tuple[list[float], list[float]]:
    peer = TRLGRPO(args, WORKLOAD, Clock(args.device), [])
    trainer = peer.trainer(args.steps)

    def generate(_: Any, input_ids: torch.Tensor, **__: Any) -> torch.Tensor:
        texts = [str(peer.tokenizer.decode(row)) for row in input_ids]
        ids = [responses[text][n % WORKLOAD.group_size] for n, text in enumerate(texts)]
        rows = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row) for row in ids], batch_first=True, padding_value=peer.eos_id
        )
        return torch.cat([input_ids, rows.to(input_ids.device)], dim=1)

    trainer.model.generate = MethodType(generate, trainer.model)
    trainer.train()
    logged = [values for values in trainer.state.log_history if "loss" in values]
    return [values["loss"] for values in logged], [values["grad_norm"] for values in logged]


if __name__ == "__main__":
    main()
