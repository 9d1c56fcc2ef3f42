"""Checks of rows against the chat template: prompts that it refuses, and its text between prompt and response.

Training reads the prompt with the template's generation prompt, then the response, then EOS, as sampling does. The
template writes a whole conversation by rules of its own: it may open the reasoning, trim the response, or end it with
another token than EOS. Differences are reported, since a model in use would be served the template's text.
"""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from llmrl.batches import Row
from llmrl.data.chat import (
    Prompt,
    TemplateProblem,
    as_messages,
    check_template_arguments,
    opening_of_response,
    render,
    template_problem,
    uses_chat,
    without_opening,
)
from llmrl.data.config import DataConfig
from llmrl.data.files import Rows
from llmrl.data.rows import keep_usable

MAX_COMPARED = 100
"""Number of examples whose seam is compared: what a template does shows in the first ones."""
MAX_SHOWN = 60
"""Characters on each side of the place where two texts part that a note shows."""
END_OF_REASONING = "</think>"


def keep_in_template(
    rows: Sequence[Row], prompts: Sequence[Prompt | None], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> Rows:
    """The rows whose prompt the chat template takes, and those without one; see `keep_usable` for the others.

    What a template refuses are roles and their order, so one prompt of each order is tried.
    """
    check_template_arguments(tokenizer, config)
    if not uses_chat(tokenizer, config):
        return keep_usable(rows, config, lambda row: None)
    one_of_each = {_roles(prompt): prompt for prompt in reversed(prompts) if prompt is not None}
    problems = {roles: template_problem(prompt, tokenizer, config) for roles, prompt in one_of_each.items()}
    found = iter([problems[_roles(prompt)] if prompt is not None else None for prompt in prompts])
    return keep_usable(rows, config, lambda row: next(found))


def notes_on_seams(
    examples: Sequence[tuple[Prompt, str]], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> list[str]:
    """Sentences on where the text that training reads differs from that of the data or of the template."""
    if not uses_chat(tokenizer, config):
        return []
    opening = opening_of_response(tokenizer, config)
    doubled = sum(without_opening(response, opening) != response for _, response in examples)
    notes = []
    if doubled:
        notes.append(
            f"{doubled} of {len(examples)} responses begin with {opening.strip()!r}, which the generation prompt of "
            "the chat template writes already; it is read once"
        )
    compared = examples[:MAX_COMPARED]
    parted = [seam for prompt, response in compared if (seam := _parted(prompt, response, opening, tokenizer, config))]
    if parted:
        trained, written = parted[0]
        notes.append(
            f"in {len(parted)} of the first {len(compared)} examples training reads another text than the "
            f"chat template writes, such as {trained!r} where the template has {written!r}; if a model in use is "
            "to be served the latter, change the responses, the template or the tokenizer's EOS"
        )
    return notes


def _roles(prompt: Prompt) -> tuple[str, ...]:
    return ("text",) if isinstance(prompt, str) else tuple(message["role"] for message in prompt)


def _parted(
    prompt: Prompt, response: str, opening: str, tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> tuple[str, str] | None:
    """``(training text, template text)`` around the place where they differ first; None where they agree."""
    messages = as_messages(prompt, config.system_prompt)
    try:
        before = render(messages, tokenizer, config)
        answer = {"role": "assistant", "content": response}
        written = render([*messages, answer], tokenizer, config, for_response=False)
    except TemplateProblem:
        return None
    text = without_opening(response, opening)
    if END_OF_REASONING in text and END_OF_REASONING not in written:
        return None  # the template leaves past reasoning out
    trained = before + text
    if written.startswith(trained):
        rest = written[len(trained) :].lstrip()
        added: Any = tokenizer.added_tokens_encoder
        others = tuple(token for token in added if token != tokenizer.eos_token)
        if not rest.startswith(others):
            return None
        trained += str(tokenizer.eos_token)
    place = common_length(trained, written)
    shown = slice(max(place - MAX_SHOWN, 0), place + MAX_SHOWN)
    return trained[shown], written[shown]


def common_length(one: str, other: str) -> int:
    """Characters of the longest beginning that two texts share."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
