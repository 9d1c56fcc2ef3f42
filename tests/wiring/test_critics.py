"""PPO's networks as a run has them: a critic of its own, adapters on one frozen base, two heads on one trunk."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from llmrl.algorithms.config import PPOConfig
from llmrl.config import PPORun, RewardModelRun
from llmrl.data.config import PreferenceDataConfig, PromptDataConfig
from llmrl.distributed.launch import LaunchError
from llmrl.models.adapters import lora_config
from llmrl.models.config import LoraSettings, ModelConfig, MTPSettings
from llmrl.models.critic import SharedTrunk, TransformersValueFunction, ValueHead, ValueModule
from llmrl.models.folders import ModelError
from llmrl.models.saving import save_policy
from llmrl.optim.config import OptimizerConfig
from llmrl.rewards.config import LearnedRewardConfig, RewardConfig
from llmrl.rollout.config import RolloutConfig
from llmrl.rollout.support import RolloutError
from llmrl.trainers.config import EvaluationConfig, OutputConfig, RewardModelConfig, RLRunConfig, UpdateConfig
from llmrl.wiring.actors import load_actor
from llmrl.wiring.checks import check_ppo, check_reward_run, check_rl
from llmrl.wiring.reward_model import build_reward_model
from llmrl.wiring.rewards import load_scorer
from llmrl.wiring.rl import build_evaluator, build_ppo
from tests.contexts import CPU, context_of, on_cpu
from tests.models.tiny import DrawnHead, assert_same_gradients
from tests.rollout.tiny import SIZES
from tests.test_cli import refuse_to_load, write_jsonl

from .conftest import TINY, messages_of, roles_of

LORA = LoraSettings(rank=2)
OTHER_LORA = {
    "llama": LoraSettings(rank=3, alpha=5, targets=("q_proj", "down_proj")),
    "gpt2": LoraSettings(rank=3, alpha=5, targets=("c_attn",)),
}
"""Of the reward model: nothing asks for the actor's, and there are layers that only the actor adapts."""


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**(SIZES | {"vocab_size": 99, "pad_token_id": 0, "eos_token_id": 1})))


def gpt2() -> GPT2LMHeadModel:
    """Positions learned one by one, a tied head, weights the other way round, and dropout by default."""
    sizes = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=1))


def save_base(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY.path).save_pretrained(folder)
    return folder


def train_reward_model(folder: Path, base: Path, lora: LoraSettings | None) -> Path:
    """By llmrl's own trainer, on pairs in which the side with more of the letter a is preferred."""
    rows = [{"prompt": f"{n}:", "chosen": "aab"[: 2 + n % 2], "rejected": "b" * (1 + n % 3)} for n in range(16)]
    data = PreferenceDataConfig(path=str(write_jsonl(folder / "pairs.jsonl", rows)))
    config = RewardModelRun(
        model=ModelConfig(path=str(base), lora=lora, dtype="float32"),
        data=data,
        evaluation_data=data,
        reward_model=RewardModelConfig(batch_size=8),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        run=OutputConfig(output_dir=str(folder / f"rm_{lora is not None}")),
    )
    build_reward_model(config, check_reward_run(config, dry=False), **roles_of(config)).train()
    return Path(config.run.output_dir) / "final"


@pytest.fixture(scope="module", params=[llama, pytest.param(gpt2, marks=pytest.mark.slow)], ids=["llama", "gpt2"])
def folders(request, tmp_path_factory) -> SimpleNamespace:
    """A language model, and two reward models that began as it: one trained by LoRA, the other whole."""
    folder = tmp_path_factory.mktemp(request.param.__name__)
    torch.manual_seed(0)
    base, lora = save_base(folder / "base", request.param()), OTHER_LORA[request.param.__name__]
    rewards = {name: train_reward_model(folder, base, lora) for name, lora in (("lora", lora), ("whole", None))}
    prompts = write_jsonl(folder / "prompts.jsonl", [{"prompt": f"{n}" * (1 + n % 3) + ":"} for n in range(12)])
    return SimpleNamespace(base=base, **rewards, prompts=prompts)


@pytest.fixture(autouse=True)
def _drawn_heads(monkeypatch):
    monkeypatch.setattr("llmrl.wiring.critics.ValueHead", DrawnHead)


@pytest.fixture
def config(folders, tmp_path) -> PPORun:
    """Full fine-tuning with a critic of its own."""
    return PPORun(
        model=ModelConfig(path=str(folders.base), dtype="float32"),
        data=PromptDataConfig(path=str(folders.prompts)),
        reward=RewardConfig(model=LearnedRewardConfig(path=str(folders.whole), microbatch_tokens=40)),
        rollout=RolloutConfig(prompts_per_iteration=8, max_response_tokens=6),
        algorithm=PPOConfig(kl_coef=0.05),
        update=UpdateConfig(minibatch_size=4, num_epochs=1, microbatch_tokens=40),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        critic_optimizer=OptimizerConfig(learning_rate=2e-2),
        run=RLRunConfig(output_dir=str(tmp_path / "run"), num_iterations=3),
    )


def with_critic(config: PPORun, **changes: Any) -> PPORun:
    return dataclasses.replace(config, critic=dataclasses.replace(config.critic, **changes))


def with_model(config: PPORun, **changes: Any) -> PPORun:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))


def with_reward(config: PPORun, **changes: Any) -> PPORun:
    assert config.reward.model is not None
    return dataclasses.replace(config, reward=RewardConfig(model=dataclasses.replace(config.reward.model, **changes)))


@pytest.fixture
def one_base(config, folders) -> PPORun:
    """Four roles on one frozen base."""
    adapters = with_critic(with_model(config, lora=LORA), network="adapter")
    return with_reward(adapters, path=str(folders.lora), on_actor_base=True)


