"""Runs whose responses have several turns, and what is refused before they begin."""

import dataclasses
import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from llmrl.batches import StopReason
from llmrl.config import GRPORun
from llmrl.data.config import PromptDataConfig
from llmrl.environments.config import EnvironmentConfig
from llmrl.environments.processes import Processes
from llmrl.environments.threads import Threads
from llmrl.models.folders import ModelError
from llmrl.models.loading import load_tokenizer
from llmrl.rewards.config import LearnedRewardConfig, RewardConfig, RewardFunctionConfig
from llmrl.rollout.config import RolloutConfig
from llmrl.rollout.scripted import ScriptedEngine
from llmrl.user_code import UserCodeError, handed_over
from llmrl.wiring import checks
from llmrl.wiring.checks import check_rl
from llmrl.wiring.environments import check_environment, with_turns
from tests.contexts import context_of
from tests.environments.fakes import FORGETS, FORGOTTEN
from tests.environments.families import family

from .conftest import TINY, build_run

SIZES = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
GUESS = '''
import llmrl

class Guess(llmrl.Environment):
    def start(self, row):
        self.secret = row["secret"]
        return f"{self.random.random():.3f} "

    def respond(self, message):
        if self.secret == 3 and message.turn == 2:
            raise KeyError("x")
        return llmrl.Turn(f"{self.random.random():.3f}", reward=float(len(message.text)), done=message.turn == 3)

    def close(self):
        return 0.5

def add(a: int, b: int) -> int:
    """Adds.

    Args:
        a: One.
        b: Other.
    """
    return a + b

def bare(a):
    return a

total = add

def starts_with_a_digit(prompts, responses, completions):
    return [float(p[0] == "0" and c[-1] == {"role": "assistant", "content": r})
            for p, r, c in zip(prompts, responses, completions)]
'''


@pytest.fixture
def guess(tmp_path):
    (tmp_path / "guess.py").write_text(GUESS)
    return tmp_path / "guess.py"


