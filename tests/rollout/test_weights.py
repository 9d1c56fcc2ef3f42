import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.testing import assert_close

from llmrl.rollout.weights import SamplingWeights

from .tiny import build, full_forward_logprobs, make_sampling, rows_of


class Trained:
    """`Trainable` of which the engine may read the module only."""

    learning_rate = 0.0
    num_steps_done = 0
    device = torch.device("cpu")
    holds_all = True

    def __init__(self, model):
        self.module = self.wrapped = nn.Module()
        self.module.model = model

    def whole(self, part):
        return ((name, p.detach()) for name, p in part.named_parameters())

    def backward(self, loss):
        raise AssertionError("an engine never trains")

    optimizer_step = state_dict = load_state_dict = assign = backward


def assert_samples_from(model, rollout, atol):
    for prompt, response, logprobs, _ in rows_of(rollout):
        assert_close(logprobs, full_forward_logprobs(model, prompt, response), atol=atol, rtol=0)


def in_bfloat16(model):
    """The oracle: rounded weights, computed on in the engine's precision."""
    rounded = build("llama")
    rounded.load_state_dict(model.state_dict())
    return rounded.to(torch.bfloat16)


def test_weights_in_the_dtype_of_sampling_are_live(model, any_engine, prompts):
    engine = any_engine(model)
    engine.generate(prompts, make_sampling())
    with torch.no_grad():
        model.lm_head.weight[9] += 1.0
    assert_samples_from(model, engine.generate(prompts, make_sampling()), 1e-5)
    engine.load_weights(Trained(model))
    assert engine.weights.fresh() is model


def test_a_copy_in_bfloat16_is_refreshed(model, any_engine, prompts):
    engine = any_engine(model, dtype=torch.bfloat16)
    before = engine.generate(prompts, make_sampling())
    assert_samples_from(in_bfloat16(model), before, 0.15)
    with torch.no_grad():
        model.lm_head.weight[9] += 1.0
        model.model.layers[0].self_attn.k_proj.weight *= -1.0
    engine.load_weights(Trained(model))
    after = engine.generate(prompts, make_sampling())
    assert_samples_from(in_bfloat16(model), after, 0.15)
    assert not after.sequences.response_ids.equal(before.sequences.response_ids)


def test_a_stale_copy_does_not_go_unnoticed(model, any_engine, prompts):
    engine = any_engine(model, dtype=torch.bfloat16)
    trained = Trained(model)
    engine.load_weights(trained)
    engine.generate(prompts, make_sampling())
    trained.num_steps_done += 1
    with pytest.raises(RuntimeError, match="changed since load_weights"):
        engine.generate(prompts, make_sampling())
    engine.load_weights(trained)
    engine.generate(prompts, make_sampling())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_another_model_are_refused(model, any_engine, dtype):
    with pytest.raises(ValueError, match="another model"):
        any_engine(model, dtype=dtype).load_weights(Trained(build("llama")))


def test_the_copy_leaves_the_trained_model_alone(model, native, prompts):
    engine = native(model, dtype=torch.bfloat16)
    copied = engine.weights.fresh()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.dtype for p in copied.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in copied.parameters())
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in copied.parameters()}
    assert copied.model.rotary_emb.inv_freq.dtype == torch.float32


def test_tied_weights_stay_tied(native):
    model = build("gemma3")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    copied = native(model, dtype=torch.bfloat16).weights.fresh()
    assert copied.lm_head.weight is copied.model.embed_tokens.weight


def test_adapters_injected_in_place(model, native, prompts):
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False), model)
    rollout = native(model, max_rows=4).generate(prompts, make_sampling())
    assert_samples_from(model, rollout, 1e-5)
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.lora_B["default"].weight *= 3.0
    assert_samples_from(model, native(model).generate(prompts, make_sampling()), 1e-5)


def test_a_frozen_base_in_the_dtype_of_sampling_is_shared(model, native, prompts):
    model.to(torch.bfloat16)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), model)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data = parameter.data.float()
    engine = native(model, dtype=torch.bfloat16)
    copied = dict(engine.weights.fresh().named_parameters())
    for name, parameter in model.named_parameters():
        assert (copied[name] is parameter) == ("lora" not in name)
    engine.generate(prompts, make_sampling())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_will_be_split_are_copied_all(dtype):
    """From then on the copy follows what comes together, whatever stands in the trained model."""
    model = build("gemma3")  # tied
    weights = SamplingWeights(model, dtype, torch.device("cpu"))
    copied = weights.fresh()
    assert copied is not model
    assert {p.dtype for p in copied.parameters()} == {dtype}
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in copied.parameters()}
    assert copied.lm_head.weight is copied.model.embed_tokens.weight
    trained = Trained(model)
    whole = {name: torch.full_like(p, 2.0) for name, p in model.named_parameters()}
    trained.whole = lambda part: iter(whole.items()) if part is model else None
    weights.load(trained)
    assert all(bool((p == 2.0).all()) for p in copied.parameters())
    assert not any(bool((p == 2.0).all()) for p in model.parameters())
