"""Rewards for GSM8K, grade school word problems. Copy this file and change what you like.

A recipe names a function by file and name, and says how much it counts:

    reward:
      functions:
        - {name: "reward_models/gsm8k.py:correct"}
        - {name: "reward_models/gsm8k.py:shows_answer", weight: 0.1}
        - {name: "reward_models/gsm8k.py:steps_right", weight: 0.02}

`responses` are the texts that the model wrote; `answer` is the data column of that name, and any other column can be
asked for in the same way. Return one number for each response, or None where a response cannot be scored, or a list
for places in it, as `steps_right` does.
"""

import re

from llmrl.rewards.rules import gsm8k_answer, right_equations


def correct(responses: list[str], answer: list[str]) -> list[float | None]:
    """1.0 for the right number: the one after ``####``, or the last one where the response has no ``####``."""
    return gsm8k_answer(responses, answer)


def shows_answer(responses: list[str]) -> list[float]:
    """1.0 for a response that ends as the data does, with ``#### 72``, whether the number is right or not."""
    return [float(re.search(r"####\s*-?[\d,.]*\d\s*$", response) is not None) for response in responses]


def steps_right(responses: list[str]) -> list[list[tuple[int, float]]]:
    """1.0 at the end of each step that is right, such as ``48/2 = 24`` or ``<<48/2=24>>``, wrong answer or not."""
    return right_equations(responses)
