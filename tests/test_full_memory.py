"""Memory runs out at each call of an iteration: the step is exact, or there is one line.

A call is half a forward pass, of a decode step too, or half a backward pass. An undisturbed run with the budgets that
the disturbed one came to, each from the same unit of work on, is equal to the bit.
"""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from itertools import pairwise

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from llmrl.distributed.activity import HERE, FollowedProgress
from llmrl.distributed.roles import DistributedPolicy
from llmrl.memory import MemoryFull
from llmrl.microbatches import TokenBudget
from llmrl.reports.progress import Silent
from tests.contexts import context_of
from tests.processes import ROOT, TINY, environment, lines, write_recipes
from tests.test_memory import WORDINGS
from tests.trainers import test_reward_model as of_pairs
from tests.trainers import test_rl as of_rollouts
from tests.trainers import test_sft as of_examples

TOKENS = 60
STRIDE = 1 if os.environ.get("RELIABILITY") else 5
"""Calls from one that fails to the next: RELIABILITY=1 tries every one; prime to the number of wordings."""


class Said(Silent):
    """Progress that keeps what is said, and the units that are done in each phase."""

    def __init__(self):
        self.messages, self.phases = [], []

    def phase(self, name, total):
        self.phases.append([name, total, 0])

    def advance(self, amount=1):
        self.phases[-1][2] += amount

    def message(self, text):
        self.messages.append(text)


class Planted:
    """Counts calls of a model, and lets memory run out in those that a test names."""

    def __init__(self, fails):
        self.fails = fails
        self.num_calls = 0

    def in_the_middle_of(self, layer, parameter):
        layer.register_forward_pre_hook(lambda *_: self.call())
        parameter.register_hook(lambda gradient: self.call())

    def call(self):
        self.num_calls += 1
        if self.fails(self.num_calls - 1):
            error = WORDINGS[self.num_calls % len(WORDINGS)]
            raise type(error)(*error.args)


class Bench:
    """A trainer over a tiny model, and what it makes of two iterations."""

    def __init__(self, kind, fails=lambda call: False, budgets=None):
        self.planted, self.said = Planted(fails), Said()
        self.budgets = budgets
        """Those to use for each unit of work, one after another; None: those that it comes to."""
        self.used = []
        progress = FollowedProgress(self.said)
        if kind == "sft":
            self.trainer = of_examples.make_trainer(
                of_examples.RAGGED, trainable=of_examples.adamw, microbatch_tokens=TOKENS, progress=progress
            )
        elif kind == "pairs":
            self.trainer = of_pairs.make_trainer(
                of_pairs.RAGGED, trainable=of_pairs.adamw, microbatch_tokens=TOKENS, progress=progress
            )
        else:
            self.trainer = of_rollouts.make_trainer(kind, microbatch_tokens=TOKENS)
            self.trainer.progress = self.trainer.engine.progress = self.trainer.microbatcher.progress = progress
            actor = self.trainer.algorithm.actor
            budget = TokenBudget(max_tokens=TOKENS)
            self.trainer.algorithm.actor = DistributedPolicy(actor, context_of(progress=progress), budget=budget)
            self.follow(self.trainer.algorithm.actor.microbatcher, "run", "budget")
            self.follow(self.trainer.engine, "generate", "rows_that_fit")
        self.follow(self.trainer.microbatcher, "run", "budget")
        self.trained = next(iter(self.trainer.trained.values()))
        module = self.trained.module
        layer = next(part for name, part in module.named_modules() if name.endswith(".0.mlp"))
        weight = next(p for name, p in module.named_parameters() if "attn" in name and p.dim() == 2)
        self.planted.in_the_middle_of(layer, weight)

    def follow(self, owner, method, attribute):
        """Notes the size with which each unit of work succeeds, or sets it."""
        work = getattr(owner, method)

        def followed(*arguments):
            if self.budgets is not None:
                setattr(owner, attribute, self.budgets[len(self.used)])
            result = work(*arguments)
            self.used.append(getattr(owner, attribute))
            return result

        setattr(owner, method, followed)

    def outcome(self):
        """Metrics without the clock, weights and states after two iterations."""
        values = [self.trainer.iterate().values() for _ in range(2)]
        return without_clock(values), self.trained.state_dict(), self.trainer.position()


def without_clock(metrics):
    return [{name: x for name, x in values.items() if not name.endswith("_s")} for values in metrics]


KINDS = ["rotary", "absolute", "sft", "pairs"]


def num_calls(kind):
    bench = Bench(kind)
    bench.outcome()
    return bench.planted.num_calls


def check(kind, calls):
    undisturbed = {}
    for call in calls:
        bench = Bench(kind, lambda n, call=call: n == call)
        outcome = bench.outcome()
        assert bench.said.messages[0].startswith("out of memory in "), call
        assert len(bench.said.messages) == 1, call
        assert_all_is_counted_once(bench.said.phases)
        plan = tuple(bench.used)
        if plan not in undisturbed:
            quiet = Bench(kind, budgets=plan)
            undisturbed[plan] = quiet.outcome()
            assert quiet.said.messages == []
        told, state, position = undisturbed[plan]
        assert outcome[0] == told, call
        assert_close(outcome[1], state, rtol=0.0, atol=0.0)
        assert outcome[2] == position, call


