"""Roles of one's own: an engine, an algorithm, a loss, a baseline."""

import torch

import llmrl
from llmrl.functional.losses import clipped_policy_loss
from llmrl.models.vocabulary import end_ids, num_token_ids
from llmrl.reports.progress import Silent
from llmrl.rollout.transformers import TransformersEngine
from llmrl.user_code import load_object
from tests.golden.runs import GRPO, ROOT

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
    class Mine(load_object(f"{ROOT}/recipes/algorithms/reinforce.py:Reinforce", role="algorithm")):
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
    class Engine:
        """`RolloutEngine` that counts, over one of llmrl."""

        def __init__(self):
            self.inner, self.num_calls, self.num_loaded = None, 0, 0

        def load_weights(self, trained):
            model = trained.module.model
            self.num_loaded += 1
            self.inner = self.inner or TransformersEngine(
                model,
                eos_ids=end_ids(tiny.tokenizer, model),
                vocab_size=num_token_ids(tiny.tokenizer, model),
                dtype=torch.float32,
                progress=Silent(),
                copy_device=None,
            )
            self.inner.load_weights(trained)

        def generate(self, prompts, sampling):
            self.num_calls += 1
            return self.inner.generate(prompts, sampling)

    engine = Engine()
    last = train(tiny, rows, tmp_path / "run", engine=engine).train()
    assert (engine.num_calls, engine.num_loaded) == (2, 3)
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
