"""What is read as an answer, and how everything else is refused."""

import math

import pytest

from llmrl.environments.answers import NoAnswer, read_answer
from llmrl.environments.calls import ToolCall
from llmrl.environments.environment import Message, Turn
from llmrl.environments.episode import Call, Close, Open, Respond
from llmrl.environments.hosting import ToolResult

OPEN, CLOSE, CALL = Open({}, 0, 0), Close(), Call((ToolCall("f"),))
RESPOND = Respond(Message("x", 1, []))
USER, SYSTEM = {"role": "user", "content": "go"}, {"role": "system", "content": "be brief"}
ASSISTANT, TOOL = {"role": "assistant", "content": "1"}, {"role": "tool", "content": "2"}


@pytest.mark.parametrize(
    ("request_", "value", "answer"),
    [
        (OPEN, None, None),
        (OPEN, "begin", "begin"),
        (OPEN, [SYSTEM, USER, ASSISTANT, USER], [SYSTEM, USER, ASSISTANT, USER]),
        (RESPOND, ["lower", False, -0.02], Turn("lower", False, -0.02)),
        (RESPOND, [None, True, 1], Turn(None, True, 1.0)),
        (RESPOND, ["", True, True], Turn("", True, 1.0)),
        (RESPOND, [[TOOL, USER], False, 0], Turn([TOOL, USER], False, 0.0)),
        (RESPOND, ['[{"role": "x"}]', False, 0], Turn('[{"role": "x"}]', False, 0.0)),
        (CALL, ["", False], ToolResult("", False)),
        (CLOSE, None, 0.0),
        (CLOSE, 2, 2.0),
    ],
)
def test_an_answer_is_read(request_, value, answer):
    read = read_answer(request_, value)
    assert read == answer
    assert type(read) is type(answer)


@pytest.mark.parametrize(
    ("request_", "value", "why"),
    [
        (OPEN, " ", "an empty text; return None for the prompt of the row"),
        (OPEN, 3, "must be a text or a list of messages, not an int"),
        (OPEN, [], "is an empty list of messages"),
        (OPEN, [USER, ASSISTANT], "ends with the assistant's message"),
        (OPEN, [{"role": "bot", "content": "x"}], "unknown role 'bot'"),
        (OPEN, "\ud800", "half of a surrogate pair"),
        (RESPOND, ["go", 1, 0.0], "a turn whose done is 1; it must be True or False"),
        (RESPOND, [None, False, 0.0], "a turn without an observation"),
        (RESPOND, ["", False, 0.0], "a turn without an observation"),
        (RESPOND, [[], False, 0.0], "a turn without an observation"),
        (RESPOND, [3, False, 0.0], "a turn whose observation is 3; it must be a text or a list of messages"),
        (RESPOND, "None (a.py:A)", "returned None (a.py:A); return a llmrl.Turn, a text or a list of messages"),
        (RESPOND, [[USER, ASSISTANT, USER], False, 0.0], "a message of the assistant"),
        (RESPOND, [["go"], False, 0.0], "is no object with"),
        (RESPOND, ["\udfff", False, 0.0], "half of a surrogate pair"),
        (RESPOND, ["go", False, math.nan], "the reward nan; it must be a finite number"),
        (RESPOND, ["go", False, math.inf], "the reward inf; it must be a finite number"),
        (RESPOND, ["go", False, 1e300], "must be a finite number"),
        (RESPOND, ["go", False, "1"], "the reward '1'; it must be a finite number"),
        (RESPOND, ["go", False, None], "the reward None; it must be a finite number"),
        (CALL, ["\ud800", False], "half of a surrogate pair"),
        (CALL, [3, False], "which is no answer"),
        (CLOSE, math.nan, "the reward nan; it must be a finite number"),
        (CLOSE, [1.0], "must be a finite number"),
    ],
)
def test_what_is_none_is_refused_in_words(request_, value, why):
    with pytest.raises(NoAnswer) as refused:
        read_answer(request_, value)
    assert str(refused.value).startswith("returned ")
    assert why in str(refused.value)
