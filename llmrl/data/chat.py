"""The prompt boundary: from the texts and messages of rows to token ids. Special tokens are decided here only.

A chat prompt is rendered by the chat template, which writes its own BOS, and is tokenized without special tokens.
A plain text gets the special tokens that the tokenizer puts before a text, but one BOS at most, and no EOS behind it.
A response is tokenized on its own and ends with EOS: what is trained on is what is sampled later.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmrl.data.rows import DataConfig, DataError, check_rows
from llmrl.experience import Sequences

ROLES = ("system", "user", "assistant", "tool")

Message = Mapping[str, Any]
Prompt = str | Sequence[Message]


def prompt_problem(prompt: Any) -> str | None:
    """Why a value is no prompt that a model can respond to; None if it is one."""
    match prompt:
        case str():
            return None if prompt.strip() else "is an empty text"
        case []:
            return "is an empty list of messages"
        case list():
            return messages_problem(prompt) or _ending_problem(prompt)
    return f"must be a text or a list of messages, not {kind(prompt)}"


def messages_problem(messages: Sequence[Any]) -> str | None:
    """Why a list holds something else than messages; None if all of them are."""
    for number, message in enumerate(messages, start=1):
        if problem := _message_problem(message):
            return f"has a message {number} that {problem}"
    return None


def kind(value: Any) -> str:
    """What a value is, for a message about it."""
    return "null" if value is None else f"a {type(value).__name__}"


def _ending_problem(messages: Sequence[Message]) -> str | None:
    if messages[-1]["role"] == "assistant":
        return "ends with the assistant's message; end with one that asks for a response"
    if messages[-1]["role"] == "user" and not messages[-1]["content"].strip():
        return "ends with an empty message of the user"
    return None


def _message_problem(message: Any) -> str | None:
    match message:
        case {"role": role} if role not in ROLES:
            return f"has the unknown role {role!r}; use one of {', '.join(ROLES)}"
        case {"role": _, "content": str()}:
            return None
        case {"role": _, "content": content}:
            return f"has a content that is no text but {kind(content)}"
    return 'is no object with "role" and "content"'


def prompt_ids(prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> list[list[int]]:
    """Token ids of each prompt, up to the place where the response begins."""
    if uses_chat(tokenizer, config):
        texts = [_render(prompt, tokenizer, config.system_prompt) for prompt in prompts]
        ids = _tokenize(texts, tokenizer, add_special_tokens=False)
    else:
        texts = _plain_texts(prompts, config)
        ids = [_open_ended(ids, tokenizer) for ids in _tokenize(texts, tokenizer, add_special_tokens=True)]
    check_rows(config.path, ids, lambda row: None if row else "the tokenizer makes no tokens of its prompt")
    return ids


def response_ids(responses: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of each response as a model would sample it, its EOS included."""
    eos = tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise DataError("the tokenizer has no EOS token, so no response could ever end; set its eos_token")
    return [[*ids, eos] for ids in _tokenize(responses, tokenizer, add_special_tokens=False)]


def uses_chat(tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> bool:
    """Whether prompts go through the tokenizer's chat template."""
    has_template = tokenizer.chat_template is not None
    if config.template == "chat" and not has_template:
        raise DataError(
            'data.template is "chat", but the tokenizer has no chat template; '
            'use the tokenizer of an instruct model, or set data.template to "none"'
        )
    if config.system_prompt is not None and not has_template:
        raise DataError(
            "data.system_prompt needs a chat template, but the tokenizer has none; "
            "use the tokenizer of an instruct model, or put the system prompt into the prompts"
        )
    return has_template and config.template != "none"


def padded(rows: Sequence[Sequence[int]], *, left: bool) -> tuple[Int[Tensor, "N L"], Bool[Tensor, "N L"]]:
    """Rows of token ids as ``(ids, mask)``, zeros before (left) or behind them."""
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for n, row in enumerate(rows):
        columns = slice(width - len(row), width) if left else slice(0, len(row))
        ids[n, columns] = torch.tensor(row)
        mask[n, columns] = True
    return ids, mask


def as_sequences(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Sequences:
    """Prompts and responses as one batch, in which every response token counts."""
    prompt_ids, prompt_mask = padded(prompts, left=True)
    response_ids, response_mask = padded(responses, left=False)
    return Sequences(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        response_ids=response_ids,
        response_mask=response_mask,
        response_lengths=response_mask.sum(dim=1),
    )


def _tokenize(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool) -> list[list[int]]:
    ids: Any = tokenizer(list(texts), add_special_tokens=add_special_tokens)["input_ids"]
    return ids


def _render(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, system_prompt: str | None) -> str:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
    if system_prompt is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system_prompt}, *messages]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert isinstance(text, str), "one conversation renders as one text"
    return text


def _plain_texts(prompts: Sequence[Prompt], config: DataConfig) -> list[str]:
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if len(texts) < len(prompts):
        why = 'data.template is "none"' if config.template == "none" else "the tokenizer has no chat template"
        raise DataError(
            f"{config.path}: {len(prompts) - len(texts)} prompts in {config.prompt_column!r} are messages, but {why}; "
            "use the chat template of an instruct model's tokenizer, or make the prompts texts"
        )
    return texts


def _open_ended(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Without an EOS at the end, which would say that there is nothing to respond, and without a second BOS."""
    if ids and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    return ids[1:] if ids[:2] == [tokenizer.bos_token_id] * 2 else ids
