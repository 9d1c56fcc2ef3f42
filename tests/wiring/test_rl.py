"""What building wires together, beyond what the whole runs of test_cli.py show."""

import copy
import dataclasses
import shutil
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config

from llmrl.data.config import PromptDataConfig
from llmrl.models.config import LoraSettings, ModelConfig
from llmrl.models.folders import ModelError
from llmrl.models.packing import packs
from llmrl.reports.progress import Silent
from llmrl.rewards.config import RewardConfig, RewardFunctionConfig
from llmrl.rollout.native import NativeEngine
from llmrl.rollout.support import RolloutError
from llmrl.rollout.transformers import TransformersEngine
from llmrl.trainers.checkpoint import join_state, split_state
from llmrl.trainers.config import EvaluationConfig, UpdateConfig
from llmrl.wiring.checks import check_rl
from llmrl.wiring.rl import build_evaluator, build_grpo
from tests.contexts import context_of

from .conftest import ROOT, TINY, build_run, roles_of


def test_rows_that_are_too_long_are_told(config):
    _, messages = build_run(config)
    assert messages == ["data: dropped 1 row longer than data.max_prompt_tokens: line 4"]


def test_the_probe_of_sampling_belongs_to_a_phase(config, monkeypatch):
    """A large model takes a while there. It is still the start, whose memory has its own ways out."""
    begun = []
    monkeypatch.setattr(Silent, "phase", lambda _, name, total: begun.append((name, total)))
    seen = []
    monkeypatch.setattr("llmrl.wiring.rl.check_sampling", lambda *_: seen.extend(begun))
    roles = {**roles_of(config), "context": context_of()}
    build_grpo(config, check_rl(config, dry=False), **roles)
    assert seen == [("start", 1)]


def test_what_is_seldom_meant_is_told(config):
    algorithm = dataclasses.replace(config.algorithm, kl_coef=0.1)
    _, messages = build_run(dataclasses.replace(config, algorithm=algorithm))
    assert any("gives it one price" in message for message in messages)


def test_the_schedule_ends_with_the_run(config):
    optimizer = dataclasses.replace(config.optimizer, schedule="linear", learning_rate=1.0)
    run, _ = build_run(dataclasses.replace(config, optimizer=optimizer))
    trained = run.trainer.trained["actor"]
    num_steps = 3 * 2 * (16 * 8 // 32)
    trained.num_steps_done = num_steps - 1
    assert trained.learning_rate == pytest.approx(1 / num_steps)


def test_one_temperature_for_sampling_and_for_log_probabilities(config):
    run, _ = build_run(config)
    assert run.trainer.sampling.temperature == 0.5
    assert run.trainer.trained["actor"].module.temperature == 0.5
    run.prepare()
    assert run.trainer.iterate().values()["policy/rollout_gap"] < 1e-5


def test_rounding_is_judged_by_the_dtype_of_the_model(config):
    assert build_run(config)[0].alarms.gap_limit == 0.01
    half = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="bfloat16"))
    assert build_run(half)[0].alarms.gap_limit == 0.1


def test_no_kl_no_reference(config):
    assert build_run(config)[0].trainer.algorithm.reference is None


def test_a_nat_that_has_a_price_is_counted_from_a_reference(config):
    """The actor as it was loaded, at its temperature."""
    algorithm = dataclasses.replace(config.algorithm, kl_coef=0.1, scale="none")
    run, _ = build_run(dataclasses.replace(config, algorithm=algorithm))
    reference, actor = run.trainer.algorithm.reference.policy.module, run.trainer.trained["actor"].module
    assert reference.temperature == actor.temperature == 0.5
    assert not any(p.requires_grad for p in reference.parameters())
    for ours, theirs in zip(reference.parameters(), actor.parameters(), strict=True):
        assert ours is not theirs
        assert torch.equal(ours, theirs)


