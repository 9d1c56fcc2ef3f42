"""Tiny tokenizers that carry the chat templates of published models, with their special tokens.

Every byte is a token, besides some merges where they are asked for, so that any text has ids.
"""

from functools import lru_cache
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEMPLATES = Path(__file__).parent / "templates"
CHATML = ("", "<|im_end|>", ["<|endoftext|>", "<|im_start|>"])
LLAMA = (
    "<|begin_of_text|>",
    "<|eot_id|>",
    ["<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|python_tag|>"],
)
GEMMA = ("<bos>", "<end_of_turn>", ["<eos>", "<start_of_turn>"])
FAMILIES = {
    "qwen2_5": CHATML,
    "qwen3": CHATML,
    "smollm2": CHATML,
    "llama3": LLAMA,
    "llama3_1": LLAMA,
    "llama3_2": LLAMA,
    "gemma": GEMMA,
    "gemma3": GEMMA,
    "mistral": (
        "<s>",
        "</s>",
        ["[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]",
         "[/TOOL_RESULTS]"],
    ),
}  # fmt: skip
"""BOS, the EOS that ends a turn, and the other special tokens."""
WORDS = ["the user answers", "assistant\n\nwhat do you think?", '{"name": "search"}', "  and\n\n\nthen\t 1234"]

PIECES = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
"""What no token goes beyond, in Llama 3 and Qwen (without the endings of English)."""


@lru_cache
def family(name: str, *, merges: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer with the template of this name; Qwen's also have the tags of calls and of reasoning as tokens."""
    bos, eos, others = FAMILIES[name]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(PIECES, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = 400 if merges else 0
    tokenizer.train_from_iterator(
        WORDS * 9, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos, **({"bos_token": bos} if bos else {}), extra_special_tokens=others
    )
    if name.startswith("qwen"):
        tags = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
        fast.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    fast.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
    return fast
