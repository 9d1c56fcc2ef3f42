"""Environments of verifiers, of tasksets that these tests write."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from llmrl.environments.environment import Message
from llmrl.environments.episode import Close, Episode, Open, Respond

TASKSET = """
import verifiers.v1 as vf

class Data(vf.TaskData):
    answer: str

class Task(vf.Task[Data]):
    @vf.reward(weight=2.0)
    async def right(self, trace: vf.Trace) -> float:
        return float(trace.last_reply == self.data.answer)

    @vf.reward
    async def replies(self, trace: vf.Trace) -> float:
        return 0.25 * len(trace.assistant_messages)

    @vf.stop
    async def gave_up(self, trace: vf.Trace) -> bool:
        return trace.last_reply == "pass"

class Config(vf.TasksetConfig):
    word: str = "cab"

class Letters(vf.Taskset[Task, Config]):
    def load(self):
        for system in (None, "Be brief."):
            yield Task(Data(prompt=f"Sort {self.config.word}.", system_prompt=system, answer="abc"), self.config.task)
"""
TALK = """
class Talk(vf.SingleAgentEnv):
    async def run(self, task, agents):
        async with agents.agent.interaction(task) as interaction:
            segment = await interaction.turn()
            while not segment.terminated and segment.last_reply != "abc":
                if segment.last_reply == "crash":
                    raise KeyError("crash")
                segment = await interaction.turn([{"role": "user", "content": f"{segment.last_reply} is wrong."}])
        assert interaction.trace.rewards
"""
TWO = """
class TwoConfig(vf.EnvConfig):
    solver: vf.AgentConfig = vf.AgentConfig()
    judge: vf.AgentConfig = vf.AgentConfig()

class Two(vf.Env[TwoConfig]):
    async def run(self, task, agents):
        pass
"""
AGAIN = """
class Again(vf.SingleAgentEnv):
    async def run(self, task, agents):
        await agents.agent.run(task)
        await agents.agent.run(task)
"""
BOX = """
class BoxTask(Task):
    async def setup(self, trace, runtime):
        await runtime.run(["true"], {})

class Box(vf.Taskset[BoxTask, Config]):
    def load(self):
        yield BoxTask(Data(prompt="x", answer=""), self.config.task)
"""
OPENING = {"role": "user", "content": "Sort cab."}


@pytest.fixture(autouse=True)
def tasksets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("verifiers", minversion="0.4")
    monkeypatch.syspath_prepend(str(tmp_path))
    sources = {
        "letters_once": f"{TASKSET}\n__all__ = ['Letters']",
        "letters": f"{TASKSET}\n{TALK}\n__all__ = ['Letters', 'Talk']",
        "letters_two": f"{TASKSET}\n{TWO}\n__all__ = ['Letters', 'Two']",
        "letters_again": f"{TASKSET}\n{AGAIN}\n__all__ = ['Letters', 'Again']",
        "letters_box": f"{TASKSET}\n{BOX}\n__all__ = ['Box']",
    }
    for name, source in sources.items():
        (tmp_path / f"{name}.py").write_text(source)


def played(taskset: str, *texts: str, task: Any = 0, **config: Any) -> list[Any]:
    """The answers to the opening, to each text, and to the end."""
    from llmrl.environments.verifiers import Verifiers

    episode = Episode(partial(Verifiers, taskset, config), {})
    turns = [Respond(Message(text, n, [])) for n, text in enumerate(texts, start=1)]
    answers = []
    for request in (Open({"task": task}, 1, 2), *turns, Close()):
        kind, *answer = json.loads(next(iter(episode.lines(request))))
        answers.append(answer[0] if kind == "answer" else answer)
        if kind == "failure":
            break
    return answers


def test_a_task_with_one_reply_is_scored_by_its_weighted_rewards():
    assert played("letters_once", "abc") == [[OPENING], [None, True, 0.0], 2.25]
    assert played("letters_once", "acb") == [[OPENING], [None, True, 0.0], 0.25]


def test_the_environment_answers_until_it_ends():
    wrong = [{"role": "user", "content": "bca is wrong."}]
    assert played("letters", "bca", "abc") == [[OPENING], [wrong, False, 0.0], [None, True, 0.0], 2.5]


def test_a_condition_of_the_task_ends_it():
    assert played("letters", "pass") == [[OPENING], [None, True, 0.0], 0.25]


def test_an_episode_that_a_limit_ends_is_scored_by_what_was_said():
    assert played("letters", "bca")[-1] == 0.25
    assert played("letters")[-1] == 0.0


def test_a_row_names_its_task_and_settings_reach_the_taskset():
    assert played("letters", task=1, word="xy")[0] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Sort xy."},
    ]


@pytest.mark.parametrize(
    ("taskset", "texts", "task", "name", "what"),
    [
        ("letters", [], 2, "start", "the taskset has no task 2"),
        ("letters", [], None, "start", "the row has no number in its column 'task'"),
        ("letters", ["crash"], 0, "respond", "raised KeyError: 'crash'"),
        ("letters_two", [], 0, "start", "letters_two needs the agents solver, judge, and the actor is one"),
        ("letters_again", ["a"], 0, "respond", "a second conversation"),
        ("letters_box", [], 0, "start", "setup of the task needs a sandbox"),
        ("letters_none", [], 0, "start", "taskset 'letters_none' not found"),
    ],
)
def test_what_cannot_be_played_fails_by_name(taskset: str, texts: list[str], task: Any, name: str, what: str):
    failure = played(taskset, *texts, task=task)[-1]
    assert failure[0] == name
    assert what in failure[1]
