"""The model card: what it says, and what it must not."""

import math

import pytest
from huggingface_hub import ModelCard

from llmrl.reports.model_card import CardFacts, Data, evenly_spaced, model_card, public, sparkline
from llmrl.secrets import MASK

SECRET = "hf_" + "q" * 24
HOME = "/" + "home/someone"
LINES = [
    (0, {"eval/accuracy": 0.25, "eval/accuracy_low": 0.2, "eval/accuracy_high": 0.3}),
    *[(n, {"score/mean": n / 10, "kl/sequence": n / 100, "actor/grad_norm": 1.0}) for n in range(1, 30)],
    (30, {"score/mean": 3.0, "kl/sequence": 0.375}),
]
LINES[-1][1].update({"eval/accuracy": 0.5, "eval/accuracy_low": 0.4, "eval/accuracy_high": 0.6})


def facts(**changes) -> CardFacts:
    known = {
        "command": "grpo",
        "base_model": "owner/model",
        "data": [Data(section="data", path="owner/rows", num_rows=7000, digest="0123456789abcdef" * 4)],
        "rewards": [f"{HOME}/rules.py:right, weight 1"],
        "environment": [],
        "changed": {"optimizer.learning_rate": 1e-5, "data.path": f"{HOME}/private/train.jsonl"},
        "versions": {"llmrl": "0.1.0", "torch": "2.10", "deepspeed": None},
    }
    return CardFacts(**(known | changes))


def test_the_hub_reads_its_header():
    header = ModelCard(model_card(facts(), LINES)).data.to_dict()
    assert header == {
        "library_name": "transformers",
        "tags": ["llmrl", "grpo"],
        "pipeline_tag": "text-generation",
        "base_model": "owner/model",
        "datasets": ["owner/rows"],
    }


def test_the_header_names_no_folder():
    data = [Data(section="data", path=f"{HOME}/rows.jsonl", num_rows=1, digest=None)]
    header = ModelCard(model_card(facts(base_model=f"{HOME}/run/final", data=data), LINES)).data.to_dict()
    assert "base_model" not in header
    assert "datasets" not in header


@pytest.mark.parametrize(("command", "task"), [("reward-model", "text-classification"), ("critic", None)])
def test_the_task_is_that_of_the_model(command, task):
    assert ModelCard(model_card(facts(command=command), LINES)).data.to_dict().get("pipeline_tag") == task


def test_what_answered_the_actor_is_named_without_its_folder():
    assert "## Environment" not in model_card(facts(), LINES)
    card = model_card(facts(environment=[f"{HOME}/games/guess.py:Guess, which answers each turn"]), LINES)
    assert "## Environment\n\n* guess.py:Guess, which answers each turn\n" in card
    assert HOME not in card


def test_it_says_what_was_measured():
    card = model_card(facts(), LINES)
    assert "| accuracy | 0.25 [0.2, 0.3] | 0.5 [0.4, 0.6] |" in card
    assert "|  | after iteration 0 | after iteration 30 |" in card
    assert "KL to the model that it began as: 0.375 nats per response" in card
    assert "| 1 | 0.1 | 0.01 |" in card
    assert "| 30 | 3 | 0.375 |" in card
    assert "| data | `owner/rows` | 7,000 | 0123456789abcdef |" in card
    assert "| `optimizer.learning_rate` | `1e-05` |" in card
    assert "llmrl 0.1.0, torch 2.10" in card
    assert "deepspeed" not in card


def test_a_reference_that_moves_is_not_what_the_model_began_as():
    card = model_card(facts(changed={"algorithm.reference_refresh_every": 10}), LINES)
    assert "KL to the reference, which moves: 0.375 nats per response" in card


def test_what_is_not_known_has_no_section():
    card = model_card(facts(rewards=[], changed={}), [])
    for title in ("Reward", "Held-out result", "Learning curve", "Settings"):
        assert f"## {title}" not in card


def test_it_holds_nothing_of_the_machine_and_no_secret():
    changed = {
        "model.path": f"{HOME}/models/base",
        "data.path": "~/corpora/rows.jsonl",
        "data.system_prompt": f"Read {HOME}/notes.txt and/or ask",
        "reward.functions": [{"name": f"{HOME}/rules.py:right", "arguments": {"url": f"{HOME}/x", "api_key": SECRET}}],
        "algorithm.name": f"{HOME}/mine.py:Mine",
        "data.subset": f"token {SECRET}",
    }
    card = model_card(facts(base_model=f"{HOME}/models/base", changed=changed), LINES)
    assert "someone" not in card
    assert "corpora" not in card
    assert SECRET not in card
    assert MASK in card
    assert "rules.py:right" in card
    assert "Read notes.txt and/or ask" in card


def test_a_table_stays_one():
    card = model_card(facts(changed={"data.system_prompt": "a|b`c\nd"}), LINES)
    assert "| `data.system_prompt` | `a\\|b'c d` |" in card


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (f"{HOME}/a b/c", "c"),
        (f"{HOME}/a b/rules.py:right, weight 1", "rules.py:right, weight 1"),
        ("~/a b/c", "c"),
        ("owner/name", "owner/name"),
        ("./runs/x/", "x"),
        ("a/b/c.yaml", "c.yaml"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        (f"file://{HOME}/a", "a"),
        (f"Read file://{HOME}/a, (../b/c), `~/d` and\n{HOME}/e.", "Read a, (c), `d` and\ne."),
        ("/no_think You are good at 1/2.", "/no_think You are good at 1/2."),
        ("/no_think", "/no_think"),
        ("是/" + "不" * 300, "是/" + "不" * 300),
        ("/no_" + "x" * 300 + " and/or", "/no_" + "x" * 300 + " and/or"),
        ("think and/or/else: </think>, https://x.org/a/b", "think and/or/else: </think>, https://x.org/a/b"),
        ([f"{HOME}/a", 3, None], ["a", 3, None]),
        ({f"{HOME}/a": "b"}, {"a": "b"}),
    ],
)
def test_of_a_path_the_last_name_is_left(value, shown):
    assert public(value) == shown


def test_a_curve_in_a_line():
    assert sparkline([0.0, 3.5, 7.0]) == "▁▅█"
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([0.0, math.nan, 7.0]) == "▁ █"
    assert len(sparkline([float(n) for n in range(1000)])) == 60


@pytest.mark.parametrize("count", [1, 2, 10, 11, 12, 999])
def test_few_of_many_with_both_ends(count):
    chosen = evenly_spaced(count, 11)
    assert (chosen[0], chosen[-1]) == (0, count - 1)
    assert len(chosen) == min(count, 11)
    assert sorted(set(chosen)) == chosen


def test_the_model_of_a_run_has_the_name_of_the_run(tmp_path):
    run = tmp_path / "quickstart" / "sft"
    (run / "final").mkdir(parents=True)
    assert "\n# final, after `llmrl grpo`\n" in model_card(facts(base_model=str(run / "final")), LINES)
    (run / "metrics.jsonl").touch()
    card = model_card(facts(base_model=str(run / "final")), LINES)
    assert "\n# sft/final, after `llmrl grpo`\n" in card
    assert "from `sft/final`." in card
    assert "quickstart" not in card
