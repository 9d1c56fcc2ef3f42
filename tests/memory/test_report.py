from pathlib import Path

import pytest

from llmrl.config import PPORun, RewardModelRun
from llmrl.data.preferences import PreferenceDataConfig
from llmrl.memory import describe_memory
from llmrl.memory.report import in_units
from llmrl.models.loading import ModelConfig
from llmrl.trainers.run import OutputConfig
from tests.memory.test_estimate import REWARD_MODEL, rl

TINY = str(Path(__file__).parents[2] / "recipes" / "models" / "tiny_char_llama")


@pytest.mark.parametrize(
    ("num_bytes", "told"), [(3, "3 B"), (1536, "1.5 KiB"), (5 * 2**20, "5 MiB"), (2**30 + 2**28, "1.25 GiB")]
)
def test_units(num_bytes, told):
    assert in_units(num_bytes) == told


def test_a_run_is_described_in_a_few_lines():
    first, peak, parts, host = describe_memory(rl(PPORun, path=TINY))
    assert first == "Memory, estimated with every weight on 1 device:"
    assert "in the update" in peak
    assert "weights" in parts
    assert "gradients" in parts
    assert "keys and values" not in parts
    assert "of the CPU" in host


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
    assert "The reward model is not counted" in told[-1]


def test_a_run_without_rollouts_has_no_phase_for_them():
    data = PreferenceDataConfig(path="pairs.jsonl")
    config = RewardModelRun(
        model=ModelConfig(path=TINY), data=data, evaluation_data=data, run=OutputConfig(output_dir="out")
    )
    told = "\n".join(describe_memory(config))
    assert "Phases: update " in told
    assert "rollout" not in told
    assert "scoring" not in told
