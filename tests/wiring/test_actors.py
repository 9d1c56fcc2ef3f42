import pytest
import torch
from torch.testing import assert_close

from llmrl.distributed.config import DistributedConfig
from llmrl.models.config import LoraSettings, ModelConfig
from llmrl.wiring.actors import load_actor, reference_of
from tests.contexts import CPU, context_of
from tests.models.tiny import FAMILIES, assert_same_gradients, build, dense, gradients, make_sequences, save_folder


def actor_of(folder, seed=3, **settings):
    config = ModelConfig(path=str(folder), **settings)
    return load_actor(config, CPU, temperature=0.7, seed=seed)


@pytest.fixture(params=["llama", "gpt2", "gemma2"])
def folder(request, tmp_path):
    torch.manual_seed(0)
    return save_folder(tmp_path, FAMILIES[request.param]())


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2)], ids=["full", "lora"])
def test_gradient_checkpointing_changes_memory_alone(folder, lora):
    results, num_forwards = [], []
    for checkpointing in (False, True):
        actor = actor_of(folder, lora=lora, gradient_checkpointing=checkpointing)
        layer = actor.model.get_decoder().layers[0] if hasattr(actor.model, "model") else actor.model.transformer.h[0]
        calls = []
        layer.mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        results.append(gradients(actor.model, *actor.policy.logprobs(make_sequences()).named.values()))
        num_forwards.append(len(calls))
    assert num_forwards == [1, 2]  # recomputed in the backward pass, or it was never on
    assert_same_gradients(results[1], results[0])
    assert any(grad.any() for grad in results[0].values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2)], ids=["full", "lora"])
def test_the_reference_stays_where_the_actor_started(folder, lora, dtype):
    actor = actor_of(folder, lora=lora, dtype=dtype)
    assert actor.model.training
    reference = reference_of(actor, DistributedConfig(), context_of())
    with torch.no_grad():
        start = actor.policy.logprobs(make_sequences()).logprobs
        for p in actor.model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
        assert not torch.allclose(actor.policy.logprobs(make_sequences()).logprobs, start, atol=0.01)
        assert_close(reference.logprobs(make_sequences()).logprobs, start, atol=1e-5, rtol=0)


def test_a_bfloat16_reference_is_smaller_than_its_actor(folder):
    actor = actor_of(folder, dtype="bfloat16")
    reference = reference_of(actor, DistributedConfig(), context_of()).module
    sizes = [sum(p.nbytes for p in module.parameters()) for module in (actor.module, reference)]
    assert sizes[1] < 0.8 * sizes[0]


def test_logprobs_are_the_folders(tmp_path):
    torch.manual_seed(0)
    actor = actor_of(save_folder(tmp_path, FAMILIES["gpt2"]()))
    with torch.no_grad():
        expected, _ = dense(build("gpt2"))
    assert_close(actor.policy.logprobs(make_sequences()).logprobs.detach(), expected, rtol=1e-4, atol=1e-4)


def test_random_weights_and_adapters_come_from_the_seed(tmp_path):
    path = save_folder(tmp_path, FAMILIES["llama"]())
    settings = {"from_scratch": True, "lora": LoraSettings(rank=2)}
    first = actor_of(path, **settings).model.state_dict()
    torch.rand(3)
    second = actor_of(path, **settings).model.state_dict()
    assert all(torch.equal(x, second[name]) for name, x in first.items())
    other = actor_of(path, seed=4, **settings).model.state_dict()
    assert any(not torch.equal(x, other[name]) for name, x in first.items())