def test_an_adapted_model_measures_its_kl_at_no_price(config):
    """There the reference takes no memory."""
    adapted = dataclasses.replace(config, model=dataclasses.replace(config.model, lora=LoraSettings(rank=2)))
    run, _ = build_run(adapted)
    Path(config.run.output_dir).mkdir()
    assert run.trainer.iterate().values()["kl/sequence"] == pytest.approx(0.0, abs=1e-5)
    trained = run.trainer.trained["actor"]
    with torch.no_grad():
        for p in trained.parameters.values():
            p.add_(0.1)
    run.trainer.engine.load_weights(trained)
    assert abs(run.trainer.iterate().values()["kl/mean"]) > 1e-3


MOVING = {
    "copy": {"reference_refresh_every": 2},
    "average": {"reference_refresh_every": 1, "reference_mixing": 0.25},
}


def moving(config, settings, **model):
    """These settings with a reference that moves."""
    algorithm = dataclasses.replace(config.algorithm, kl_coef=0.1, scale="none", **settings)
    optimizer = dataclasses.replace(config.optimizer, learning_rate=1e-2)
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, **model), algorithm=algorithm, optimizer=optimizer
    )


def learned(config, num_iterations, state=None):
    """A trainer after some iterations from a state, with their metrics, in a folder of its own."""
    folder = Path(tempfile.mkdtemp(dir=Path(config.run.output_dir).parent))
    trainer = build_run(dataclasses.replace(config, run=dataclasses.replace(config.run, output_dir=str(folder))))[
        0
    ].trainer
    if state is not None:
        trainer.load_state_dict(state)
    return trainer, [trainer.iterate().values() for _ in range(num_iterations)]


@pytest.mark.parametrize(
    ("settings", "model"),
    [
        ("copy", {}),
        ("copy", {"dtype": "bfloat16"}),
        ("copy", {"lora": LoraSettings(rank=2)}),
        ("average", {}),
        ("average", {"dtype": "bfloat16"}),
    ],
)
def test_a_reference_that_moves_goes_on_where_it_stood(config, settings, model):
    """Four iterations, and two that are saved and two after them: weights, reference and metrics to the bit."""
    config = moving(config, MOVING[settings], **model)
    straight, told = learned(config, 4)
    half, _ = learned(config, 2)
    saved = join_state(*copy.deepcopy(split_state(half.state_dict())))
    resumed, rest = learned(config, 2, saved)
    now, before = (split_state(trainer.state_dict())[0] for trainer in (resumed, straight))
    assert any(name.startswith("reference/") for name in now)
    assert now.keys() == before.keys()
    assert all(torch.equal(weight, before[name]) for name, weight in now.items())
    for ours, theirs in zip(rest, told[2:], strict=True):
        assert all(value == theirs[name] for name, value in ours.items() if not name.endswith("_s"))
    every = config.algorithm.reference_refresh_every
    assert [each["reference/moved"] for each in told] == [float(n % every == 0) for n in range(1, 5)]


@pytest.mark.parametrize("model", [{}, {"lora": LoraSettings(rank=2)}], ids=["full", "lora"])
def test_the_kl_is_measured_from_where_the_reference_moved(config, model):
    config = moving(config, MOVING["copy"], **model)
    _, told = learned(config, 3)
    first, second, third = (each["kl/sequence"] for each in told)
    assert first == pytest.approx(0.0, abs=1e-5)
    assert abs(second) > 1e-3
    assert third == pytest.approx(0.0, abs=1e-5)  # the actor has just been copied


def test_rewards_are_compared_one_by_one_where_that_is_asked_for(config):
    rules = (
        *config.reward.functions,
        RewardFunctionConfig(name=f"{ROOT}/recipes/algorithms/digits.py:digits", weight=0.5),
    )
    summed, standardized = (
        dataclasses.replace(config, reward=RewardConfig(functions=rules, combine=combine))
        for combine in ("sum", "standardized")
    )
    assert build_run(summed)[0].trainer.algorithm.reward_weights is None
    trainer, (values,) = learned(standardized, 1)
    assert trainer.algorithm.reward_weights == {"correct": 1.0, "digits": 0.5}
    assert values["advantage/std"] > 0


