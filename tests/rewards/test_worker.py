"""The process in which the functions of a recipe run: it is stopped whatever they do, and ends with its parent."""

import gc
import inspect
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmrl.rewards.asking import Asker
from llmrl.rewards.calls import Failure, Pending
from llmrl.rewards.config import RewardConfig, RewardFunctionConfig
from llmrl.rewards.loading import required_columns, takes
from llmrl.rewards.worker import Worker
from llmrl.user_code import UserCodeError, name_of, source_file
from tests.rewards.said import Said

RULES = """
import asyncio, os, subprocess, sys, time
seen = []

def modules(responses):
    return [float(name in sys.modules) for name in ("torch", "numpy", "transformers")]

def process(responses):
    seen.append(1)
    return [os.getpid(), len(seen)]

def place(responses):
    return [os.getcwd() == responses[0], os.environ["LLMRL_TEST"] == responses[1], sys.path == responses[2]]

def hangs(responses):
    child = subprocess.Popen(["sleep", "3600"])
    open(responses[0], "w").write(f"{os.getpid()} {child.pid}")
    os.rename(responses[0], responses[1])
    sum(range(10**15))

def argued(responses, answer, limit: int, scale=1.0, **columns):
    return [limit * scale]

async def quick(responses):
    return [1.0]

async def slow(responses):
    await asyncio.sleep(3600)

async def fails(responses):
    await asyncio.sleep(0.01)
    raise ValueError("down")
"""

pytestmark = pytest.mark.slow


@pytest.fixture
def worker(tmp_path: Path):
    (tmp_path / "rules.py").write_text(RULES)

    def worker(*names: str, arguments: dict | None = None) -> Worker:
        settings = [
            RewardFunctionConfig(name=f"{tmp_path}/rules.py:{name}", arguments=arguments or {}) for name in names
        ]
        worker = Worker(RewardConfig(functions=tuple(settings)))
        worker.load()
        return worker

    return worker


def ask(worker: Worker, name: str, *responses: object, limit_s: float | None = None, said: Said | None = None):
    setting = next(each for each in worker.config.functions if each.name.endswith(f":{name}"))
    asker = Asker(worker, setting, place="reward.functions.0", progress=said or Said())
    return asker.ask({"responses": list(responses)}, limit_s)


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ends(*processes: int) -> bool:
    """Whether these end within a minute."""
    for _ in range(600):
        if not any(is_alive(process) for process in processes):
            return True
        time.sleep(0.1)
    return False


def processes_of(file: Path) -> list[int]:
    for _ in range(600):
        if file.exists():
            return [int(number) for number in file.read_text().split()]
        time.sleep(0.1)
    raise AssertionError("nothing was started")


def test_it_imports_only_what_the_file_does(worker):
    assert ask(worker("modules"), "modules", "a", "b", "c") == [0.0, 0.0, 0.0]


