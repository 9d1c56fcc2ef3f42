"""What arguments of TRL, verl and OpenRLHF are called here; docs/trl.md has them too.

A name may end with ``*``. Each value goes on from "what other frameworks call NAME is".
"""

_NO_VLLM = "not needed: the engine samples from the trained weights"
_PRECISION = "model.dtype"
_LOGGED = "not needed: every iteration is logged"
_MEMORY = "update.microbatch_tokens"
_MINIBATCH = "update.minibatch_size, over all processes"
_PROMPTS = "rollout.prompts_per_iteration, over all processes"
_LENGTH = "run.num_iterations"
_EPOCHS = f"{_LENGTH}; --dry-run prints the epochs"
_DATA_LENGTH = "data.max_tokens"

EVERY_RUN: dict[str, str] = {
    "learning_rate": "optimizer.learning_rate",
    "lr_scheduler_type": "optimizer.schedule",
    "warmup_steps": "optimizer.warmup_steps",
    "warmup_ratio": "optimizer.warmup_steps, a number of steps",
    "weight_decay": "optimizer.weight_decay",
    "max_grad_norm": "optimizer.max_grad_norm",
    "adam_beta1": "optimizer.betas",
    "adam_beta2": "optimizer.betas",
    "bf16": _PRECISION,
    "fp16": _PRECISION,
    "model_init_kwargs": _PRECISION,
    "gradient_checkpointing": "model.gradient_checkpointing",
    "peft_config": "model.lora",
    "load_in_4bit": "model.quantization",
    "quantization_config": "model.quantization",
    "use_qlora": "model.quantization",
    "lora_r": "model.lora.rank",
    "lora_alpha": "model.lora.alpha",
    "lora_target_modules": "model.lora.targets",
    "packing": "model.packing",
    "disable_dropout": "not needed: dropout is always off",
    "chat_template_kwargs": "data.chat_template_kwargs",
    "seed": "run.seed",
    "save_steps": "run.checkpoint_every",
    "save_strategy": "run.checkpoint_every",
    "save_total_limit": "run.keep_checkpoints",
    "load_best_model_at_end": "run.best_metric",
    "metric_for_best_model": "run.best_metric",
    "resume_from_checkpoint": "not needed: the same command goes on with the run in run.output_dir",
    "report_to": "trackers.names",
    "logging_steps": _LOGGED,
    "logging_strategy": _LOGGED,
    "push_to_hub": "the command llmrl push",
    "deepspeed": "a file for accelerate launch --config_file",
}
"""Names that mean the same in every kind of run."""

SFT: dict[str, str] = {
    "max_steps": _LENGTH,
    "num_train_epochs": _EPOCHS,
    "per_device_train_batch_size": "sft.batch_size, over all processes",
    "gradient_accumulation_steps": "sft.batch_size, over all processes",
    "eval_strategy": "sft.evaluate_every",
    "eval_steps": "sft.evaluate_every",
    "max_length": _DATA_LENGTH,
    "max_seq_length": _DATA_LENGTH,
    "completion_only_loss": "not needed: the response alone is learned",
    "assistant_only_loss": "data.train_on",
}
"""Names of supervised fine-tuning."""

REWARD_MODEL: dict[str, str] = {
    "max_steps": "reward_model.num_epochs",
    "num_train_epochs": "reward_model.num_epochs",
    "per_device_train_batch_size": "reward_model.batch_size, over all processes",
    "gradient_accumulation_steps": "reward_model.batch_size, over all processes",
    "eval_strategy": "reward_model.evaluate_every",
    "eval_steps": "reward_model.evaluate_every",
    "max_length": _DATA_LENGTH,
    "center_rewards_coefficient": "reward_model.center_coef",
}
"""Names of reward models."""