def build_run(config: PPORun) -> Any:
    run = build_ppo(config, check_ppo(config, dry=False), **roles_of(config))
    Path(config.run.output_dir).mkdir(exist_ok=True)
    return run


def modules_of(run: Any) -> SimpleNamespace:
    """Whoever plays a part, as a module; the actor is its language model."""
    return SimpleNamespace(
        actor=run.trainer.trained["actor"].module.model,
        critic=run.trainer.trained["critic"].module,
        reward=run.trainer.reward.scorer.scorer.module,
    )


def move(module: nn.Module, seed: int = 7) -> None:
    """What training does: other weights wherever they may learn, so that no adapter is zero any more."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def changed(module: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}


def learning(module: nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters() if p.requires_grad}


def storage(module: nn.Module) -> set[int]:
    return {p.data_ptr() for p in module.parameters()}


def rollout_of(run: Any) -> Any:
    trainer = run.trainer
    trainer.engine.load_weights(trainer.trained["actor"])
    with torch.no_grad():
        return trainer.collect(trainer.prompts.next(8))[:2]


def losses_of(run: Any) -> Any:
    """The losses of one rollout as the algorithm yields them, every token counting the same."""
    algorithm = run.trainer.algorithm
    with torch.no_grad():
        experience, _ = algorithm.experience(*rollout_of(run))
    mask = experience.counted
    return algorithm.losses(experience, mask.float() / mask.sum())


# --- one base, four roles ---------------------------------------------------------------------------------------------


def test_four_roles_stand_on_the_same_weights(one_base):
    """And each has its adapter, and its head, to itself."""
    run = build_run(one_base)
    roles = modules_of(run)
    base = {name: p for name, p in roles.actor.named_parameters() if "lora_" not in name}
    assert not any(p.requires_grad for p in base.values())
    shared = {p.data_ptr() for p in base.values()}
    for module in (roles.critic, roles.reward):
        for name, p in module.named_parameters():
            owned = "lora_" in name or name.startswith(("head.", "model.score."))
            assert (p.data_ptr() in shared) != owned, name
    assert storage(roles.critic) & storage(roles.reward) == shared & storage(roles.critic)
    assert storage(roles.critic) | storage(roles.actor) | storage(roles.reward) > shared
    assert run.trainer.algorithm.reference.policy.actor.module is run.trainer.trained["actor"].module
    # every weight of the trunk is shared, not just some
    trunk = {p.data_ptr() for name, p in roles.actor.base_model.named_parameters() if "lora_" not in name}
    assert trunk <= storage(roles.critic)
    assert trunk <= storage(roles.reward)


def test_scores_and_values_are_those_of_models_of_their_own(one_base, folders):
    """Also when the actor has moved, and while it takes the part of the reference."""
    run = build_run(one_base)
    roles, algorithm = modules_of(run), run.trainer.algorithm
    move(roles.actor)
    move(roles.critic)
    rollout, scores = rollout_of(run)
    sequences = run.trainer.reward.encode(rollout)

    merged = load_scorer(ModelConfig(path=str(folders.lora)), normalize=True, place=on_cpu)
    assert_close(run.trainer.reward.scorer.scores(sequences), merged.scorer.scores(sequences), rtol=1e-5, atol=1e-5)
    assert_close(scores.parts["model"], merged.normalize(merged.scorer.scores(sequences)), rtol=1e-4, atol=1e-5)

    with torch.no_grad():
        outputs = algorithm.networks.both(rollout.sequences)
        ref_logprobs = algorithm.reference.logprobs(rollout.sequences).logprobs
        of_critic = critic_apart(roles.critic, folders.base).values(rollout.sequences)
        assert_close(dict(of_critic.named), {name: outputs.named[name] for name in ("values", "last_values")})
        start = load_actor(ModelConfig(path=str(folders.base)), CPU, temperature=1.0, seed=0)
        assert_close(ref_logprobs, start.policy.logprobs(rollout.sequences).logprobs, rtol=1e-5, atol=1e-5)
        again = algorithm.networks.both(rollout.sequences)
    assert (ref_logprobs - outputs.logprobs).abs().max() > 0.1
    assert_close(dict(again.named), dict(outputs.named), rtol=0, atol=0)


def critic_apart(critic: Any, base: Path) -> TransformersValueFunction:
    """The same critic on weights of its own, its adapter merged into them."""
    trunk = AutoModelForCausalLM.from_pretrained(base).base_model
    adapted = get_peft_model(trunk, lora_config(LORA, trunk, task_type="FEATURE_EXTRACTION"))
    ours = {name: p for name, p in critic.trunk.named_parameters() if "lora_" in name}
    theirs = {name: p for name, p in trunk.named_parameters() if "lora_" in name}
    assert ours.keys() == theirs.keys()
    with torch.no_grad():
        for name, p in theirs.items():
            p.copy_(ours[name])
    merged = adapted.merge_and_unload().eval()
    return TransformersValueFunction(ValueModule(merged, critic.head, dtype=torch.float32))


def test_every_adapter_gets_its_gradient_and_only_its_own(one_base):
    run = build_run(one_base)
    roles = modules_of(run)
    parts = {"actor": roles.actor, "critic": roles.critic}
    for module in parts.values():
        move(module)
    reward = snapshot(roles.reward)
    seen = []
    for name, loss, _ in losses_of(run):
        seen.append(name)
        loss.backward()
        for part, module in {**parts, "reward": roles.reward}.items():
            has_gradient = {n for n, p in module.named_parameters() if p.grad is not None}
            assert has_gradient == (learning(module) if part == name else set()), part
        assert [n for n, p in parts[name].named_parameters() if p.requires_grad and not p.grad.any()] == []
        parts[name].zero_grad(set_to_none=True)
    assert seen == ["actor", "critic"]
    assert {"lora_" in n for n in learning(roles.actor)} == {True}
    assert {n for n in learning(roles.critic) if "lora_" not in n} == {"head.weight"}
    assert learning(roles.reward) == set()
    assert changed(roles.reward, reward) == set()


def test_an_iteration_moves_two_adapters_and_a_head_and_nothing_else(one_base, folders):
    run = build_run(one_base)
    roles = modules_of(run)
    for module in (roles.actor, roles.critic):
        move(module)
    run.trainer.engine.load_weights(run.trainer.trained["actor"])
    before = {name: snapshot(module) for name, module in vars(roles).items()}
    metrics = run.trainer.iterate().values()
    assert changed(roles.actor, before["actor"]) == learning(roles.actor)
    assert changed(roles.critic, before["critic"]) == learning(roles.critic)
    assert changed(roles.reward, before["reward"]) == set()
    assert metrics["policy/ratio_max_deviation"] < 1e-4
    assert metrics["actor/skipped_steps"] == metrics["critic/skipped_steps"] == 0
    start = AutoModelForCausalLM.from_pretrained(folders.base).state_dict()
    for name, p in roles.actor.named_parameters():
        if "lora_" not in name:
            assert torch.equal(p, start[name.replace(".base_layer", "")]), name


def test_layers_that_the_actor_trains_whole_are_its_own(one_base, folders):
    """Critic and reward model read the originals; a state has them, and the engine reads them."""
    layers = ("embed_tokens", "norm") if "llama" in str(folders.base) else ("ln_f",)
    config = with_model(one_base, lora=LoraSettings(rank=2, modules_to_save=layers))
    run = build_run(config)
    roles, trained = modules_of(run), run.trainer.trained["actor"]
    whole = {name for name in learning(roles.actor) if "lora_" not in name}
    assert {name.split(".")[-4] for name in whole} == set(layers)
    rollout, _ = rollout_of(run)
    sequences = rollout.sequences
    others = {"values": run.trainer.algorithm.networks.values, "logprobs": run.trainer.algorithm.reference.logprobs}
    with torch.no_grad():
        before = {name: ask(sequences).named[name] for name, ask in others.items()}
        before["scores"] = run.trainer.reward.scorer.scores(sequences)
        old_logprobs = run.trainer.algorithm.networks.logprobs(sequences).logprobs
        move(roles.actor)
        after = {name: ask(sequences).named[name] for name, ask in others.items()}
        after["scores"] = run.trainer.reward.scorer.scores(sequences)
        logprobs = run.trainer.algorithm.networks.logprobs(sequences).logprobs
    assert (logprobs - old_logprobs).abs().max() > 0.1
    assert_close(after, before, rtol=0, atol=0)
    metrics = run.trainer.iterate().values()
    assert metrics["policy/ratio_max_deviation"] < 1e-4
    state, other = trained.state_dict(), f"{config.run.output_dir}_2"
    assert {f"model.{name}" for name in whole} < state["parameters"].keys()

    again = build_run(dataclasses.replace(config, run=dataclasses.replace(config.run, output_dir=other)))
    again.trainer.trained["actor"].load_state_dict(state)
    with torch.no_grad():
        resumed, kept = (r.trainer.algorithm.networks.logprobs(sequences).logprobs for r in (again, run))
    assert_close(resumed, kept, rtol=0, atol=0)


def test_saving_the_actor_leaves_no_trace_of_the_others(one_base, folders, tmp_path):
    run = build_run(one_base)
    roles = modules_of(run)
    run.trainer.iterate()
    before = {name: snapshot(module) for name, module in vars(roles).items()}
    trained = {name: learning(module) for name, module in vars(roles).items()}
    run.save_model(tmp_path / "final")
    for name, module in vars(roles).items():
        assert changed(module, before[name]) == set()
        assert learning(module) == trained[name]

    files = {
        name: load_file(folder / "model.safetensors")
        for name, folder in (("base", folders.base), ("ours", tmp_path / "final"))
    }
    assert files["ours"].keys() == files["base"].keys()
    adapter = load_file(tmp_path / "final" / "adapter" / "adapter_model.safetensors")
    ours = {
        f"base_model.model.{name}".replace(".default", ""): p for name, p in before["actor"].items() if "lora_" in name
    }
    assert adapter.keys() == ours.keys()
    assert all(torch.equal(adapter[name], p) for name, p in ours.items())
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "final").eval()
    ids = torch.tensor([[7, 8, 9, 20, 21]])
    with torch.no_grad():
        logits = [model(input_ids=ids, use_cache=False).logits for model in (saved, roles.actor)]
    assert_close(*logits, rtol=1e-4, atol=1e-4)
    run.trainer.iterate()  # and it goes on
    assert changed(roles.actor, before["actor"]) >= learning(roles.actor)


@pytest.mark.parametrize("network", ["own", "reward_model", "adapter", "shared"])
def test_gradient_checkpointing_changes_memory_alone(one_base, network):
    grads, num_forwards = [], []
    for checkpointing in (False, True):
        settings = with_critic(one_base, network=network)
        run = build_run(with_model(settings, gradient_checkpointing=checkpointing))
        trained = {name: trainable.module for name, trainable in run.trainer.trained.items()}
        calls = []
        trunk = trained["actor"].model.base_model if network == "shared" else trained["critic"].trunk
        layers = trunk.layers if hasattr(trunk, "layers") else trunk.h
        layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(torch.is_grad_enabled()))
        for module in trained.values():
            move(module)
        for _, loss, _ in losses_of(run):
            loss.backward()
        grads.append(
            {f"{name}.{n}": p.grad for name, m in trained.items() for n, p in m.named_parameters() if p.requires_grad}
        )
        num_forwards.append(sum(calls))
    assert num_forwards == [1, 2]  # recomputed in the backward pass, or it was never on
    assert all(grad.any() for grad in grads[0].values())
    assert_same_gradients(grads[1], grads[0])


# --- a critic that is kept --------------------------------------------------------------------------------------------


def trained_critic(config: PPORun, folder: Path) -> Any:
    """A run whose networks have moved, saved to a folder."""
    run = build_run(config)
    for trainable in run.trainer.trained.values():
        move(trainable.module)
    run.save_model(folder)
    return run


@pytest.mark.parametrize("network", ["own", "reward_model", "adapter", "shared"])
def test_a_kept_critic_gives_the_same_values_in_another_run(one_base, tmp_path, network):
    """To the bit, where its trunk is that of the run which saved it."""
    saved = with_critic(one_base, network=network)
    if network != "adapter":
        saved = with_model(with_reward(saved, on_actor_base=False), lora=None)
    run = trained_critic(saved, tmp_path / "first")
    critic = tmp_path / "first" / "critic"
    has_own = {"own": "model.safetensors", "reward_model": "model.safetensors", "adapter": "adapter"}.get(network)
    assert {"value_head.safetensors", "config.json", "tokenizer.json"} <= {path.name for path in critic.iterdir()}
    assert {name for name in ("model.safetensors", "adapter") if (critic / name).exists()} == {has_own} - {None}
    assert not (critic / "value_head.safetensors").stat().st_size > 1000

    settings = with_critic(saved, path=str(critic), network="own" if network == "reward_model" else network)
    if network == "shared":
        settings = with_model(settings, path=str(tmp_path / "first"))
    again = build_run(settings)
    rollout, _ = rollout_of(run)
    with torch.no_grad():
        ours, theirs = (each.trainer.algorithm.networks.values(rollout.sequences) for each in (run, again))
    assert ours.values.abs().max() > 0.01
    assert torch.equal(ours.values, theirs.values)
    assert torch.equal(ours.last_values, theirs.last_values)
    names = [
        learning(each.trainer.trained.get("critic", each.trainer.trained["actor"]).module) for each in (run, again)
    ]
    assert names[0] == names[1]  # what learned goes on learning


@pytest.mark.parametrize("dry", [False, True])
def test_a_folder_that_is_no_fitting_critic_is_refused(config, folders, monkeypatch, tmp_path, dry):
    trained_critic(config, tmp_path / "own")
    trained_critic(with_critic(config, network="shared"), tmp_path / "shared")
    own, shared = str(tmp_path / "own" / "critic"), str(tmp_path / "shared" / "critic")
    foreign = AutoTokenizer.from_pretrained(folders.base)
    foreign.eos_token = "a"
    other = retokenized(tmp_path / "own" / "critic", tmp_path / "foreign", foreign)
    wide = Path(shutil.copytree(own, tmp_path / "wide"))
    save_file({"weight": torch.zeros(1, 7)}, wide / "value_head.safetensors")
    torn = Path(shutil.copytree(own, tmp_path / "torn"))
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:-1])
    for path, network, problem in (
        (str(tmp_path / "own"), "own", f"holds no value_head.safetensors, so it is no critic; did you mean {own}?"),
        (str(tmp_path / "ownn"), "own", f"is no folder; did you mean {tmp_path / 'own'}?"),
        (shared, "own", "holds a value head alone, which reads the trunk of the actor that was saved with it; set "
         "critic.network to shared, or name another critic"),
        (own, "shared", "holds a critic with a trunk of its own; set critic.network to own, or name another critic"),
        (str(other), "own", f"reads other tokens than model.path ({folders.base}), and the critic reads the policy's"),
        (str(wide), "own", "its value_head.safetensors has [1, 7] where the trunk needs a weight of [1, 32]"),
        (str(torn), "own", "it is truncated"),
    ):  # fmt: skip
        message = refusal(with_critic(config, network=network, path=path), monkeypatch, dry=dry)
        assert f"critic.path ({path})" in message
        assert problem in message


def test_an_adapter_on_another_base_is_refused(one_base, folders, monkeypatch, tmp_path):
    trained_critic(one_base, tmp_path / "first")
    critic = str(tmp_path / "first" / "critic")
    other = with_reward(with_model(one_base, path=str(folders.whole)), on_actor_base=False)
    shutil.copytree(folders.base, tmp_path / "base")
    message = refusal(with_critic(with_model(other, path=str(tmp_path / "base")), path=critic), monkeypatch, dry=False)
    assert message.startswith(f"critic.path ({critic}) is an adapter on {folders.base}, and the actor's base is ")


def test_a_critic_that_a_command_makes_need_not_be_there_in_a_dry_run(config, tmp_path):
    path = str(tmp_path / "critic" / "final")
    made = dataclasses.replace(with_critic(config, path=path), made_by={path: "llmrl critic critic.yaml"})
    assert f"critic.path ({path}) does not exist yet; `llmrl critic critic.yaml` makes it" in (
        check_ppo(made, dry=True).unchecked
    )
    with pytest.raises(ModelError, match=r"make it with `llmrl critic critic\.yaml`"):
        check_ppo(made, dry=False)


def test_another_critic_is_another_run(config, tmp_path):
    """Its weights, and those of its adapter, are part of what the run reads."""
    trained_critic(config, tmp_path / "first")
    reads = with_critic(config, path=str(tmp_path / "first" / "critic"))
    before = check_ppo(reads, dry=False).contents["critic.path"]
    run = build_run(reads)
    move(run.trainer.trained["critic"].module, seed=3)
    run.save_model(tmp_path / "first")
    assert check_ppo(reads, dry=False).contents["critic.path"] != before


# --- a critic of its own ----------------------------------------------------------------------------------------------


def assert_apart(run: Any) -> None:
    """The critic's weights are its own memory, and every one of them learns; the reward model's do not."""
    roles = modules_of(run)
    assert learning(roles.reward) == set()
    assert not storage(roles.critic) & (storage(roles.actor) | storage(roles.reward))
    assert learning(roles.critic) == {name for name, _ in roles.critic.named_parameters()}
    assert {p.dtype for p in roles.critic.parameters()} == {torch.float32}


def weights_of(trunk: nn.Module) -> dict[str, Tensor]:
    return dict(trunk.state_dict())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_a_body_from_the_actor_is_the_actor_bit_for_bit(config, folders, lora, dtype):
    run = build_run(with_model(config, lora=lora, dtype=dtype))
    start = AutoModelForCausalLM.from_pretrained(folders.base).base_model
    trunk = weights_of(modules_of(run).critic.trunk)
    assert trunk.keys() == weights_of(start).keys()
    assert all(torch.equal(trunk[name], p) for name, p in weights_of(start).items())
    assert_apart(run)


def test_a_body_from_an_actor_that_came_with_an_adapter_has_it_merged(config, folders, tmp_path):
    """Such a run goes on training the adapter: the actor is more than its base."""
    actor = load_actor(ModelConfig(path=str(folders.base), lora=LORA), CPU, temperature=1.0, seed=0)
    move(actor.model)
    parts = {"model": actor.model, "adapted": actor.adapted, "tokenizer": actor.tokenizer, "dtype": actor.dtype}
    save_policy(tmp_path / "earlier", **parts)
    run = build_run(with_model(config, path=str(tmp_path / "earlier" / "adapter")))
    ids = torch.tensor([[7, 8, 9, 20, 21]])
    roles = modules_of(run)
    with torch.no_grad():
        ours, actors = (
            trunk(ids, use_cache=False).last_hidden_state for trunk in (roles.critic.trunk, roles.actor.base_model)
        )
        base = AutoModelForCausalLM.from_pretrained(folders.base).base_model(ids, use_cache=False).last_hidden_state
    assert_close(ours, actors, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours, base, atol=0.01)
    assert_apart(run)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_a_body_from_the_reward_model_is_the_reward_model_bit_for_bit(config, folders, lora, dtype):
    run = build_run(with_critic(with_model(config, lora=lora, dtype=dtype), network="reward_model"))
    theirs = weights_of(AutoModelForSequenceClassification.from_pretrained(folders.whole).base_model)
    ours = weights_of(modules_of(run).critic.trunk)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], p) for name, p in theirs.items())
    start = AutoModelForCausalLM.from_pretrained(folders.base).base_model
    assert any(not torch.equal(ours[name], p) for name, p in weights_of(start).items())
    assert_apart(run)


def save_scorer(folder: Path, config: Any) -> str:
    """A reward model with random weights that reads the policy's tokens."""
    config.num_labels = 1
    return str(save_base(folder, AutoModelForSequenceClassification.from_config(config)))