def assert_all_is_counted_once(phases):
    """Where an update was begun again, its first phase may have stayed incomplete."""
    for (name, total, done), after in pairwise([*phases, [None]]):
        assert name not in ("rollout", "update") or done == total or (done < total and name == after[0] == "update")


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_exact_wherever_memory_runs_out(kind):
    """In the first rollout and the first update, and in the second ones."""
    calls = num_calls(kind)
    check(kind, range(1, calls, -(-calls // 4)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_exact_at_every_call_where_memory_runs_out(kind):
    check(kind, range(0, num_calls(kind), STRIDE))


def train_ppo(fails, budgets=None):
    """Three iterations of actor and critic, with budgets as for `Bench`. Calls lie before and after each backward."""
    trainer, planted, used = of_rollouts.make_ppo_trainer(), Planted(fails), []
    losses, run = trainer.algorithm.losses, trainer.microbatcher.run

    def planted_losses(batch, weights):
        for loss in losses(batch, weights):
            planted.call()
            yield loss
            planted.call()

    def followed(batch, work):
        if budgets is not None:
            trainer.microbatcher.budget = budgets[len(used)]
        result = run(batch, work)
        used.append(trainer.microbatcher.budget)
        return result

    trainer.algorithm.losses, trainer.microbatcher.run = planted_losses, followed
    told = [of_rollouts.told(trainer) for _ in range(3)]
    steps = {name: trained.num_steps_done for name, trained in trainer.trained.items()}
    return (told, of_rollouts.everything(trainer), steps, trainer.position()), used, planted.num_calls


def test_actor_and_critic_take_each_step_once_wherever_memory_runs_out():
    *_, calls = train_ppo(lambda n: False)
    for call in range(0, calls, 5):
        ours, used, _ = train_ppo(lambda n, call=call: n == call)
        assert used[-1].max_tokens < 8192, call
        theirs, *_ = train_ppo(lambda n: False, used)
        assert ours[0] == theirs[0], call
        assert_close(ours[1:], theirs[1:], rtol=0.0, atol=0.0)


def check_end(kind, calls):
    """Where memory has run out for good: one line, and no weight has moved unless the iteration had begun a step."""
    for call in calls:
        bench = Bench(kind, lambda n, call=call: n >= call)
        before = []

        def iterate(bench=bench, before=before):
            while True:
                before.append((copy.deepcopy(bench.trained.state_dict()), bench.trainer.position()))
                bench.trainer.iterate()

        with pytest.raises(MemoryFull) as raised:
            iterate()
        size = "(one row in a microbatch|4 responses decoded at once)"
        assert re.match(rf"out of memory in {HERE.phase} with {size} \([CG]PU.*\): [^\n]*$", str(raised.value)), call
        moved = bench.trainer.has_moved
        assert bench.trainer.rewind() != moved
        if not moved:
            assert_close((bench.trained.state_dict(), bench.trainer.position()), before[-1], rtol=0.0, atol=0.0)
            assert all(p.grad is None for p in bench.trained.parameters.values())


@pytest.mark.parametrize("kind", KINDS)
def test_no_memory_is_one_line(kind):
    calls = num_calls(kind)
    check_end(kind, range(1, calls, -(-calls // 3)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_no_memory_from_any_call_on_is_one_line(kind):
    check_end(kind, range(0, num_calls(kind), STRIDE))


# --- by a limit of the system -----------------------------------------------------------------------------------------


def train(folder, output, *settings, program):
    """What a supervised run prints whose batch takes some 500 MB in a single pass."""
    texts = [chr(ord("a") + n % 26) * (20 + n % 7) for n in range(100)]
    rows = [{"prompt": text, "response": text[:1] * (150 + n % 30)} for n, text in enumerate(texts)]
    (folder / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = subprocess.run(
        [sys.executable, *program, "sft", "sft.yaml", f"run.output_dir={output}", *settings],
        cwd=folder, env=environment() | {"MALLOC_ARENA_MAX": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


LARGE = ("data.path=long.jsonl", "sft.batch_size=100", "run.num_iterations=1", "model.packing=false")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="another system has no /proc, or grants all that is asked for")
def test_a_run_whose_memory_is_limited_goes_on_as_one_with_smaller_microbatches(tmp_path):
    write_recipes(tmp_path)
    limited = (str(ROOT / "tests" / "limited.py"), "200")
    status, output, error = train(tmp_path, "ours", *LARGE, "sft.microbatch_tokens=100000", program=limited)
    assert status == 0, error
    told = re.findall(
        r"out of memory in update with microbatches of \d+ tokens \(CPU, .*\): goes on with (\d+); ", output
    )
    assert told
    status, _, error = train(tmp_path, "plain", *LARGE, f"sft.microbatch_tokens={told[-1]}", program=("-m", "llmrl"))
    assert status == 0, error
    ours, plain = (load_file(tmp_path / run / "final" / "model.safetensors") for run in ("ours", "plain"))
    assert_close(ours, plain, rtol=0.0, atol=0.0)
    assert without_clock(lines(tmp_path / "ours" / "metrics.jsonl")) == without_clock(
        lines(tmp_path / "plain" / "metrics.jsonl")
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="another system has no /proc, or grants all that is asked for")
def test_a_run_without_memory_ends_in_a_line(tmp_path):
    """One row asks for some 70 MB. What is left must hold the checkpoint, whose writer aborts where it gets no 1 MB."""
    write_recipes(tmp_path)
    deep = shutil.copytree(TINY, tmp_path / "deep")
    config = json.loads((deep / "config.json").read_text())
    (deep / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 24}))
    limited = (str(ROOT / "tests" / "limited.py"), "24")
    status, _, error = train(
        tmp_path, "ours", *LARGE, "sft.microbatch_tokens=100000", f"model.path={deep}", program=limited
    )
    assert status == 1, error
    assert error.startswith("error: out of memory in update with one row in a microbatch (CPU, "), error
    assert "Traceback" not in error
