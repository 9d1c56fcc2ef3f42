"""What building wires together, beyond what the whole runs of test_cli.py show."""

import dataclasses
from pathlib import Path

import pytest
import torch

from llmrl import build
from llmrl.config import GRPORun
from llmrl.data.prompts import PromptDataConfig
from llmrl.models.loading import ModelConfig
from llmrl.reports.progress import Silent
from llmrl.reports.trackers import TrackerConfig, Trackers
from llmrl.rewards.config import RewardConfig, RewardFunctionConfig
from llmrl.rollout.config import RolloutConfig
from llmrl.rollout.generate import TransformersEngine
from llmrl.rollout.native import NativeEngine
from llmrl.trainers.evaluate import EvaluationConfig
from llmrl.trainers.optimize import UpdateConfig
from llmrl.trainers.run import RunConfig

ROOT = Path(__file__).parents[1]
TINY = ModelConfig(path=str(ROOT / "recipes" / "models" / "tiny_char_llama"), from_scratch=True)


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
        run=RunConfig(output_dir=str(tmp_path / "run"), num_iterations=3),
    )


class Heard(Silent):
    def __init__(self):
        self.messages = []

    def message(self, text):
        self.messages.append(text)


def build_run(config):
    progress = Heard()
    trackers = Trackers(TrackerConfig(), output_dir=Path(config.run.output_dir))
    run = build.build_grpo(config, build.check_grpo(config, dry=False), progress=progress, trackers=trackers)
    return run, progress.messages


def test_rows_that_are_too_long_are_told(config):
    _, messages = build_run(config)
    assert messages == ["data: 1 rows are longer than data.max_prompt_tokens and were dropped"]


def test_what_is_seldom_meant_is_told(config):
    algorithm = dataclasses.replace(config.algorithm, kl_coef=0.1)
    _, messages = build_run(dataclasses.replace(config, algorithm=algorithm))
    assert any("kl_coef has no fixed meaning" in message for message in messages)


def test_the_schedule_ends_with_the_run(config):
    optimizer = dataclasses.replace(config.optimizer, schedule="linear", learning_rate=1.0)
    run, _ = build_run(dataclasses.replace(config, optimizer=optimizer))
    trained = run.trainer.trained["actor"]
    num_steps = 3 * 2 * (16 * 8 // 32)
    trained.num_steps_done = num_steps - 1
    assert trained.learning_rate == pytest.approx(1 / num_steps)


def test_one_temperature_for_sampling_and_for_log_probabilities(config):
    run, _ = build_run(config)
    assert run.trainer.temperature == 0.5
    assert run.trainer.trained["actor"].module.temperature == 0.5
    run.prepare()
    assert run.trainer.iterate().values()["policy/rollout_gap"] < 1e-5


def test_no_kl_no_reference(config):
    assert build_run(config)[0].trainer.algorithm.reference is None


@pytest.mark.parametrize(("name", "engine"), [("native", NativeEngine), ("transformers", TransformersEngine)])
def test_the_engine_is_the_one_named(config, name, engine):
    rollout = dataclasses.replace(config.rollout, engine=name)
    assert type(build_run(dataclasses.replace(config, rollout=rollout))[0].trainer.engine) is engine


def test_the_seed_decides_random_weights():
    def weights(seed):
        actor = build.load_actor(TINY, temperature=1.0, microbatch_tokens=64, seed=seed)
        return torch.cat([p.flatten() for p in actor.model.parameters()])

    assert (weights(1) == weights(1)).all()
    assert (weights(1) != weights(2)).any()


def test_held_out_prompts_are_read_only_where_they_are_used(config):
    gone = PromptDataConfig(path="gone.jsonl")
    idle = dataclasses.replace(config, evaluation_data=gone)
    assert build.check_grpo(idle, dry=False).evaluation_rows is None
    with pytest.raises(ValueError, match=r"gone\.jsonl"):
        build.check_grpo(dataclasses.replace(idle, evaluation=EvaluationConfig(every=1)), dry=False)


def test_responses_to_texts_come_in_groups_and_greedy_ones_agree():
    def respond(temperature):
        return build.respond(
            TINY,
            ["1+1=", "2+2="],
            system_prompt=None,
            temperature=temperature,
            num_responses=3,
            max_response_tokens=5,
            seed=0,
        )

    torch.manual_seed(0)
    greedy = respond(0.0)
    assert [len(group) for group in greedy] == [3, 3]
    assert all(len(set(group)) == 1 for group in greedy)
    assert any(len(set(group)) > 1 for group in respond(1.0))