def test_the_head_is_as_wide_as_its_trunk(config, tmp_path):
    wide = LlamaConfig(**(SIZES | {"vocab_size": 99, "hidden_size": 48, "pad_token_id": 0, "eos_token_id": 1}))
    body = with_critic(with_reward(config, path=save_scorer(tmp_path / "wide", wide)), network="reward_model")
    run = build_run(body)
    roles = modules_of(run)
    assert roles.critic.head.weight.shape == (1, 48)
    before = snapshot(roles.critic)
    run.trainer.iterate()
    assert changed(roles.critic, before) == learning(roles.critic)


@pytest.mark.parametrize(("network", "whose"), [("reward_model", "critic"), ("own", "reward model")])
def test_every_model_that_reads_a_response_must_have_room_for_it(config, tmp_path, network, whose):
    """Prompts of up to 4 tokens with responses of 6. Whatever the policy's own positions are."""
    short = GPT2Config(vocab_size=99, n_embd=8, n_layer=1, n_head=1, n_positions=9, pad_token_id=0, eos_token_id=1)
    limited = with_critic(with_reward(config, path=save_scorer(tmp_path / "short", short)), network=network)
    told = rf"rollout\.max_response_tokens \(6\) with a prompt of \d+ tokens exceeds the 9 positions of the {whose};"
    with pytest.raises(RolloutError, match=told):
        build_run(limited)
    build_run(dataclasses.replace(limited, rollout=dataclasses.replace(config.rollout, max_response_tokens=2)))


