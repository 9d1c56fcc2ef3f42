"""A run that a program drives: left, stopped and gone on with; its model and its evaluation; the process around it."""

import json
import os
import signal
import threading
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file
from transformers.utils.logging import is_progress_bar_enabled

import llmrl
from llmrl.data.mixture import sets_of
from llmrl.distributed.stop import handlers, install, restore
from llmrl.trainers import run as trainers
from llmrl.trainers.run import Stopped
from llmrl.wiring.process import joined

from .conftest import SHORT, digits, without_times


@pytest.fixture
def make(tiny, rows, tmp_path):
    """A run of three iterations; the same call again is the same run."""

    def run(name="run", reward=None, **arguments):
        reward = reward or (lambda responses: digits(responses))
        given = {"prompts": rows, "reward": {"digits": reward}, "num_iterations": 3, "settings": SHORT, **arguments}
        return llmrl.grpo(tiny.model, tokenizer=tiny.tokenizer, output_dir=tmp_path / name, **given)

    return run


def weights(run):
    return load_file(run.folder / "final" / "model.safetensors")


def assert_same(run, other):
    assert without_times(run.metrics) == without_times(other.metrics)
    assert run.samples == other.samples
    assert all(weight.equal(weights(other)[name]) for name, weight in weights(run).items())


@pytest.fixture
def straight(make):
    run = make("straight")
    run.train()
    return run


def test_a_loop_that_was_left_goes_on_bit_for_bit(make, straight):
    run = make()
    for iteration in run:
        if iteration["iteration"] == 2:
            break
    assert [path.name for path in sorted((run.folder / "checkpoints").iterdir())] == ["step_000001", "step_000002"]
    again = make()
    assert [iteration["iteration"] for iteration in again] == [3]
    assert_same(again, straight)
    assert list(make()) == []


def test_the_same_run_goes_on_after_an_exception_of_the_loop(make, straight):
    run = make()

    def loop():
        for _ in run:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        loop()
    assert run.train()["iteration"] == 3
    assert_same(run, straight)


def test_what_comes_between_two_steps_ends_them_while_the_folder_is_locked(make, monkeypatch):
    run = make()
    held = []
    checkpoint = trainers.Run.checkpoint
    monkeypatch.setattr(trainers.Run, "checkpoint", lambda own: (held.append(run._under_way is own), checkpoint(own)))
    steps = iter(run)
    next(steps), next(steps)
    held.clear()
    with pytest.raises(KeyboardInterrupt):
        steps.throw(KeyboardInterrupt)
    assert held == [True]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_an_iteration_stops_the_run(make, straight, number, default_signals):
    """Where it comes before the first optimizer step, the iteration is done again."""
    calls = []

    def reward(responses):
        calls.append(len(responses))
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return digits(responses)

    run = make(reward=reward)
    with pytest.raises(Stopped, match="after iteration 1; the same command goes on from"):
        list(run)
    run.train()
    assert_same(run, straight)


