"""The catalogue of metrics against what runs log: the golden runs as stored, and eight that bring what those lack."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from llmrl.catalogue import CATALOGUE, OWN, find, reserved
from llmrl.environments.calls import ToolCall
from llmrl.reports.progress import HEADLINES, PARTS
from tests.golden.runs import (
    GRPO,
    PAIRS,
    PPO,
    ROOT,
    RULES,
    RUNS,
    VOCABULARY,
    make_data,
    make_models,
    read_metrics,
    stored,
    train,
)

FLAKY = {"name": f"{RULES}:flaky", "weight": 0.0, "on_error": "exclude"}
TWO_REWARDS = {"reward": {"functions": [FLAKY, {"name": f"{RULES}:graded"}, {"name": f"{RULES}:odd"}]}}
EXTREME = {"reward": {"functions": [FLAKY, {"name": f"{RULES}:graded"}, {"name": f"{RULES}:huge"}]}}
SAMPLED = {"evaluation": {"every": 2, "num_responses": 2, "pass_at": [1, 2]}}
MOVING = {"kl_coef": 0.1, "reference_refresh_every": 2}
PHASIC = {"auxiliary_every": 1, "auxiliary_epochs": 2}
PLAYED = {
    "environment": {"name": "GAME:Game", "tools": ["GAME:add"], "tool_format": "hermes", "max_turns": 3},
    "rollout": {"prompts_per_iteration": 8, "max_response_tokens": 60},
    "data": {"path": "ROWS", "max_prompt_tokens": 32},
}
IMPLICIT = {"critic": {"network": "mtp"}}
TIMED = (
    ("sft", "llama", {"sft": PAIRS}),
    ("reward-model", "llama", {"reward_model": PAIRS}),
    ("critic", "llama", {"critic": PAIRS}),
    ("grpo", "chat", {**GRPO, **EXTREME, **SAMPLED, **PLAYED, "algorithm": {"group_size": 4, **MOVING}}),
    ("ppo", "chat", {**PPO, **EXTREME, **SAMPLED, **PLAYED, "algorithm": {"step_kl_target": 0.1, **MOVING, **PHASIC}}),
    (OWN, "chat", {**GRPO, **TWO_REWARDS, **SAMPLED, **PLAYED, "algorithm": {"name": "SILENT", **MOVING}}),
    ("grpo", "mixture", {**GRPO, "algorithm": {"group_size": 4}}),
    ("ppo", "mixture", {**PPO, **IMPLICIT}),
)
"""Kind of run, model and sections: what logs times and speed, parts and pass@k of an evaluation, the KL of an
iteration, turns, auxiliary phases, what an implicit critic logs, and the experts of a mixture."""
SILENT = """
from llmrl.algorithms.grpo import GRPO
from llmrl.metrics import Metrics

class Silent(GRPO):
    def experience(self, rollout, scores):
        return super().experience(rollout, scores)[0], Metrics()

    def losses(self, batch, weights):
        for module, loss, _ in super().losses(batch, weights):
            yield module, loss, Metrics()
"""
"""An algorithm that logs nothing: all that its run logs comes from the loop."""

GAME = """
import llmrl

class Game(llmrl.Environment):
    def start(self, row):
        return row["prompt"]

    def respond(self, message):
        assert "7" not in message.text
        return llmrl.Turn("next", reward=len(message.text) / 10)

def add(number: int) -> int:
    \"\"\"Adds one.

    Args:
        number: Any.
    \"\"\"
    return number + 1
"""
TEMPLATE = """\
{%- for message in messages %}{{ message.role[0] + message.content }}
{%- if message.role == "assistant" %}{{ eos_token }}{% endif %}{% endfor %}{{ "a" if add_generation_prompt else "" }}"""


def some_calls(text: str, *_: object, **__: object) -> tuple[list[ToolCall], str]:
    """A call for messages with a 1, a bad one for those with a 2."""
    calls = [ToolCall("add", {"number": value}) for mark, value in (("1", 1), ("2", "?")) if mark in text]
    return calls, text


Logged = set[tuple[str, str]]
"""Pairs of a kind of run and a name."""


def make_mixture(folder: Path) -> None:
    """A tiny mixture of experts with random weights."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2}
    special = {
        "moe_intermediate_size": 8,
        "vocab_size": VOCABULARY,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "initializer_range": 0.3,
    }
    torch.manual_seed(0)
    shutil.copytree(folder / "llama", folder / "mixture")
    AutoModelForCausalLM.from_config(Qwen3MoeConfig(**sizes, **heads, **special)).save_pretrained(folder / "mixture")