RL: dict[str, str] = {
    "max_steps": _LENGTH,
    "num_train_epochs": _EPOCHS,
    "num_iterations": "update.num_epochs; the length of a run is in its section run",
    "per_device_train_batch_size": _MINIBATCH,
    "gradient_accumulation_steps": _MINIBATCH,
    "eval_strategy": "evaluation.every",
    "eval_steps": "evaluation.every",
    "generation_batch_size": _PROMPTS,
    "max_prompt_length": "data.max_prompt_tokens",
    "max_completion_length": "rollout.max_response_tokens",
    "temperature": "rollout.temperature",
    "top_p": "refused: what is sampled is the policy that is trained",
    "top_k": "refused: what is sampled is the policy that is trained",
    "min_p": "refused: what is sampled is the policy that is trained",
    "repetition_penalty": "refused: what is sampled is the policy that is trained",
    "use_vllm": _NO_VLLM,
    "vllm_*": _NO_VLLM,
    "reward_funcs": "reward.functions",
    "reward_weights": "reward.functions.<n>.weight",
    "log_completions": "run.samples_per_iteration",
    "beta": "algorithm.kl_coef",
    "epsilon": "algorithm.clip_low",
    "epsilon_high": "algorithm.clip_high",
    "train_batch_size": "rollout.prompts_per_iteration for verl, update.minibatch_size for OpenRLHF",
    "max_response_length": "rollout.max_response_tokens",
    "ppo_mini_batch_size": f"{_MINIBATCH}; it counts responses",
    "ppo_micro_batch_size_per_gpu": _MEMORY,
    "ppo_max_token_len_per_gpu": _MEMORY,
    "ppo_epochs": "update.num_epochs",
    "clip_ratio": "algorithm.clip_low and algorithm.clip_high",
    "clip_ratio_low": "algorithm.clip_low",
    "clip_ratio_high": "algorithm.clip_high",
    "clip_ratio_c": "algorithm.dual_clip",
    "kl_loss_coef": "algorithm.kl_coef",
    "total_epochs": _EPOCHS,
    "total_training_steps": _LENGTH,
    "test_freq": "evaluation.every",
    "save_freq": "run.checkpoint_every",
    "rollout_batch_size": _PROMPTS,
    "micro_train_batch_size": _MEMORY,
    "max_epochs": "update.num_epochs",
    "num_episodes": _EPOCHS,
    "prompt_max_len": "data.max_prompt_tokens",
    "generate_max_len": "rollout.max_response_tokens",
    "init_kl_coef": "algorithm.kl_coef",
    "eps_clip": "algorithm.clip_low and algorithm.clip_high",
    "actor_learning_rate": "optimizer.learning_rate",
}
"""Names of GRPO and PPO."""

GRPO: dict[str, str] = {
    "num_generations": "algorithm.group_size",
    "n_samples_per_prompt": "algorithm.group_size",
    "delta": "algorithm.dual_clip",
    "loss_type": "algorithm.aggregation, or algorithm.loss for cispo",
    "loss_agg_mode": "algorithm.aggregation",
    "scale_rewards": "algorithm.scale",
    "norm_adv_by_std_in_grpo": "algorithm.scale",
    "mask_truncated_completions": "algorithm.mask_truncated",
    "sync_ref_model": "algorithm.reference_refresh_every",
    "use_kl_in_reward": "algorithm.kl_form k1_reward",
    "ref_model_sync_steps": "algorithm.reference_refresh_every",
    "ref_model_mixup_alpha": "algorithm.reference_mixing",
    "multi_objective_aggregation": "reward.combine",
    "importance_sampling_level": "algorithm.ratio",
    "adv_estimator": "algorithm.baseline, or the command llmrl ppo",
    "advantage_estimator": "algorithm.baseline, or the command llmrl ppo",
}
"""Names of GRPO alone."""

PPO: dict[str, str] = {
    "total_episodes": f"{_LENGTH}, times the prompts of an iteration",
    "num_ppo_epochs": "update.num_epochs",
    "num_mini_batches": "update.minibatch_size, the responses of one",
    "value_model": "critic.network",
    "kl_coef": "algorithm.kl_coef",
    "kl_estimator": "not needed: the KL in the reward is k1",
    "cliprange": "algorithm.clip_low and algorithm.clip_high",
    "cliprange_value": "algorithm.value_clip",
    "vf_coef": "critic.value_coef",
    "gamma": "algorithm.gamma",
    "lam": "algorithm.gae_lambda",
    "lambd": "algorithm.gae_lambda",
    "missing_eos_penalty": "algorithm.missing_eos_penalty",
    "whiten_rewards": "algorithm.normalize_scores, which scales by all scores so far",
    "kl_target": "algorithm.kl_target",
    "critic_learning_rate": "critic_optimizer.learning_rate",
}
"""Names of PPO alone."""