@pytest.fixture
def episodes(config, guess, tmp_path):
    """A small run of GRPO with an environment, whose actor ends a turn by chance."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"secret": n}) + "\n" for n in range(5)))
    return dataclasses.replace(
        config,
        data=PromptDataConfig(path=str(tmp_path / "rows.jsonl"), max_prompt_tokens=8),
        reward=RewardConfig(),
        environment=EnvironmentConfig(name=f"{guess}:Guess", max_turns=4),
        rollout=RolloutConfig(prompts_per_iteration=4, max_response_tokens=90),
        update=dataclasses.replace(config.update, minibatch_size=32, num_epochs=1),
    )


def iterate(config):
    run, _ = build_run(config)
    rollouts = []
    engine = run.trainer.engine
    generate = engine.generate
    engine.generate = lambda *arguments: rollouts.append(generate(*arguments)) or rollouts[-1]
    run.prepare()
    return run.trainer.iterate().values(), rollouts[0], run


def test_a_run_learns_from_its_episodes(episodes):
    values, rollout, _ = iterate(episodes)
    told = rollout.episodes
    assert told.num_turns.max() > 1
    of_three = torch.tensor([row["secret"] == 3 for row in rollout.rows])
    assert (told.failed == (of_three & (told.num_turns >= 2) & (rollout.stop_reason == StopReason.FAILED))).all()
    assert values["environment/failed"] == float(told.failed.sum()) == values.get("environment/failed/respond", 0.0)
    assert values["score/unscored"] == float(told.failed.sum())
    ok = ~told.failed
    expected = (told.turn_rewards.sum(dim=1) + 0.5)[ok].mean()
    assert values["score/environment"] == pytest.approx(float(expected), rel=1e-6)
    assert values["turn/count"] == pytest.approx(float(told.num_turns.float().mean()))
    assert values["turn/limit_fraction"] == float((rollout.stop_reason == StopReason.TURNS).float().mean())
    assert values["response/length"] == pytest.approx(float(rollout.sequences.response_mask.sum()) / 32)
    assert values["actor/grad_norm"] > 0


def test_a_run_is_the_same_again(episodes, tmp_path):
    values, rollout, _ = iterate(episodes)
    other = dataclasses.replace(episodes, run=dataclasses.replace(episodes.run, output_dir=str(tmp_path / "other")))
    again, rollout_again, _ = iterate(other)
    assert torch.equal(rollout.sequences.response_ids, rollout_again.sequences.response_ids)
    assert torch.equal(rollout.rollout_logprobs, rollout_again.rollout_logprobs)
    assert {k: v for k, v in values.items() if not k.endswith("_s")} == {
        k: v for k, v in again.items() if not k.endswith("_s")
    }


@pytest.fixture
def forgetting(episodes, tmp_path):
    """Whose chat template leaves out some letters of earlier turns, and whose actor ends a turn with every third id."""
    model = shutil.copytree(TINY.path, tmp_path / "forgetting")
    (model / "chat_template.jinja").write_text(FORGETS)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(0, 99, 3))}))
    environment = dataclasses.replace(episodes.environment, history="branch")
    model_config = dataclasses.replace(episodes.model, path=str(model))
    return dataclasses.replace(episodes, model=model_config, environment=environment)


def test_before_each_turn_the_actor_read_what_the_template_writes_then(forgetting):
    """And what it learns from is what it read."""
    values, rollout, _ = iterate(forgetting)
    tokenizer, sequences, told = (
        AutoTokenizer.from_pretrained(forgetting.model.path),
        rollout.sequences,
        rollout.episodes,
    )
    num_branched = 0
    for row, opening in enumerate(told.openings):
        prompt = sequences.unique_prompt_ids[sequences.prompt_of_row[row]].tolist()
        chosen, restarts = sequences.response_mask[row].tolist(), sequences.restarts[row].tolist()
        read, expected, before = prompt, f">{opening}<", False
        texts = iter(told.messages[row])
        for column in range(int(sequences.response_lengths[row])):
            read = [] if restarts[column] else read
            if chosen[column] and not before:
                assert tokenizer.decode(read, skip_special_tokens=True) == expected
                said, answer = next(texts), next(texts, {"content": ""})
                kept = "".join(letter for letter in said["content"] if letter not in FORGOTTEN)
                expected += f"{kept}>{answer['content']}<"
            read, before = [*read, int(sequences.response_ids[row, column])], chosen[column]
        num_branched += any(restarts)
    assert 0 < num_branched < len(told.openings)
    assert told.num_turns.max() == 3
    assert values["policy/rollout_gap"] < 1e-5


def test_functions_score_the_last_turn_beside_the_environment(episodes, guess):
    functions = (RewardFunctionConfig(name=f"{guess}:starts_with_a_digit", weight=2.0),)
    values, rollout, _ = iterate(dataclasses.replace(episodes, reward=RewardConfig(functions=functions)))
    assert values["score/starts_with_a_digit"] == 1.0
    ok = ~rollout.episodes.failed
    expected = (rollout.episodes.turn_rewards.sum(dim=1) + 2.5)[ok].mean()
    assert values["score/mean"] == pytest.approx(float(expected), rel=1e-6)


def test_code_of_an_environment_is_among_what_a_run_is_known_by(episodes):
    run, _ = build_run(episodes)
    assert "environment.name" in run.contents


def checked(guess, tokenizer=None, **settings):
    return check_environment(EnvironmentConfig(**settings), tokenizer, PromptDataConfig(path="rows.jsonl"))


def test_what_a_recipe_names_has_processes_and_what_a_program_hands_over_threads(guess):
    assert isinstance(checked(guess, name=f"{guess}:Guess").host, Processes)
    from llmrl.environments.environment import Environment, Turn

    class Mine(Environment):
        def respond(self, message):
            return Turn(done=True)

    with handed_over({"Mine": Mine}):
        assert isinstance(checked(guess, name="given:Mine").host, Threads)


@pytest.mark.parametrize("dry", [False, True])
@pytest.mark.parametrize(
    ("body", "why"),
    [
        ('self.secret = row["secrt"]', r"start raised KeyError: 'secrt' at .*other\.py:5; it was tried with line 1"),
        ("import time; time.sleep(60)", r"start took longer than 0\.5 s \(environment\.timeout_s\); it was tried"),
        ("pass", r"start returned no opening, and the row has no 'prompt'; return a text or messages; it was tried"),
        ("return 3", r"start returned 3, which must be a text or a list of messages"),
    ],
)
def test_start_is_tried_with_the_first_row_before_a_model_loads(episodes, tmp_path, body, why, dry):
    (tmp_path / "other.py").write_text(
        f"import llmrl\n\nclass Other(llmrl.Environment):\n    def start(self, row):\n        {body}\n"
        "    def respond(self, message):\n        return 'x'\n"
    )
    environment = EnvironmentConfig(name=f"{tmp_path / 'other.py'}:Other", timeout_s=0.5)
    with pytest.raises(UserCodeError, match=why) as error:
        check_rl(dataclasses.replace(episodes, environment=environment), dry=dry)
    assert str(error.value).endswith("tried with line 1 of the data, which has the columns secret")


CLOSES = """
import llmrl

