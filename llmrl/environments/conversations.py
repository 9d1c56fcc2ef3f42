"""The conversations of a rollout while they grow: what actors wrote, and what environments and tools answered.

What is done depends on what was written and not on when, so a rollout that is repeated is the same.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from llmrl.batches import Episodes, Rollout, Row, StopReason
from llmrl.data.chat import Prompt, as_messages
from llmrl.data.files import DataError
from llmrl.data.rendering import Rendering
from llmrl.environments.calls import ToolCall
from llmrl.environments.config import EnvironmentConfig
from llmrl.environments.environment import Message, Turn
from llmrl.environments.hosting import START, Answer, Failure, Host
from llmrl.environments.tools import result_of_call, turn_of_assistant
from llmrl.roles import Sampling

RENDERING = "rendering"
"""Name of the failures of a chat template between two turns."""

ReadTurn = Callable[[Sequence[int]], tuple[str, str, list[ToolCall]]]
"""From the ids of a turn to its text, the text without calls, and the calls."""


@dataclass
class Conversation:
    """One response of several turns."""

    number: int
    """Global number of the response."""
    row: Row
    opening: Prompt = ""
    first_ids: list[int] = field(default_factory=list)
    """Ids of the opening."""
    messages: list[dict[str, Any]] = field(default_factory=list)
    """What follows the opening."""
    texts: list[str] = field(default_factory=list)
    """What the actor wrote in each turn, its calls included."""
    length: int = 0
    """Response tokens so far."""
    turn_ends: list[int] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    end_reward: float = 0.0
    last_id: int = -1
    calls: list[ToolCall] = field(default_factory=list)
    """Calls of the last turn."""
    num_calls: int = 0
    num_bad_calls: int = 0
    failure: Failure | None = None
    stop_reason: int | None = None
    """Why it is over, where the engine does not know."""

    @property
    def so_far(self) -> list[dict[str, Any]]:
        """All messages, the opening included."""
        return [*as_messages(self.opening), *self.messages]

    @property
    def has_begun(self) -> bool:
        """Whether it has opened: what the actor writes after no opening is no turn."""
        return self.failure is None or self.failure.name != START

    def add_turn(self, ids: Sequence[int], read: ReadTurn) -> str:
        """Adds what the actor wrote. Returns its text."""
        text, rest, self.calls = read(ids)
        self.texts.append(text)
        self.messages.append(turn_of_assistant(rest, self.calls))
        self.length += len(ids)
        self.last_id = ids[-1]
        self.turn_ends.append(self.length)
        self.rewards.append(0.0)
        return text

    def fail(self, failure: Failure) -> None:
        """Notes why it cannot be scored; the first failure counts."""
        self.failure = self.failure or failure
        self.stop_reason = StopReason.FAILED


class Conversations:
    """`Replies` of a host to the responses of a rollout.

    Args:
        rows: The data rows; G adjacent conversations begin with each.
        sampling: Numbers and limits of the responses.
        host: Runs environments and tools.
        rendering: Token ids of what an actor reads.
        read: Reads what it wrote.
        config: Limits.
        prompt_column: Column of the prompt where an environment opens with none.
        max_prompt_tokens: Limit on the ids of an opening.
        look: Called several times a second while answers are waited for.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        sampling: Sampling,
        *,
        host: Host,
        rendering: Rendering,
        read: ReadTurn,
        config: EnvironmentConfig,
        prompt_column: str,
        max_prompt_tokens: int,
        look: Callable[[], None],
    ) -> None:
        self.sampling = sampling
        self.host = host
        self.rendering = rendering
        self.read = read
        self.config = config
        self.prompt_column = prompt_column
        self.max_prompt_tokens = max_prompt_tokens
        self.look = look
        first, size = sampling.first_response, sampling.num_responses
        self.all = [
            Conversation(first + index, row) for index, row in enumerate(row for row in rows for _ in range(size))
        ]
        self.groups = [self.all[start : start + size] for start in range(0, len(self.all), size)]

    # --- openings -----------------------------------------------------------------------------------------------------

    def open(self) -> list[list[int]]:
        """Begins every episode. Returns what the actor reads first in each group: one token where all failed."""
        for each in self.all:
            group = each.number // self.sampling.num_responses
            self.host.open(
                each.number, each.row, opening_seed=self._seed("start", group), seed=self._seed("turns", each.number)
            )
        answers = self.host.wait([each.number for each in self.all], self.look)
        for each in self.all:
            self._open(each, answers[each.number])
        return [self._first_ids(group) for group in self.groups]

    def _seed(self, *parts: object) -> int:
        """A seed of 64 bits that is a function of the run and of these."""
        text = "/".join(map(str, (self.sampling.seed, int(self.sampling.purpose), *parts)))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])

    def _open(self, each: Conversation, answer: Answer) -> None:
        if isinstance(answer, Failure):
            each.fail(answer)
            return
        opening: Any = each.row.get(self.prompt_column) if answer is None else answer
        if opening is None:
            each.fail(Failure(START, f"returned no opening, and its row has no {self.prompt_column!r}"))
            return
        try:
            ids = self.rendering.opening(opening)
        except DataError as error:
            each.fail(Failure(START, f"opened with what cannot be rendered: {error}"))
            return
        each.opening = opening
        if len(ids) > self.max_prompt_tokens:
            limit = f"data.max_prompt_tokens ({self.max_prompt_tokens})"
            each.fail(Failure(START, f"opened with {len(ids)} tokens, more than {limit}"))
        else:
            each.first_ids = ids

    def _first_ids(self, group: Sequence[Conversation]) -> list[int]:
        """What a group reads first. A group that opens in two ways fails as a whole: it would compare unlike things."""
        opened = [each for each in group if each.failure is None]
        ids = opened[0].first_ids if opened else [0]
        if any(each.first_ids != ids for each in opened):
            for each in opened:
                each.fail(
                    Failure(
                        START,
                        "opened differently in two episodes of one group, which are compared; draw what is random in "
                        "start from self.random",
                    )
                )
        return ids

    @property
    def unopened(self) -> list[int]:
        """Indices of the conversations that have not begun."""
        return [index for index, each in enumerate(self.all) if not each.has_begun]

    # --- turns --------------------------------------------------------------------------------------------------------

    def ask(self, turns: Mapping[int, Sequence[int]]) -> None:
        """See `Replies`."""
        for index, ids in turns.items():
            each = self.all[index]
            if each.failure is not None:
                continue
            text = each.add_turn(ids, self.read)
            if each.calls:
                each.num_calls += len(each.calls)
                self.host.call(each.number, each.calls)
            else:
                self.host.respond(each.number, Message(text, len(each.turn_ends), each.so_far))

    def take(self, indices: Sequence[int]) -> Mapping[int, Sequence[int]]:
        """See `Replies`."""
        asked = [self.all[index] for index in indices if self.all[index].failure is None]
        answers = self.host.wait([each.number for each in asked], self.look)
        fed = {index: [] for index in indices}
        for index in indices:
            each = self.all[index]
            if each.failure is None:
                fed[index] = self._take(each, answers[each.number])
        return fed

    def _take(self, each: Conversation, answer: Answer) -> list[int]:
        """What is fed to a response after this answer; nothing where it is over."""
        match answer:
            case Failure():
                each.fail(answer)
                return []
            case Turn():
                each.rewards[-1] = answer.reward
                if answer.done:
                    return []
                observation: Any = answer.observation
            case list():
                observation = self._results(each, answer)
            case _:
                raise AssertionError(f"no answer to a turn: {answer!r}")
        if len(each.turn_ends) == self.config.max_turns:
            each.stop_reason = StopReason.TURNS
            return []
        try:
            ids = self.rendering.between(self._as_written(each), observation, last_id=each.last_id)
        except DataError as error:
            each.fail(Failure(RENDERING, str(error)))
            return []
        if not ids:
            each.fail(Failure(RENDERING, f"leaves nothing to read of the observation {observation!r}"))
            return []
        if each.length + len(ids) >= self.sampling.max_response_tokens:
            each.stop_reason = StopReason.LENGTH
            return []
        each.length += len(ids)
        each.messages.extend(as_messages(observation))
        return ids

    def _as_written(self, each: Conversation) -> list[dict[str, Any]]:
        """All messages, those of the actor as the chat template gets them."""
        texts = iter(each.texts)
        return [
            *as_messages(each.opening),
            *(
                self.rendering.as_written(message, next(texts)) if message["role"] == "assistant" else message
                for message in each.messages
            ),
        ]

    def _results(self, each: Conversation, results: Sequence[Any]) -> list[dict[str, Any]]:
        each.num_bad_calls += sum(result.is_bad for result in results)
        return [result_of_call(call, result.text) for call, result in zip(each.calls, results, strict=True)]

    # --- the end ------------------------------------------------------------------------------------------------------

    def close(self, rollout: Rollout) -> Rollout:
        """The rollout with its episodes, once every response is complete."""
        self._add_truncated_turns(rollout)
        alive = [each for each in self.all if each.failure is None]
        for each in alive:
            self.host.close(each.number)
        answers = self.host.wait([each.number for each in alive], self.look)
        for each in alive:
            answer = answers[each.number]
            if isinstance(answer, Failure):
                each.fail(answer)
            else:
                assert isinstance(answer, float), "the answer to close"
                each.end_reward = answer
        return self._with_episodes(rollout)

    def _add_truncated_turns(self, rollout: Rollout) -> None:
        """Adds last turns that a limit truncated, which no one was asked about."""
        sequences = rollout.sequences
        rows = zip(self.all, sequences.response_ids.tolist(), sequences.response_lengths.tolist(), strict=True)
        for each, ids, length in rows:
            if each.has_begun and each.length < length:
                each.add_turn(ids[each.length : length], self.read)

    def _with_episodes(self, rollout: Rollout) -> Rollout:
        device = rollout.device
        width = max(len(each.turn_ends) or 1 for each in self.all)
        stops = rollout.stop_reason.tolist()
        known = [each.stop_reason or stop for each, stop in zip(self.all, stops, strict=True)]
        return replace(
            rollout,
            stop_reason=torch.tensor(known, device=device),
            episodes=Episodes(
                turn_ends=_table([each.turn_ends for each in self.all], width, torch.long).to(device),
                turn_rewards=_table([each.rewards for each in self.all], width, torch.float32).to(device),
                end_reward=torch.tensor([each.end_reward for each in self.all], device=device),
                num_calls=torch.tensor([each.num_calls for each in self.all], device=device),
                num_bad_calls=torch.tensor([each.num_bad_calls for each in self.all], device=device),
                failures=tuple(None if each.failure is None else each.failure.name for each in self.all),
                reasons=tuple(None if each.failure is None else each.failure.what for each in self.all),
                openings=tuple(each.opening for each in self.all),
                messages=tuple(tuple(each.messages) for each in self.all),
            ),
        )


def _table(rows: Sequence[Sequence[int | float]], width: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of numbers, with zeros after them."""
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=dtype)
