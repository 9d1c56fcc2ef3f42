"""Roles of one's own: an engine, an algorithm, a loss, a baseline."""

import torch

import llmrl
from llmrl.functional.losses import clipped_policy_loss
from llmrl.roles import Sampling
from recipes.algorithms.reinforce import Reinforce
from tests.golden.runs import GRPO

from .conftest import SHORT, digits


def train(tiny, rows, folder, settings=None, **arguments):
    return llmrl.grpo(
        tiny.model,
        tokenizer=tiny.tokenizer,
        prompts=rows,
        reward=lambda responses: digits(responses),
        output_dir=folder,
        num_iterations=2,
        settings={**SHORT, **(settings or {})},
        **arguments,
    )


def test_an_algorithm_a_loss_and_a_baseline_are_handed_over(tiny, rows, tmp_path):
    class Mine(Reinforce):
        pass

    run = train(tiny, rows, tmp_path / "algorithm", {"algorithm.name": Mine})
    assert "policy/baseline" in run.train()
    assert run.config["settings"]["algorithm"]["name"] == "given:Mine"

    called = []

    def loss(logprobs, old_logprobs, advantages, weights):
        called.append("loss")
        return clipped_policy_loss(logprobs, old_logprobs, advantages, weights, clip_low=0.2, clip_high=0.2)

    def zero(scores, group_ids):
        called.append("baseline")
        return torch.zeros_like(scores)

    settings = {"algorithm.loss": loss, "algorithm.baseline": zero, "algorithm.scale": "none"}
    train(tiny, rows, tmp_path / "functions", settings).train()
    assert called == ["baseline", "loss"] * 2


def test_an_engine_of_ones_own_draws_every_response(tiny, rows, tmp_path):
    """It is an engine of llmrl, which counts what it is asked for."""
    from llmrl.models.vocabulary import end_ids, num_token_ids
    from llmrl.reports.progress import Silent
    from llmrl.rollout.transformers import TransformersEngine

    class Counting(TransformersEngine):
        asked: list[Sampling] = []  # noqa: RUF012

        def generate(self, prompts, sampling):
            self.asked.append(sampling)
            return super().generate(prompts, sampling)

    engine = Counting(
        tiny.model,
        eos_ids=end_ids(tiny.tokenizer, tiny.model),
        vocab_size=num_token_ids(tiny.tokenizer, tiny.model),
        dtype=torch.float32,
        progress=Silent(),
        copy_device=None,
    )
    last = train(tiny, rows, tmp_path / "run", engine=engine).train()
    assert len(Counting.asked) == 2
    assert last["policy/rollout_gap"] < 1e-4  # it has the weights of the run


def test_sections_of_settings_may_be_nested(tiny, rows, tmp_path):
    settings = {name: section for name, section in GRPO.items() if name not in ("reward", "evaluation")}
    run = llmrl.grpo(
        tiny.model,
        tokenizer=tiny.tokenizer,
        prompts=rows,
        reward=lambda responses: digits(responses),
        output_dir=tmp_path / "run",
        num_iterations=1,
        settings={**settings, "model.lora": {"rank": 2}},
    )
    run.train()
    assert run.config["settings"]["rollout"]["max_rows"] == 5
    assert run.config["settings"]["model"]["lora"]["rank"] == 2
