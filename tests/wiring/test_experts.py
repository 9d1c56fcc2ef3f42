"""Runs of a mixture of experts: how its choices are balanced, and that nothing of it depends on how a step is split."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from llmrl.models.config import LoraSettings, ModelConfig
from llmrl.models.experts import BIAS
from llmrl.models.folders import ModelError
from llmrl.trainers.checkpoint import join_state, split_state
from tests.mixtures import config_of

from .conftest import TINY, build_run


@pytest.fixture
def mixture(tmp_path):
    def make(family: str) -> ModelConfig:
        folder = tmp_path / family
        tokenizer = AutoTokenizer.from_pretrained(TINY.path)
        tokenizer.save_pretrained(folder)
        ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        shape = config_of(family, **ids, vocab_size=len(tokenizer), initializer_range=0.3)
        shape.save_pretrained(folder)
        return ModelConfig(path=str(folder), from_scratch=True, dtype="float32")

    return make


def learned(config, **settings):
    run, _ = build_run(replace(config, algorithm=replace(config.algorithm, **settings)))
    return run.trainer, [run.trainer.iterate().values() for _ in range(2)]


def weights(trainer):
    return {name: p.detach() for name, p in trainer.trained["actor"].module.named_parameters()}


def test_the_split_into_microbatches_does_not_show(config, mixture):
    config = replace(config, model=mixture("qwen3_moe"))
    whole, in_pieces = (
        learned(replace(config, update=replace(config.update, microbatch_tokens=tokens)), balance_coef=1.0)
        for tokens in (4096, 16)
    )
    assert torch.equal(whole[0].balance.shares, in_pieces[0].balance.shares)
    for name, weight in weights(in_pieces[0]).items():
        torch.testing.assert_close(weights(whole[0])[name], weight, atol=2e-6, rtol=1e-4)
    for ours, theirs in zip(whole[1], in_pieces[1], strict=True):
        for name in ("experts/load_max", "experts/unused_fraction", "experts/balance_loss"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5)
        assert ours["policy/ratio_max_deviation"] < 1e-5


def test_its_weight_moves_the_routers_and_0_leaves_the_run_as_it_is(config, mixture):
    config = replace(config, model=mixture("qwen3_moe"))
    plain, balanced = (learned(config, balance_coef=coef)[0] for coef in (0.0, 10.0))
    unwatched, _ = build_run(config)
    unwatched.trainer.trained["actor"].module.experts = unwatched.trainer.balance = None
    for _ in range(2):
        unwatched.trainer.iterate()
    for name, weight in weights(plain).items():
        assert torch.equal(weight, weights(unwatched.trainer)[name])
    routers = [name for name in weights(plain) if name.endswith("mlp.gate.weight")]
    assert len(routers) == 2
    for name in routers:
        assert not torch.allclose(weights(plain)[name], weights(balanced)[name], atol=1e-7)


def test_a_resumed_run_goes_on_to_the_bit(config, mixture, tmp_path):
    config = replace(config, model=mixture("deepseek_v3"))
    settings = {"balance_coef": 0.1, "balance_bias_rate": 0.05}
    straight, _ = learned(config, **settings)
    arrays, rest = split_state(straight.state_dict())
    state = join_state({name: x.clone() for name, x in arrays.items()}, json.loads(json.dumps(rest)))
    resumed, _ = build_run(replace(config, algorithm=replace(config.algorithm, **settings)))
    resumed.trainer.load_state_dict(state)
    assert any(router.get_buffer(BIAS).any() for router in straight.balance.routers)
    for trainer in (straight, resumed.trainer):
        trainer.iterate()
    for name, weight in weights(straight).items():
        assert torch.equal(weight, weights(resumed.trainer)[name]), name
    for ours, theirs in zip(straight.balance.routers, resumed.trainer.balance.routers, strict=True):
        assert torch.equal(ours.get_buffer(BIAS), theirs.get_buffer(BIAS))


def test_the_engine_samples_with_the_bias_that_was_learned(config, mixture):
    config = replace(config, model=mixture("deepseek_v3"))
    one_step = replace(config.update, minibatch_size=None, num_epochs=1)
    algorithm = replace(config.algorithm, balance_bias_rate=0.3)
    trainer = build_run(replace(config, update=one_step, algorithm=algorithm))[0].trainer
    trainer.iterate()
    assert any(router.get_buffer(BIAS).any() for router in trainer.balance.routers)
    assert trainer.iterate().values()["policy/rollout_gap"] < 1e-4


def test_what_cannot_be_balanced_is_refused_before_the_model_is_loaded(config, mixture):
    def refused(model, match, **settings):
        with pytest.raises(ModelError, match=match):
            build_run(replace(config, model=model, algorithm=replace(config.algorithm, **settings)))

    refused(TINY, r"model\.path \(.*tiny_char_llama\) is no mixture of experts", balance_coef=0.01)
    refused(mixture("qwen3_moe"), r"balance_bias_rate could move", balance_bias_rate=0.001)
    adapted = replace(mixture("deepseek_v3"), lora=LoraSettings(rank=2))
    refused(adapted, r"balance_bias_rate \(0\.001\) moves a bias of the base", balance_bias_rate=0.001)
    assert Path(adapted.path).is_dir()