def test_an_evaluation_must_leave_its_reward_model_room_too(config, tmp_path):
    short = GPT2Config(vocab_size=99, n_embd=8, n_layer=1, n_head=1, n_positions=9, pad_token_id=0, eos_token_id=1)
    limited = with_reward(config, path=save_scorer(tmp_path / "short", short))
    limited = dataclasses.replace(limited, evaluation_data=config.data)
    with pytest.raises(RolloutError, match="exceeds the 9 positions of the reward model"):
        build_evaluator(limited, check_rl(limited, dry=False, trains=False), context_of())


def test_targets_that_the_critic_lacks_are_refused(one_base):
    """The LM head is the actor's alone; a tied one is refused whoever has it."""
    head = with_model(one_base, lora=LoraSettings(rank=2, targets=("lm_head",)))
    told = r"^model\.lora\.targets \(lm_head\) names no layer of the critic|one matrix for its input and its output"
    with pytest.raises(ModelError, match=told):
        build_run(head)


@pytest.mark.parametrize("network", ["own", "reward_model"])
def test_actor_and_critic_learn_each_by_itself(config, network):
    run = build_run(with_critic(config, network=network))
    roles, trained = modules_of(run), run.trainer.trained
    losses = losses_of(run)
    for name, loss, _ in losses:
        before = {part: snapshot(module) for part, module in vars(roles).items()}
        trained[name].backward(loss)
        trained[name].optimizer_step()
        moved = {part for part, module in vars(roles).items() if changed(module, before[part])}
        assert moved == {name}


