"""Makes the folders of three tiny Llamas, which read characters, chats in characters, and words: no weights.

    python recipes/models/make_tiny_llamas.py [--out recipes/models]

A run that trains from scratch draws the weights from its seed. The words are those of data/reviews/generate.py; other
text is read too, in smaller pieces.
"""

import argparse
import random
import runpy
import string
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AddedToken, LlamaConfig, PreTrainedTokenizerFast

REVIEWS = Path(__file__).parents[2] / "data" / "reviews" / "generate.py"
SPECIAL_TOKENS = ["<pad>", "<eos>", "<unk>"]
ROLES = ["system", "user", "assistant", "tool"]
CALL_PIECES = ["<tool_call>", "</tool_call>", '{"name": "', '", "arguments": {"', '": "', '"}}']
"""Tokens of their own, so that a call of a tool is short."""
CHAT_TEMPLATE = """\
{%- if tools -%}
    <|system|>
    {%- for tool in tools -%}
        {{ tool.function.name }}({{ tool.function.parameters.properties | join(", ") }}){{ "" if loop.last else " " }}
    {%- endfor -%}
    <eos>
{%- endif -%}
{%- for message in messages -%}
    <|{{ message.role }}|>{{ message.content }}
    {%- for call in message.tool_calls or [] -%}
        <tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>
    {%- endfor -%}
    <eos>
{%- endfor -%}
{%- if add_generation_prompt -%}
    <|assistant|>
{%- endif -%}
"""
CHARACTERS = [*"\n ", *string.digits, *string.ascii_letters, *string.punctuation]
NUM_WORDS = 1024  # at most: 256 bytes, pieces, and each word of the reviews with a space before it and without
NUM_REVIEWS = 20_000  # texts that it is made from
MAX_TOKENS = 256


def char_tokenizer() -> Tokenizer:
    """One token a character."""
    ids = {token: n for n, token in enumerate(SPECIAL_TOKENS + CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, a role and a piece of a call; calls of tools in the format of Hermes and Qwen."""
    chat = finished(char_tokenizer())
    chat.add_tokens([AddedToken(f"<|{role}|>", special=True, normalized=False) for role in ROLES])
    chat.add_tokens([AddedToken(piece, normalized=False) for piece in CALL_PIECES])
    chat.chat_template = CHAT_TEMPLATE
    return chat


def word_tokenizer() -> Tokenizer:
    """Byte-pair encoding: one token a word for the words of the reviews, and any other text in pieces down to bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_WORDS,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(review_texts(), trainer)
    return tokenizer


def review_texts() -> Iterator[str]:
    """Prompts and reviews of the review data, the same ones every time."""
    reviews, rng = runpy.run_path(str(REVIEWS)), random.Random(0)
    prompts = reviews["draw_prompts"](rng)
    for n in range(NUM_REVIEWS):
        prompt = prompts[n % len(prompts)]
        yield prompt
        yield reviews["draw_review"](reviews["kind_of"](prompt), rng)


def finished(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """With its special tokens; no BOS and no chat template."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=MAX_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def make_config(vocab_size: int) -> LlamaConfig:
    """About 0.3 million parameters and the embeddings: enough to add, little enough to learn it in a minute."""
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_TOKENS,
        initializer_range=0.05,  # at the usual 0.02, meant for wider layers, some seeds start to learn late
        bos_token_id=None,
        eos_token_id=SPECIAL_TOKENS.index("<eos>"),
        pad_token_id=SPECIAL_TOKENS.index("<pad>"),
        dtype="float32",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the folders of the tiny Llamas.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write them to")
    out = parser.parse_args().out
    tokenizers = {
        "tiny_char_llama": finished(char_tokenizer()),
        "tiny_chat_llama": chat_tokenizer(),
        "tiny_word_llama": finished(word_tokenizer()),
    }
    for name, tokenizer in tokenizers.items():
        tokenizer.save_pretrained(out / name)
        make_config(len(tokenizer)).save_pretrained(out / name)
        for path in sorted((out / name).iterdir()):
            print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
