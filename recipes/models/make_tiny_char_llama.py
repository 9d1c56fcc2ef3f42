"""Makes the folder of a tiny Llama that reads characters: configuration and tokenizer, and no weights.

    python recipes/models/make_tiny_char_llama.py [--out recipes/models/tiny_char_llama]

A run that trains from scratch draws the weights from its seed.
"""

import argparse
import string
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

VOCABULARY = ["<pad>", "<eos>", "<unk>", *"\n ", *string.digits, *string.ascii_letters, *string.punctuation]
MAX_TOKENS = 256


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character; no BOS and no chat template."""
    ids = {token: n for n, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=MAX_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def make_config() -> LlamaConfig:
    """About 0.35 million parameters: enough to add, little enough to learn it on a laptop in a minute."""
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(VOCABULARY),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_TOKENS,
        initializer_range=0.05,  # at the usual 0.02, meant for wider layers, some seeds start to learn late
        bos_token_id=None,
        eos_token_id=VOCABULARY.index("<eos>"),
        pad_token_id=VOCABULARY.index("<pad>"),
        dtype="float32",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the folder of the tiny Llama.")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "tiny_char_llama", help="folder to write to"
    )
    out = parser.parse_args().out
    make_tokenizer().save_pretrained(out)
    make_config().save_pretrained(out)
    for path in sorted(out.iterdir()):
        print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