def test_new_weights_come_from_the_seed(one_base):
    first = snapshot(modules_of(build_run(one_base)).critic)
    torch.rand(3)
    assert changed(modules_of(build_run(one_base)).critic, first) == set()
    other = dataclasses.replace(one_base, run=dataclasses.replace(one_base.run, seed=1))
    assert "head.weight" in changed(modules_of(build_run(other)).critic, first)


@pytest.mark.parametrize("network", ["own", "adapter", "shared"])
def test_the_critic_computes_in_the_arithmetic_of_the_actor(config, network):
    lora = LORA if network == "adapter" else None
    run = build_run(with_critic(with_model(config, dtype="bfloat16", lora=lora), network=network))
    networks, seen = run.trainer.algorithm.networks, []
    trunk = networks.networks.module.policy.model.base_model if network == "shared" else modules_of(run).critic.trunk
    trunk.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    rollout, _ = rollout_of(run)
    seen.clear()
    with torch.no_grad():
        values = networks.values(rollout.sequences).values
    assert seen
    assert all(seen)
    assert values.dtype == torch.float32


def test_every_value_is_0_at_first(config, monkeypatch):
    monkeypatch.setattr("llmrl.wiring.critics.ValueHead", ValueHead)
    run = build_run(config)
    outputs = run.trainer.algorithm.networks.values(rollout_of(run)[0].sequences)
    values, last_values = outputs.values, outputs.last_values
    assert not values.any()
    assert not last_values.any()


