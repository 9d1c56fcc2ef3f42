"""A small run of GRPO, and how it is built."""

import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from llmrl.config import GRPORun
from llmrl.data.config import PromptDataConfig
from llmrl.models.config import ModelConfig
from llmrl.reports.progress import Silent
from llmrl.reports.trackers import TrackerConfig, Trackers
from llmrl.rewards.config import RewardConfig, RewardFunctionConfig
from llmrl.rollout.config import RolloutConfig
from llmrl.trainers.config import RLRunConfig, UpdateConfig
from llmrl.wiring.checks import check_rl
from llmrl.wiring.rl import build_grpo
from tests.contexts import context_of

ROOT = Path(__file__).parents[2]
TINY = ModelConfig(
    path=str(ROOT / "recipes" / "models" / "tiny_char_llama"), from_scratch=True, dtype="float32"
)  # on a GPU too


@pytest.fixture
def config(tmp_path):
    (tmp_path / "train.csv").write_text("prompt,answer\n1+1=,2\n2+2=,4\n123456789+1=,123456790\n")
    rule = RewardFunctionConfig(name=f"{ROOT}/reward_models/arithmetic.py:correct")
    return GRPORun(
        model=TINY,
        data=PromptDataConfig(path=str(tmp_path / "train.csv"), max_prompt_tokens=6),
        reward=RewardConfig(functions=(rule,)),
        rollout=RolloutConfig(prompts_per_iteration=16, max_response_tokens=3, temperature=0.5),
        update=UpdateConfig(minibatch_size=32, num_epochs=2),
        run=RLRunConfig(output_dir=str(tmp_path / "run"), num_iterations=3),
    )


@pytest.fixture
def one_token_more(tmp_path):
    """The tiny model with a special token `§` that has no embedding."""
    folder = tmp_path / "more"
    tokenizer = AutoTokenizer.from_pretrained(TINY.path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["§"]})
    tokenizer.save_pretrained(folder)
    shutil.copy(Path(TINY.path) / "config.json", folder)
    return ModelConfig(path=str(folder), from_scratch=True)


class Heard(Silent):
    def __init__(self):
        self.messages = []

    def message(self, text):
        self.messages.append(text)


def roles_of(config):
    """What a run of these settings is built with: ``context``, whose progress keeps the messages, and ``trackers``."""
    trackers = Trackers(TrackerConfig(), output_dir=Path(config.run.output_dir))
    return {"context": context_of(progress=Heard()), "trackers": trackers}


def messages_of(roles):
    """What was reported to these."""
    return roles["context"].progress.messages


def build_run(config):
    roles = roles_of(config)
    return build_grpo(config, check_rl(config, dry=False), **roles), messages_of(roles)
