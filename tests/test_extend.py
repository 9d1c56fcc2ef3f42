"""Mathematics of users by the command line: the examples of docs/extend.md run; what equals ours gives our numbers."""

import json
import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from llmrl.cli import app

ROOT = Path(__file__).parents[1]
TINY = ROOT / "recipes" / "models" / "tiny_char_llama"
PAGE = (ROOT / "docs" / "extend.md").read_text()
FILES = dict(re.findall(r"```python\n# (\S+)\n(.*?)```", PAGE, re.DOTALL))
RECIPES = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
SECTIONS = [yaml.safe_load(text)["algorithm"] for text in RECIPES[:-1]]
OURS = """
import torch
from llmrl.functional.losses import clipped_policy_loss

def mean_of_others(scores, group_ids):
    same = group_ids[:, None] == group_ids
    return ((same * scores).sum(dim=1) - scores) / (same.sum(dim=1) - 1)

def clipped(logprobs, old_logprobs, advantages, weights):
    return clipped_policy_loss(logprobs, old_logprobs, advantages, weights, clip_low=0.2, clip_high=0.2)
"""


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch, tmp_path):
    """A folder with the files of the page, data and a rule whose scores differ within groups."""
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "ours.py").write_text(OURS)
    (tmp_path / "rule.py").write_text(
        "def digits(responses): return [sum(c.isdigit() for c in r) for r in responses]\n"
    )
    rows = [{"prompt": f"{a}+{b}="} for a in range(5) for b in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def llmrl(*arguments):
    """Exit status, and what is printed."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def recipe(name, algorithm, *, num_iterations=2, **sections):
    """A recipe of a tiny model with two optimizer steps an iteration."""
    settings = {
        "model": {"path": str(TINY), "from_scratch": True},
        "data": {"path": "rows.jsonl"},
        "reward": {"functions": [{"name": "rule.py:digits"}]},
        "rollout": {"prompts_per_iteration": 8, "max_response_tokens": 4},
        "update": {"minibatch_size": 8, "microbatch_tokens": 40},
        "optimizer": {"learning_rate": 1e-2},
        "run": {"output_dir": name, "num_iterations": num_iterations},
        "algorithm": algorithm,
        **sections,
    }
    path = Path(f"{name}.yaml")
    path.write_text(yaml.safe_dump(settings))
    return path


def grpo(name, algorithm, *overrides, **sections):
    """Metrics of every iteration of a run that ends well, without times."""
    status, error = llmrl("grpo", recipe(name, {"group_size": 4, **algorithm}, **sections), *overrides)
    assert status == 0, error
    return metrics(name)


def metrics(name):
    entries = [json.loads(line) for line in Path(name, "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in entry.items() if not k.startswith(("time/", "tokens/per_s"))} for entry in entries]


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_shows_the_files_of_the_repository():
    assert (len(FILES), len(SECTIONS)) == (5, 4)
    assert {name: (ROOT / name).read_text() for name in FILES} == FILES


def test_the_recipe_of_the_page_learns():
    name, _, text = RECIPES[-1].removeprefix("# ").partition("\n")
    assert (ROOT / name).read_text() == text
    Path("mine.yaml").write_text(text)
    override = (f"model.path={TINY}", "data.path=rows.jsonl", "run.num_iterations=5", "run.output_dir=run")
    status, printed = llmrl("grpo", "mine.yaml", *override)
    assert status == 0, printed
    assert "warning" not in printed
    first, *_, last = metrics("run")
    assert last["score/mean"] > first["score/mean"] + 0.2
    assert {"policy/entropy", "policy/rollout_gap"} <= first.keys()


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: next(iter(section.values())).rpartition(":")[2])
def test_an_example_of_the_page_learns(section):
    entries = grpo("run", section)
    assert entries[-1]["iteration"] == 2
    assert entries[-1]["policy/loss"] != entries[0]["policy/loss"]
    assert entries[-1]["actor/grad_norm"] > 0
    assert json.loads(Path("run", "config.json").read_text())["settings"]["algorithm"].items() >= section.items()


# --- what equals ours -------------------------------------------------------------------------------------------------


def test_a_baseline_and_a_loss_that_equal_ours_give_our_numbers():
    theirs = {"baseline": "ours.py:mean_of_others", "loss": "ours.py:clipped", "scale": "none"}
    assert grpo("theirs", theirs) == grpo("ours", {"baseline": "leave_one_out", "scale": "none"})


def test_a_class_that_changes_nothing_gives_our_numbers():
    Path("same.py").write_text("from llmrl.algorithms.grpo import GRPO\nclass Same(GRPO):\n    pass\n")
    assert grpo("theirs", {"name": "same.py:Same"}) == grpo("ours", {})


def test_a_loss_that_equals_ours_gives_our_numbers_in_ppo():
    for name, loss in (("theirs", "ours.py:clipped"), ("ours", "clipped")):
        status, error = llmrl("ppo", recipe(name, {"loss": loss, "kl_coef": 0.0}))
        assert status == 0, error
    assert metrics("theirs") == metrics("ours")
    assert metrics("ours")[0]["policy/loss"] != 0


def test_a_run_of_a_class_with_state_resumes_as_if_it_had_not_stopped():
    name = {"name": "recipes/algorithms/reinforce.py:Reinforce"}
    whole = grpo("whole", name)
    grpo("parts", name, num_iterations=1)
    assert grpo("parts", name, "run.resume=true") == whole


# --- what is wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "override", "told"),
    [
        (
            "grpo",
            "algorithm.loss=gone.py:loss",
            r"algorithm\.loss gone\.py:loss: there is no file .*/gone\.py; a path begi",
        ),
        (
            "grpo",
            "algorithm.loss=ours.py:cliped",
            r"algorithm\.loss .*: ours\.py has no 'cliped'; did you mean 'clipped'\?",
        ),
        (
            "ppo",
            "algorithm.loss=ours.py:mean_of_others",
            r"algorithm\.loss .* takes \(scores, group_ids\) and is called wi",
        ),
        (
            "grpo",
            "algorithm.baseline=ours.py:clipped",
            r"algorithm\.baseline .* is called with \(scores, group_ids\): miss",
        ),
        (
            "grpo",
            "algorithm.baseline=mode",
            r"algorithm\.baseline \('mode'\) must be mean, .*, or name your o",
        ),
        ("grpo", "algorithm.name=ours.py:clipped", r"algorithm\.name ours\.py:clipped is <function .*; name a class"),
        (
            "grpo",
            "algorithm.name=ppo",
            r"algorithm\.name \('ppo'\) must be grpo, or name your own: path/to/file\.py:name",
        ),
    ],
)
def test_what_cannot_be_used_ends_before_a_model_loads(monkeypatch, command, override, told):
    monkeypatch.setattr("llmrl.wiring.rl.load_actor", None)
    scale = ["algorithm.scale=none"] if "baseline" in override else []
    for dry in ([], ["--dry-run"]):
        status, error = llmrl(command, recipe("run", {}), override, *scale, *dry)
        assert status == 2
        assert re.search(told, error), error
        assert len(error.splitlines()) <= 2
        assert not Path("run").exists()


def test_a_loss_that_fails_ends_the_run_with_its_line_and_a_checkpoint():
    Path("bad.py").write_text(
        "def loss(logprobs, old_logprobs, advantages, weights):\n    return weights.sum() / 0 * {}\n"
    )
    status, error = llmrl("grpo", recipe("run", {"loss": "bad.py:loss"}))
    assert status == 1
    assert re.search(r"error: algorithm\.loss bad\.py:loss raised TypeError: .* at .*/bad\.py:2\n", error), error
    assert Path("run", "checkpoints", "step_000000").is_dir()


def test_an_evaluation_needs_no_loss():
    path = recipe("run", {"loss": "gone.py:loss"}, evaluation_data={"path": "rows.jsonl", "num_rows": 3})
    assert llmrl("evaluate", path)[0] == 0


@pytest.mark.parametrize(
    ("algorithm", "file", "message"),
    [
        (
            {"name": "bad.py:Bad"},
            "from llmrl.algorithms.grpo import GRPO\n"
            "class Bad(GRPO):\n"
            "    def experience(self, rollout, scores):\n"
            "        return super().experience(rollout, scores.totals)\n",
            r"algorithm\.name bad\.py:Bad\.experience raised AttributeError: .* no attribute 'totals' at /.*bad\.py:4",
        ),
        (
            {"name": "bad.py:Bad"},
            "from llmrl.algorithms.grpo import GRPO\n"
            "class Bad(GRPO):\n"
            "    def losses(self, batch, weights):\n"
            "        for module, loss, metrics in super().losses(batch, weights):\n"
            "            yield module, loss * float('nan'), metrics\n",
            r"algorithm\.name bad\.py:Bad\.losses yielded nan as the loss; expected a finite number; .*",
        ),
        (
            {"loss": "bad.py:loss"},
            "def loss(logprobs, old_logprobs, advantages, weights):\n    return logprobs.sum() * float('nan')\n",
            r"algorithm\.loss bad\.py:loss returned nan as the loss; expected a finite number; .*",
        ),
    ],
)
def test_a_mistake_is_one_line_and_the_way_to_resume(algorithm, file, message):
    Path("bad.py").write_text(file)
    status, error = llmrl("grpo", recipe("run", algorithm))
    assert status == 1
    *_, line, hint = error.splitlines()
    assert re.fullmatch(f"error: {message}", line)
    assert hint.startswith("mend it; the same command, with run.resume=true if settings have changed, goes on from /")


def test_a_mistake_before_there_is_a_checkpoint_is_one_line():
    Path("bad.py").write_text(
        "from llmrl.algorithms.grpo import GRPO\n"
        "class Bad(GRPO):\n"
        "    def __init__(self, config, **roles):\n"
        "        self.config = config.kl\n"
    )
    status, error = llmrl("grpo", recipe("run", {"name": "bad.py:Bad"}))
    assert status == 1
    *_, line = error.splitlines()
    assert re.fullmatch(r"error: algorithm\.name bad\.py:Bad raised AttributeError: .*'kl' at /.*/bad\.py:4", line)


def test_a_setting_that_a_class_does_not_read_is_reported_after_the_first_iteration():
    algorithm = {"name": "recipes/algorithms/reinforce.py:Reinforce", "clip_low": 0.1, "aggregation": "sequence"}
    status, printed = llmrl("grpo", recipe("run", algorithm))
    assert status == 0
    assert printed.count("warning: algorithm.") == 1
    assert "algorithm.clip_low (0.1) is set, and algorithm.name recipes/algorithms/reinforce.py:Reinforce" in printed


def test_clips_that_a_loss_of_ones_own_does_not_read_are_told():
    status, error = llmrl("grpo", recipe("run", {"loss": "ours.py:clipped", "clip_high": 0.28}, num_iterations=1))
    assert status == 0
    assert "algorithm.clip_high is read only where algorithm.loss is clipped" in error
