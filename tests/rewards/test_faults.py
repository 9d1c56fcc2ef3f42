"""What llmrl does about reward functions that go wrong: each row of the table in docs/rewards.md is one of these."""

import os
import re
import signal
import subprocess
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from llmrl.batches import Rollout, StopReason
from llmrl.data.chat import as_sequences
from llmrl.rewards.config import RewardConfig, RewardFunctionConfig
from llmrl.rewards.functions import FunctionReward, RewardError
from llmrl.rewards.worker import Worker
from llmrl.user_code import UserCodeError
from tests.data.conftest import make_tokenizer, spell
from tests.processes import command, environment, write_recipes
from tests.rewards.said import Said

DOCS = Path(__file__).parents[2] / "docs" / "rewards.md"
TEXTS = ["aa", "bbb", "c", "dd"]
"""Two responses to each of two prompts."""
LENGTHS = [2.0, 3.0, 1.0, 2.0]
NONE = [None] * 4
NO_LIST = "expected a list of 4 numbers or None, one for each response"


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A function, called `_` here, and what becomes of a run with it: it ends with this message, or goes on with these
    scores."""

    code: str
    ends: str | None = None
    """Regular expression of what follows the name of the function."""
    scores: list[float | None] = field(default_factory=lambda: LENGTHS)
    told: str = ""
    """Regular expression of a message, if there is one."""
    failed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    calls: int = 1


def returns(value: str, **outcome: Any) -> Fault:
    return Fault(code=f"def _(responses):\n    return {value}\n", **outcome)


def does(*lines: str, **outcome: Any) -> Fault:
    """It does this, then returns the length of each response."""
    body = "".join(f"    {line}\n" for line in lines)
    return Fault(code=f"def _(responses):\n{body}    return [len(text) for text in responses]\n", **outcome)


def is_async(*lines: str, **outcome: Any) -> Fault:
    fault = does(*lines, **outcome)
    return Fault(**{**vars(fault), "code": f"async {fault.code}"})


EXCLUDE = {"on_error": "exclude"}
HANGS = {"timeout_s": 0.3}
LATE = r"did not return within 0\.3 s \(reward\.functions\.0\.timeout_s\) in call 1, for 4 responses; raise the limit"

FAULTS: dict[str, Fault] = {
    # what it returns
    "returns-a-number": returns("1.0", ends=rf"returned 1\.0 \(float\); {NO_LIST}"),
    "returns-nothing": returns("None", ends=rf"returned None \(NoneType\); {NO_LIST}"),
    "returns-a-dict": returns("{0: 1.0}", ends=rf"returned \{{0: 1\.0\}} \(dict\); {NO_LIST}"),
    "returns-a-text": returns("'1111'", ends=r"returned '1111' \(str\); "),
    "returns-a-generator": returns("(1.0 for _ in responses)", ends=r"returned <generator .*\(generator\); "),
    "returns-an-iterator": returns("map(len, responses)", ends=r"returned <map .*\(map\); "),
    "returns-too-few": returns("[1.0]", ends=rf"returned 1 scores; {NO_LIST}"),
    "returns-too-many": returns("[1.0] * 5", ends=rf"returned 5 scores; {NO_LIST}"),
    "returns-an-empty-list": returns("[]", ends=rf"returned 0 scores; {NO_LIST}"),
    "returns-its-input": returns("responses", ends=r"returned 'aa' \(str\) for row 0; expected a finite number"),
    "returns-nan": returns("[1.0, float('nan'), 1.0, 1.0]", ends=r"returned nan \(float\) for row 1; .*The row: "),
    "returns-infinity": returns("[1.0, 1.0, float('inf'), 1.0]", ends=r"returned inf \(float\) for row 2"),
    "returns-more-than-float32": returns("[1e39] * 4", ends=r"returned 1e\+39 \(float\) for row 0"),
    "returns-a-huge-integer": returns("[10**400] * 4", ends=r"returned 10+\.\.\. \(int\) for row 0"),
    "returns-a-complex-number": returns("[1j] * 4", ends=r"returned 1j \(complex\) for row 0"),
    "returns-a-decimal": Fault(
        code="from decimal import Decimal\ndef _(responses):\n    return [Decimal(1)] * 4\n",
        ends=r"returned Decimal\('1'\) \(Decimal\) for row 0",
    ),
    "returns-an-offset-outside": returns(
        "[[(9, 1.0)]] * 4", ends=r"returned a list with \(9, 1\.0\) at place 0 for row 0"
    ),
    "returns-a-list-of-another-length": returns("[[1.0]] * 4", ends=r"returned a list of length 1 for row 0"),
    "returns-what-has-no-text": Fault(
        code="class Mute:\n    def __repr__(self):\n        raise KeyError\n"
        "def _(responses):\n    return [Mute()] * 4\n",
        ends=r"returned <no repr: KeyError> \(Mute\) for row 0",
    ),
    "returns-what-holds-itself": does("a = [1.0]", "a.append(a)", "return a", ends=r"raised RecursionError: "),
    "returns-none-for-some": returns("[1.0, None, 2.0, None]", scores=[1.0, None, 2.0, None]),
    "returns-none-for-all": returns("[None] * 4", scores=NONE),
    "returns-truths": returns("[len(text) == 2 for text in responses]", scores=[1.0, 0.0, 0.0, 1.0]),
    "returns-arrays": Fault(
        code="import numpy\ndef _(responses):\n    return numpy.array([len(text) for text in responses])\n"
    ),
    "returns-an-enum": Fault(
        code="from enum import IntEnum\nclass Grade(IntEnum):\n    GOOD = 2\n"
        "def _(responses):\n    return [Grade.GOOD] * 4\n",
        scores=[2.0] * 4,
    ),
    "returns-nan-excluded": returns(
        "[1.0, float('nan'), 2.0, 'x']", settings=EXCLUDE, scores=[1.0, None, 2.0, None], failed=2
    ),
    "returns-too-few-excluded": returns("[1.0]", settings=EXCLUDE, ends=rf"returned 1 scores; {NO_LIST}"),
    # what it raises
    "raises": does("raise KeyError('gold')", ends=r"raised KeyError: 'gold' at .*rules\.py:\d+ for row 0; .*The row: "),
    "raises-for-one-response": does(
        "assert 'c' not in responses, 'c'", ends=r"raised AssertionError: c at .*rules\.py:\d+ for row 2; .*The row: "
    ),
    "raises-for-several-at-once": does(
        "assert len(responses) < 3, 'too many'",
        ends=r"raised AssertionError: too many at .* on the whole batch of call 1, and on no row that was tried alone",
    ),
    "raises-system-exit": does("raise SystemExit(0)", ends=r"raised SystemExit: 0 at .* for row 0"),
    "raises-keyboard-interrupt": does("raise KeyboardInterrupt", ends=r"raised KeyboardInterrupt at .* for row 0"),
    "raises-generator-exit": does("raise GeneratorExit", ends=r"raised GeneratorExit at .* for row 0"),
    "raises-stop-iteration": does("next(iter(()))", ends=r"raised StopIteration at .* for row 0"),
    "raises-memory-error": does("raise MemoryError", ends=r"raised MemoryError at .* for row 0"),
    "recurses-without-end": Fault(
        code="def down():\n    down()\ndef _(responses):\n    down()\n", ends=r"raised RecursionError: .* for row 0"
    ),
    "raises-what-has-no-text": Fault(
        code="class Silent(Exception):\n    def __str__(self):\n        raise KeyError\n"
        "def _(responses):\n    raise Silent\n",
        ends=r"raised Silent at .* for row 0",
    ),
    "raises-what-cannot-be-sent": does(
        "error = ValueError('kept')",
        "error.lock = __import__('threading').Lock()",
        "raise error",
        ends=r"raised ValueError: kept at .* for row 0",
    ),
    "raises-a-missing-file": does(
        "open('/no/such/file')", ends=r"raised FileNotFoundError: .*'/no/such/file' at .* for row 0"
    ),
    "raises-once-for-a-connection": Fault(
        code="tries = []\ndef _(responses):\n    tries.append(1)\n    if len(tries) < 3:\n"
        "        raise ConnectionError('refused')\n    return [len(text) for text in responses]\n",
        told=r"raised ConnectionError: refused at .*; it is called again in 2 s",
    ),
    "raises-once-for-too-many-requests": Fault(
        code="class RateLimitError(Exception):\n    pass\ncalls = []\ndef _(responses):\n    calls.append(1)\n"
        "    if len(calls) < 2:\n        raise RateLimitError('429')\n    return [len(text) for text in responses]\n",
        told=r"raised RateLimitError: 429 at .*; it is called again in 1 s",
    ),
    "raises-for-a-connection-always": does(
        "raise TimeoutError('down')",
        settings={"retries": 1},
        told=r"it is called again in 1 s",
        ends=rf"raised TimeoutError: down at .* in call 1; {NO_LIST}$",
    ),
    "raises-for-one-response-excluded": does(
        "assert 'c' not in responses, 'c'",
        settings=EXCLUDE,
        scores=[2.0, 3.0, None, 2.0],
        failed=1,
        told=r"raised AssertionError: c at .*; 1 response of this call left out as unscored",
    ),
    "raises-for-a-group-excluded": does(
        "assert 'c' not in responses and 'dd' not in responses, responses",
        settings=EXCLUDE,
        scores=[2.0, 3.0, None, None],
        failed=2,
        told=r"; 2 responses of this call left out",
    ),
    "raises-always-excluded": does("raise KeyError('gold')", settings=EXCLUDE, scores=NONE, failed=4),
    "raises-for-a-connection-excluded": does(
        "raise ConnectionError('down')", settings={**EXCLUDE, "retries": 0}, scores=NONE, failed=4
    ),
    # how it hangs
    "sleeps": does("import time; time.sleep(3600)", settings=HANGS, ends=LATE),
    "spins": does("while True: pass", settings=HANGS, ends=LATE),
    "spins-in-c": does("sum(range(10**15))", settings=HANGS, ends=LATE),
    "matches-for-ever": does("import re; re.match('(a+)+$', 'a' * 60 + 'b')", settings=HANGS, ends=LATE),
    "waits-for-a-lock": does(
        "import threading; lock = threading.Lock()", "lock.acquire(); lock.acquire()", settings=HANGS, ends=LATE
    ),
    "waits-for-a-process": does("import subprocess; subprocess.run(['sleep', '3600'])", settings=HANGS, ends=LATE),
    "ignores-signals": does(
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)",
        "signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(3600)",
        settings=HANGS,
        ends=LATE,
    ),
    "catches-everything": does(
        "import time",
        "while True:",
        "    try:",
        "        time.sleep(3600)",
        "    except BaseException:",
        "        pass",
        settings=HANGS,
        ends=LATE,
    ),
    "awaits-for-ever": is_async("import asyncio; await asyncio.Event().wait()", settings=HANGS, ends=LATE),
    "blocks-the-event-loop": is_async("import time; time.sleep(3600)", settings=HANGS, ends=LATE),
    "hangs-excluded": does(
        "import time; time.sleep(3600)", settings={**HANGS, **EXCLUDE}, scores=NONE, failed=4, calls=2
    ),
    "reads-standard-input": does("input()", ends=r"raised EOFError: .* for row 0"),
    "starts-a-debugger": does("breakpoint()", ends=r"raised BdbQuit at .*"),
    # how it leaves
    "exits": does("import sys; sys.exit()", ends=r"raised SystemExit at .* for row 0"),
    "exits-at-once": does(
        "import os; os._exit(0)", ends=r"ended the process that it runs in with exit status 0 for row 0"
    ),
    "exits-at-once-with-a-status": does(
        "import os; os._exit(3)", ends=r"ended the process that it runs in with exit status 3 for row 0"
    ),
    "exits-for-one-response": does(
        "import os", "if 'c' in responses: os._exit(0)", ends=r"ended the process .* with exit status 0 for row 2"
    ),
    "exits-for-one-response-excluded": does(
        "import os",
        "if 'c' in responses: os._exit(0)",
        settings=EXCLUDE,
        scores=[2.0, 3.0, None, 2.0],
        failed=1,
        told=r"ended the process that it runs in with exit status 0; 1 response of this call left out",
    ),
    "breaks-memory": does(
        "import ctypes; ctypes.string_at(0)", ends=r"ended the process that it runs in by SIGSEGV for row 0"
    ),
    "aborts": does("import os; os.abort()", ends=r"ended the process that it runs in by SIGABRT for row 0"),
    "is-killed": does(
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        ends=r"ended the process that it runs in by SIGKILL \(which the system sends where memory runs out\) for row 0",
    ),
    "exits-in-a-coroutine": is_async(
        "import os; os._exit(0)", ends=r"ended the process .* with exit status 0 for row 0"
    ),
    "closes-every-file": does(
        "import os; os.closerange(3, 256)", ends=r"ended the process that it runs in with exit status 1"
    ),
    "forks-and-returns-twice": does("import os; os.fork()", calls=2),
    "starts-a-thread-that-stays": does(
        "import threading, time; threading.Thread(target=time.sleep, args=(5,), daemon=True).start()"
    ),
    "starts-a-pool": Fault(
        code="import multiprocessing\ndef length(text):\n    return len(text)\ndef _(responses):\n"
        "    with multiprocessing.get_context('fork').Pool(2) as pool:\n        return pool.map(length, responses)\n"
    ),
    # what it changes
    "changes-its-lists": does(
        "kept = list(responses); responses.clear()", "return [len(text) for text in kept]", calls=2
    ),
    "changes-a-row": Fault(
        code="def _(prompts, question):\n    sizes = [len(each) for each in question]\n"
        "    for each, same in zip(prompts, question):\n        each.append({}); same.append({})\n    return sizes\n",
        scores=[1.0] * 4,
        calls=2,
    ),
    "changes-the-working-folder": does(
        "import os; before = os.getcwd(); os.chdir('/')",
        "return [float(before != '/')] * 4",
        scores=[1.0] * 4,
        calls=2,
        told=r"warning: .*changed the working folder to /; it is set back after each call",
    ),
    "changes-the-environment": does("import os; os.environ.update(LLMRL_TEST_PLANTED='1')"),
    "changes-random-states": does("import random, numpy; random.seed(0); numpy.random.seed(0)"),
    "changes-signals": does("import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"),
    "changes-warnings": does("import warnings; warnings.simplefilter('error')"),
    "changes-the-path": does("import sys; sys.path.clear()"),
    "changes-the-recursion-limit": does("import sys; sys.setrecursionlimit(123)"),
    "replaces-standard-output": does("import sys, io; sys.stdout = io.StringIO()", calls=2),
    "closes-standard-output": does("import sys; sys.stdout.close()", calls=2),
    "keeps-state": Fault(
        code="seen = []\ndef _(responses):\n    seen.append(1)\n    return [len(seen)] * 4\n", scores=[2.0] * 4, calls=2
    ),
    # columns
    "takes-everything": Fault(code="def _(**columns):\n    return [len(text) for text in columns['responses']]\n"),
    "takes-a-column-with-a-default": Fault(
        code="def _(responses, nothing=7):\n    return [nothing] * 4\n", scores=[7.0] * 4
    ),
    "takes-a-column-that-rows-lack": Fault(
        code="def _(answer=7):\n    return [-1.0 if gold is None else 1.0 for gold in answer]\n",
        scores=[1.0, 1.0, -1.0, -1.0],
    ),
    # async
    "async-raises": is_async("raise ValueError('down')", ends=r"raised ValueError: down at .*rules\.py:\d+ for row 0"),
    "async-exits": is_async("raise SystemExit(0)", ends=r"raised SystemExit: 0 at .* for row 0"),
    "async-is-cancelled": is_async(
        "import asyncio; raise asyncio.CancelledError", ends=r"raised CancelledError at .* for row 0"
    ),
    "async-raises-for-one-response-excluded": is_async(
        "assert 'c' not in responses, 'c'", settings=EXCLUDE, scores=[2.0, 3.0, None, 2.0], failed=1
    ),
    "async-keeps-a-connection": Fault(
        code="import asyncio\nkept = []\nasync def _(responses):\n    if not kept:\n"
        "        kept.append(asyncio.get_running_loop().create_future())\n    else:\n"
        "        asyncio.get_running_loop().call_soon(kept[0].set_result, 1)\n        await kept[0]\n"
        "    return [len(text) for text in responses]\n",
        calls=2,
    ),
    "runs-a-loop-of-its-own": Fault(
        code="import asyncio\nasync def judge(responses):\n    return [len(text) for text in responses]\n"
        "def _(responses):\n    return asyncio.run(judge(responses))\n"
    ),
}

LOADS = {
    "file-raises": ("1 / 0", r"rules\.py does not load: ZeroDivisionError"),
    "file-exits": ("raise SystemExit(0)", r"rules\.py does not load: SystemExit"),
    "file-exits-at-once": (
        "import os; os._exit(0)",
        r"while it was loaded, its code ended the process .* exit status 0",
    ),
    "asks-for-a-missing-column": ("def _(responses, gold): pass", "needs 'gold', and there is no such column"),
    "asks-for-an-ambiguous-column": ("def _(tokens): pass", "takes 'tokens', which comes from the rollout"),
    "asks-by-position": ("def _(responses, /): pass", "takes 'responses' by its position only"),
    "is-a-class": ("class _: pass", "is a class, whose call makes an object"),
    "is-no-function": ("_ = 3", "is not a function but int"),
    "is-missing": ("", "has no '_'"),
}
"""Files that cannot be used, and what is said of them before a model loads."""

AGAIN = {
    "file-raises-again": ("1 / 0", {}, r"could not be loaded again: .*rules\.py does not load: ZeroDivisionError"),
    "file-exits-again": ("os._exit(4)", {}, r"could not be loaded again: while it was loaded, .* exit status 4"),
    "file-hangs-again": ("while True: pass", HANGS, r"could not be loaded again: it did not load within 0\.3 s "),
    "file-raises-again-excluded": ("1 / 0", EXCLUDE, None),
    "file-hangs-again-excluded": ("while True: pass", {**HANGS, **EXCLUDE}, None),
    "file-changes": ("", EXCLUDE, r": .*rules\.py has changed during the run"),
}
"""Files whose function ends its process, and what they do as a fresh one loads them; what is said of it, None: all
responses are excluded."""


ENDINGS = ("exits", "exits-at-once", "breaks-memory", "sleeps", "spins-in-c", "awaits-for-ever")
"""Faults that a whole run is tried with."""


def name_of(fault: str) -> str:
    return fault.replace("-", "_")


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file with all functions."""
    file = tmp_path_factory.mktemp("faults") / "rules.py"
    code = [re.sub(r"\bdef _\(", f"def {name_of(fault)}(", FAULTS[fault].code) for fault in FAULTS]
    file.write_text("\n".join(code))
    return file


