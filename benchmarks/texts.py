"""Prompts and preference pairs of known lengths in tokens, drawn from a seed."""

import random
import re
from typing import Any

from transformers import PreTrainedTokenizerBase

WORD, LETTER = re.compile(" [a-z]+"), re.compile("[a-z]")


class Words:
    """Texts made of words that are one token each; of letters, where the tokenizer has no words."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> None:
        self.tokenizer = tokenizer
        self.random = random.Random(seed)
        texts = {token: str(tokenizer.decode([token])) for token in range(len(tokenizer))}
        self.ids = [token for token, text in texts.items() if WORD.fullmatch(text)]
        self.ids = self.ids or [token for token, text in texts.items() if LETTER.fullmatch(text)]

    def draw(self, num_tokens: int) -> str:
        """A text of this many tokens.

        Raises:
            ValueError: The tokenizer reads the text as other tokens.
        """
        ids = self.random.choices(self.ids, k=num_tokens)
        text = str(self.tokenizer.decode(ids))
        if self.tokenizer.encode(text, add_special_tokens=False) != ids:
            raise ValueError("the tokenizer splits its own words into other tokens; choose another model")
        return text

    def pair(self, prompt: tuple[int, int], response: tuple[int, int]) -> dict[str, Any]:
        """A row of preference data, with lengths uniform between these bounds."""
        return {
            "prompt": self.draw(self.random.randint(*prompt)),
            "chosen": self.draw(self.random.randint(*response)),
            "rejected": self.draw(self.random.randint(*response)),
        }
