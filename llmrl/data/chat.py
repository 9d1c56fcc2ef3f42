"""The prompt boundary: from the texts and messages of rows to token ids. Special tokens are decided here only.

A chat prompt is rendered by the chat template, which writes its own BOS, and is tokenized without special tokens.
A plain text gets the special tokens that the tokenizer puts before a text, but one BOS at most, and no EOS after it.
A response is tokenized on its own and ends with EOS: what is trained on is what is sampled later.
"""

import inspect
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Bool, Int
from jinja2 import Environment, TemplateSyntaxError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmrl.batches import Sequences
from llmrl.data.config import DataConfig
from llmrl.data.files import SURROGATE, DataError, kind
from llmrl.data.rows import check_rows
from llmrl.limits import TooLong, can_limit_time, memory_limit, time_limit
from llmrl.messages import in_one_line

ROLES = ("system", "user", "assistant", "tool")

WRITTEN_MESSAGES = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from|value)["']\s*:""")
"""Messages as JSON or as Python writes them, which a column of CSV may hold."""

OPENING = re.compile(r"[<\[][^<>\[\]\s]+[>\]]\s*\Z")
"""A tag at the end of a generation prompt."""

Message = Mapping[str, Any]
Prompt = str | Sequence[Message]


def prompt_problem(prompt: Any) -> str | None:
    """Why a value is no prompt that a model can respond to; None if it is one."""
    match prompt:
        case str():
            return text_problem(prompt)
        case []:
            return "is an empty list of messages"
        case list():
            return messages_problem(prompt) or _ending_problem(prompt)
    return f"must be a text or a list of messages, not {kind(prompt)}"


def text_problem(text: str) -> str | None:
    """Why a text cannot be trained on; None if it can."""
    if SURROGATE.search(text):
        return "holds half of a surrogate pair, which is no character"
    if WRITTEN_MESSAGES.match(text):
        return "is a text in which messages are written; write the file as .jsonl, where a list of messages is one"
    return None if text.strip() else "is an empty text"


def messages_problem(messages: Sequence[Any]) -> str | None:
    """Why a list is not one of messages; None if it is."""
    for number, message in enumerate(messages, start=1):
        if problem := _message_problem(message):
            return f"has a message {number} that {problem}"
    return None


def _ending_problem(messages: Sequence[Message]) -> str | None:
    if messages[-1]["role"] == "assistant":
        return "ends with the assistant's message; end with one that asks for a response"
    if messages[-1]["role"] == "user" and not messages[-1]["content"].strip():
        return "ends with an empty message of the user"
    return None


def _message_problem(message: Any) -> str | None:
    match message:
        case {"role": "developer"}:
            return "has the role 'developer'; write 'system'"
        case {"role": role} if role not in ROLES:
            return f"has the unknown role {role!r}; use one of {', '.join(ROLES)}"
        case {"role": _, "content": str(content)}:
            return "has half of a surrogate pair, which is no character" if SURROGATE.search(content) else None
        case {"role": _, "content": [*_, {"type": "text", "text": str()}]}:
            return "has a content in parts; join their texts to one"
        case {"role": _, "content": content}:
            return f"has a content that is no text but {kind(content)}"
        case {"from": _, "value": _}:
            return 'has "from" and "value"; write "role" (user for human, assistant for gpt) and "content"'
    return 'is no object with "role" and "content"'


def prompt_ids(
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    *,
    places: Sequence[str] | None = None,
) -> list[list[int]]:
    """Token ids of each prompt, up to the place where the response begins; `places` as in `check_rows`."""
    if uses_chat(tokenizer, config):
        texts = _render_all(prompts, tokenizer, config, places)
        ids = _tokenize(texts, tokenizer, add_special_tokens=False)
    else:
        texts = _plain_texts(prompts, config)
        ids = [_open_ended(ids, tokenizer) for ids in _tokenize(texts, tokenizer, add_special_tokens=True)]
    check_rows(
        config.path, ids, lambda row: None if row else "the tokenizer makes no tokens of its prompt", places=places
    )
    return ids