def make_chat(folder: Path) -> None:
    """The tiny Llama with a chat template."""
    shutil.copytree(folder / "llama", folder / "chat")
    (folder / "chat" / "chat_template.jinja").write_text(TEMPLATE)


@pytest.fixture(scope="module")
def logged(tmp_path_factory) -> Logged:
    folder = tmp_path_factory.mktemp("catalogue")
    lines = [(RUNS[name][0], line) for name in RUNS for line in stored(name)["metrics"]]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        make_models(folder)
        make_data(folder)
        (folder / "silent.py").write_text(SILENT)
        (folder / "game.py").write_text(GAME)
        make_chat(folder)
        make_mixture(folder)
        patch.setattr("llmrl.wiring.environments.parse_calls", some_calls)
        for number, (kind, model, sections) in enumerate(TIMED):
            text = json.dumps(sections).replace("SILENT", f"{folder / 'silent.py'}:Silent")
            placed = json.loads(
                text.replace("GAME", str(folder / "game.py")).replace("ROWS", str(folder / "rows.jsonl"))
            )
            output = folder / f"{kind}_{number}"
            train("grpo" if kind == OWN else kind, model, placed, folder, output=output)
            lines += [(kind, line) for line in read_metrics(output)]
    return {(kind, name) for kind, line in lines for name in line if name != "iteration"}


def test_every_logged_name_is_in_the_catalogue(logged: Logged):
    for kind, name in sorted(logged):
        metric = find(name)
        assert metric is not None, f"{kind} logs {name}"
        assert kind in metric.runs, f"{kind} logs {name}"


def test_every_entry_is_logged_by_the_runs_that_it_names(logged: Logged):
    entries = {(kind, metric.name) for kind, name in logged if (metric := find(name))}
    assert {(kind, metric.name) for metric in CATALOGUE for kind in metric.runs} - entries == set()


def test_headlines_are_in_the_catalogue():
    assert [name for name in HEADLINES if name != PARTS and find(name) is None] == []


def test_no_name_stands_twice():
    names = [metric.name for metric in CATALOGUE]
    assert len(names) == len(set(names))


def test_what_a_clock_says_ends_in_s():
    for metric in CATALOGUE:
        assert metric.name.endswith("_s") == (metric.unit in ("seconds", "tokens per second")), metric.name


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("score/mean", "score/mean"),
        ("score/correct", "score/<part>"),
        ("score/rules/mine.py:mean", "score/<part>"),
        ("eval/score", "eval/score"),
        ("eval/score/mean", "eval/score/<part>"),
        ("eval/pass_at_16", "eval/pass_at_<k>"),
        ("eval/pass_at_16_low", "eval/pass_at_<k>_low"),
        ("critic/grad_norm", "<module>/grad_norm"),
    ],
)
def test_a_logged_name_belongs_to_one_entry(name: str, entry: str):
    metric = find(name)
    assert metric is not None
    assert metric.name == entry


@pytest.mark.parametrize("name", ["", "score", "score/", "eval/pass_at_k", "policy/grad_norm", "eval/accuracy2"])
def test_other_names_belong_to_none(name: str):
    assert find(name) is None


def test_no_part_of_a_score_can_be_another_metric():
    assert reserved("score/<part>") == {"mean", "std", "unscored", "extreme", "extreme_size", "overlong_penalty"}
    assert reserved("eval/score/<part>") == set()


def test_it_loads_no_library():
    code = "import sys, llmrl.catalogue; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_page_is_up_to_date():
    spec = importlib.util.spec_from_file_location("metrics_page", ROOT / "docs" / "metrics.py")
    assert spec is not None
    assert spec.loader is not None
    docs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(docs)
    assert docs.PAGE.read_text() == docs.page(), "make docs writes it"
    assert max(map(len, docs.page().splitlines())) <= 120
