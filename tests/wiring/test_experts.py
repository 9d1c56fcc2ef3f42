"""Runs of a mixture of experts: how its choices are balanced, and that nothing of it depends on how a step is split."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from llmrl.models.config import LoraSettings, ModelConfig
from llmrl.models.experts import BIAS
from llmrl.models.folders import ModelError
from llmrl.routing import route_of
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
        for name in ("experts/load_max", "experts/unused_fraction", "experts/balance_loss", "experts/agreement"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5)
        assert ours["policy/ratio_max_deviation"] < 1e-5


@pytest.mark.parametrize(("family", "engine"), [("qwen3_moe", "native"), ("deepseek_v3", "transformers")])
def test_rollout_and_update_choose_the_same_experts(config, mixture, family, engine):
    """Also where the policy moves between the minibatches of an iteration: the first one is read."""
    optimizer = replace(config.optimizer, learning_rate=1e-2)
    config = replace(config, rollout=replace(config.rollout, engine=engine), optimizer=optimizer)
    _, told = learned(replace(config, model=mixture(family)), balance_coef=10.0)
    for values in told:
        assert values["experts/agreement"] == 1.0
        assert values["policy/rollout_gap"] < 1e-4


def test_fewer_agree_where_rollouts_are_stale(config, mixture):
    optimizer = replace(config.optimizer, learning_rate=1e-2)
    update = replace(config.update, staleness=1)
    config = replace(config, model=mixture("qwen3_moe"), optimizer=optimizer, update=update)
    _, (first, second) = learned(config, importance="truncated", balance_coef=10.0)
    assert first["experts/agreement"] == 1.0  # nothing has been learned yet
    assert second["experts/agreement"] < 0.9


def test_two_experts_that_change_places_disagree_where_one_of_them_was_chosen(config, mixture):
    trainer = build_run(replace(config, model=mixture("qwen3_moe")))[0].trainer
    with torch.no_grad():
        rollout, scores, _ = trainer.collect(trainer.prompts.next(16))
        last = trainer.balance.routers[1].weight
        last.copy_(last[[1, 0, 2, 3]])
        experience, _ = trainer.algorithm.experience(rollout, scores)
    mask = experience.counted
    ((_, _, metrics),) = trainer.algorithm.losses(experience, mask / mask.sum())
    sets = {int(route_of(torch.tensor(pair))): pair for pair in itertools.combinations(range(4), 2)}
    chosen = [sets[code] for code in rollout.routes[..., 1][mask].tolist()]
    same = sum((0 in pair) == (1 in pair) for pair in chosen)
    assert 0 < same < len(chosen)
    assert metrics.values()["experts/agreement"] == pytest.approx((len(chosen) + same) / (2 * len(chosen)))
    shifted = replace(experience, rollout=replace(rollout, routes=rollout.routes.roll(1, dims=1)))
    ((_, _, metrics),) = trainer.algorithm.losses(shifted, mask / mask.sum())
    assert metrics.values()["experts/agreement"] < 0.6


def test_a_rollout_that_waited_in_a_checkpoint_of_before_has_no_routes(config, mixture):
    config = replace(config, model=mixture("qwen3_moe"), update=replace(config.update, num_replayed=1))
    straight, _ = learned(config, importance="truncated")
    arrays, rest = split_state(straight.state_dict())
    kept = {name: x.clone() for name, x in arrays.items() if not name.endswith("routes")}
    assert len(kept) == len(arrays) - 1
    resumed, _ = build_run(replace(config, algorithm=replace(config.algorithm, importance="truncated")))
    resumed.trainer.load_state_dict(join_state(kept, json.loads(json.dumps(rest))))
    told = [trainer.iterate().values() for trainer in (straight, resumed.trainer, resumed.trainer)]
    assert ["experts/agreement" in values for values in told] == [True, False, True]
    assert told[0]["policy/loss"] == told[1]["policy/loss"]


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