# --- what learns when, and how fast -----------------------------------------------------------------------------------


def test_in_the_warm_up_the_critic_learns_alone(config):
    run = build_run(with_critic(config, warmup_iterations=1))
    roles = modules_of(run)
    before = {name: snapshot(module) for name, module in vars(roles).items()}
    metrics = run.trainer.iterate().values()
    assert not changed(roles.actor, before["actor"])
    assert changed(roles.critic, before["critic"]) == learning(roles.critic)
    assert not any(name.startswith("actor/") for name in metrics)
    metrics = run.trainer.iterate().values()
    assert changed(roles.actor, before["actor"]) == learning(roles.actor)
    assert metrics["actor/learning_rate"] == pytest.approx(1e-2)
    assert metrics["critic/learning_rate"] == pytest.approx(2e-2)


@pytest.mark.parametrize("kl_coef", [0.0, 0.05])
def test_the_only_step_on_a_rollout_needs_the_actor_before_it_for_a_kl_alone(config, kl_coef):
    update = dataclasses.replace(config.update, minibatch_size=8, microbatch_tokens=8192)
    run = build_run(dataclasses.replace(config, algorithm=PPOConfig(kl_coef=kl_coef), update=update))
    passes = []
    for name, trained in run.trainer.trained.items():
        trained.module.register_forward_pre_hook(lambda *_, name=name: passes.append((name, torch.is_grad_enabled())))
    values = run.trainer.iterate().values()
    scored = [("actor", False)] if kl_coef else []
    assert sorted(passes) == [*scored, ("actor", True), ("critic", False), ("critic", True)]
    assert values["policy/entropy"] > 1
    assert values["policy/rollout_gap"] < 1e-5


def test_schedules_end_with_the_run_of_each(config):
    """3 iterations of 2 steps; the actor has 2 of them."""
    linear = {name: OptimizerConfig(learning_rate=1.0, schedule="linear") for name in ("optimizer", "critic_optimizer")}
    run = build_run(dataclasses.replace(with_critic(config, warmup_iterations=1), **linear))
    rates = {}
    for name, num_steps in (("actor", 4), ("critic", 6)):
        run.trainer.trained[name].num_steps_done = num_steps - 1
        rates[name] = run.trainer.trained[name].learning_rate
    assert rates == {"actor": pytest.approx(1 / 4), "critic": pytest.approx(1 / 6)}


def test_the_settings_of_ppo_reach_it(config):
    """Each of them is another number than its default."""
    settings = dataclasses.replace(
        with_critic(config, warmup_iterations=2, value_coef=0.3),
        algorithm=PPOConfig(kl_coef=0.07, overlong_buffer_tokens=2, gamma=0.9),
        optimizer=OptimizerConfig(learning_rate=1e-3, max_grad_norm=0.3, weight_decay=0.1),
        critic_optimizer=OptimizerConfig(learning_rate=2e-3, max_grad_norm=0.7, weight_decay=0.2),
    )
    trainer = build_run(settings).trainer
    algorithm = trainer.algorithm
    assert algorithm.config == settings.algorithm
    assert (algorithm.max_response_tokens, algorithm.warmup_iterations, algorithm.value_coef) == (6, 2, 0.3)
    assert (trainer.group_size, trainer.config) == (1, settings.update)
    for name, expected in (("actor", settings.optimizer), ("critic", settings.critic_optimizer)):
        trained = trainer.trained[name]
        assert trained.peak_learning_rate == expected.learning_rate
        assert trained.max_grad_norm == expected.max_grad_norm
        assert {group["weight_decay"] for group in trained.optimizer.param_groups} == {0.0, expected.weight_decay}


