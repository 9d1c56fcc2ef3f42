import dataclasses
import shutil
from pathlib import Path
from unittest import mock

import pytest
from transformers import AutoConfig

from llmrl.config import GRPORun, PPORun, RewardModelRun
from llmrl.data.config import PreferenceDataConfig
from llmrl.models.config import ModelConfig
from llmrl.sizing import describe_memory
from llmrl.sizing.machine import Machine
from llmrl.sizing.shape import read_shape
from llmrl.trainers.config import OutputConfig
from tests.sizing.test_estimate import REWARD_MODEL, rl

TINY = str(Path(__file__).parents[2] / "recipes" / "models" / "tiny_char_llama")


def test_a_run_is_described_in_a_few_lines():
    first, peak, parts, host, fit = describe_memory(rl(PPORun, path=TINY))
    assert first == "Memory, estimated with every weight on 1 device:"
    assert "in the update" in peak
    assert "weights" in parts
    assert "gradients" in parts
    assert "keys and values" not in parts
    assert "of the CPU" in host
    assert "the run fits" in fit


def test_the_launch_counts(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    told = "\n".join(describe_memory(rl(PPORun, path=TINY)))
    assert "FSDP2 over 8 devices" in told
    assert "copy to sample from" in told


def test_a_model_that_is_not_here_is_told():
    (told,) = describe_memory(rl(PPORun, path="nobody/nosuchmodel"))
    assert told.startswith("Memory is not estimated: the config.json of model.path (nobody/nosuchmodel)")


def test_a_reward_model_that_is_not_here_is_told():
    told = describe_memory(rl(PPORun, path=TINY, reward=REWARD_MODEL))
    assert "The reward model is not counted" in told[-2]
    assert "the run fits without the reward model, with " in told[-1]


def test_a_run_without_rollouts_has_no_phase_for_them():
    data = PreferenceDataConfig(path="pairs.jsonl")
    config = RewardModelRun(
        model=ModelConfig(path=TINY), data=data, evaluation_data=data, run=OutputConfig(output_dir="out")
    )
    told = "\n".join(describe_memory(config))
    assert "Phases: update " in told
    assert "rollout" not in told
    assert "scoring" not in told


# --- beside the machine -----------------------------------------------------------------------------------------------

GIB = 2**30


@pytest.fixture
def machine(monkeypatch):
    """Says what this machine has."""

    def has(*, cpu, gpu=None):
        monkeypatch.setattr("llmrl.sizing.report.this_machine", lambda: Machine(cpu=cpu, gpu=gpu))

    return has


def peak_of(config):
    number, unit = describe_memory(config)[1].removeprefix("  Each device has ").split()[:2]
    return float(number) * {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[unit]


def test_a_run_that_does_not_fit_is_told_with_what_lowers_it(machine):
    machine(cpu=64 * 2**10)
    *_, fit = describe_memory(rl(PPORun, path=TINY))
    assert fit.startswith("  This machine's CPU, as torch sees no GPU on it, has 64 KiB, and the run takes ")
    assert "it does not fit. These lower it: " in fit
    assert "docs/sizing.md" in fit
    ways = dict(way.rsplit(" to ", 1) for way in fit.partition("lower it: ")[2].partition(". ")[0].split(", "))
    assert list(ways)[-1] == "all of these together"
    assert "model.lora.rank=16" in ways


def test_an_adapter_is_offered_no_other_one(machine, tmp_path):
    shutil.copytree(TINY, tmp_path / "model")
    (tmp_path / "model" / "adapter_config.json").write_text("{}")
    machine(cpu=1)
    with mock.patch("llmrl.sizing.report.read_shape", return_value=read_shape(ModelConfig(path=TINY))):
        fit = describe_memory(rl(PPORun, path=str(tmp_path / "model")))[-1]
    assert "These lower it: " in fit
    assert "lora" not in fit


def test_what_a_setting_lowers_the_peak_to_is_its_own_estimate(machine):
    machine(cpu=1)
    config = rl(PPORun, path=TINY)
    fit = describe_memory(config)[-1]
    lean = dataclasses.replace(config, model=dataclasses.replace(config.model, gradient_checkpointing=True))
    told = fit.partition("model.gradient_checkpointing=true to ")[2].split(",")[0]
    assert told == describe_memory(lean)[1].removeprefix("  Each device has ").partition(" in tensors")[0]


def test_processes_on_the_cpu_share_its_memory(machine, monkeypatch):
    config = rl(PPORun, path=TINY)
    peak = peak_of(config)
    machine(cpu=int(1.5 * peak))
    assert "the run fits" in describe_memory(config)[-1]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "it does not fit" in describe_memory(config)[-1]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # on two machines
    assert "the run fits" in describe_memory(config)[-1]


def test_a_gpu_is_what_counts_where_there_is_one(machine, monkeypatch):
    config = rl(PPORun, path=TINY)
    machine(cpu=1, gpu=80 * GIB)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert describe_memory(config)[-1].startswith("  This machine's GPU has 80 GiB: the run fits, with ")
    machine(cpu=80 * GIB, gpu=1)
    assert "it does not fit" in describe_memory(config)[-1]


def test_runs_without_rollouts_have_their_own_ways(machine):
    machine(cpu=1)
    config = RewardModelRun(
        model=ModelConfig(path=TINY),
        data=PreferenceDataConfig(path="p.jsonl", max_tokens=300),
        evaluation_data=PreferenceDataConfig(path="p.jsonl"),
        run=OutputConfig(output_dir="out"),
    )
    fit = describe_memory(config)[-1]
    assert "reward_model.microbatch_tokens=300 to " in fit
    assert "rollout" not in fit


def test_routers_that_lora_leaves_out_are_named(tmp_path, machine):
    machine(cpu=2**30)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    experts = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    AutoConfig.for_model("qwen2_moe", vocab_size=40, **sizes, **experts).save_pretrained(tmp_path)
    told = "model.lora leaves out the routers of the mixture of experts (shared_expert_gate); name them in"
    assert describe_memory(rl(GRPORun, path=str(tmp_path), lora={"rank": 2}))[-1].startswith(told)
    for lora in (None, {"rank": 2, "targets": ["q_proj", "shared_expert_gate"]}):
        assert "routers" not in describe_memory(rl(GRPORun, path=str(tmp_path), lora=lora))[-1]
    assert "routers" not in describe_memory(rl(GRPORun, path=TINY, lora={"rank": 2}))[-1]