@pytest.fixture(scope="module")
def worker(rules: Path) -> Worker:
    functions = [RewardFunctionConfig(name=f"{rules}:{name_of(fault)}") for fault in FAULTS]
    worker = Worker(RewardConfig(functions=tuple(functions)))
    worker.load()
    return worker


@pytest.fixture
def rollout() -> Rollout:
    sequences = as_sequences([[1]] * 4, [spell(text) for text in TEXTS])
    messages = [{"role": "user", "content": "?"}]
    rows = ({"question": messages, "answer": "x"}, {"question": messages})
    return Rollout(
        sequences=sequences,
        rollout_logprobs=torch.zeros(sequences.response_ids.shape),
        stop_reason=torch.full((4,), StopReason.LENGTH),
        group_ids=torch.tensor([0, 0, 1, 1]),
        rows=(rows[0], rows[0], rows[1], rows[1]),
    )


def reward_of(worker: Worker, name: str, said: Said, **settings: Any) -> FunctionReward:
    return FunctionReward(
        RewardConfig(functions=(RewardFunctionConfig(name=name, **settings),)),
        functions=[worker.functions[name]],
        tokenizer=make_tokenizer(),
        prompt_column="question",
        columns=["question", "answer"],
        progress=said,
    )


def state_of_the_run() -> dict[str, Any]:
    """What belongs to the run, and must not change. (Python's own random state is drawn from by beartype.)"""
    return {
        "streams": (sys.stdout, sys.stderr, sys.stdout.closed),
        "random state of torch": torch.get_rng_state().tolist(),
        "random state of numpy": np.random.get_state()[1].tolist(),
        "working folder": os.getcwd(),
        "environment": dict(os.environ),
        "path": list(sys.path),
        "recursion limit": sys.getrecursionlimit(),
        "warnings": [each for each in warnings.filters if each[0] == "error"],
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
    }


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_function(fault: str, worker: Worker, rules: Path, rollout: Rollout, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("llmrl.rewards.asking.Asker._pause", lambda self, seconds: None)
    monkeypatch.setattr("llmrl.rewards.asking.SEARCH_S", 300.0)
    case, said, before = FAULTS[fault], Said(), state_of_the_run()
    name = f"{rules}:{name_of(fault)}"
    reward = reward_of(worker, name, said, **case.settings)
    if case.ends is None:
        for _ in range(case.calls):
            scores = reward(rollout)
        expected = torch.tensor([float("nan") if score is None else score for score in case.scores])
        assert_close(scores.total, expected, equal_nan=True)
        assert sum(int(failed.sum()) for failed in scores.failed.values()) == case.failed
    else:
        with pytest.raises(RewardError) as error:
            reward(rollout)
        assert re.search(rf"^reward function {re.escape(name)} {case.ends}", str(error.value)), error.value
        assert "\n" not in str(error.value)
    assert re.search(case.told, "\n".join(said.messages)), said.messages
    after = state_of_the_run()
    assert [name for name in before if after[name] != before[name]] == []


@pytest.mark.slow
@pytest.mark.parametrize("fault", ENDINGS)
def test_a_run(fault: str, rules: Path, tmp_path: Path):
    """It ends with a status other than 0 and one line that names the function, and its start is saved."""
    write_recipes(tmp_path)
    name = f"{rules}:{name_of(fault)}"
    done = subprocess.run(
        command("grpo", "grpo.yaml", f"reward.functions=[{{name: '{name}', timeout_s: 1}}]", num_processes=1),
        cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = done.stderr.splitlines()
    assert done.returncode == 1, done.stderr
    assert [line for line in lines if line.startswith(f"error: reward function {name} ")] == lines[:1]
    assert "Traceback" not in done.stderr
    assert (tmp_path / "out" / "checkpoints" / "step_000000").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("fault", LOADS)
def test_a_file(fault: str, tmp_path: Path):
    code, said = LOADS[fault]
    (tmp_path / "rules.py").write_text(f"{code}\n")
    worker = Worker(RewardConfig(functions=(RewardFunctionConfig(name=f"{tmp_path}/rules.py:_"),)))

    def check() -> None:
        worker.load()
        worker.check_columns(("question", "tokens"))

    with pytest.raises(UserCodeError, match=said):
        check()


@pytest.mark.slow
@pytest.mark.parametrize("fault", AGAIN)
def test_a_file_that_is_loaded_again(fault: str, tmp_path: Path, rollout: Rollout):
    does, settings, ends = AGAIN[fault]
    file, marker = tmp_path / "rules.py", tmp_path / "called"
    file.write_text(
        f"import os, pathlib\nif os.path.exists('{marker}'):\n    {does or 'pass'}\n"
        f"def _(responses):\n    pathlib.Path('{marker}').touch()\n    os._exit(3)\n"
    )
    worker = Worker(RewardConfig(functions=(RewardFunctionConfig(name=f"{file}:_"),)))
    worker.load()
    said = Said()
    reward = reward_of(worker, f"{file}:_", said, **settings)
    if ends is None:
        for _ in range(2):
            scores = reward(rollout)
            assert scores.total.isnan().all()
            assert [int(failed.sum()) for failed in scores.failed.values()] == [4]
        assert "4 responses of this call left out" in said.messages[0]
        return
    if fault == "file-changes":
        file.write_text(f"{file.read_text()}\n")
    else:
        with pytest.raises(RewardError, match=r"_ ended the process that it runs in with exit status 3 in call 1; "):
            reward(rollout)
    with pytest.raises(RewardError) as error:
        reward(rollout)
    assert re.search(rf"^reward function {re.escape(str(file))}:_ ?{ends}", str(error.value)), error.value


def test_the_table_of_the_docs_has_these():
    _, _, table = DOCS.read_text().partition("## The table")
    listed = re.findall(r"^\| `([a-z0-9-]+)` \|", table, flags=re.MULTILINE)
    assert listed == [*FAULTS, *LOADS, *AGAIN]
