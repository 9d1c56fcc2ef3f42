"""Conversations in parts, as token ids: what an actor reads first, and what it reads between two of its turns.

The ids that an actor sampled are never encoded again. What the chat template puts between two turns is the difference
of two renderings, in which a marker stands for each message of the assistant: it does not depend on what was said.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import product
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from llmrl.batches import NewContext
from llmrl.data.chat import (
    Prompt,
    TemplateProblem,
    as_messages,
    opening_of_response,
    prompt_ids,
    render,
    template_problem,
    uses_chat,
    without_opening,
)
from llmrl.data.config import DataConfig
from llmrl.data.files import DataError
from llmrl.data.seam import MAX_SHOWN, common_length

Messages = list[dict[str, Any]]

WAY_OUT = (
    'set environment.history to "branch" (the actor reads the conversation anew) or to "keep" (it goes on reading what '
    "it wrote), or take a chat template that leaves earlier turns as they are"
)


CALL_ID = "probe0001"
"""Mistral's templates take ids of nine letters and digits only."""


class Rewritten(DataError):
    """A chat template that writes a conversation differently once it goes on: the actor has read another text."""

    def __init__(self, what: str) -> None:
        super().__init__(f"the chat template {what}; {WAY_OUT}")
        self.what = what
        """What it does to the earlier turns."""