class Other(llmrl.Environment):
    def start(self, row):
        self.secret = row["secret"]
        return "x"

    def respond(self, message):
        return "x"

    def close(self):
        with open(PATH, "a") as file:
            file.write(f"{self.secret};")
"""


def test_what_is_tried_is_closed(episodes, tmp_path):
    (tmp_path / "other.py").write_text(CLOSES.replace("PATH", repr(str(tmp_path / "closed"))))
    environment = EnvironmentConfig(name=f"{tmp_path / 'other.py'}:Other")
    check_rl(dataclasses.replace(episodes, environment=environment), dry=True)
    assert (tmp_path / "closed").read_text() == "0;"


def test_tools_are_shown_to_the_actor(guess):
    environment = checked(guess, family("qwen2_5"), tools=(f"{guess}:add",))
    assert environment.format == "hermes"
    (schema,) = environment.shown(PromptDataConfig(path="rows.jsonl")).chat_template_kwargs["tools"]
    assert schema["function"]["name"] == "add"
    assert set(schema["function"]["parameters"]["properties"]) == {"a", "b"}


@pytest.mark.parametrize(
    ("settings", "tokenizer", "error", "message"),
    [
        ({"name": "{guess}:Gess"}, None, UserCodeError, "did you mean"),
        ({"tools": ("{guess}:bare",)}, "qwen2_5", UserCodeError, "bare cannot be shown to the actor"),
        ({"tools": ("{guess}:total",)}, "qwen2_5", UserCodeError, "as 'add', but its calls are looked up by 'total'"),
        ({"tools": ("{guess}:add",)}, "smollm2", UserCodeError, "set environment.tool_format"),
        ({"name": "{guess}:Guess"}, "qwen3", ModelError, 'set environment.history to "branch" .* or to "keep"'),
    ],
)
def test_what_would_fail_later_is_refused(guess, settings, tokenizer, error, message):
    named = {
        name: value.format(guess=guess) if isinstance(value, str) else tuple(x.format(guess=guess) for x in value)
        for name, value in settings.items()
    }
    with pytest.raises(error, match=message):
        checked(guess, None if tokenizer is None else family(tokenizer), **named)


@pytest.mark.parametrize("dry", [False, True])
def test_a_reward_model_that_writes_episodes_differently_is_refused_before_a_model_loads(episodes, tmp_path, dry):
    config = LlamaConfig(**SIZES, vocab_size=99, pad_token_id=0, num_labels=1)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "judge")
    tokenizer = AutoTokenizer.from_pretrained(TINY.path)
    tokenizer.save_pretrained(tmp_path / "judge")
    judged = RewardConfig(model=LearnedRewardConfig(path=str(tmp_path / "judge")))
    check_rl(dataclasses.replace(episodes, reward=judged), dry=dry)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(tmp_path / "judge")
    with pytest.raises(ModelError, match=r"reward\.model\.path \(.*judge\) has other tokens or another chat template"):
        check_rl(dataclasses.replace(episodes, reward=judged), dry=dry)


@pytest.mark.parametrize("dry", [False, True])
def test_the_tokenizer_of_the_actor_is_loaded_once(episodes, monkeypatch, dry):
    loaded = []
    monkeypatch.setattr(checks, "load_tokenizer", lambda config: loaded.append(config) or load_tokenizer(config))
    check_rl(episodes, dry=dry)
    assert loaded == [episodes.model]


def test_history_may_be_kept(guess):
    assert checked(guess, family("qwen3"), name=f"{guess}:Guess", history="keep").format is None


def test_another_engine_is_refused(guess):
    environment = checked(guess, name=f"{guess}:Guess")
    engine = ScriptedEngine(lambda row, number: ([], [], True))
    with pytest.raises(ModelError, match="environment needs the engine of llmrl, and ScriptedEngine was handed over"):
        with_turns(engine, environment, PromptDataConfig(path="rows.jsonl"), family("qwen2_5"), context_of())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"environment": None}, "there is nothing to learn from"),
        (
            {"rollout": RolloutConfig(engine="transformers")},
            r"rollout\.engine \(transformers\) samples responses of one",
        ),
        (
            {"environment": EnvironmentConfig(name="a.py:A", max_turn_tokens=999)},
            r"environment\.max_turn_tokens \(999\) must be at most rollout\.max_response_tokens \(90\)",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(episodes, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(episodes, **changes)


def test_credit_by_turn_needs_turns(config):
    with pytest.raises(ValueError, match=r"algorithm\.credit turn compares turns"):
        dataclasses.replace(config, algorithm=dataclasses.replace(config.algorithm, credit="turn"))
    assert isinstance(config, GRPORun)