def test_adapters_are_not_averaged(config):
    adapted = moving(config, MOVING["average"], lora=LoraSettings(rank=2))
    with pytest.raises(ModelError, match=r"algorithm\.reference_mixing \(0\.25\) averages weights, .* set it to 1"):
        check_rl(adapted, dry=True)


@pytest.mark.parametrize(("name", "engine"), [("native", NativeEngine), ("transformers", TransformersEngine)])
def test_the_engine_is_the_one_named(config, name, engine):
    rollout = dataclasses.replace(config.rollout, engine=name)
    assert type(build_run(dataclasses.replace(config, rollout=rollout))[0].trainer.engine.engine) is engine


@pytest.mark.parametrize("engine", ["native", "transformers"])
def test_a_resumed_run_samples_from_the_weights_that_it_loaded(config, engine):
    """In bfloat16 the engine holds a copy of them."""
    settings = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, dtype="bfloat16"),
        rollout=dataclasses.replace(config.rollout, engine=engine),
    )
    first, resumed = (build_run(settings)[0].trainer for _ in range(2))
    Path(config.run.output_dir).mkdir()
    first.iterate()
    resumed.load_state_dict(first.state_dict())
    assert next(resumed.engine.engine.weights.fresh().parameters()).dtype == torch.bfloat16
    for ours, theirs in zip(*(t.engine.engine.weights.fresh().parameters() for t in (resumed, first)), strict=True):
        assert torch.equal(ours, theirs)
    resumed.iterate()


@pytest.fixture
def positions(tmp_path):
    """The settings of a model with so many absolute positions."""

    def make(number):
        folder = tmp_path / f"{number}_positions"
        shutil.copytree(TINY.path, folder)
        sizes = {"n_embd": 8, "n_layer": 1, "n_head": 1, "vocab_size": 99}
        GPT2Config(n_positions=number, bos_token_id=0, eos_token_id=0, **sizes).save_pretrained(folder)
        return ModelConfig(path=str(folder), from_scratch=True)

    return make


def test_prompts_that_leave_no_room_are_refused_before_the_first_rollout(config, positions, tmp_path):
    """Of 4 tokens, and held-out ones of 6; the responses may have 13."""
    config = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, max_response_tokens=13))
    (tmp_path / "test.csv").write_text("prompt,answer\n1+1=,2\n10+10=,20\n")
    held_out = PromptDataConfig(path=str(tmp_path / "test.csv"))
    with pytest.raises(RolloutError, match=r"with a prompt of 4 tokens exceeds the 16 positions"):
        build_run(dataclasses.replace(config, model=positions(16)))
    run, _ = build_run(dataclasses.replace(config, model=positions(17)))
    assert run.trainer.prompts.state_dict()["position"] == 0
    measured = dataclasses.replace(
        config, model=positions(18), evaluation_data=held_out, evaluation=EvaluationConfig(every=1)
    )
    with pytest.raises(RolloutError, match=r"with a prompt of 6 tokens exceeds the 18 positions"):
        build_run(measured)
    with pytest.raises(RolloutError, match=r"with a prompt of 6 tokens exceeds the 18 positions"):
        build_evaluator(measured, check_rl(measured, dry=False), context_of())