class Rendering:
    """Token ids of a conversation, part by part.

    Args:
        tokenizer: Its chat template is used as `config` says; without one a conversation is its texts in a row.
        config: How prompts become tokens.
        tools: JSON schemas of the tools, for the template to list.
        history: What becomes of a template that rewrites earlier turns: `refuse`, it is an error; `keep`, the actor
            goes on reading what it wrote; `branch`, it reads the rewritten conversation.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: DataConfig,
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        history: Literal["refuse", "keep", "branch"] = "refuse",
    ) -> None:
        arguments = {**config.chat_template_kwargs, "tools": list(tools)} if tools else config.chat_template_kwargs
        self._config = replace(config, chat_template_kwargs=arguments)
        self._tokenizer = tokenizer
        self._history = history
        self._chat = uses_chat(tokenizer, config)

    def opening(self, prompt: Prompt) -> list[int]:
        """Ids that an actor reads first, the generation prompt included.

        Raises:
            DataError: The chat template does not take the messages, or there is none for them.
        """
        if not self._chat:
            return prompt_ids([prompt], self._tokenizer, self._config)[0]
        return self._encode(self._render(as_messages(prompt, self._config.system_prompt)))

    def between(self, messages: Sequence[Mapping[str, Any]], observation: Prompt, *, last_id: int) -> list[int]:
        """Ids that an actor reads after one of its turns: the end of that turn, the observation, the generation prompt.
        Or the whole conversation, as a `NewContext`, where it branches.

        Args:
            messages: The conversation, turns that were sampled `as_written`; the last message is one.
            observation: What answers it: a text, which is the user's, or messages.
            last_id: The last id of the turn, an EOS; what the template puts up to it is not written again.

        Raises:
            Rewritten: The template writes the conversation differently now, and `history` is `refuse`.
            DataError: The template does not take the messages, or there is none for them.
        """
        assert messages[-1]["role"] == "assistant", "only an actor's turn is answered"
        last = self._text_of(last_id)
        if self._chat:
            written, asked = as_messages(messages, self._config.system_prompt), as_messages(observation)
            try:
                text = self._after(self._skeleton(messages, asked), asked, last)
                if self._history == "branch":
                    self._check_text(written, asked)
            except Rewritten:
                if self._history != "branch":
                    raise
                return NewContext(self._encode(self._render([*written, *asked])))
        elif isinstance(observation, str):
            text = observation
        else:
            raise DataError("an observation of messages needs a chat template; make it a text")
        return self._encode_after(last_id, text)

    def as_written(self, turn: Mapping[str, Any], text: str) -> dict[str, Any]:
        """A message of the assistant with all the text that it wrote; with its calls only where the template needs them
        beside the text."""
        dropped = {"tool_calls"} if turn.get("tool_calls") and not self._needs_calls else set()
        return {key: value for key, value in turn.items() if key not in dropped} | {"content": text}

    def before_each_turn(self, messages: Sequence[Mapping[str, Any]], *, last_id: int) -> list[list[int]]:
        """Ids that stand before each of the assistant's messages of a written conversation: the opening, then what is
        between its turns. Blanks around a message are not compared, since templates trim them.

        Raises:
            Rewritten: The template writes one of the messages, or what is before it, differently later.
            DataError: The template does not take the messages.
        """
        if not self._chat:
            raise DataError(
                "its messages need a chat template, but the tokenizer has none or data.template skips it; use texts"
            )
        last, opening = self._text_of(last_id), opening_of_response(self._tokenizer, self._config)
        written = _stripped(as_messages(messages, self._config.system_prompt))
        turns = [number for number, message in enumerate(written) if message["role"] == "assistant"]
        texts = [self._render(written[:number]) for number in turns]
        parts = [self._encode(texts[0])]
        for number, before, after in zip(turns, texts, texts[1:], strict=False):
            start = before + without_opening(written[number]["content"], opening)
            _check_begins(after, start)
            parts.append(self._encode_after(last_id, self._without_end(after[len(start) :], last)))
        return parts

    def check_history(self, roles: Sequence[str]) -> None:
        """Renders conversations of three turns, answered by messages of these roles in every order, with and without
        reasoning.

        Raises:
            Rewritten: The template writes an earlier turn differently once the conversation goes on.
            DataError: It does not take messages of these roles in this order, or leaves out what they say.
        """
        opening = opening_of_response(self._tokenizer, self._config)
        for order in product(roles, repeat=3):
            self._probe(order, "answer")
            try:
                self._probe(order, without_opening("<think>\nreason\n</think>\n\nanswer", opening))
            except Rewritten as problem:
                raise Rewritten(f"{problem.what} (a turn with reasoning, <think> to </think>)") from problem

    def _probe(self, roles: Sequence[str], content: str) -> None:
        messages = as_messages([_observation("user", 0)], self._config.system_prompt)
        for number, role in enumerate(roles, start=1):
            turn = _assistant(f"{content}{number}", role)
            messages.append(self.as_written(turn, turn["content"]))
            asked = _observation(role, number)
            if asked["content"] not in self._after(messages, [asked], str(self._tokenizer.eos_token or "")):
                raise DataError(f"the chat template leaves out what a message of the role {role!r} says")
            messages.append(asked)

    def _check_text(self, messages: Messages, observed: Messages) -> None:
        """Refuses a template that writes what was said differently once it is answered. Blanks around a turn are not
        compared, since templates trim them; nor are calls that it writes in place of the text."""
        stripped = _stripped(messages)
        writes_calls = self._needs_calls and messages[-1].get("tool_calls")
        said = "" if writes_calls else without_opening(stripped[-1]["content"], self._opening_of_response)
        _check_begins(self._render([*stripped, *observed]), self._render(stripped[:-1]) + said)

    @cached_property
    def _opening_of_response(self) -> str:
        return opening_of_response(self._tokenizer, self._config)

    def _skeleton(self, messages: Sequence[Mapping[str, Any]], observed: Messages) -> Messages:
        """The conversation with a marker in place of each content of the assistant."""
        marker = "zqTurn"
        while marker in f"{messages}{observed}":
            marker += "q"
        return [
            self.as_written(message, f"{marker}{number}qz") if message["role"] == "assistant" else message
            for number, message in enumerate(as_messages(messages, self._config.system_prompt))
        ]

    def _after(self, messages: Messages, observed: Messages, last: str) -> str:
        """What the template puts after the last message, the assistant's, `last` at its end taken off."""
        before, after = self._render(messages[:-1]), self._render([*messages, *observed])
        content = messages[-1]["content"]
        if self._needs_calls and messages[-1].get("tool_calls") and content not in after:
            return self._after_calls(messages, before, after, last)
        if self._history != "keep":
            _check_begins(after, before + content)
        if after.count(content) != 1:
            raise Rewritten(f"writes a turn of the assistant {after.count(content)} times once it is answered")
        return self._without_end(after.partition(content)[2], last)

    def _without_end(self, rest: str, last: str) -> str:
        """The text after a turn, without the `last` that ends the turn."""
        end = rest.lstrip()
        if not last or not end.startswith(last):
            return rest
        if self._history != "keep" and end != rest:
            raise Rewritten("writes blanks between what the assistant said and the end of its turn")
        return end.removeprefix(last)

    def _after_calls(self, messages: Messages, before: str, after: str, last: str) -> str:
        """As `_after`, where the template writes a turn's calls in place of its text."""
        closed = self._render(messages, for_response=False)
        _check_begins(after, closed)
        if self._history != "keep":
            _check_begins(closed, before)
        end = closed.rfind(last) if last else -1
        if end < 0:
            raise Rewritten(f"does not end a turn that calls tools with {last!r}")
        return after[end + len(last) :]

    @cached_property
    def _needs_calls(self) -> bool:
        """Whether results of tools are only written after messages that bring their calls as such (Mistral)."""
        return not self._shows_results(with_calls=False) and self._shows_results(with_calls=True)

    def _shows_results(self, *, with_calls: bool) -> bool:
        turn = _assistant("answer", answered_by="tool" if with_calls else "user")
        results = [_observation("tool", number) for number in (1, 2)]
        try:
            text = render([_observation("user", 0), turn, results[0], turn, results[1]], self._tokenizer, self._config)
        except TemplateProblem:
            return False
        return all(result["content"] in text for result in results)

    def _render(self, messages: Messages, *, for_response: bool = True) -> str:
        try:
            return render(messages, self._tokenizer, self._config, for_response=for_response)
        except TemplateProblem as problem:
            raise DataError(template_problem(messages, self._tokenizer, self._config) or str(problem)) from problem

    def _encode(self, text: str) -> list[int]:
        ids: Any = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _encode_after(self, last_id: int, text: str) -> list[int]:
        """Ids of a text as they are after this one: a token may take in the blanks that follow it."""
        ids = self._encode(self._text_of(last_id) + text)
        return ids[1:] if ids[:1] == [last_id] else self._encode(text)

    def _text_of(self, token_id: int) -> str:
        added = self._tokenizer.added_tokens_decoder.get(token_id)
        return added.content if added else str(self._tokenizer.decode([token_id]))