@pytest.mark.parametrize("network", ["own", "reward_model", "shared"])
def test_the_head_begins_at_zero(config, network, monkeypatch):
    monkeypatch.setattr("llmrl.wiring.critics.ValueHead", ValueHead)
    trained = build_run(with_critic(config, network=network)).trainer.trained
    (head,) = (part for one in trained.values() for part in one.module.modules() if isinstance(part, ValueHead))
    assert not head.weight.any()


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_a_shared_trunk_is_one_module_whose_head_has_a_rate_of_its_own(config, lora):
    run = build_run(with_critic(with_model(config, lora=lora), network="shared"))
    (trained,) = run.trainer.trained.values()
    assert isinstance(run.trainer.algorithm.networks.networks, SharedTrunk)
    peaks = {id(p): group["peak"] for group in trained.optimizer.param_groups for p in group["params"]}
    rates = {name: peaks[id(p)] for name, p in trained.parameters.items()}
    assert {name for name, rate in rates.items() if rate == 2e-2} == {"head.weight"}
    assert {rate for name, rate in rates.items() if name != "head.weight"} == {1e-2}
    before = snapshot(trained.module)
    metrics = run.trainer.iterate().values()
    assert {"policy/loss", "value/loss"} <= metrics.keys()
    moved = changed(trained.module, before)
    assert moved <= learning(trained.module)
    assert "head.weight" in moved
    assert any(name.startswith("policy.model.") for name in moved)


@pytest.fixture(params=["whole", "adapters"])
def phasic(request, config, one_base) -> PPORun:
    """Auxiliary phases after every second iteration."""
    run = config if request.param == "whole" else one_base
    return dataclasses.replace(run, algorithm=PPOConfig(kl_coef=0.05, auxiliary_every=2, auxiliary_epochs=3))


def test_an_auxiliary_phase_trains_the_actors_trunk_and_its_head(phasic, tmp_path):
    """In the iterations between them the head stands still; what is saved is an ordinary model without it."""
    run = build_run(phasic)
    trainer = run.trainer
    actor, critic = (trainer.trained[name] for name in ("actor", "critic"))
    peaks = {id(p): group["peak"] for group in actor.optimizer.param_groups for p in group["params"]}
    assert {name for name, p in actor.parameters.items() if peaks[id(p)] == 2e-2} == {"head.weight"}
    before = snapshot(actor.module)
    metrics = trainer.iterate().values()
    assert not any(name.startswith("auxiliary/") for name in metrics)
    assert "head.weight" not in changed(actor.module, before)

    seen, learn_again = {}, trainer.learn_again

    def watched(auxiliary, experience):
        before = [snapshot(x.module) for x in (actor, critic)]
        metrics = learn_again(auxiliary, experience)
        moved = [changed(x.module, was) for x, was in zip((actor, critic), before, strict=True)]
        seen.update(actor=moved[0], critic=moved[1])
        return metrics

    trainer.learn_again = watched
    metrics = trainer.iterate().values()
    assert {"auxiliary/value_loss", "auxiliary/explained_variance", "auxiliary/kl", "auxiliary/critic_loss"} < set(
        metrics
    )
    assert metrics["auxiliary/kl"] >= 0
    assert metrics["policy/ratio_max_deviation"] < 1e-4
    assert "head.weight" in seen["actor"]
    assert any(name.startswith("policy.model.") for name in seen["actor"])
    assert "head.weight" in seen["critic"]

    run.save_model(tmp_path / "final")
    named = [name for file in (tmp_path / "final").rglob("*.safetensors") for name in load_file(file)]
    assert [name for name in named if "head.weight" in name and "lm_head" not in name] == []
    rollout, _ = rollout_of(run)
    with torch.no_grad():
        ours = trainer.algorithm.networks.logprobs(rollout.sequences).logprobs
    assert_close(ours, rollout.rollout_logprobs, atol=1e-4, rtol=0)  # sampled by the weights after the phase


def test_a_policy_phase_longer_than_the_run_is_ppo_to_the_bit(config):
    weights = []
    for every in (None, 9):
        output = dataclasses.replace(config.run, output_dir=f"{config.run.output_dir}_{every}")
        settings = dataclasses.replace(config, run=output, algorithm=PPOConfig(kl_coef=0.05, auxiliary_every=every))
        trainer = build_run(settings).trainer
        trainer.iterate()
        trainer.iterate()
        weights.append([snapshot(trainer.trained["actor"].module.model), snapshot(trainer.trained["critic"].module)])
    assert_close(weights[1], weights[0], rtol=0, atol=0)


@pytest.mark.parametrize("dry", [False, True])
def test_auxiliary_phases_are_refused_under_deepspeed_before_anything_loads(phasic, monkeypatch, dry):
    refuse_to_load(monkeypatch)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    with pytest.raises(LaunchError, match=r"algorithm\.auxiliary_every \(2\): .* step weights without a gradient too"):
        check_ppo(phasic, dry=dry)


def test_an_implicit_critic_is_one_module_whose_heads_have_a_rate_of_their_own(config):
    """Its settings reach the algorithm; the target heads move by their average, and no step of the optimizer."""
    run = build_run(with_critic(config, network="mtp", mtp=MTPSettings(num_heads=2, target_rate=0.25)))
    (trained,) = run.trainer.trained.values()
    algorithm, module = run.trainer.algorithm, trained.module
    assert (algorithm.num_heads, algorithm.target_rate) == (2, 0.25)
    peaks = {id(p): group["peak"] for group in trained.optimizer.param_groups for p in group["params"]}
    assert {name.partition(".")[0] for name, p in trained.parameters.items() if peaks[id(p)] == 2e-2} == {"heads"}
    assert not any(name.startswith("targets.") for name in trained.parameters)
    metrics = run.trainer.iterate().values()
    assert {"policy/loss", "value/loss", "value/clamp_fraction", "mtp/loss"} <= metrics.keys()
    for name, target in module.targets.named_parameters():
        assert_close(target, 0.25 * module.heads.get_parameter(name))
        assert target.any(), name


