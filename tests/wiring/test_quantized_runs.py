"""Runs on a base of 4 bits: step for step those on the weights that the bits stand for, and what they refuse."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from llmrl.algorithms.config import GRPOConfig, PPOConfig
from llmrl.config import CriticRun, GRPORun, PPORun, RewardModelRun, SFTRun
from llmrl.data.config import PreferenceDataConfig, PromptDataConfig, ScoredDataConfig, SupervisedDataConfig
from llmrl.distributed.launch import LaunchError
from llmrl.models.config import CriticConfig, LoraSettings, ModelConfig
from llmrl.optim.config import OptimizerConfig
from llmrl.rewards.config import LearnedRewardConfig, RewardConfig, RewardFunctionConfig
from llmrl.rollout.config import RolloutConfig
from llmrl.trainers.config import (
    CriticTrainingConfig,
    OutputConfig,
    RewardModelConfig,
    RLRunConfig,
    RunConfig,
    SFTConfig,
    UpdateConfig,
)
from llmrl.wiring.checks import check_rl
from llmrl.wiring.rl import build_evaluator
from llmrl.wiring.runs import RUNS
from tests.models.quantized import save_base, save_dequantized
from tests.test_cli import write_jsonl

from .conftest import messages_of, roles_of

pytest.importorskip("bitsandbytes", reason="the extra quantized is not installed")

RULE = "def rule(responses):\n    return [float(sum(map(ord, text)) % 7) for text in responses]\n"
OPTIMIZER = OptimizerConfig(learning_rate=1e-3)


@pytest.fixture(params=["llama", pytest.param("gpt2", marks=pytest.mark.slow)], scope="module")
def folders(request, tmp_path_factory) -> dict[str, str]:
    """A model, and the one with the weights that its 4 bits stand for."""
    folder = tmp_path_factory.mktemp(request.param)
    base = save_base(folder / "base", request.param)
    return {"nf4": base, "read": save_dequantized(base, folder / "read")}


def models(folders, **settings) -> dict[str, ModelConfig]:
    """A model on 4 bits, and one on plain weights of the same numbers."""
    lora = {"lora": LoraSettings(rank=2, **settings), "dtype": "float32"}
    return {
        "nf4": ModelConfig(path=folders["nf4"], quantization="nf4", **lora),
        "read": ModelConfig(path=folders["read"], **lora),
    }


def runs_of(tmp_path, model: ModelConfig, kind: str, name: str):
    """Settings of a run of each kind."""
    rows = write_jsonl(
        tmp_path / "rows.jsonl",
        [
            {"prompt": f"{n}" * (1 + n % 3) + "=", "response": f"{n + 1}", "score": float(n % 2)}
            | {"chosen": f"{n + 1}", "rejected": "a" * (1 + n % 3)}
            for n in range(8)
        ],
    )
    (tmp_path / "rule.py").write_text(RULE)
    rule = RewardFunctionConfig(name=f"{tmp_path}/rule.py:rule")
    output, path = str(tmp_path / name), str(rows)
    common = {"model": model, "optimizer": OPTIMIZER}
    rl = common | {
        "data": PromptDataConfig(path=path, template="none"),
        "reward": RewardConfig(functions=(rule,)),
        "rollout": RolloutConfig(prompts_per_iteration=4, max_response_tokens=5),
        "run": RLRunConfig(output_dir=output, num_iterations=3, checkpoint_every=1),
    }
    critic = {"critic_optimizer": OPTIMIZER, "algorithm": PPOConfig(kl_coef=0.05)}
    update = UpdateConfig(minibatch_size=4, microbatch_tokens=64)
    run = RunConfig(output_dir=output, num_iterations=3)
    match kind:
        case "grpo":
            return GRPORun(**rl, algorithm=GRPOConfig(group_size=4, kl_coef=0.05, scale="none"), update=update)
        case "moving":
            algorithm = GRPOConfig(group_size=4, kl_coef=0.05, scale="none", reference_refresh_every=1)
            return GRPORun(**rl, algorithm=algorithm, update=update)
        case "ppo adapter" | "ppo shared":
            return PPORun(**rl, **critic, critic=CriticConfig(network=kind.split()[1]), update=update)
        case "sft":
            data = SupervisedDataConfig(path=path, template="none")
            return SFTRun(**common, data=data, sft=SFTConfig(batch_size=4), run=run)
        case "critic":
            data = ScoredDataConfig(path=path, template="none")
            return CriticRun(**common, data=data, critic=CriticTrainingConfig(batch_size=4), run=run)
    data = PreferenceDataConfig(path=path, template="none")
    settings = RewardModelConfig(batch_size=4, num_epochs=2)
    return RewardModelRun(
        **common, data=data, evaluation_data=data, reward_model=settings, run=OutputConfig(output_dir=output)
    )


def build(config):
    roles = roles_of(config)
    kind = next(kind for kind in RUNS.values() if kind.settings is type(config))
    return kind.builder()(config, kind.checker()(config, dry=False), **roles), messages_of(roles)


def metrics(config) -> list[dict[str, float]]:
    lines = (Path(config.run.output_dir) / "metrics.jsonl").read_text().splitlines()
    return [
        {name: x for name, x in json.loads(line).items() if not name.startswith("time/") and "per_s" not in name}
        for line in lines
    ]


def weights(config) -> dict[str, torch.Tensor]:
    final = Path(config.run.output_dir) / "final"
    return {
        f"{file.relative_to(final)} {name}": x
        for file in sorted(final.rglob("*.safetensors"))
        for name, x in load_file(file).items()
    }


KINDS = ("grpo", "moving", "ppo adapter", "ppo shared", "sft", "reward model", "critic")


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_the_one_on_the_weights_that_the_bits_stand_for(folders, kind, tmp_path):
    configs = {name: runs_of(tmp_path, model, kind, name) for name, model in models(folders).items()}
    for config in configs.values():
        build(config)[0].train()
    ours, theirs = (metrics(config) for config in configs.values())
    assert len(ours) == len(theirs) >= 3
    for row, other in zip(ours, theirs, strict=True):
        assert row == pytest.approx(other, rel=1e-3, abs=1e-4)
    ours, theirs = (weights(config) for config in configs.values())
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        assert_close(ours[name], x, rtol=0.0, atol=1e-4, msg=name)
    if kind in ("grpo", "ppo adapter"):
        samples = [(Path(config.run.output_dir) / "samples.jsonl").read_text() for config in configs.values()]
        responses = [[json.loads(line)["response"] for line in text.splitlines()] for text in samples]
        assert responses[0] == responses[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_sampled_is_what_is_trained(folders, dtype, tmp_path):
    model = replace(models(folders)["nf4"], dtype=dtype)
    config = runs_of(tmp_path, model, "grpo", dtype)
    build(config)[0].train()
    rows = metrics(config)
    assert rows[0]["kl/mean"] == 0.0
    assert rows[-1]["kl/mean"] != 0.0
    assert max(row["policy/ratio_max_deviation"] for row in rows) < 1e-6
    gaps = [row["policy/rollout_gap"] for row in rows]
    assert max(gaps) < (1e-5 if dtype == "float32" else 0.02)


def test_the_copy_that_is_sampled_from_shares_the_bits(folders, tmp_path):
    model = replace(models(folders)["nf4"], dtype="bfloat16")
    run, _ = build(runs_of(tmp_path, model, "grpo", "shares"))
    trained = run.trainer.trained["actor"].module.model
    sampled = run.trainer.engine.engine.weights.fresh()
    ours = dict(trained.named_parameters())
    for name, p in sampled.named_parameters():
        assert (p.data_ptr() == ours[name].data_ptr()) == (p.dtype == torch.uint8), name
        assert p.dtype in (torch.uint8, torch.bfloat16)
    assert any("lora_A" in name for name, _ in sampled.named_parameters())


@pytest.mark.parametrize("kind", ["grpo", "ppo adapter"])
def test_a_resumed_run_is_bit_for_bit_the_undisturbed_one(folders, kind, tmp_path):
    model = models(folders)["nf4"]
    straight = runs_of(tmp_path, model, kind, "straight")
    build(straight)[0].train()
    for num_iterations in (1, 3):
        stopped = runs_of(tmp_path, model, kind, "stopped")
        stopped = replace(stopped, run=replace(stopped.run, num_iterations=num_iterations))
        build(stopped)[0].train()
    assert metrics(stopped) == metrics(straight)
    ours, theirs = weights(stopped), weights(straight)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(x, theirs[name]) for name, x in ours.items())
    state = next((Path(stopped.run.output_dir) / "checkpoints").iterdir()) / "state.safetensors"
    assert not any("base_layer" in name for name in load_file(state))


def test_an_evaluation_reads_the_same_bits(folders, tmp_path):
    """Before training that is the score on their numbers; of what was trained, final/ has the score of the run."""
    config = runs_of(tmp_path, models(folders)["nf4"], "grpo", "evaluated")
    config = replace(config, evaluation_data=config.data)
    build(config)[0].train()
    final = Path(config.run.output_dir) / "final"
    plain = {"lora": None, "quantization": None}
    scores = {}
    for name, model in {
        "before": config.model,
        "before, read": ModelConfig(path=folders["read"], dtype="float32"),
        "merged": replace(config.model, path=str(final), **plain),
        "adapter": replace(config.model, path=str(final / "adapter"), lora=None),
    }.items():
        each = replace(config, model=model)
        evaluator = build_evaluator(each, check_rl(each, dry=False, trains=False), roles_of(each)["context"])
        scores[name] = evaluator.evaluate()["eval/score"]
    assert scores["before"] == pytest.approx(scores["before, read"])
    after = json.loads((Path(config.run.output_dir) / "metrics.jsonl").read_text().splitlines()[-1])
    assert scores["merged"] == pytest.approx(after["eval/score"])
    assert scores["adapter"] == pytest.approx(after["eval/score"])


def test_what_cannot_be_is_refused_with_the_way_out(folders, tmp_path):
    model = models(folders)["nf4"]
    ppo = runs_of(tmp_path, model, "ppo adapter", "refused")
    with pytest.raises(
        ValueError, match=r"^critic\.network own .* \(nf4\) .*; set critic\.network to adapter or shared"
    ):
        replace(ppo, critic=CriticConfig(network="own"))
    reward = RewardConfig(model=LearnedRewardConfig(path="runs/rm/final", on_actor_base=True))
    with pytest.raises(
        ValueError, match=r"^reward\.model\.on_actor_base .* model\.quantization \(nf4\) rounds .* out$"
    ):
        replace(ppo, reward=reward)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("launcher", ["deepspeed", "fsdp"])
def test_launches_that_split_or_cast_weights_are_refused(folders, kind, launcher, tmp_path, monkeypatch):
    launch = {"deepspeed": {"ACCELERATE_USE_DEEPSPEED": "true"}, "fsdp": {"ACCELERATE_USE_FSDP": "true"}}[launcher]
    for name, value in (launch | {"FSDP_VERSION": "2", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}).items():
        monkeypatch.setenv(name, value)
    config = runs_of(tmp_path, models(folders)["nf4"], kind, "split")
    with pytest.raises(LaunchError, match=rf"(model\.quantization \(nf4\): the launch is by {launcher}|critic)"):
        build(config)
