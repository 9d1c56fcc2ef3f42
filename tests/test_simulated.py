"""Whole iterations on a simulated device: no tensor of the CPU meets one of it, and the numbers are the CPU's."""

import tempfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from llmrl.algorithms.config import GRPOConfig, PPOConfig
from llmrl.batches import Experience
from llmrl.config import GRPORun, PPORun, RewardModelRun, SFTRun
from llmrl.data.config import PreferenceDataConfig, PromptDataConfig, SupervisedDataConfig
from llmrl.distributed.device import pick_device
from llmrl.models.config import CriticConfig, LoraSettings, ModelConfig
from llmrl.optim.config import OptimizerConfig
from llmrl.optim.local import LocalTrainable
from llmrl.reports.trackers import TrackerConfig, Trackers
from llmrl.rewards.config import LearnedRewardConfig, RewardConfig, RewardFunctionConfig
from llmrl.rollout.config import RolloutConfig
from llmrl.trainers.config import (
    EvaluationConfig,
    OutputConfig,
    RewardModelConfig,
    RLRunConfig,
    SFTConfig,
    UpdateConfig,
)
from llmrl.wiring.checks import check_ppo, check_reward_run, check_rl, check_sft
from llmrl.wiring.engines import respond
from llmrl.wiring.reward_model import build_reward_model
from llmrl.wiring.rewards import score_rows
from llmrl.wiring.rl import build_grpo, build_ppo
from llmrl.wiring.sft import build_sft
from tests.contexts import context_of
from tests.rollout.tiny import SIZES
from tests.simulated import NAME, Far, Meeting, Simulated

ROOT = Path(__file__).parents[1]
TINY = ModelConfig(path=str(ROOT / "recipes" / "models" / "tiny_char_llama"), from_scratch=True, dtype="float32")
LORA = replace(TINY, lora=LoraSettings(rank=2))
BUILD = {
    GRPORun: (build_grpo, check_rl),
    PPORun: (build_ppo, check_ppo),
    SFTRun: (build_sft, check_sft),
    RewardModelRun: (build_reward_model, check_reward_run),
}


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    """The path of prompts, of examples and of pairs, all ragged."""
    lines = [
        "prompt,answer,response,chosen,rejected",
        "1+1=,2,2,2,33",
        "12+2=,14,14,14,1",
        "7=,7,7,7,5",
        "9+9=,18,1,18,9",
    ]
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    return str(tmp_path / "rows.csv")


@pytest.fixture
def scorer(tmp_path):
    """A reward model of random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(**(SIZES | {"vocab_size": 99, "num_labels": 1, "pad_token_id": 0, "eos_token_id": 1}))
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "scorer")
    AutoTokenizer.from_pretrained(TINY.path).save_pretrained(tmp_path / "scorer")
    return LearnedRewardConfig(path=str(tmp_path / "scorer"))


def reinforced(kind, data, **settings):
    rule = RewardFunctionConfig(name="tests.golden.rules:graded")  # equal scores would leave rounding to be learned
    base = {
        "model": TINY,
        "data": PromptDataConfig(path=data),
        "reward": RewardConfig(functions=(rule,)),
        "rollout": RolloutConfig(prompts_per_iteration=4, max_response_tokens=3, max_rows=8),
        "update": UpdateConfig(minibatch_size=8, num_epochs=2, microbatch_tokens=64),
        "optimizer": OptimizerConfig(learning_rate=1e-3),
        "run": RLRunConfig(output_dir=str(Path(data).parent / "run"), num_iterations=3),
    }
    return kind(**(base | settings))


def grpo(data, _, *, rollout=None, **settings):
    settings = {"algorithm": GRPOConfig(group_size=4, kl_coef=0.1)} | settings
    config = reinforced(GRPORun, data, **settings)
    return replace(config, rollout=replace(config.rollout, **rollout or {}))


def gspo(data, _):
    algorithm = GRPOConfig(group_size=4, ratio="sequence", aggregation="sequence", overlong_buffer_tokens=2)
    return grpo(data, None, algorithm=algorithm)


def rloo(data, _):
    return grpo(data, None, algorithm=GRPOConfig(group_size=4, baseline="leave_one_out", scale="none"), model=LORA)


def by_generate(data, _):
    return grpo(data, None, rollout={"engine": "transformers"})


def with_checkpoints(data, _):
    return grpo(data, None, model=replace(TINY, gradient_checkpointing=True))


def ppo(data, scorer, **settings):
    return reinforced(
        PPORun,
        data,
        **{
            "reward": RewardConfig(model=scorer),
            "rollout": RolloutConfig(prompts_per_iteration=8, max_response_tokens=3),
            "algorithm": PPOConfig(kl_coef=0.05, normalize_scores=True, score_clip=5.0),
        }
        | settings,
    )


def steered_ppo(data, scorer):
    algorithm = PPOConfig(
        kl_coef=0.05, kl_target=6.0, step_kl_target=0.01, entropy_coef=0.01, bootstrap_truncated=True, value_lambda=0.9
    )
    return ppo(data, scorer, algorithm=algorithm, critic=CriticConfig(network="shared"))


def ppo_on_one_base(data, scorer):
    return ppo(data, scorer, model=LORA, critic=CriticConfig(network="adapter"))


def sft(data, _):
    return SFTRun(
        model=TINY,
        data=SupervisedDataConfig(path=data),
        evaluation_data=SupervisedDataConfig(path=data),
        sft=SFTConfig(batch_size=4, evaluate_every=1),
        run=RLRunConfig(output_dir=str(Path(data).parent / "run"), num_iterations=2),
    )


def reward_model(data, _):
    pairs = PreferenceDataConfig(path=data)
    return RewardModelRun(
        model=TINY,
        data=pairs,
        evaluation_data=pairs,
        reward_model=RewardModelConfig(batch_size=2, num_epochs=2, evaluate_every=1),
        run=OutputConfig(output_dir=str(Path(data).parent / "run")),
    )


def build(config):
    """In a folder of its own: what an earlier one left would be another run's."""
    folder = tempfile.mkdtemp(dir=Path(config.run.output_dir).parent)
    config = replace(config, run=replace(config.run, output_dir=folder))
    make, check = BUILD[type(config)]
    trackers = Trackers(TrackerConfig(), output_dir=Path(config.run.output_dir))
    return make(config, check(config, dry=False), context=context_of(), trackers=trackers)


