from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from llmrl.sizing import activations
from llmrl.sizing.activations import Pass

WORK = Pass(rows=3, num_tokens=30, num_scored=12, bfloat16=False)
HALF = replace(WORK, bfloat16=True)


def test_a_layer_by_hand(shape):
    # norms 2 x (8 + 8) float32, inputs 2 x 8, q 8, k 4, v 4, output 8, one number for each of 2 heads, 4 x 16
    assert activations.of_layer(shape, WORK) == 4 * (32 + 16 + 24 + 2 + 64)
    assert activations.of_layer(shape, HALF) == 4 * (32 + 2) + 2 * (5 * 8 + 24 + 64)


def test_a_pass_by_hand(shape):
    assert activations.saved_bytes(shape, WORK) == 30 * (4 * 8 * 3 + 2 * 552)
    checkpoints = replace(WORK, checkpoints=True)
    assert activations.saved_bytes(shape, checkpoints) == 30 * 4 * 8 * (3 + 2)
    assert activations.peak_extra_bytes(shape, checkpoints) == 30 * 552
    assert activations.peak_extra_bytes(shape, WORK) == activations.head(shape, WORK) + activations.head_gradient(
        shape, WORK
    )
    cast = activations.saved_bytes(shape, HALF) - 30 * (4 * 8 * 3 + 2 * activations.of_layer(shape, HALF))
    assert cast == 2 * 2 * 576
    logits = 3 * 4 * 12 * 32
    assert activations.head(shape, WORK) == 2 * 4 * 12 * 8 + logits
    assert activations.head_gradient(shape, WORK) == 2 * 4 * 256
    assert activations.no_gradient_bytes(shape, WORK) == max(
        30 * 4 * (2 * 8 + 3 * 16 + 8), 30 * 4 * 8 + activations.head(shape, WORK)
    )


def test_weights_of_four_bits_are_numbers_one_layer_at_a_time(shape):
    """The largest has 8 x 16; no copy of all of them is cast."""
    bits = replace(HALF, quantized=True, checkpoints=True, learns=False)
    plain = replace(bits, quantized=False)
    less = activations.peak_extra_bytes(shape, plain) - activations.peak_extra_bytes(shape, bits)
    assert less == 2 * 576 - 6 * 128
    assert (
        activations.saved_bytes(shape, replace(plain, checkpoints=False))
        - activations.saved_bytes(shape, replace(bits, checkpoints=False))
        == 2 * 2 * 576
    )


def test_without_a_head_there_are_no_logits(shape):
    work = replace(WORK, num_scored=0)
    assert activations.head(shape, work) == activations.head_gradient(shape, work) == 0


def test_a_chunk_bounds_the_logits(shape):
    long, longer = (replace(WORK, num_scored=num) for num in (1000, 2000))
    states = 2 * 4 * 8 * 1000
    assert activations.head(shape, longer) - activations.head(shape, long) == states


def test_what_is_frozen_keeps_less(shape):
    frozen = replace(WORK, learns=False)
    assert activations.saved_bytes(shape, frozen) < activations.saved_bytes(shape, WORK)
    assert activations.head_gradient(shape, frozen) == 0


@pytest.mark.parametrize("rank", [0, 2])
def test_a_pass_keeps_as_many_bytes_as_autograd_does(llama, shape, rank):
    """Those of saved tensors that are not weights, each storage once; beyond the formula, cosines, sines and means."""
    model = AutoModelForCausalLM.from_config(llama)
    if rank:
        get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    embeddings = torch.randn(3, 10, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        hidden = model.base_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    measured = sum(kept.values()) + hidden.nbytes
    work = replace(WORK, rank=rank, learns=not rank)
    assert measured == pytest.approx(activations.saved_bytes(shape, work), rel=0.06)
