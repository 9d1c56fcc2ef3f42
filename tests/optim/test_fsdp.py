"""FSDP2 in a group of one. Several ranks: tests/test_many_processes.py."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from llmrl.optim.fsdp import ShardedTrainable, shard
from tests.contexts import CPU
from tests.distributed.one_rank import group  # noqa: F401
from tests.distributed.sharded import LikeLocal

SIZES = {"vocab_size": 8, "hidden_size": 4}
pytestmark = pytest.mark.usefixtures("group")


class TestShardedTrainable(LikeLocal):
    kind = ShardedTrainable


@pytest.mark.parametrize(
    "model",
    [
        LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=4, num_hidden_layers=3, num_attention_heads=2)),
        GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=6, n_embd=4, n_layer=3, n_head=2)),
    ],
    ids=["llama", "gpt2"],
)
def test_layers_are_split_one_by_one_and_answers_stay(model: nn.Module):
    model.eval()
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        expected = model(ids).logits
        shard(model, CPU)
        assert_close(model(ids).logits, expected)
    split = [type(module).__name__ for module in model.modules() if isinstance(module, FSDPModule)]
    assert len(split) == 1 + 3
    model.reshard()
    assert all(isinstance(p, DTensor) for p in model.parameters())
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == isinstance(
        model, GPT2LMHeadModel
    )


def test_of_what_is_frozen_nothing_stays_whole():
    """No backward pass comes that would need it."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=4, num_hidden_layers=2, num_attention_heads=2))
    model.requires_grad_(False)
    shard(model, CPU, is_frozen=True)
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))
    assert all(isinstance(p, DTensor) for p in model.parameters())