def test_a_column_of_a_later_row_reaches_the_reward(config, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1"}\n{"prompt": "2", "level": 3}\n')
    (tmp_path / "rule.py").write_text(
        "def hard(responses, level=()):\n    assert set(level) <= {None, 3} and len(level) == len(responses)\n"
        "    return [0.0 if x is None else 1.0 for x in level]\n"
    )
    run, _ = build_run(
        dataclasses.replace(
            config,
            data=dataclasses.replace(config.data, path=str(tmp_path / "rows.jsonl")),
            reward=RewardConfig(functions=(RewardFunctionConfig(name=f"{tmp_path}/rule.py:hard"),)),
        )
    )
    run.prepare()
    assert run.trainer.iterate().values()["score/mean"] == 0.5


# --- what of the recipe reaches which part ----------------------------------------------------------------------------


def with_held_out(config, tmp_path, *, settings=None, **evaluation):
    """The run with an evaluation before and after each iteration."""
    (tmp_path / "test.csv").write_text("question,answer\n1+1=,2\n3+4=,7\n")
    held_out = PromptDataConfig(path=str(tmp_path / "test.csv"), prompt_column="question", **settings or {})
    return dataclasses.replace(
        config, evaluation_data=held_out, evaluation=EvaluationConfig(**({"every": 1} | evaluation))
    )


def with_run(config, **changes):
    return dataclasses.replace(config, run=dataclasses.replace(config.run, **changes))


def with_rollout(config, **changes):
    return dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, **changes))


def test_the_order_of_the_data_comes_from_the_seed(config, tmp_path):
    rows = "".join(f"{a}+{b}=,{a + b}\n" for a in range(6) for b in range(6))
    (tmp_path / "train.csv").write_text("prompt,answer\n" + rows)

    def order(seed):
        run, _ = build_run(with_run(config, seed=seed))
        return [row["prompt"] for row in run.trainer.prompts.next(36).rows]

    assert order(3) == order(3)
    assert order(3) != order(4)
    assert sorted(order(3)) == sorted(order(4))


def test_what_is_sampled_comes_from_the_seed(config, tmp_path):
    settings = with_held_out(config, tmp_path, num_responses=2)
    for seed in (3, 4):
        run, _ = build_run(with_run(settings, seed=seed))
        assert run.trainer.seed == seed
        assert run.evaluate.__self__.sampling.seed == seed
    first, second = (build_evaluator(s, check_rl(s, dry=False), context_of()) for s in (settings, settings))
    assert first.evaluate() == second.evaluate()


@pytest.mark.parametrize("alone", [False, True], ids=["in training", "alone"])
def test_an_evaluation_is_what_the_recipe_asks_for(config, tmp_path, alone):
    settings = with_held_out(config, tmp_path, num_responses=6, temperature=0.3, pass_at=(2,))
    settings = with_rollout(settings, max_response_tokens=17)
    if alone:
        evaluator = build_evaluator(settings, check_rl(settings, dry=False), context_of())
    else:
        evaluator = build_run(settings)[0].evaluate.__self__
    sampling = evaluator.sampling
    assert (sampling.max_response_tokens, sampling.temperature, sampling.num_responses) == (17, 0.3, 6)
    assert evaluator.config.pass_at == (2,)
    assert [row["question"] for row in evaluator.prompts.rows] == ["1+1=", "3+4="]


def test_an_evaluation_reads_its_own_columns_and_its_own_system_prompt(config, tmp_path):
    """The prompt is in another column than that of the data, and the reward is told of it by that."""
    (tmp_path / "rule.py").write_text(
        "def knows_its_prompt(prompts, responses):\n    return [float('+' in prompt) for prompt in prompts]\n"
    )
    rule = RewardConfig(functions=(RewardFunctionConfig(name=f"{tmp_path}/rule.py:knows_its_prompt"),))
    settings = dataclasses.replace(with_held_out(config, tmp_path, settings={"max_prompt_tokens": 9}), reward=rule)
    assert build_run(settings)[0].evaluate()["eval/accuracy"] == 1.0
    evaluator = build_evaluator(settings, check_rl(settings, dry=False), context_of())
    assert evaluator.evaluate()["eval/accuracy"] == 1.0
    assert evaluator.reward.reward.prompt_column == "question"


def test_what_is_correct_is_said_by_the_first_reward(config, tmp_path):
    (tmp_path / "rules.py").write_text(
        "def right(responses):\n    return [1.0] * len(responses)\n\n\n"
        "def wrong(responses):\n    return [0.0] * len(responses)\n"
    )
    names = [RewardFunctionConfig(name=f"{tmp_path}/rules.py:{name}") for name in ("right", "wrong")]
    for functions, expected in ((names, 1.0), (names[::-1], 0.0)):
        settings = dataclasses.replace(with_held_out(config, tmp_path), reward=RewardConfig(functions=tuple(functions)))
        assert build_run(settings)[0].evaluate()["eval/accuracy"] == expected


