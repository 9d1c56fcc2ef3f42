"""Runs that train a critic: what they learn, and that PPO begins from it."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmrl.config import CriticRun, PPORun
from llmrl.data.config import PromptDataConfig, ScoredDataConfig
from llmrl.distributed.launch import LaunchError
from llmrl.models.config import CriticConfig, LoraSettings
from llmrl.models.critic_folder import VALUE_HEAD
from llmrl.models.saving import save_policy
from llmrl.optim.config import OptimizerConfig
from llmrl.rewards.config import RewardConfig, RewardFunctionConfig
from llmrl.rollout.config import RolloutConfig
from llmrl.trainers.config import CriticTrainingConfig, RLRunConfig, RunConfig
from llmrl.wiring.actors import load_actor
from llmrl.wiring.checks import check_critic_run, check_ppo
from llmrl.wiring.critic_run import build_critic
from llmrl.wiring.rl import build_ppo
from tests.contexts import CPU

from .conftest import ROOT, TINY, messages_of, roles_of

ROWS = [{"prompt": f"{n}+1=", "response": str(n % 2) * 2, "score": float(n % 2)} for n in range(10)]


@pytest.fixture
def policy(tmp_path) -> str:
    """A folder with the tiny model."""
    actor = load_actor(TINY, CPU, temperature=1.0, seed=0)
    save_policy(tmp_path / "policy", model=actor.model, adapted=None, tokenizer=actor.tokenizer, dtype=torch.float32)
    return str(tmp_path / "policy")


@pytest.fixture
def config(tmp_path, policy) -> CriticRun:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data = ScoredDataConfig(path=str(tmp_path / "rows.jsonl"), max_tokens=8)
    return CriticRun(
        model=dataclasses.replace(TINY, path=policy, from_scratch=False),
        data=data,
        evaluation_data=data,
        critic=CriticTrainingConfig(batch_size=8),
        optimizer=OptimizerConfig(learning_rate=3e-3),
        run=RunConfig(output_dir=str(tmp_path / "run"), num_iterations=12, checkpoint_every=1),
    )


def build_run(config):
    roles = roles_of(config)
    return build_critic(config, check_critic_run(config, dry=False), **roles), messages_of(roles)


def weights(config: CriticRun) -> dict[str, torch.Tensor]:
    final = Path(config.run.output_dir) / "final"
    files = [final / VALUE_HEAD, *final.rglob("*model.safetensors")]
    return {f"{file.name} {name}": x for file in files for name, x in load_file(file).items()}


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=4)], ids=["own", "adapter"])
def test_ppo_begins_with_the_values_that_were_learned(config, policy, lora, tmp_path):
    """An answer of ones scores 1 and one of zeros 0, which the critic can know once it has seen the first token."""
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, lora=lora))
    run, _ = build_run(config)
    before = run.evaluate()
    run.train()
    after = run.evaluate()
    assert before["eval/explained_variance"] == pytest.approx(0.0)
    assert after["eval/loss"] < 0.7 * before["eval/loss"]

    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    rule = RewardFunctionConfig(name=f"{ROOT}/reward_models/arithmetic.py:correct")
    network = "own" if lora is None else "adapter"
    ppo = PPORun(
        model=config.model,
        data=PromptDataConfig(path=str(tmp_path / "prompts.jsonl"), max_prompt_tokens=6),
        reward=RewardConfig(functions=(rule,)),
        rollout=RolloutConfig(prompts_per_iteration=4, max_response_tokens=3),
        critic=CriticConfig(network=network, path=str(Path(config.run.output_dir) / "final")),
        run=RLRunConfig(output_dir=str(tmp_path / "ppo"), num_iterations=1),
    )
    ppo_run = build_ppo(ppo, check_ppo(ppo, dry=False), **roles_of(ppo))
    batch = run.trainer.held_out.sequences
    with torch.no_grad():
        theirs = ppo_run.trainer.algorithm.networks.values(batch).values
        ours = run.trainer.objective.critic.values(batch).values
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=4)], ids=["own", "adapter"])
def test_a_resumed_run_is_bit_for_bit_the_undisturbed_one(config, lora, tmp_path):
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, lora=lora))
    build_run(config)[0].train()
    straight = weights(config)
    folder = str(tmp_path / "stopped")
    for num_iterations in (5, 12):
        settings = dataclasses.replace(config.run, output_dir=folder, num_iterations=num_iterations)
        stopped = dataclasses.replace(config, run=settings)
        build_run(stopped)[0].train()
    resumed = weights(stopped)
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], x) for name, x in resumed.items())


def test_an_adapter_is_refused_where_the_launch_splits_its_base(config, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    check_critic_run(config, dry=False)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, lora=LoraSettings(rank=4)))
    with pytest.raises(LaunchError, match=r"^model\.lora: .* launch with plain data parallel or ZeRO-2"):
        check_critic_run(config, dry=False)


def test_rows_that_are_too_long_are_told(config, tmp_path):
    rows = [*ROWS, {"prompt": "123456789+1=", "response": "123456790", "score": 1}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert build_run(config)[1] == [
        f"{section}: dropped 1 row longer than {section}.max_tokens: line 11" for section in ("data", "evaluation_data")
    ]


def test_the_loop_is_what_the_recipe_asks_for(config):
    settings = CriticTrainingConfig(batch_size=2, microbatch_tokens=77, evaluate_every=2, gamma=0.5)
    run, _ = build_run(dataclasses.replace(config, critic=settings))
    assert (run.trainer.batch_size, run.evaluate_every, run.trainer.objective.gamma) == (2, 2, 0.5)
    assert run.trainer.microbatcher.budget.max_tokens == 77
    assert run.trainer.objective.critic.microbatcher.budget.max_tokens == 77
    assert build_run(dataclasses.replace(config, evaluation_data=None))[0].evaluate is None


def test_a_critic_that_is_an_adapter_trains_no_layer_whole(config):
    lora = LoraSettings(rank=2, modules_to_save=("lm_head",))
    with pytest.raises(ValueError, match=r"^model\.lora\.modules_to_save \(lm_head\) are layers of an actor .* out$"):
        dataclasses.replace(config, model=dataclasses.replace(config.model, lora=lora))
