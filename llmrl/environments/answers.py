"""Reading of what environments and tools answered: whatever is no answer is refused in words."""

from typing import Any

from llmrl.data.chat import messages_problem, prompt_problem
from llmrl.data.files import SURROGATE
from llmrl.environments.environment import Opening, Turn
from llmrl.environments.episode import Call, Close, Open, Request, Respond
from llmrl.environments.hosting import ToolResult
from llmrl.rewards.calls import shorten
from llmrl.rewards.per_token import is_number


class NoAnswer(ValueError):
    """Why a value is no answer to a request: ``returned ...``."""


def read_answer(request: Request, value: Any) -> Opening | Turn | ToolResult | float:
    """The answer that a value of JSON is; to `Call` that of one of its calls.

    Raises:
        NoAnswer: It is none.
    """
    match request, value:
        case Open(), _:
            return _read_opening(value)
        case Respond(), [observation, done, reward]:
            return _read_turn(observation, done, reward)
        case Respond(), str():
            raise NoAnswer(f"returned {value}; return a llmrl.Turn, a text or a list of messages")
        case Call(), [str(text), bool(is_bad)]:
            return ToolResult(_read_text(text), is_bad)
        case Close(), _:
            return 0.0 if value is None else _read_reward(value)
    raise NoAnswer(f"returned {shorten(value)}, which is no answer")


def _read_opening(value: Any) -> Opening:
    if value is None:
        return None
    if isinstance(value, str):
        if not value.strip():
            raise NoAnswer("returned an empty text; return None for the prompt of the row")
        return _read_text(value)
    if problem := prompt_problem(value):
        raise NoAnswer(f"returned {shorten(value)}, which {problem}")
    return value


def _read_turn(observation: Any, done: Any, reward: Any) -> Turn:
    if not isinstance(done, bool):
        raise NoAnswer(f"returned a turn whose done is {shorten(done)}; it must be True or False")
    if not done and observation in (None, "", []):
        raise NoAnswer("returned a turn without an observation; only the last one, with done=True, may have none")
    return Turn(_read_observation(observation), done, _read_reward(reward))


def _read_observation(value: Any) -> str | list[dict[str, Any]] | None:
    match value:
        case None:
            return None
        case str():
            return _read_text(value)
        case list():
            problem = messages_problem(value)
            if problem is None and any(message["role"] == "assistant" for message in value):
                problem = "has a message of the assistant, whose messages are the actor's own"
            if problem is None:
                return value
            raise NoAnswer(f"returned {shorten(value)}, which {problem}")
    raise NoAnswer(f"returned a turn whose observation is {shorten(value)}; it must be a text or a list of messages")


def _read_text(text: str) -> str:
    if SURROGATE.search(text):
        raise NoAnswer("returned a text that holds half of a surrogate pair, which is no character")
    return text


def _read_reward(value: Any) -> float:
    if not is_number(value):
        raise NoAnswer(f"returned the reward {shorten(value)}; it must be a finite number")
    return float(value)
