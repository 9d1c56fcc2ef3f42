"""Tokenizers of one token a character: id = 3 + place in the alphabet, behind <bos> 0, <eos> 1 and <unk> 2."""

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

ALPHABET = "abcdefghijklmnopqrstuvwxyz:|"
BOS, EOS = 0, 1

# Writes its own BOS, then "role:content|" for each message, then "assistant:".
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m.content }}|{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)

# As Qwen3's: told not to think, it writes the end of a thought itself.
THINKING_TEMPLATE = CHAT_TEMPLATE.replace(
    "assistant:", "assistant:{% if enable_thinking is defined and enable_thinking is false %}nothought|{% endif %}"
)


def make_tokenizer(post_processor: str | None = None, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer whose `post_processor` is written as in "<bos> $A <eos>"."""
    vocabulary = {token: n for n, token in enumerate(["<bos>", "<eos>", "<unk>", *ALPHABET])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    if post_processor:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=post_processor, special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=chat_template,
    )


def spell(text: str) -> list[int]:
    """The ids of a text by the rule above, without special tokens."""
    return [3 + ALPHABET.index(character) for character in text]


@pytest.fixture(scope="session")
def plain() -> PreTrainedTokenizerFast:
    """Adds no special token; has no chat template."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def chat() -> PreTrainedTokenizerFast:
    """Puts BOS before a text, as many do, and has a chat template that writes BOS too."""
    return make_tokenizer("<bos> $A", CHAT_TEMPLATE)