def test_an_implicit_critic_is_refused_where_the_launch_splits_its_heads(config, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    check_ppo(with_critic(config, network="shared"), dry=False)
    with pytest.raises(LaunchError, match=r"^critic\.network mtp: .* launch with plain data parallel or ZeRO-2"):
        check_ppo(with_critic(config, network="mtp"), dry=False)


def test_the_weight_of_the_critics_loss_is_the_one_named(config):
    assert build_run(with_critic(config, network="shared", value_coef=0.125)).trainer.algorithm.value_coef == 0.125


def test_the_best_metric_may_be_one_of_the_actor_behind_a_warm_up(config):
    best = dataclasses.replace(config.run, best_metric="actor/grad_norm")
    run = build_run(with_critic(dataclasses.replace(config, run=best), warmup_iterations=1))
    run.train()
    assert run.best.record()["iteration"] > 1


def test_settings_that_nothing_reads_are_told(config):
    roles = roles_of(config)
    idle = with_critic(config, value_coef=0.125)
    build_ppo(idle, check_ppo(idle, dry=False), **roles)
    assert "warning: critic.value_coef is read only where critic.network is shared or mtp" in messages_of(roles)


# --- what is refused before anything loads ----------------------------------------------------------------------------


def refusal(config: PPORun, monkeypatch: pytest.MonkeyPatch, *, dry: bool = False) -> str:
    refuse_to_load(monkeypatch)
    with pytest.raises(ModelError) as error:
        check_ppo(config, dry=dry)
    return str(error.value)


@pytest.fixture
def foreign(folders, tmp_path) -> Path:
    """The reward model with an end of its own."""
    tokenizer = AutoTokenizer.from_pretrained(folders.base)
    tokenizer.eos_token = "a"
    return retokenized(folders.whole, tmp_path / "foreign", tokenizer)


def retokenized(model: Path, folder: Path, tokenizer: Any) -> Path:
    shutil.copytree(model, folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_body_may_have_another_chat_template(config, folders, monkeypatch, tmp_path):
    """The critic reads ids alone."""
    tokenizer = AutoTokenizer.from_pretrained(folders.base)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    other = retokenized(folders.whole, tmp_path / "other", tokenizer)
    refuse_to_load(monkeypatch)
    check_ppo(with_reward(with_critic(config, network="reward_model"), path=str(other)), dry=False)


@pytest.mark.parametrize("dry", [False, True])
@pytest.mark.parametrize("idle", [False, True], ids=["", "with prompts that nothing reads"])
def test_a_body_that_reads_other_tokens_is_refused(config, folders, foreign, monkeypatch, idle, dry):
    """Whatever else could not be checked."""
    if idle:
        gone = PromptDataConfig(path="gone.jsonl")
        config = dataclasses.replace(config, evaluation_data=gone, evaluation=EvaluationConfig(every=0))
    body = with_reward(with_critic(config, network="reward_model"), path=str(foreign))
    assert refusal(body, monkeypatch, dry=dry) == (
        f"critic.network reward_model: reward.model.path ({foreign}) reads other tokens than "
        f"model.path ({folders.base}), and the critic reads the policy's; set critic.network to own"
    )
    check_ppo(with_reward(config, path=str(foreign)), dry=dry)


def test_a_dry_run_says_that_a_body_was_not_checked(config, monkeypatch):
    refuse_to_load(monkeypatch)
    body = with_reward(with_critic(config, network="reward_model"), path="runs/none/final")
    body = dataclasses.replace(body, made_by={"runs/none/final": "llmrl reward-model r"})
    assert check_ppo(body, dry=True).unchecked == [
        "reward.model.path (runs/none/final) does not exist yet; `llmrl reward-model r` makes it",
        "whether the critic's body reads the policy's tokens",
    ]


@pytest.mark.parametrize("dry", [False, True])
def test_a_reward_model_that_was_trained_whole_is_no_adapter(one_base, folders, monkeypatch, dry):
    whole = with_reward(one_base, path=str(folders.whole))
    assert refusal(whole, monkeypatch, dry=dry).startswith(
        f"reward.model.path ({folders.whole}) holds no adapter/, so it was not trained with model.lora"
    )


def test_a_name_on_the_hub_is_no_folder_with_an_adapter(one_base, monkeypatch):
    hub = with_reward(one_base, path="nobody/reward")
    assert refusal(hub, monkeypatch).startswith("reward.model.path (nobody/reward) holds no adapter/")
    assert len(check_ppo(hub, dry=True).unchecked) == 1


def test_a_reward_model_from_another_base_is_refused(one_base, folders, monkeypatch, tmp_path):
    shutil.copytree(folders.base, tmp_path / "other")
    other = with_model(one_base, path=str(tmp_path / "other"))
    assert refusal(other, monkeypatch) == (
        f"reward.model.path ({folders.lora}) is an adapter on {folders.base}, and the actor's base is "
        f"{tmp_path / 'other'}; leave reward.model.on_actor_base out, or train the reward model from the actor's own "
        "model"
    )


def test_the_same_base_may_be_written_in_two_ways(one_base, folders, monkeypatch):
    refuse_to_load(monkeypatch)
    monkeypatch.chdir(folders.base.parent)
    check_ppo(with_model(one_base, path="./base"), dry=False)


def test_an_adapter_that_names_no_base_is_refused(one_base, folders, monkeypatch, tmp_path):
    shutil.copytree(folders.lora, tmp_path / "nameless")
    file = tmp_path / "nameless" / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": None}))
    nameless = with_reward(one_base, path=str(tmp_path / "nameless"))
    assert "is an adapter on a model without a name, and the actor's base is" in refusal(nameless, monkeypatch)


def test_what_fits_passes_without_a_model(one_base, config, monkeypatch):
    refuse_to_load(monkeypatch)
    for fitting in (
        one_base,
        config,
        with_critic(config, network="reward_model"),
        with_critic(config, network="shared"),
    ):
        assert check_ppo(copy.deepcopy(fitting), dry=False).unchecked == []
