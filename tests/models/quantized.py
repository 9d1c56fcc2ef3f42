"""Tiny models that can be quantized, and the same models with the weights that their 4 bits stand for."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from tests.rollout.tiny import SIZES

TOKENIZER = Path(__file__).parents[2] / "recipes" / "models" / "tiny_char_llama"
WIDE = SIZES | {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_hidden_layers": 2, "vocab_size": 99}


def llama(**changes) -> LlamaForCausalLM:
    sizes = WIDE | {"pad_token_id": 0, "eos_token_id": 1, "initializer_range": 0.1}
    return LlamaForCausalLM(LlamaConfig(**(sizes | changes)))


def gpt2() -> GPT2LMHeadModel:
    """Its linear layers are stored the other way round, with biases; its head is tied."""
    sizes = {"vocab_size": 99, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.1}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=1))


FAMILIES = {"llama": llama, "gpt2": gpt2}


def save_base(folder: Path, family: str, **changes) -> str:
    torch.manual_seed(0)
    model = FAMILIES[family](**changes)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.1)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    return str(folder)


def save_dequantized(base: str, folder: Path) -> str:
    """The same folder with the weights that the 4 bits stand for in the linear layers below the head."""
    functional = __import__("bitsandbytes").functional
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for layer in model.base_model.modules():
            if isinstance(layer, torch.nn.Linear | Conv1D):
                weight = layer.weight.T.contiguous() if isinstance(layer, Conv1D) else layer.weight
                four_bits = functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
                read = functional.dequantize_4bit(*four_bits)
                layer.weight.copy_(read.T if isinstance(layer, Conv1D) else read)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return str(folder)
