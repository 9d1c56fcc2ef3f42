"""What comes back of a call: plain numbers, or a failure in words."""

import socket
import urllib.error
from enum import IntEnum

import numpy as np
import pytest
import torch

from llmrl.rewards.calls import Calls, Failure, Odd, Pending, is_transient, plain, rows_of


class Grade(IntEnum):
    GOOD = 2


class Share(float):
    pass


class ReadTimeout(Exception):
    """As httpx has it."""


class APIStatusError(Exception):
    """As openai has it."""


class RateLimitError(APIStatusError):
    pass


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([1, 2.5, True, None], [1, 2.5, True, None]),
        ((1, 2), (1, 2)),
        (torch.tensor([1.0, 2.0], requires_grad=True), [1.0, 2.0]),
        (torch.tensor([[1, 2]]), [[1, 2]]),
        (np.array([1, 2]), [1, 2]),
        ([np.float32(1), torch.tensor(2.0), np.array([3.0])], [1.0, 2.0, [3.0]]),
        ([Grade.GOOD, Share(0.5)], [2, 0.5]),
        ([[(3, Share(0.5))]], [[(3, 0.5)]]),
        ([], []),
    ],
)
def test_numbers_come_back_as_python_has_them(value, expected):
    result = plain(value)
    assert result == expected
    flat = result
    while isinstance(flat, list | tuple) and flat:
        assert type(flat) in (list, tuple)
        flat = flat[0]
    assert type(flat) in (int, float, bool, list)


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.0, "1.0 (float)"), (None, "None (NoneType)"), ({}, "{} (dict)"), (torch.tensor(1), "tensor(1) (Tensor)")],
)
def test_what_is_no_list_comes_back_as_its_text(value, text):
    assert str(plain(value)) == text


def test_odd_things_in_a_list_come_back_as_their_text():
    assert plain(["1", [1j]]) == [Odd("'1'", "str"), [Odd("1j", "complex")]]
    assert str(plain(["x" * 200])[0]) == f"'{'x' * 79}... (str)"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConnectionResetError("reset"), True),
        (TimeoutError(), True),
        (socket.gaierror(-3, "Temporary failure in name resolution"), True),
        (OSError(101, "Network is unreachable"), True),
        (urllib.error.URLError("refused"), True),
        (ReadTimeout(), True),
        (RateLimitError(), True),
        (APIStatusError(), False),
        (FileNotFoundError(2, "No such file", "x"), False),
        (OSError(28, "No space left on device", "x"), False),
        (ValueError("timeout"), False),
        (KeyError("a"), False),
        (SystemExit(0), False),
    ],
)
def test_services_fail_for_a_while_and_files_do_not(error, expected):
    assert is_transient(error) is expected


def test_a_failure_is_told_from_a_result():
    def fails(responses):
        raise ConnectionError("refused")

    calls = Calls({"fails": fails, "f": lambda responses: [1.0 for _ in responses]})
    failure = calls.ask("fails", {"responses": ["a"]})
    assert isinstance(failure, Failure)
    assert failure.what.startswith("raised ConnectionError: refused at ")
    assert (failure.kind, failure.is_transient, failure.is_stuck) == ("builtins.ConnectionError", True, False)
    assert isinstance(failure.cause, ConnectionError)
    assert calls.ask("f", {"responses": ["a"]}) == [1.0]


def test_what_is_awaited_comes_later():
    async def judge(responses):
        return [float(len(text)) for text in responses]

    calls = Calls({"a": judge, "b": judge})
    assert [calls.ask(name, {"responses": ["xy"]}) for name in "ab"] == [Pending.PENDING] * 2
    assert dict(calls.gather({"a": None, "b": None})) == {"a": [2.0], "b": [2.0]}


def test_rows_are_picked_from_all_columns():
    assert rows_of({"a": [1, 2, 3], "b": [4, 5, 6]}, [2, 0]) == {"a": [3, 1], "b": [6, 4]}
