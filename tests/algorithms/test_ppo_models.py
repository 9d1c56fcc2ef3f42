"""PPO over real networks, built as a recipe builds them: with a learning rate of 0 nothing moves, over two epochs.

Old log-probabilities and values come in other batches, without gradient; that they are still those of the update to
1e-5 is what makes every later ratio mean something. On rotary and on absolute positions, prompts and responses ragged.
"""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, LlamaConfig

from llmrl.algorithms.config import PPOConfig
from llmrl.config import PPORun
from llmrl.data.config import PromptDataConfig
from llmrl.models.config import CriticConfig, ModelConfig
from llmrl.models.critic import ValueHead
from llmrl.models.training import initialize_head
from llmrl.optim.config import OptimizerConfig
from llmrl.reports.trackers import TrackerConfig, Trackers
from llmrl.rewards.config import RewardConfig, RewardFunctionConfig
from llmrl.rollout.config import RolloutConfig
from llmrl.trainers.config import RLRunConfig, UpdateConfig
from llmrl.wiring.checks import check_rl
from llmrl.wiring.rl import build_ppo
from tests.contexts import context_of

ROOT = Path(__file__).parents[2]
LLAMA = ROOT / "recipes" / "models" / "tiny_char_llama"


TOKENS = {"vocab_size": 99, "bos_token_id": None, "eos_token_id": 1, "initializer_range": 0.3}
MODELS = {
    "rotary": LlamaConfig(
        **TOKENS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    ),
    "absolute": GPT2Config(**TOKENS, n_positions=64, n_embd=32, n_layer=2, n_head=4),
}


@pytest.fixture(params=MODELS)
def model(request, tmp_path):
    shutil.copytree(LLAMA, tmp_path / "model")
    MODELS[request.param].save_pretrained(tmp_path / "model")
    return ModelConfig(path=str(tmp_path / "model"), from_scratch=True)


def build(model, folder, *, learning_rate, network):
    (folder / "train.csv").write_text("prompt,answer\n1+1=,2\n2+2=,4\n10+10=,20\n9+1=,10\n")
    rule = RewardFunctionConfig(name=f"{ROOT}/reward_models/arithmetic.py:correct")
    optimizer = OptimizerConfig(learning_rate=learning_rate)
    config = PPORun(
        model=model,
        data=PromptDataConfig(path=str(folder / "train.csv")),
        reward=RewardConfig(functions=(rule,)),
        rollout=RolloutConfig(prompts_per_iteration=24, max_response_tokens=24, temperature=1.5),
        algorithm=PPOConfig(entropy_coef=0.01, step_kl_target=0.1),
        critic=CriticConfig(network=network),
        update=UpdateConfig(minibatch_size=8, num_epochs=2, microbatch_tokens=100),
        optimizer=optimizer,
        critic_optimizer=optimizer,
        run=RLRunConfig(output_dir=str(folder / "run"), num_iterations=3),
    )
    (folder / "run").mkdir()
    trackers = Trackers(TrackerConfig(), output_dir=folder / "run")
    trainer = build_ppo(config, check_rl(config, dry=False), context=context_of(), trackers=trackers).trainer
    (head,) = (part for one in trainer.trained.values() for part in one.module.modules() if isinstance(part, ValueHead))
    initialize_head(head, "normal")
    return trainer


def watched_iteration(trainer):
    """The metrics of an iteration and those of each of its optimizer steps."""
    steps, update = [], trainer.update

    def watched(minibatch):
        metrics = update(minibatch)
        steps.append(metrics.values())
        return metrics

    trainer.update = watched
    return trainer.iterate().values(), steps


def weights_of(trainer):
    return {
        f"{network}.{name}": parameter.detach().clone()
        for network, trained in trainer.trained.items()
        for name, parameter in trained.module.named_parameters()
    }


@pytest.mark.parametrize("network", ["own", "shared"])
def test_learning_rate_0_moves_nothing_in_two_epochs(model, tmp_path, network):
    trainer = build(model, tmp_path, learning_rate=0.0, network=network)
    before = weights_of(trainer)
    values, steps = watched_iteration(trainer)
    assert all(torch.equal(before[name], now) for name, now in weights_of(trainer).items())
    assert len(steps) == 6
    for step in steps:
        assert step["policy/ratio_max_deviation"] < 1e-5
        assert step["policy/approx_kl"] == pytest.approx(0, abs=1e-9)
        assert step["policy/clip_fraction"] == step["value/clip_fraction"] == 0
        assert step["actor/grad_norm"] > 0
    assert values["policy/rollout_gap"] < 1e-5
    assert values["policy/step_kl"] == pytest.approx(0, abs=1e-9)
    assert values["kl/sequence"] == pytest.approx(0, abs=1e-5)
    assert 0 < values["response/finished_fraction"] < 1  # rows of many lengths


def test_only_the_first_minibatch_is_on_policy_once_something_moves(model, tmp_path):
    trainer = build(model, tmp_path, learning_rate=0.01, network="own")
    before = copy.deepcopy(weights_of(trainer))
    values, steps = watched_iteration(trainer)
    assert values["policy/ratio_max_deviation"] == steps[0]["policy/ratio_max_deviation"] < 1e-5
    assert all(step["policy/ratio_max_deviation"] > 1e-4 for step in steps[1:])
    moved = {name.split(".")[0] for name, now in weights_of(trainer).items() if not torch.equal(before[name], now)}
    assert moved == {"actor", "critic"}
