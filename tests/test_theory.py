"""The whole loop against theory: a bandit of one token with a KL to where it started.

The policy that maximizes E[score] - kl_coef * KL(policy, reference) is known:

    policy(a)  ∝  reference(a) * exp(score(a) / kl_coef)
"""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmrl.algorithms.config import GRPOConfig
from llmrl.algorithms.grpo import GRPO
from llmrl.batches import Prompts, Scores
from llmrl.microbatches import TokenBudget
from llmrl.models.heads import choose_head
from llmrl.models.policy import PolicyModule, TransformersPolicy
from llmrl.optim.config import OptimizerConfig
from llmrl.optim.local import LocalTrainable
from llmrl.reports.progress import Silent
from llmrl.rollout.native import NativeEngine
from llmrl.trainers.config import UpdateConfig
from llmrl.trainers.rl import RLTrainer
from tests.contexts import context_of, sampling_of

NUM_ACTIONS = 6
SCORES = torch.tensor([1.0, 0.2, 0.8, 0.0, 0.5, 0.9])
KL_COEF = 0.3
PROMPT = [1, 2]


class OnePrompt:
    def next(self, num_prompts):
        ids = torch.tensor([PROMPT] * num_prompts)
        return Prompts(ids=ids, mask=torch.ones_like(ids, dtype=torch.bool), rows=({"prompt": "?"},) * num_prompts)

    def state_dict(self):
        return {}

    def load_state_dict(self, state): ...


def scores_of_actions(scores):
    def reward(rollout):
        total = scores[rollout.sequences.response_ids[:, 0]]
        return Scores(total=total, per_token=torch.zeros(len(total), 1), parts={})

    return reward


def policy_over(model):
    module = PolicyModule(model, choose_head(model, NUM_ACTIONS), temperature=1.0, dtype=torch.float32)
    return module, TransformersPolicy(module)


@torch.no_grad()
def action_probabilities(model):
    return model(input_ids=torch.tensor([PROMPT])).logits[0, -1, :NUM_ACTIONS].softmax(0)


def train(config, *, scores=SCORES, num_iterations=150):
    """The policy after GRPO on the bandit, and the one it started from."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=NUM_ACTIONS,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=8,
        initializer_range=0.5,
    )
    model = LlamaForCausalLM(shape)
    module, actor = policy_over(model)
    _, reference = policy_over(copy.deepcopy(model).requires_grad_(False))
    before = action_probabilities(model)
    optimizer = OptimizerConfig(learning_rate=0.02, schedule="linear", max_grad_norm=100.0)
    trainer = RLTrainer(
        algorithm=GRPO(config, actor=actor, reference=reference, max_response_tokens=1),
        engine=NativeEngine(
            model, eos_ids=(0,), vocab_size=NUM_ACTIONS, dtype=torch.float32, max_rows=512, progress=Silent()
        ),
        reward=scores_of_actions(scores),
        prompts=OnePrompt(),
        trained={"actor": LocalTrainable(module, optimizer, num_steps=num_iterations)},
        update=UpdateConfig(minibatch_size=512),
        budget=TokenBudget(max_tokens=8192),
        prompts_per_iteration=512 // config.group_size,
        sampling=sampling_of(config.group_size, seed=0, max_response_tokens=1),
        context=context_of(),
        observe=lambda iteration, experience: None,
        reference=None,
        auxiliary=None,
        balance=None,
    )
    for _ in range(num_iterations):
        trainer.iterate()
    return action_probabilities(model), before


def total_variation(p, q):
    return float((p - q).abs().sum() / 2)


def optimum(reference, kl_coef):
    weights = reference * (SCORES / kl_coef).exp()
    return weights / weights.sum()


@pytest.mark.parametrize("kl_form", ["k2", "k3"])
def test_leave_one_out_without_scaling_reaches_the_optimum(kl_form):
    config = GRPOConfig(group_size=2, baseline="leave_one_out", scale="none", kl_coef=KL_COEF, kl_form=kl_form)
    policy, reference = train(config)
    assert total_variation(reference, optimum(reference, KL_COEF)) > 0.2
    assert total_variation(policy, optimum(reference, KL_COEF)) < 0.05


def test_a_mean_that_includes_the_response_itself_moves_the_optimum():
    # the baseline takes 1/G of every score with it, so with G = 2 the KL weighs twice as much
    policy, reference = train(GRPOConfig(group_size=2, scale="none", kl_coef=KL_COEF))
    assert total_variation(policy, optimum(reference, KL_COEF)) > 0.1
    assert total_variation(policy, optimum(reference, 2 * KL_COEF)) < 0.05


def test_equal_scores_without_a_kl_leave_every_weight_as_it_was():
    policy, reference = train(GRPOConfig(group_size=4), scores=torch.full((NUM_ACTIONS,), 0.9), num_iterations=2)
    assert (policy == reference).all()
