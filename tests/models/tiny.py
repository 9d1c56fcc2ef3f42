"""Tiny random models of ten kinds, a tokenizer, ragged rows, and an oracle that takes each row alone."""

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from llmrl.batches import Sequences, TokenOutputs
from llmrl.distributed.microbatcher import Microbatcher
from llmrl.distributed.roles import distribute_rows
from llmrl.microbatches import TokenBudget
from llmrl.models.critic import ValueHead
from llmrl.models.heads import choose_head
from llmrl.models.packing import packs
from llmrl.models.policy import PolicyModule
from llmrl.models.probe import pack_where_exact
from llmrl.models.training import initialize_head, turn_dropout_off
from tests.contexts import context_of
from tests.rollout import tiny as rollout_tiny
from tests.rollout.tiny import SIZES, VOCAB

EOS = 2
TEMPERATURE = 0.7
HEAD_SIZES = {name: value for name, value in SIZES.items() if name != "head_dim"}


def in_microbatches(ask: Callable[[Sequences], TokenOutputs], sequences: Sequences, max_tokens: int) -> TokenOutputs:
    """Outputs as a run in one process asks for them."""
    return distribute_rows(ask, sequences, Microbatcher(TokenBudget(max_tokens=max_tokens), context_of()))


class DrawnHead(ValueHead):
    """A critic's head that does not begin at zero, so that its values and their gradients are not 0."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size)
        initialize_head(self, "normal")


def llama(**changes):
    return LlamaForCausalLM(LlamaConfig(**(SIZES | changes)))


def llama_tied():
    return llama(tie_word_embeddings=True)


def qwen2():
    return Qwen2ForCausalLM(Qwen2Config(**HEAD_SIZES))


def gpt2(**changes):
    """Positions learned one by one, and the dropout of 0.1 that its config has by default."""
    sizes = {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3}
    return GPT2LMHeadModel(GPT2Config(**(sizes | changes), bos_token_id=2, eos_token_id=2))


def gemma2(**changes):
    settings = {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8, "sliding_window": 4}
    return Gemma2ForCausalLM(Gemma2Config(**(SIZES | settings | changes)))


def cohere():
    return CohereForCausalLM(CohereConfig(**HEAD_SIZES, logit_scale=0.25))


def granite():
    return GraniteForCausalLM(GraniteConfig(**HEAD_SIZES, logits_scaling=4.0))


def granite_moe():
    return GraniteMoeForCausalLM(GraniteMoeConfig(**HEAD_SIZES, logits_scaling=4.0, num_local_experts=2))


LINEAR = {f.__name__: f for f in (llama, llama_tied, qwen2, rollout_tiny.qwen3, gpt2, rollout_tiny.mistral)}
NOT_LINEAR = {f.__name__: f for f in (gemma2, rollout_tiny.gemma3, cohere, granite, granite_moe)}
FAMILIES = LINEAR | NOT_LINEAR
PACKING = [name for name in FAMILIES if name not in ("mistral", "gemma2", "gemma3")]
"""Families that pack; the others have a window that slides over columns."""


def build(family: str):
    """The same weights each time, in eval mode: what the oracle reads."""
    torch.manual_seed(0)
    return FAMILIES[family]().eval()


def packing(model):
    """The same model, whose passes are packed."""
    pack_where_exact(model)
    assert packs(model.base_model, torch.float32, torch.device("cpu"))
    return model


def module_of(model, *, temperature=TEMPERATURE, dtype=torch.float32) -> PolicyModule:
    """A policy in train mode without dropout, as a run has it."""
    turn_dropout_off(model)
    return PolicyModule(model.train(), choose_head(model, VOCAB), temperature=temperature, dtype=dtype)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """37 words ``t0 ... t36``; the EOS pads too."""
    words = Tokenizer(models.WordLevel({f"t{n}": n for n in range(VOCAB)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token=f"t{EOS}", pad_token=f"t{EOS}", unk_token="t0"
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} t2 {% endfor %}"
    return tokenizer


def save_folder(folder: Path, model) -> str:
    """A model folder; returns its path."""
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


# Prompt, response, and which response tokens the actor chose.
ROWS = [
    ([7, 8, 9], [10, 11, 20, 21, 12, EOS], [1, 1, 0, 0, 1, 1]),  # tool output in the middle
    ([EOS, 14], [15], [1]),  # an EOS that is no padding
    ([3, 4, 5, 6, 30, 31, 32, 33], [EOS], [1]),
    ([34], [16, 17], [0, 0]),  # nothing of it counts
    ([35, 18], [19, EOS, 22, 23], [0, 1, 1, 1]),
]


def make_sequences(rows=ROWS, *, prompt_padding=(EOS,), response_padding=(EOS,)) -> Sequences:
    """Prompts padded left and responses right, one column wider than any needs; the padding ids are used in turn."""
    width = 1 + max(len(prompt) for prompt, _, _ in rows)
    length = 1 + max(len(response) for _, response, _ in rows)

    def cycle(ids, count):
        return [ids[n % len(ids)] for n in range(count)]

    return Sequences.from_rows(
        prompt_ids=torch.tensor([cycle(prompt_padding, width - len(p)) + p for p, _, _ in rows]),
        prompt_mask=torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p, _, _ in rows]),
        response_ids=torch.tensor([r + cycle(response_padding, length - len(r)) for _, r, _ in rows]),
        response_mask=torch.tensor(
            [[bool(c) for c in chosen] + [False] * (length - len(chosen)) for *_, chosen in rows]
        ),
        response_lengths=torch.tensor([len(r) for _, r, _ in rows]),
    )


def dense(model, rows=ROWS, *, temperature=TEMPERATURE) -> tuple[Tensor, Tensor]:
    """``(logprobs, entropy)`` from the model's own logits, one forward a row, nothing padded; 0 outside the mask."""
    length = 1 + max(len(response) for _, response, _ in rows)
    logprobs, entropies = [], []
    for prompt, response, chosen in rows:
        logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0]
        before = logits[len(prompt) - 1 : -1, :VOCAB].double() / temperature
        distribution = before.log_softmax(dim=-1)
        counted = torch.tensor(chosen).double()
        pad = (0, length - len(response))
        picked = distribution[range(len(response)), response]
        logprobs.append(torch.nn.functional.pad(picked * counted, pad))
        entropy = -(distribution.exp() * distribution).sum(dim=-1)
        entropies.append(torch.nn.functional.pad(entropy * counted, pad))
    return torch.stack(logprobs).float(), torch.stack(entropies).float()


def gradients(model, logprobs: Tensor, entropy: Tensor) -> dict[str, Tensor]:
    """Of a sum in which each token has a weight of its own, by parameter; zeros where none arrives."""
    weights = torch.linspace(-1.0, 2.0, logprobs.numel()).view_as(logprobs)
    loss = (weights * logprobs).sum() + 0.3 * (weights.flip(1) * entropy).sum()
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(learning.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if grad is None else grad
        for (name, p), grad in zip(learning.items(), grads, strict=True)
    }


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Each close by the size of the largest number in it."""
    assert ours.keys() == theirs.keys()
    for name in ours:
        scale = theirs[name].abs().max().item()
        assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-5 + 1e-4 * scale, msg=lambda m, n=name: f"{n}: {m}")


IDS = torch.tensor([[7, 8, 9, 20, 21]])


def move(adapted):
    """What training does: other weights wherever they may learn."""
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p))


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits
