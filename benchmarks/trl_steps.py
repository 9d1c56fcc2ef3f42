"""The trainers of TRL for the workloads of `steps.py`, as shipped and tuned, with forced response lengths."""

import argparse
import json
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from common import Clock
from datasets import Dataset
from lengths import ForcedLengths
from peers import import_peer
from scoring import score
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from workloads import Workload, checksum

from llmrl.models.adapters import lora_config
from llmrl.models.config import LoraSettings

LEARNING_RATE = 1e-6
SHIPPED_BATCH = 8
"""Rows of a pass by TRL's defaults."""


def prepare_trl(
    args: argparse.Namespace, workload: Workload, clock: Clock, work: list[dict[str, int]], num_steps: int
) -> Callable[[], None]:
    """A run of TRL for as many steps; `args.worker` says whether it is tuned."""
    peer = TRLGRPO if workload.algorithm == "grpo" else TRLPPO
    return peer(args, workload, clock, work).prepare(num_steps)


def import_trainer(workload: Workload) -> Any:
    """The module with the trainer of the workload."""
    if workload.algorithm == "grpo":
        return import_peer("trl.trainer.grpo_trainer", workload.trl)
    return import_peer("trl.experimental.ppo.ppo_trainer", workload.trl)


class TRL:
    """What the trainers of TRL have in common."""

    def __init__(self, args: argparse.Namespace, workload: Workload, clock: Clock, work: list[dict[str, int]]) -> None:
        self.args = args
        self.workload = workload
        self.clock = clock
        self.work = work
        """Work of each step, for `steps.check_same_work`."""
        self.is_tuned = args.worker == "trl_tuned"
        self.dtype = getattr(torch, args.dtype)
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(args.model)
        self.eos_id: Any = self.tokenizer.eos_token_id
        rows = (args.folder / "prompts.jsonl").read_text().splitlines()
        self.prompts = [json.loads(row)["prompt"] for row in rows]

    def settings(self) -> dict[str, Any]:
        """Arguments of every trainer: the work that llmrl does, and nothing saved or reported."""
        rows = self.workload.num_responses
        batch = rows if self.is_tuned else min(SHIPPED_BATCH, rows)
        return {
            "output_dir": str(self.args.folder / self.args.worker),
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": rows // batch,
            "bf16": self.args.dtype == "bfloat16",
            "gradient_checkpointing": not self.is_tuned,
            "optim": "adamw_torch_fused",
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 1.0,
            "use_cpu": self.args.device == "cpu",
            "seed": self.args.seed,
            "disable_tqdm": True,
            "report_to": "none",
            "save_strategy": "no",
        }

    def load(self, kind: Any, name: Any, *, dtype: torch.dtype = torch.float32, **settings: Any) -> PreTrainedModel:
        return kind.from_pretrained(name, dtype=dtype, **settings)

    def in_one_dtype(self) -> Any:
        """Context in which weights are cast once, where tuned."""
        is_cast = self.is_tuned and self.dtype != torch.float32
        return torch.autocast(torch.device(self.args.device).type, self.dtype) if is_cast else nullcontext()

    def force(self, model: Any) -> None:
        """Makes `generate` keep the lengths of the workload, and counts what it does."""
        generate = model.generate
        lengths = self.workload.lengths(self.args.seed).to(self.args.device)

        def forced(input_ids: torch.Tensor, **settings: Any) -> Any:
            processor = ForcedLengths(lengths, eos_id=self.eos_id, width=input_ids.shape[1])
            with self.in_one_dtype():
                output = generate(input_ids=input_ids, logits_processor=LogitsProcessorList([processor]), **settings)
            ids = output if isinstance(output, torch.Tensor) else output.sequences
            self.count(input_ids, ids[:, input_ids.shape[1] :])
            return output

        model.generate = self.clock.timed("rollout", forced)

    def count(self, prompt_ids: torch.Tensor, response_ids: torch.Tensor) -> None:
        ends = response_ids.eq(self.eos_id).int()
        prompts = prompt_ids[:: self.workload.group_size].tolist()
        num_tokens = int((ends.argmax(dim=1) + 1).sum())
        self.work.append({"prompts": checksum(prompts), "response_tokens": num_tokens})

    def callback(self) -> TrainerCallback:
        clock = self.clock

        class StepEnded(TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                clock.step_ended()

        return StepEnded()


class TRLGRPO(TRL):
    """`GRPOTrainer`."""

    def prepare(self, num_steps: int) -> Callable[[], None]:
        trainer = self.trainer(num_steps)
        self.force(trainer.model)
        generate_and_score = trainer._generate_and_score_completions

        def scored(inputs: Any) -> Any:
            started, rollout = self.clock.now(), self.clock.phases["rollout"]
            outputs = generate_and_score(inputs)
            rollout = self.clock.phases["rollout"] - rollout
            self.clock.phases["scoring"] += self.clock.now() - started - rollout
            return outputs

        trainer._generate_and_score_completions = scored
        return trainer.train

    def trainer(self, num_steps: int) -> Any:
        """The trainer, not yet forced."""
        trl, workload = import_peer("trl", self.workload.trl), self.workload
        config = trl.GRPOConfig(
            **self.settings(),
            max_steps=num_steps,
            num_generations=workload.group_size,
            generation_batch_size=workload.num_responses,
            max_completion_length=workload.response_tokens,
            shuffle_dataset=False,
            scale_rewards="none",
            beta=workload.kl_coef,
            logging_steps=1,
        )

        def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
            return score([[str(self.tokenizer.decode([token])) for token in ids] for ids in completion_ids])

        return trl.GRPOTrainer(
            model=self.load(AutoModelForCausalLM, self.args.model),
            args=config,
            reward_funcs=reward,
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in self.prompts]),
            processing_class=self.tokenizer,
            callbacks=[self.callback()],
        )