@pytest.fixture
def interruptible():
    """Python's own handler of SIGINT, which a process that a shell has started in the background lacks."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_signal_in_the_body_is_that_of_the_program(make, straight, interruptible):
    run = make()

    def loop():
        for _ in run:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        loop()
    run.train()
    assert_same(run, straight)


def test_the_process_is_as_it_was_in_the_loop_and_after(make):
    def state():
        return (
            [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)],
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.cuda.cudnn_sdp_enabled(),
            torch.get_num_threads(),
            os.getcwd(),
            is_progress_bar_enabled(),
            torch.is_grad_enabled(),
        )

    def mask():
        mask = os.umask(0)
        os.umask(mask)
        return mask

    before = state(), mask()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    with torch.no_grad():
        before = state(), mask()
        for _ in make(num_iterations=1, settings={**SHORT, "run.deterministic": True}):
            assert (state(), mask()) == before
        assert (state(), mask()) == before
    assert torch.equal(torch.rand(3), expected)


def test_handlers_of_several_ranks_are_those_of_the_program_in_the_loop_and_after(make, monkeypatch):
    """Ranks that watch each other install handlers when they join, and restore what was there when they part."""

    @contextmanager
    def several(config):
        with joined(config) as context:
            before = install(lambda *_: None)
            yield context
            restore(before)

    monkeypatch.setattr("llmrl.api.run.joined", several)
    before = handlers()
    for _ in make(num_iterations=1):
        assert handlers() == before
    assert handlers() == before


def test_a_run_may_be_driven_outside_of_the_main_thread(make):
    done = []
    thread = threading.Thread(target=lambda: done.extend(make(num_iterations=1)))
    thread.start()
    thread.join()
    assert [iteration["iteration"] for iteration in done] == [1]


def test_the_model_is_that_of_the_last_iteration_in_a_loop_and_after(make):
    run, steps = make(num_iterations=2), []
    for _ in run:
        steps.append(run.model.state_dict())
        if len(steps) == 1:
            break
    after = make(num_iterations=2).model.state_dict()
    assert all(weight.equal(after[name]) for name, weight in steps[0].items())
    run.train()
    assert not all(weight.equal(run.model.state_dict()[name]) for name, weight in steps[0].items())
    assert type(run.model).__name__ == "LlamaForCausalLM"
    assert run.tokenizer("1+1=").input_ids


def test_a_longer_run_has_the_model_of_its_end(make):
    """final/ of the shorter one lies there still."""
    make(num_iterations=1).train()
    run = make(num_iterations=3)
    for _ in run:
        break
    old = load_file(run.folder / "final" / "model.safetensors")
    assert not all(weight.equal(old[name]) for name, weight in run.model.state_dict().items() if name in old)


def test_an_evaluation_is_paired_with_that_before_the_training(make, rows, tiny):
    run = make(settings={**SHORT, "optimizer.learning_rate": 0.02})
    run.train()
    held_out = rows[:6]
    values = run.evaluate(held_out)
    settings = {name: x for name, x in SHORT.items() if name.startswith("rollout")}
    reward = {"digits": lambda responses: digits(responses)}
    before, after = (
        llmrl.evaluate(model, tokenizer=tiny.tokenizer, prompts=held_out, reward=reward, settings=settings)
        for model in (tiny.model, run.model)
    )
    assert values["eval/score"] == after["eval/score"]
    difference = after["eval/score"] - before["eval/score"]
    assert difference != 0
    assert values["difference/score"] == pytest.approx(difference)
    assert values["difference/score_low"] < difference < values["difference/score_high"]
    assert set(values) - set(after) == {
        f"difference/{x}{y}" for x in ("score", "accuracy") for y in ("", "_low", "_high")
    }


def test_an_evaluation_is_of_its_prompts_alone_where_the_run_trains_on_a_mixture(make, rows, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps(rows[0]) + "\n")
    run = make(settings={**SHORT, "data.mixed_with": [{"path": str(other), "weight": 1.0}]})
    config = run._to_evaluate(rows[:2])
    assert sets_of(config.evaluation_data) == (config.evaluation_data,)
    assert config.evaluation_data.path != config.data.path
    assert config.data == run._config.data


def test_an_evaluation_in_the_loop_changes_nothing(make, straight, rows):
    run = make()
    for _ in run:
        run.evaluate(rows[:2])
    assert_same(run, straight)


def test_an_evaluation_without_prompts_is_refused(make, tiny, rows, tmp_path):
    with pytest.raises(llmrl.Error, match="has no prompts: hand them over"):
        make().evaluate()
    run = llmrl.sft(tiny.model, data=rows, output_dir=tmp_path / "sft", num_iterations=1, tokenizer=tiny.tokenizer)
    with pytest.raises(llmrl.Error, match="for grpo and ppo"):
        run.evaluate(rows)


def test_another_run_is_not_gone_on_with(make, rows):
    make().train()
    with pytest.raises(llmrl.Error, match="the content of data is another"):
        make(prompts=rows[1:])
    make().train()  # what it reads is still there


def test_a_reward_that_fails_ends_with_a_checkpoint(make):
    def reward(responses):
        raise KeyError("gold")

    with pytest.raises(llmrl.Error, match="reward function given:digits raised KeyError: 'gold'"):
        make(reward=reward).train()
    assert make().train()["iteration"] == 3
