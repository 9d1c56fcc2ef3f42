"""Tiny random models of five families, ragged prompts, and an oracle that knows nothing of caches."""

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from llmrl.batches import Prompts
from llmrl.functional.streams import Purpose
from llmrl.roles import Sampling

VOCAB = 37  # of the tokenizer; the embedding is padded to 40
EOS = (2, 5)
SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # far from uniform, so that a wrong token in the cache shows
    "pad_token_id": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama():
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def qwen3():
    return Qwen3ForCausalLM(Qwen3Config(**SIZES))


def mistral():
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4))


def gemma3():
    config = Gemma3TextConfig(
        **SIZES,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        query_pre_attn_scalar=8,
        final_logit_softcapping=3.0,
        attn_logit_softcapping=None,
    )
    return Gemma3ForCausalLM(config)


def gpt2():
    config = GPT2Config(
        vocab_size=40,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        initializer_range=0.3,
        pad_token_id=2,
        bos_token_id=2,
        eos_token_id=2,
    )
    return GPT2LMHeadModel(config)


FAMILIES = {build.__name__: build for build in (llama, qwen3, mistral, gemma3, gpt2)}


def build(family: str):
    torch.manual_seed(0)
    return FAMILIES[family]().eval()


class Counter:
    """Progress that counts."""

    def __init__(self):
        self.advanced = 0
        self.num_looks = 0
        """Calls of `advance`, where a run can be stopped."""

    def begin(self, num_iterations):
        raise AssertionError("the run says how long it is, not the engine")

    def phase(self, name, total):
        raise AssertionError("the loop names phases, not the engine")

    def iteration(self, number, values):
        raise AssertionError("the run counts iterations, not the engine")

    def message(self, text):
        raise AssertionError("the engine has nothing to say")

    def advance(self, amount=1):
        self.advanced += amount
        self.num_looks += 1


def make_prompts(*token_ids: list[int], pad=2) -> Prompts:
    width = max(len(ids) for ids in token_ids) + 1  # one column that no prompt needs
    ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids in token_ids])
    mask = torch.tensor([[False] * (width - len(ids)) + [True] * len(ids) for ids in token_ids])
    return Prompts(ids=ids, mask=mask, rows=tuple({"row": n} for n in range(len(token_ids))))


def make_sampling(**changes) -> Sampling:
    settings = {
        "temperature": 1.0,
        "num_responses": 2,
        "max_response_tokens": 12,
        "greedy": False,
        "seed": 11,
        "purpose": Purpose.TRAINING,
        "first_response": 0,
    }
    return Sampling(**(settings | changes))


def rows_of(rollout):
    """Each row as (prompt, response, log-probabilities, finished), padding gone."""
    sequences = rollout.sequences
    return [
        (
            sequences.prompt_ids[b][sequences.prompt_mask[b]].tolist(),
            sequences.response_ids[b][sequences.response_mask[b]].tolist(),
            rollout.rollout_logprobs[b][sequences.response_mask[b]],
            bool(rollout.finished[b]),
        )
        for b in range(len(rollout.rows))
    ]


def full_forward_logprobs(model, prompt, response, temperature=1.0, vocab=VOCAB):
    """Of each response token, by one plain forward over this row alone: no cache, no padding, no batch."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0, :, :vocab].double()
    logprobs = (logits / temperature).log_softmax(dim=-1)
    return torch.stack([logprobs[len(prompt) + t - 1, token] for t, token in enumerate(response)]).float()