class TRLPPO(TRL):
    """`PPOTrainer`, which TRL has no longer."""

    def prepare(self, num_steps: int) -> Callable[[], None]:
        module = import_trainer(self.workload)
        trainer, policy = self.trainer(num_steps)
        self.force(policy)
        self.time_scoring(module)
        return trainer.train

    def trainer(self, num_steps: int) -> tuple[Any, PreTrainedModel]:
        """The trainer, not yet forced, and the model that generates."""
        ppo = import_peer("trl.experimental.ppo", self.workload.trl)
        self.tokenizer.pad_token_id = next(id for id in self.tokenizer.all_special_ids if id != self.eos_id)
        frozen, lora = self.dtype if self.is_tuned else torch.float32, self.workload.lora_rank
        policy = self.load(AutoModelForCausalLM, self.args.model)
        trainer = ppo.PPOTrainer(
            args=ppo.PPOConfig(
                **self.settings(),
                num_ppo_epochs=1,
                num_mini_batches=1,
                total_episodes=num_steps * self.workload.num_responses,
                response_length=self.workload.response_tokens,
                kl_coef=self.workload.kl_coef,
                temperature=1.0,
                num_sample_generations=0,
            ),
            processing_class=self.tokenizer,
            model=policy,
            ref_model=None if lora else self.load(AutoModelForCausalLM, self.args.model, dtype=frozen),
            reward_model=self.scorer(frozen).eval(),
            value_model=self.scorer(torch.float32),
            train_dataset=Dataset.from_list([{"input_ids": ids} for ids in self.tokenizer(self.prompts)["input_ids"]]),
            eval_dataset=Dataset.from_list([{"input_ids": [0]}]),
            callbacks=[self.callback()],
            peft_config=lora_config(LoraSettings(rank=lora), policy, task_type="CAUSAL_LM") if lora else None,
        )
        return trainer, policy

    def scorer(self, dtype: torch.dtype) -> PreTrainedModel:
        folder = self.args.folder / "reward_model"
        model = self.load(AutoModelForSequenceClassification, folder, dtype=dtype, num_labels=1)
        model.config.pad_token_id = self.tokenizer.pad_token_id
        return model

    def time_scoring(self, module: Any) -> None:
        """Counts what lies between the rollout and the advantages, whose standardization ends it, as scoring."""
        generate, get_reward, whiten = module.batch_generation, module.get_reward, module.masked_whiten
        ended = 0.0

        def generated(*args: Any) -> Any:
            nonlocal ended
            output = generate(*args)
            ended = self.clock.now()
            return output

        def scored(*args: Any) -> Any:
            with self.in_one_dtype():
                return get_reward(*args)

        def whitened(*args: Any, **settings: Any) -> Any:
            output = whiten(*args, **settings)
            self.clock.phases["scoring"] = self.clock.now() - ended
            return output

        module.batch_generation, module.get_reward, module.masked_whiten = generated, scored, whitened