def test_the_loop_is_what_the_recipe_asks_for(config, tmp_path):
    algorithm = dataclasses.replace(config.algorithm, group_size=4, overlong_buffer_tokens=2)
    update = dataclasses.replace(config.update, minibatch_size=16, num_epochs=3, microbatch_tokens=77)
    settings = dataclasses.replace(with_held_out(config, tmp_path, every=2), algorithm=algorithm, update=update)
    settings = with_run(with_rollout(settings, prompts_per_iteration=8, max_rows=11), samples_per_iteration=1)
    run, _ = build_run(settings)
    trainer = run.trainer
    assert (trainer.prompts_per_iteration, trainer.group_size, trainer.config) == (8, 4, update)
    assert (trainer.engine.engine.max_rows, run.evaluate_every, trainer.observe.num_samples) == (11, 2, 1)
    assert trainer.algorithm.max_response_tokens == 3
    assert trainer.microbatcher.budget.max_tokens == trainer.algorithm.actor.microbatcher.budget.max_tokens == 77
    assert trainer.algorithm.config == algorithm


def test_the_actor_samples_and_is_saved_in_the_arithmetic_of_the_recipe(config, tmp_path):
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        model = dataclasses.replace(config.model, dtype=name)
        run, _ = build_run(with_run(dataclasses.replace(config, model=model), output_dir=str(tmp_path / name)))
        assert {p.dtype for p in run.trainer.engine.engine.weights.fresh().parameters()} == {dtype}
        run.save_model(tmp_path / name / "final")
        saved = load_file(tmp_path / name / "final" / "model.safetensors")
        assert {weight.dtype for weight in saved.values()} == {dtype}


@pytest.mark.parametrize("section", ["data", "evaluation_data"])
def test_a_prompt_with_a_token_that_has_no_embedding_is_refused(config, one_token_more, tmp_path, section):
    (tmp_path / "more.csv").write_text("prompt,answer\n1+1=,2\n§2=,4\n")
    odd = PromptDataConfig(path=str(tmp_path / "more.csv"), max_prompt_tokens=6)
    changed = {"evaluation_data": config.data, "evaluation": EvaluationConfig(every=1), section: odd}
    with pytest.raises(ModelError, match=r"more\.csv has tokens beyond the \d+ embeddings of the model: '§'"):
        build_run(dataclasses.replace(config, model=one_token_more, **changed))


class Counted:
    """A head that counts the rows that it reads with gradient."""

    def __init__(self, head):
        self.head, self.num_rows = head, 0

    def __call__(self, model, hidden, ids, temperature):
        self.num_rows += len(hidden) * torch.is_grad_enabled()
        return self.head(model, hidden, ids, temperature)


@pytest.mark.parametrize("packing", [True, False])
def test_an_update_reads_each_prompt_of_a_group_once_and_each_response_once(config, packing):
    """In each of two epochs; the head reads the scored tokens only. In padded rows it is more, never for the head."""
    run, _ = build_run(dataclasses.replace(config, model=dataclasses.replace(config.model, packing=packing)))
    policy, seen, tokens = run.trainer.trained["actor"].module, [], []
    run.trainer.observe = lambda _, experience: seen.append(experience)
    policy.head = Counted(policy.head)
    policy.model.base_model.register_forward_pre_hook(
        lambda _, __, kwargs: tokens.append(kwargs["input_ids"].numel() * torch.is_grad_enabled()), with_kwargs=True
    )
    run.trainer.iterate()
    (experience,) = seen
    sequences, groups = experience.sequences, experience.rollout.group_ids.tolist()
    prompts = sum({group: int(n) for group, n in zip(groups, sequences.prompt_lengths, strict=True)}.values())
    once = prompts + int(sequences.response_lengths.sum())
    assert len(set(groups)) == 16
    assert sum(tokens) == 2 * once if packing else sum(tokens) >= 2 * int(sequences.num_tokens.sum()) > 2 * once
    assert policy.head.num_rows == 2 * int(sequences.response_mask.sum())


