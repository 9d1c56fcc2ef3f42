"""Errors of users, and those that are not."""

import errno
import os
import warnings

import pytest
import torch

import llmrl
from llmrl.api.guest import checking, errors_of_users, own_random_numbers, quiet
from llmrl.distributed.watchdog import PhaseTimeout
from llmrl.memory import MemoryFull


def raising(error, context=errors_of_users):
    with context():
        raise error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (FloatingPointError("loss is not finite"), "loss is not finite"),
        (PhaseTimeout("the phase rollout lasts"), "the phase rollout lasts"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x/final"), "x/final: No space left on device"),
    ],
)
def test_causes_outside_of_llmrl_are_errors_of_users(error, message):
    with pytest.raises(llmrl.Error) as raised:
        raising(error)
    assert str(raised.value) == message


def test_memory_that_ran_out_is_one_line_with_a_way_out():
    with pytest.raises(MemoryFull, match="out of memory in"):
        raising(MemoryError())


@pytest.mark.parametrize("error", [RuntimeError("a bug"), OSError("strange"), KeyError("x"), ValueError("y")])
def test_a_bug_stays_what_it_is(error):
    with pytest.raises(type(error)) as raised:
        raising(error)
    assert raised.value is error


def test_before_a_model_loads_a_value_error_is_the_input():
    with pytest.raises(llmrl.Error, match="bad value"):
        raising(ValueError("bad value"), checking)


def test_warnings_to_authors_of_libraries_are_left_out_and_come_back():
    def warn():
        warnings.warn_explicit("soon", FutureWarning, "theirs.py", 7, module="peft.tuners.lora")

    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with quiet():
            warn()
            warnings.warn_explicit("soon", FutureWarning, "mine.py", 7, module="mine")
        assert [warning.filename for warning in heard] == ["mine.py"]
        warn()
    assert [warning.filename for warning in heard] == ["mine.py", "theirs.py"]


def test_random_numbers_of_the_program_go_on():
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    with own_random_numbers():
        torch.manual_seed(5)
        torch.rand(7)
    assert torch.equal(torch.rand(2), expected)
