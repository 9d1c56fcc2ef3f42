"""What the worker replies to each request; that it ends with its parent is tested in test_worker.py."""

import os
from pathlib import Path

import pytest

from llmrl.rewards.calls import Failure, Pending
from llmrl.rewards.serve import Answered, Ask, Check, Gather, Load, Loaded, Refused, _Worker

RULES = """
import os

def length(responses, answer=None):
    return [float(len(text)) for text in responses]

def moves(responses):
    os.chdir("/")
    return [1.0]

def interrupts(responses):
    raise KeyboardInterrupt

async def judge(responses):
    return [2.0]
"""


@pytest.fixture
def rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rules.py").write_text(RULES)
    return f"{tmp_path}/rules.py"


def reply(worker, request):
    (reply,) = worker.replies(request)
    return reply


def test_a_function_is_loaded_and_described(rules):
    loaded = reply(_Worker(), Load(f"{rules}:length", {}))
    assert loaded == Loaded(
        name=f"{rules}:length", source_file=rules, parameters=(("responses", 1, False), ("answer", 1, True))
    )


def test_what_cannot_be_loaded_is_refused_in_words(rules):
    worker = _Worker()
    assert isinstance(reply(worker, Load(f"{rules}:missing", {})), Refused)
    reply(worker, Load(f"{rules}:length", {}))
    assert reply(worker, Check((f"{rules}:length",), ("question",))) is None


def test_a_call_is_answered_and_the_working_folder_is_set_back(rules):
    worker, here = _Worker(), os.getcwd()
    for name in ("length", "moves"):
        reply(worker, Load(f"{rules}:{name}", {}))
    assert reply(worker, Ask(f"{rules}:length", {"responses": ["ab"]})) == Answered(f"{rules}:length", [2.0], None)
    assert reply(worker, Ask(f"{rules}:moves", {"responses": ["ab"]})) == Answered(f"{rules}:moves", [1.0], "/")
    assert os.getcwd() == here


def test_an_interrupt_is_a_failure_here_and_exceptions_stay_here(rules):
    worker = _Worker()
    reply(worker, Load(f"{rules}:interrupts", {}))
    answer = reply(worker, Ask(f"{rules}:interrupts", {"responses": ["ab"]})).answer
    assert isinstance(answer, Failure)
    assert answer.what.startswith("raised KeyboardInterrupt at ")
    assert answer.cause is None


def test_what_is_awaited_is_answered_later(rules):
    worker, name = _Worker(), f"{rules}:judge"
    reply(worker, Load(name, {}))
    assert reply(worker, Ask(name, {"responses": ["ab"]})).answer is Pending.PENDING
    assert reply(worker, Gather((name,))) == Answered(name, [2.0], None)