def iterations(config):
    """The metrics of an iteration, and of an evaluation after it where there is one."""
    run = build(config)
    values = [run.trainer.iterate().values()]
    if run.evaluate is not None:
        values.append(run.evaluate())
    return [{name: x for name, x in each.items() if not name.endswith("_s")} for each in values]


@pytest.mark.parametrize(
    "make",
    [grpo, gspo, rloo, by_generate, with_checkpoints, ppo, steered_ppo, ppo_on_one_base, sft, reward_model],
    ids=lambda make: make.__name__,
)
def test_no_tensor_of_the_cpu_meets_one_of_the_device(make, data, scorer):
    config = make(data, scorer)
    expected = iterations(config)
    with Simulated() as device:
        values = iterations(config)
    assert device.waits, "nothing was computed there"
    for ours, theirs in zip(values, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5, nan_ok=True)


def test_an_evaluation_and_a_state_come_from_the_device_and_go_there(data):
    config = grpo(
        data, None, evaluation_data=PromptDataConfig(path=data), evaluation=EvaluationConfig(every=1, num_responses=2)
    )
    with Simulated():
        first, second = build(config), build(config)
        first.trainer.iterate()
        second.trainer.load_state_dict(first.trainer.state_dict())
        assert second.evaluate() == first.evaluate()
        weights = [run.trainer.trained["actor"].module.parameters() for run in (first, second)]
        for ours, theirs in zip(*weights, strict=True):
            assert ours.device == theirs.device == NAME
            assert torch.equal(ours, theirs)


def test_texts_are_answered_and_scored_on_the_device(scorer):
    limits = {"temperature": 0.7, "num_responses": 2, "max_response_tokens": 3, "seed": 1, "system_prompt": None}
    rows = [{"prompt": "1+1=", "response": "2"}, {"prompt": "12+2=", "response": "14"}]
    data = SupervisedDataConfig(path="rows.jsonl")
    model = ModelConfig(path=scorer.path, dtype="float32")
    answers, scores = [], []
    for place in (nullcontext(), Simulated()):
        torch.manual_seed(0)
        with place:
            answers.append(respond(TINY, ["1+1=", "12+2="], pick_device(), **limits))
            scores.append(score_rows(model, rows, data, pick_device(), normalize=True))
    assert answers[0] == answers[1]
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)


# --- that it would show -----------------------------------------------------------------------------------------------


def test_a_stray_tensor_in_a_loss_is_found(data, monkeypatch):
    mask = Experience.counted.fget
    monkeypatch.setattr(Experience, "counted", property(lambda self: mask(self) & torch.ones(1, 1).bool()))
    config = grpo(data, None)
    iterations(config)
    with Simulated(), pytest.raises(Meeting, match=r"bitwise_and: a tensor of the CPU, of shape \(1, 1\)"):
        iterations(config)


def test_what_torch_allows_between_two_devices_is_allowed():
    with Simulated():
        x = torch.arange(6.0, device=NAME).view(2, 3)
        assert isinstance(x, Far)
        assert x.device == NAME
        assert (x + torch.tensor(1.0)).tolist() == [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
        assert x[torch.tensor([1])].tolist() == [[3.0, 4.0, 5.0]]
        x.copy_(torch.ones(2, 3))
        assert x.cpu().sum() == 6.0
        assert not isinstance(x.cpu(), Far)
        with pytest.raises(Meeting, match=r"add: a tensor of the CPU, of shape \(3,\)"):
            x + torch.ones(3)
        with pytest.raises(Meeting, match="index: a tensor of the CPU"):
            torch.ones(2, 3)[torch.tensor([0], device=NAME)]
        with pytest.raises(Meeting, match="addmm: a tensor of the CPU"):
            nn.Linear(3, 1)(x)


# --- waits ------------------------------------------------------------------------------------------------------------


def test_an_optimizer_step_waits_for_one_number():
    """Whether the gradient is finite; everything else is queued."""
    with Simulated() as device:
        module = nn.Linear(3, 2).to(NAME)
        trainable = LocalTrainable(module, OptimizerConfig(), num_steps=2)
        trainable.backward(module(torch.ones(4, 3, device=NAME)).sum())
        device.waits.clear()
        trainable.optimizer_step()
        assert device.waits == {"_local_scalar_dense": 1}
    assert_close(torch.tensor(trainable.learning_rate), torch.tensor(1e-6))