def history_problem(
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    tools: Sequence[Mapping[str, Any]] = (),
    *,
    roles: Sequence[str] = ("user",),
) -> str | None:
    """How the chat template rewrites earlier turns once messages of these roles answer them, and the way out; None if
    it leaves them as they are.

    Raises:
        DataError: It does not take such messages at all.
    """
    rendering = Rendering(tokenizer, config, tools)
    if not uses_chat(tokenizer, config):
        return None
    try:
        rendering.check_history(roles)
    except Rewritten as problem:
        return str(problem)
    return None


def _assistant(content: str, answered_by: str) -> dict[str, Any]:
    """A turn of a probe, with a call if tools answer it."""
    call = {"type": "function", "id": CALL_ID, "function": {"name": "probe", "arguments": {}}}
    return {"role": "assistant", "content": content} | ({"tool_calls": [call]} if answered_by == "tool" else {})


def _observation(role: str, number: int) -> dict[str, Any]:
    """An answer of a probe."""
    message = {"role": role, "content": f"observation{number}"}
    return message | ({"name": "probe", "tool_call_id": CALL_ID} if role == "tool" else {})


def _stripped(messages: Messages) -> Messages:
    """The messages without blanks around those of the assistant."""
    return [
        {**message, "content": message["content"].strip()}
        if message["role"] == "assistant" and isinstance(message.get("content"), str)
        else message
        for message in messages
    ]


def _check_begins(text: str, start: str) -> None:
    """Refuses a longer rendering that does not begin with the shorter one."""
    if text.startswith(start):
        return
    place = common_length(start, text)
    shown = slice(max(place - MAX_SHOWN, 0), place + MAX_SHOWN)
    raise Rewritten(f"rewrites earlier turns once a conversation goes on: {start[shown]!r} becomes {text[shown]!r}")