@pytest.mark.parametrize("packing", [True, False])
def test_passes_are_packed_unless_the_recipe_says_otherwise(config, packing):
    """The budget that forms microbatches is of one mind with the passes; and so is the reference."""
    algorithm = dataclasses.replace(config.algorithm, kl_coef=0.1)
    model = dataclasses.replace(config.model, packing=packing)
    run, _ = build_run(dataclasses.replace(config, model=model, algorithm=algorithm))
    reference = run.trainer.algorithm.reference
    assert run.trainer.microbatcher.budget == reference.microbatcher.budget
    assert run.trainer.microbatcher.budget.packed == packing
    for module in (run.trainer.trained["actor"].module, reference.policy.module):
        assert packs(module.model.base_model, torch.float32, torch.device("cpu")) == packing


def scoring_passes(config):
    """Numbers of passes without gradient of an iteration: of the actor, and of the reference."""
    run, _ = build_run(config)
    run.prepare()
    reference, passes = getattr(run.trainer.algorithm, "reference", None), {"actor": 0, "reference": 0}
    adapted = config.model.lora is not None

    def count(role, module, *_):
        if not torch.is_grad_enabled():
            off = adapted and any(getattr(part, "disable_adapters", False) is True for part in module.modules())
            passes["reference" if off else role] += 1

    run.trainer.trained["actor"].module.register_forward_pre_hook(partial(count, "actor"))
    if reference is not None and not adapted:
        reference.policy.module.register_forward_pre_hook(partial(count, "reference"))
    values = run.trainer.iterate().values()
    assert values["policy/entropy"] > 1
    assert values["policy/rollout_gap"] < 1e-5
    assert ("kl/mean" in values) == (reference is not None)
    return passes["actor"], passes["reference"]


ONE_STEP, TWO_STEPS = UpdateConfig(minibatch_size=128), UpdateConfig(minibatch_size=64)


@pytest.mark.parametrize(
    ("update", "algorithm", "lora", "expected"),
    [
        (ONE_STEP, {}, None, (0, 0)),
        (ONE_STEP, {"kl_coef": 0.1}, None, (0, 1)),
        (ONE_STEP, {}, LoraSettings(rank=2), (0, 1)),
        (ONE_STEP, {"ratio": "sequence", "aggregation": "sequence"}, None, (0, 0)),
        (TWO_STEPS, {}, None, (1, 0)),
        (dataclasses.replace(ONE_STEP, num_epochs=2), {"kl_coef": 0.1}, None, (1, 1)),
        (ONE_STEP, {"name": "recipes/algorithms/successes.py:Successes"}, None, (1, 0)),
        (ONE_STEP, {"name": "recipes/algorithms/reinforce.py:Reinforce"}, None, (1, 0)),
        (ONE_STEP, {"loss": "recipes/algorithms/sapo.py:sapo"}, None, (0, 0)),
        (ONE_STEP, {"loss": "policy_gradient", "baseline": "batch"}, None, (0, 0)),
        (ONE_STEP, {"kl_coef": 0.1, "kl_form": "k1_reward"}, None, (1, 1)),
    ],
)
def test_passes_before_the_update_are_those_that_something_needs(
    config, monkeypatch, update, algorithm, lora, expected
):
    """In one optimizer step per rollout the actor's is none, unless an algorithm of the user's own may read it."""
    monkeypatch.chdir(ROOT)
    settings = dataclasses.replace(
        config,
        update=update,
        algorithm=dataclasses.replace(config.algorithm, scale="none", **algorithm),
        model=dataclasses.replace(config.model, lora=lora),
    )
    assert scoring_passes(settings) == expected