def test_it_has_folder_environment_and_path_of_the_run_and_sends_nothing_back(worker, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMRL_TEST", "planted")
    monkeypatch.syspath_prepend("/nowhere")
    path = [*sys.path, str(tmp_path)]  # the folder of a file is found too
    assert ask(worker("place"), "place", str(tmp_path), "planted", path) == [True, True, True]
    assert not any(tmp_path.name in name for name in sys.modules)


def test_one_process_serves_all_calls_and_ends_with_the_worker(worker):
    rules = worker("process", "modules")
    (process, first), (same, second) = ask(rules, "process", "a"), ask(rules, "process", "a")
    assert process == same != os.getpid()
    assert (first, second) == (1, 2)
    del rules
    gc.collect()
    assert ends(process)


def test_a_function_is_known_by_its_signature(worker, tmp_path):
    rules = worker("argued", arguments={"limit": "3"})
    (function,) = rules.functions.values()
    assert list(inspect.signature(function).parameters) == ["responses", "answer", "scale", "columns"]
    assert required_columns(rules.config, [function]) == {"answer": f"{tmp_path}/rules.py:argued"}
    assert takes(function, "anything")
    assert (name_of(function), source_file(function)) == (f"{tmp_path}/rules.py:argued", f"{tmp_path}/rules.py")
    rules.check_columns(("answer",))
    with pytest.raises(UserCodeError, match=r"rules\.py:argued needs 'answer', and there is no such column"):
        rules.check_columns(("question",))


def test_all_functions_are_loaded_in_order_and_their_columns_checked(worker, tmp_path):
    rules = worker("quick", "argued", arguments={})
    assert [name_of(function).rpartition(":")[2] for function in rules.functions.values()] == ["quick", "argued"]
    with pytest.raises(UserCodeError, match=r"rules\.py:argued needs 'answer'"):
        rules.check_columns(("question", "limit"))


def test_an_argument_that_does_not_fit_is_refused(worker):
    with pytest.raises(UserCodeError, match="argument limit"):
        worker("argued", arguments={"limit": "x"})


def test_what_hangs_is_killed_with_what_it_has_started(worker, tmp_path):
    rules = worker("hangs", "process")
    answer = ask(rules, "hangs", f"{tmp_path}/new", f"{tmp_path}/started", limit_s=2.0)
    assert isinstance(answer, Failure)
    assert answer.is_stuck
    assert answer.what == "did not return within 2 s (reward.functions.0.timeout_s)"
    assert ends(*processes_of(tmp_path / "started"))
    assert ask(rules, "process", "a")[1] == 1  # a fresh one


def test_a_slow_import_does_not_count_for_a_short_limit_of_calls_when_it_is_repeated(tmp_path):
    (tmp_path / "rules.py").write_text("import time; time.sleep(1.0)\ndef one(responses): return [1.0]\n")
    config = RewardFunctionConfig(name=f"{tmp_path}/rules.py:one", timeout_s=0.4)
    rules = Worker(RewardConfig(functions=(config,)))
    rules.load()
    rules._kill()
    assert ask(rules, "one", "a") == [1.0]


def test_a_file_that_hangs_as_the_recipe_is_checked_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("llmrl.rewards.patience.LOADING_S", 0.5)
    (tmp_path / "rules.py").write_text("while True: pass\n")
    name = f"{tmp_path}/rules.py:one"
    with pytest.raises(UserCodeError, match=rf"^reward function {name}: it did not load within 0\.5 s$"):
        Worker(RewardConfig(functions=(RewardFunctionConfig(name=name),))).load()


def test_a_signal_ends_the_wait_for_a_file_that_hangs_as_it_is_loaded_again(tmp_path):
    class Stops(Said):
        def advance(self, amount: int = 1) -> None:
            if (tmp_path / "again").exists():
                raise KeyboardInterrupt

    (tmp_path / "rules.py").write_text(
        f"import os\nif os.path.exists('{tmp_path}/once'):\n    open('{tmp_path}/again', 'w')\n    while True: pass\n"
        "def one(responses): return [1.0]\n"
    )
    config = RewardFunctionConfig(name=f"{tmp_path}/rules.py:one", timeout_s=None)
    rules = Worker(RewardConfig(functions=(config,)))
    rules.load()
    rules._kill()
    (tmp_path / "once").touch()
    with pytest.raises(KeyboardInterrupt):
        ask(rules, "one", "a", said=Stops())
    assert rules.process is None


def test_an_interrupt_of_the_run_kills_it_and_comes_through(worker, tmp_path):
    class Stops(Said):
        def advance(self, amount: int = 1) -> None:
            if (tmp_path / "started").exists():
                raise KeyboardInterrupt

    rules = worker("hangs", "process")
    with pytest.raises(KeyboardInterrupt):
        ask(rules, "hangs", f"{tmp_path}/new", f"{tmp_path}/started", said=Stops())
    assert ends(*processes_of(tmp_path / "started"))
    assert ask(rules, "process", "a")[1] == 1


PARENT = """
import sys
from llmrl.rewards.asking import Asker
from llmrl.rewards.config import RewardConfig, RewardFunctionConfig
from llmrl.rewards.worker import Worker
from tests.rewards.said import Said

config = RewardFunctionConfig(name=sys.argv[1], timeout_s=None)
worker = Worker(RewardConfig(functions=(config,)))
worker.load()
Asker(worker, config, place="", progress=Said()).ask({"responses": sys.argv[2:]})
"""


def test_it_ends_with_its_parent_though_a_function_lets_nothing_run(worker, tmp_path):
    worker("hangs")
    arguments = [f"{tmp_path}/rules.py:hangs", f"{tmp_path}/new", f"{tmp_path}/started"]
    parent = subprocess.Popen([sys.executable, "-c", PARENT, *arguments], cwd=Path(__file__).parents[2])
    process, child = processes_of(tmp_path / "started")
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert ends(process)
    os.kill(child, signal.SIGKILL)


PRINTS = """
import os, sys
def prints(responses):
    for text in responses:
        print(text * 100_000, flush=text == "a")
        print(text, file=sys.stderr)
    return [1.0]
"""


@pytest.mark.parametrize("response", ["a", "b"])
def test_what_is_printed_to_a_pipe_that_is_closed_is_lost(tmp_path, response):
    (tmp_path / "rules.py").write_text(PRINTS)
    closed, pipe = os.pipe()
    os.close(closed)
    code = f"{PARENT.replace('Asker(', 'answer = Asker(')}\nassert answer == [1.0], answer"
    parent = subprocess.run(
        [sys.executable, "-c", code, f"{tmp_path}/rules.py:prints", response],
        cwd=Path(__file__).parents[2], stdout=pipe, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    os.close(pipe)
    assert (parent.returncode, parent.stderr) == (0, f"{response}\n")


def begun(worker: Worker, number: int) -> dict:
    """The first functions, called, and the waits for them."""
    askers = [
        Asker(worker, setting, place="reward.functions.0", progress=Said())
        for setting in worker.config.functions[:number]
    ]
    assert [asker.begin({"responses": ["a"]}) for asker in askers] == [Pending.PENDING] * number
    return {asker.name: asker.waiting(1, 1.0) for asker in askers}


def test_answers_come_as_they_are_ready_and_the_slow_one_is_stopped(worker):
    rules = worker("slow", "quick", "fails")
    answers = [(name.rpartition(":")[2], answer) for name, answer in rules.gather(begun(rules, 3))]
    assert answers[0] == ("quick", [1.0])
    assert [name for name, _ in answers[1:]] == ["fails", "slow"]
    assert answers[1][1].what.startswith("raised ValueError: down at ")
    assert answers[2][1].is_stuck


def test_an_answer_that_is_lost_with_the_process_does_not_come(worker):
    rules = worker("slow", "quick", "process")
    waiting = begun(rules, 2)
    ask(rules, "process", "a")
    rules._kill()
    assert list(rules.gather(waiting)) == []
    assert ask(rules, "quick", "a") == [1.0]