def response_ids(responses: Sequence[str], tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> list[list[int]]:
    """Token ids of each response as a model would sample it, its EOS included."""
    eos = eos_of(tokenizer)
    opening = opening_of_response(tokenizer, config)
    texts = [without_opening(response, opening) for response in responses]
    return [[*ids, eos] for ids in _tokenize(texts, tokenizer, add_special_tokens=False)]


def eos_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends a response which is trained on.

    Raises:
        DataError: The tokenizer has none, whatever the model's generation config says.
    """
    eos = tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise DataError("the tokenizer has no EOS token, so no response could ever end; set its eos_token")
    return eos


def opening_of_response(tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> str:
    """The tag that the template's generation prompt ends with, such as "<think>\\n" for models that reason first."""
    if not uses_chat(tokenizer, config):
        return ""
    try:
        text = render([{"role": "user", "content": "x"}], tokenizer, config)
    except TemplateProblem:
        return ""
    found = OPENING.search(text)
    return found[0] if found else ""


def without_opening(response: str, opening: str) -> str:
    """A response without the tag that the generation prompt has written already."""
    tag = opening.rstrip()
    if not tag or not response.lstrip().startswith(tag):
        return response
    rest = response.lstrip().removeprefix(tag)
    return rest.removeprefix(opening[len(tag) :])


class TemplateProblem(Exception):
    """Why a chat template does not render a conversation, in its own words."""


MAX_RENDER_S = 10.0
MAX_RENDER_BYTES = 2**30
MAX_RENDERED = 10_000_000
"""Characters of the longest conversation that a template may write."""


def render(
    messages: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    *,
    for_response: bool = True,
) -> str:
    """A conversation in the tokenizer's chat template; `for_response` ends it with the generation prompt.

    A template is a program that came with the model. It runs in the sandbox of Jinja, for 10 seconds at most (in the
    main thread), and takes a GiB of memory at most (on Linux).

    Raises:
        TemplateProblem: It fails, or exceeds a limit.
    """
    _refuse_powers(tokenizer)
    try:
        with time_limit(MAX_RENDER_S) if can_limit_time() else nullcontext(), memory_limit(MAX_RENDER_BYTES):
            text = tokenizer.apply_chat_template(
                messages, add_generation_prompt=for_response, tokenize=False, **config.chat_template_kwargs
            )
    except MemoryError as error:
        raise TemplateProblem(f"it takes more than {MAX_RENDER_BYTES:,} bytes of memory") from error
    except TooLong as error:
        raise TemplateProblem(f"it takes more than {MAX_RENDER_S:g} s") from error
    except Exception as error:  # a program fails in every way
        raise TemplateProblem(in_one_line(error) or type(error).__name__) from error
    assert isinstance(text, str), "one conversation renders as one text"
    if len(text) > MAX_RENDERED:
        raise TemplateProblem(f"it writes {len(text):,} characters, more than {MAX_RENDERED:,}")
    return text


def _refuse_powers(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a template that raises to a power: 10**10**10 is one call into C, which no limit of time stops, and is
    computed before a conversation is rendered."""
    if any(_has_powers(template) for template in templates_of(tokenizer)):
        raise TemplateProblem("it raises a number to a power, which can take any time")


def check_template_arguments(tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> None:
    """Refuses arguments that the chat template does not read, or that are not for a setting to give.

    Raises:
        DataError: It names what the template reads.
    """
    if not config.chat_template_kwargs:
        return
    if not uses_chat(tokenizer, config):
        raise DataError(
            f"data.chat_template_kwargs ({', '.join(config.chat_template_kwargs)}) need a chat template, but the "
            "tokenizer has none; use the tokenizer of an instruct model, or leave them out"
        )
    given_otherwise = {*OTHER_ARGUMENTS, *tokenizer.special_tokens_map}
    known = {name for template in templates_of(tokenizer) for name in _variables(template)} - given_otherwise
    if unknown := [name for name in config.chat_template_kwargs if name not in known]:
        raise DataError(
            f"data.chat_template_kwargs ({', '.join(unknown)}): the chat template takes no such argument from a "
            f"setting; it takes {', '.join(sorted(known)) or 'none'}"
        )


OTHER_ARGUMENTS = frozenset(
    {*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters, "messages"}
    | {"raise_exception", "strftime_now"}
)
"""Names that a template may read and that the tokenizer gives it, or the rows."""


def templates_of(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The chat templates of a tokenizer, which may have several by name."""
    template = tokenizer.chat_template
    return list(template.values()) if isinstance(template, dict) else [template] if template is not None else []


@lru_cache(maxsize=16)
def _has_powers(template: str) -> bool:
    if "**" not in template:
        return False
    tree = _parse_template(template)
    return tree is not None and tree.find(nodes.Pow) is not None


@lru_cache(maxsize=16)
def _variables(template: str) -> frozenset[str]:
    """Names that a template reads and does not set."""
    tree = _parse_template(template)
    return frozenset() if tree is None else frozenset(meta.find_undeclared_variables(tree))


def _parse_template(template: str) -> nodes.Template | None:
    """The syntax tree of a template; None for one that is broken, which is for the renderer to report."""
    environment = Environment(extensions=["jinja2.ext.loopcontrols", _GenerationBlock])
    try:
        return environment.parse(template)
    except (TemplateSyntaxError, RecursionError):
        return None


class _GenerationBlock(Extension):
    """The block ``{% generation %}`` of chat templates, as what is in it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """What stands between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def as_messages(prompt: Prompt, system_prompt: str | None = None) -> list[dict[str, Any]]:
    """A prompt as the messages that the chat template gets. Keys that are null, as Parquet has them, are left out."""
    if isinstance(prompt, str):
        messages = [{"role": "user", "content": prompt}]
    else:
        messages = [{key: value for key, value in message.items() if value is not None} for message in prompt]
    if system_prompt is not None and messages[0]["role"] != "system":
        return [{"role": "system", "content": system_prompt}, *messages]
    return messages


def template_problem(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> str | None:
    """Why the chat template does not render a prompt, and what to do; None if it does."""
    messages = as_messages(prompt, config.system_prompt)
    try:
        render(messages, tokenizer, config)
    except TemplateProblem as problem:
        roles = [message["role"] for message in messages]
        return (
            f"the chat template does not take its messages ({', '.join(roles)}): {problem}; {_way_out(roles, config)}"
        )
    return None


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
    """Rows of token ids as ``(ids, mask)``, zeros before (left) or after them."""
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for n, row in enumerate(rows):
        columns = slice(width - len(row), width) if left else slice(0, len(row))
        ids[n, columns] = torch.tensor(row)
        mask[n, columns] = True
    return ids, mask


def as_sequences(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    chosen: Sequence[Sequence[bool]] | None = None,
) -> Sequences:
    """Prompts and responses as one batch, in which those tokens of the responses count that are `chosen`; None: all."""
    prompt_ids, prompt_mask = padded(prompts, left=True)
    response_ids, attended = padded(responses, left=False)
    response_mask = attended if chosen is None else padded(chosen, left=False)[0].bool()
    return Sequences.from_rows(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        response_ids=response_ids,
        response_mask=response_mask,
        response_lengths=attended.sum(dim=1),
    )


def _tokenize(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool) -> list[list[int]]:
    ids: Any = tokenizer(list(texts), add_special_tokens=add_special_tokens)["input_ids"]
    return ids


def _render_all(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, config: DataConfig, places: Sequence[str] | None
) -> list[str]:
    try:
        return [render(as_messages(prompt, config.system_prompt), tokenizer, config) for prompt in prompts]
    except TemplateProblem:
        check_rows(config.path, prompts, lambda prompt: template_problem(prompt, tokenizer, config), places=places)
        raise


def _way_out(roles: Sequence[str], config: DataConfig) -> str:
    if "system" in roles and config.system_prompt is not None:
        return "leave data.system_prompt out, and put what it says into the messages of the user"
    if "system" in roles:
        return "put what the system message says into the first message of the user"
    if roles == ["user"]:
        return 'mend the template, or set data.template to "none"'
    return "let user and assistant take turns, the user first"


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
    """Ids of a text without an EOS at the end, which would leave nothing to respond, and without a second BOS."""
    if ids and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    return ids[1:] if ids[:2] == [tokenizer.bos_token_id] * 2 else ids
