"""What a recipe may say where two of its parts meet, and that every setting explains itself."""

import inspect
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from llmrl.algorithms.config import GRPOConfig, PPOConfig
from llmrl.algorithms.grpo import GRPO
from llmrl.algorithms.ppo import PPO
from llmrl.config import CriticRun, GRPORun, PPORun, RewardModelRun, SFTRun, command_for
from llmrl.data.config import PairsConfig, PreferenceDataConfig, PromptDataConfig, PromptsConfig, SupervisedDataConfig
from llmrl.models.config import CriticConfig, LoraSettings, ModelConfig, MTPSettings
from llmrl.optim.config import OptimizerConfig
from llmrl.reports.samples import SampleWriter
from llmrl.rewards.config import LearnedRewardConfig, RewardConfig, RewardFunctionConfig
from llmrl.rollout.config import RolloutConfig
from llmrl.settings import SettingError, describe, read_recipe, to_yaml
from llmrl.trainers.batch import BatchTrainer
from llmrl.trainers.config import (
    EvaluationConfig,
    OutputConfig,
    RewardModelConfig,
    RLRunConfig,
    RunConfig,
    SFTConfig,
    UpdateConfig,
)
from llmrl.trainers.evaluate import Evaluator
from llmrl.trainers.reward_model import RewardModelObjective
from llmrl.trainers.rl import RLTrainer
from llmrl.trainers.run import Run
from llmrl.wiring.runs import RUNS

KINDS = [kind.settings for kind in RUNS.values()]
LEARNED = RewardConfig(model=LearnedRewardConfig(path="rm"))
ON_BASE = RewardConfig(model=LearnedRewardConfig(path="rm", on_actor_base=True))
LORA = ModelConfig(path="m", lora=LoraSettings())
STANDARDIZED = RewardConfig(functions=(RewardFunctionConfig(name="rule.py:score"),), combine="standardized")


def sft(**sections: Any) -> SFTRun:
    required = {
        "model": ModelConfig(path="m"),
        "data": SupervisedDataConfig(path="d.jsonl"),
        "run": RunConfig(output_dir="runs/x", num_iterations=1),
    }
    return SFTRun(**(required | sections))


def reward_model(**sections: Any) -> RewardModelRun:
    required = {
        "model": ModelConfig(path="m"),
        "data": PreferenceDataConfig(path="d.jsonl"),
        "evaluation_data": PairsConfig(path="e.jsonl"),
        "run": OutputConfig(output_dir="runs/x"),
    }
    return RewardModelRun(**(required | sections))


def grpo(**sections: Any) -> GRPORun:
    required = {
        "model": ModelConfig(path="m"),
        "data": PromptDataConfig(path="d.jsonl"),
        "reward": RewardConfig(functions=(RewardFunctionConfig(name="rule.py:score"),)),
        "run": RLRunConfig(output_dir="runs/x", num_iterations=1),
    }
    return GRPORun(**(required | sections))


def ppo(**sections: Any) -> PPORun:
    required = {
        "model": ModelConfig(path="m"),
        "data": PromptDataConfig(path="d.jsonl"),
        "reward": LEARNED,
        "run": RLRunConfig(output_dir="runs/x", num_iterations=4),
    }
    return PPORun(**(required | sections))


# --- checks where two sections meet -----------------------------------------------------------------------------------


def test_only_runs_that_write_samples_have_a_setting_of_them():
    name = "run.samples_per_iteration"
    has = {
        kind: name in {setting.path for setting in describe(kind)} for kind in (SFTRun, RewardModelRun, GRPORun, PPORun)
    }
    assert has == {SFTRun: False, RewardModelRun: False, GRPORun: True, PPORun: True}


def test_the_defaults_fit_together():
    assert sft().evaluation_data is None
    for config in (grpo(), ppo()):
        assert config.num_responses == config.rollout.prompts_per_iteration * config.algorithm.group_size
        assert config.optimizer_steps_per_iteration >= 1


def test_an_evaluated_sft_run_needs_held_out_examples():
    with pytest.raises(ValueError, match=r"^sft\.evaluate_every \(5\) needs evaluation_data; name .* or set it to 0$"):
        sft(sft=SFTConfig(evaluate_every=5))
    sft(sft=SFTConfig(evaluate_every=5), evaluation_data=SupervisedDataConfig(path="e.jsonl"))


@pytest.mark.parametrize("metric", ["eval/accuracy", "-eval/accuracy"])
def test_the_best_reward_model_needs_evaluations(metric: str):
    best = OutputConfig(output_dir="o", best_metric=metric)
    message = (
        r"^run\.best_metric \(eval/accuracy\) is never measured: set reward_model\.evaluate_every, run\.best_metric"
    )
    with pytest.raises(ValueError, match=message):
        reward_model(run=best, reward_model=RewardModelConfig(evaluate_every=0))
    for every in (None, 5):
        reward_model(run=best, reward_model=RewardModelConfig(evaluate_every=every))
    reward_model(run=OutputConfig(output_dir="o", best_metric="pairs/accuracy"))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"update": UpdateConfig(minibatch_size=12)},
            r"update\.minibatch_size \(12\) must be a multiple of algorithm\.group_size \(8\): .*; try 8 or 16$",
        ),
        (
            {"update": UpdateConfig(minibatch_size=4)},
            r"update\.minibatch_size \(4\) must be a multiple of algorithm\.group_size \(8\): .*; try 8 or 16$",
        ),
        (
            {"update": UpdateConfig(minibatch_size=48)},
            r"update\.minibatch_size \(48\) must divide the 128 responses of a rollout \(16 prompts x 8\); "
            r"try 32 or 64$",
        ),
        (
            {"update": UpdateConfig(minibatch_size=256)},
            r"update\.minibatch_size \(256\) must divide the 128 responses of a rollout",
        ),
        (
            {"rollout": RolloutConfig(max_rows=4)},
            r"rollout\.max_rows \(4\) must hold every response to a prompt, in training \(8\) and in evaluation \(1\); "
            r"set it to at least 8$",
        ),
        (
            {"evaluation": EvaluationConfig(num_responses=100)},
            r"rollout\.max_rows \(64\) must hold .* in evaluation \(100\); set it to at least 100$",
        ),
        (
            {
                "rollout": RolloutConfig(max_response_tokens=16),
                "algorithm": GRPOConfig(overlong_buffer_tokens=17),
            },
            r"algorithm\.overlong_buffer_tokens \(17\) must be at most rollout\.max_response_tokens \(16\)$",
        ),
        (
            {"reward": STANDARDIZED, "algorithm": GRPOConfig(scale="none")},
            r"algorithm\.scale \(none\) is about the sum of rewards, and reward\.combine standardized compares each by "
            r"itself; set algorithm\.scale to std, or reward\.combine to sum$",
        ),
        *(
            ({"reward": STANDARDIZED, "algorithm": GRPOConfig(**settings)}, f"algorithm.{name} .* is about the sum")
            for name, settings in {
                "baseline": {"baseline": "leave_one_out", "scale": "none"},
                "name": {"name": "mine.py:Mine"},
                "overlong_buffer_tokens": {"overlong_buffer_tokens": 4},
                "max_redraws": {"max_redraws": 1},
            }.items()
        ),
        (
            {"evaluation": EvaluationConfig(every=10)},
            r"evaluation\.every \(10\) needs evaluation_data; name held-out prompts, or set it to 0$",
        ),
        (
            {"run": RLRunConfig(output_dir="o", num_iterations=1, best_metric="eval/accuracy")},
            r"run\.best_metric \(eval/accuracy\) is never measured: set evaluation_data and evaluation\.every, run",
        ),
        (
            {
                "run": RLRunConfig(output_dir="o", num_iterations=1, best_metric="eval/accuracy"),
                "evaluation_data": PromptDataConfig(path="e.jsonl"),
                "evaluation": EvaluationConfig(every=0),
            },
            r"run\.best_metric \(eval/accuracy\) is never measured: set evaluation\.every, run\.best_metric=null, or "
            "name another metric$",
        ),
    ],
)
def test_sections_of_grpo_that_do_not_fit_are_refused(sections: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"^{message}"):
        grpo(**sections)


@pytest.mark.parametrize(
    "sections",
    [
        {"update": UpdateConfig(minibatch_size=8)},
        {"update": UpdateConfig(minibatch_size=128)},
        {"rollout": RolloutConfig(max_rows=8)},
        {"rollout": RolloutConfig(max_rows=1, engine="transformers")},
        {"algorithm": GRPOConfig(overlong_buffer_tokens=16), "rollout": RolloutConfig(max_response_tokens=16)},
        {"evaluation": EvaluationConfig(every=10), "evaluation_data": PromptDataConfig(path="e.jsonl")},
        {"reward": STANDARDIZED},
    ],
)
def test_sections_of_grpo_that_just_fit_are_taken(sections: dict[str, Any]):
    grpo(**sections)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"update": UpdateConfig(minibatch_size=48)},
            r"update\.minibatch_size \(48\) must divide the 128 responses of a rollout \(128 prompts x 1\); "
            r"try 32 or 64$",
        ),
        (
            {"rollout": RolloutConfig(prompts_per_iteration=6), "update": UpdateConfig(minibatch_size=128)},
            r"update\.minibatch_size \(128\) must divide the 6 responses of a rollout \(6 prompts x 1\); try 3 or 6$",
        ),
        (
            {"algorithm": PPOConfig(overlong_buffer_tokens=300)},
            r"algorithm\.overlong_buffer_tokens \(300\) must be at most rollout\.max_response_tokens \(256\)$",
        ),
        (
            {"critic": CriticConfig(network="adapter")},
            r"critic\.network adapter needs model\.lora: it is an adapter on the actor's frozen base; "
            r"where model\.path is an adapter, .* set critic\.network to own, or merge that adapter first$",
        ),
        (
            {
                "critic": CriticConfig(network="reward_model"),
                "reward": RewardConfig(functions=(RewardFunctionConfig(name="rule.py:score"),)),
            },
            r"critic\.network reward_model needs reward\.model; name one, or set critic\.network to own$",
        ),
        (
            {"critic": CriticConfig(warmup_iterations=4)},
            r"critic\.warmup_iterations \(4\) must be less than run\.num_iterations \(4\), or the actor never learns$",
        ),
        (
            {"critic": CriticConfig(network="mtp"), "algorithm": PPOConfig(importance="v_trace")},
            r"algorithm\.importance v_trace corrects the returns that a critic learns, and critic\.network mtp",
        ),
        (
            {"reward": replace(LEARNED, combine="standardized")},
            r"reward\.combine standardized compares each reward within the group of a prompt, and llmrl ppo has no gr",
        ),
        (
            {"reward": ON_BASE},
            r"reward\.model\.on_actor_base needs model\.lora: it is an adapter on the actor's frozen base$",
        ),
        (
            {"reward": ON_BASE, "model": ModelConfig(path="m", lora=LoraSettings(), from_scratch=True)},
            r"reward\.model\.on_actor_base needs the base .*, and model\.from_scratch draws another; leave one .* out$",
        ),
    ],
)
def test_sections_of_ppo_that_do_not_fit_are_refused(sections: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"^{message}"):
        ppo(**sections)


@pytest.mark.parametrize(
    "sections",
    [
        {"critic": CriticConfig(network="adapter"), "model": LORA},
        {"critic": CriticConfig(network="shared"), "model": LORA},
        {"critic": CriticConfig(network="own"), "model": LORA},
        {"critic": CriticConfig(network="reward_model", warmup_iterations=3)},
        {"reward": ON_BASE, "model": LORA},
        {"update": UpdateConfig(minibatch_size=1)},
    ],
)
def test_sections_of_ppo_that_just_fit_are_taken(sections: dict[str, Any]):
    ppo(**sections)


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({}, []),
        ({"critic": CriticConfig(value_coef=0.1)}, ["critic.value_coef is read only where critic.network is shared"]),
        ({"critic": CriticConfig(network="shared", value_coef=0.1)}, []),
        ({"critic": CriticConfig(network="mtp", value_coef=0.1, mtp=MTPSettings(num_heads=2))}, []),
        ({"critic": CriticConfig(mtp=MTPSettings(num_heads=2))}, ["critic.mtp is read only where critic.network is"]),
        (
            {"critic": CriticConfig(network="mtp"), "algorithm": PPOConfig(value_clip=None, value_lambda=1.0)},
            ["algorithm.value_clip is not read where critic", "algorithm.value_lambda is not read where critic"],
        ),
        (
            {"critic": CriticConfig(network="mtp"), "algorithm": PPOConfig(value_proximal_coef=0.5)},
            ["algorithm.value_proximal_coef is not read where critic.network is mtp"],
        ),
        ({"critic": CriticConfig(network="shared"), "critic_optimizer": OptimizerConfig(learning_rate=1.0)}, []),
        (
            {"critic": CriticConfig(network="shared"), "critic_optimizer": OptimizerConfig(betas=(0.5, 0.999))},
            ["critic.network shared reads nothing of critic_optimizer but its learning_rate"],
        ),
        ({"algorithm": PPOConfig(auxiliary_every=4)}, []),
        (
            {"algorithm": PPOConfig(auxiliary_every=4), "critic": CriticConfig(warmup_iterations=1)},
            ["algorithm.auxiliary_every (4) is more than the iterations of the run after critic.warmup_iterations"],
        ),
    ],
)
def test_settings_of_ppo_that_nothing_reads_are_told(sections: dict[str, Any], told: list[str]):
    warnings = ppo(**sections).warnings()
    assert len(warnings) == len(told)
    assert all(part in warning for part, warning in zip(told, warnings, strict=True))


def test_steps_of_auxiliary_phases_belong_to_the_schedules():
    """4 iterations: one of warm-up, a phase after the third, one left over; 2 x 3 steps, 5 times."""
    config = ppo(
        algorithm=PPOConfig(auxiliary_every=2, auxiliary_epochs=5),
        critic=CriticConfig(warmup_iterations=1),
        rollout=RolloutConfig(prompts_per_iteration=12),
        update=UpdateConfig(minibatch_size=4, num_epochs=1),
    )
    assert config.num_auxiliary_steps == 30
    assert (config.num_optimizer_steps, config.num_actor_steps) == (4 * 3 + 30, 3 * 3 + 30)
    replayed = replace(config, update=replace(config.update, num_replayed=1))
    assert replayed.num_auxiliary_steps == 60  # each iteration has learned from twice as many, and so does the phase
    assert (replayed.num_optimizer_steps, replayed.num_actor_steps) == (4 * 6 + 60, 3 * 6 + 60)


def test_the_actor_takes_no_step_in_the_warm_up():
    config = ppo(critic=CriticConfig(warmup_iterations=1), update=UpdateConfig(minibatch_size=64, num_epochs=3))
    assert config.optimizer_steps_per_iteration == 6
    assert (config.num_optimizer_steps, config.num_actor_steps) == (24, 18)


@pytest.mark.parametrize(("group_size", "prompts", "size"), [(8, 16, 48), (6, 16, 128), (6, 16, 5), (5, 7, 999)])
def test_what_a_message_proposes_is_taken(group_size: int, prompts: int, size: int):
    def make(size: int) -> GRPORun:
        return grpo(
            algorithm=GRPOConfig(group_size=group_size),
            rollout=RolloutConfig(prompts_per_iteration=prompts),
            update=UpdateConfig(minibatch_size=size),
        )

    with pytest.raises(ValueError, match=r"try \d+") as refused:
        make(size)
    for proposed in str(refused.value).rpartition("try ")[2].split(" or "):
        assert make(int(proposed)).update.minibatch_size == int(proposed)


def test_optimizer_steps_of_an_iteration():
    config = grpo(
        rollout=RolloutConfig(prompts_per_iteration=6),
        algorithm=GRPOConfig(group_size=4),
        update=UpdateConfig(minibatch_size=8, num_epochs=2),
    )
    assert config.num_responses == 24
    assert config.optimizer_steps_per_iteration == 6  # 3 minibatches, twice
    assert replace(config, update=replace(config.update, num_replayed=2)).optimizer_steps_per_iteration == 18


@pytest.mark.parametrize("update", [{"staleness": 1}, {"num_replayed": 1}])
def test_stale_responses_without_a_correction_warn(update: dict[str, int]):
    run = RLRunConfig(output_dir="runs/x", num_iterations=2)
    (warning,) = grpo(run=run, update=UpdateConfig(**update)).warnings()
    assert "algorithm.importance truncated corrects that" in warning
    assert grpo(run=run, update=UpdateConfig(**update), algorithm=GRPOConfig(importance="masked")).warnings() == []
    assert grpo().warnings() == []


def test_the_plan_counts_the_rollouts_that_wait():
    """3 iterations of 8 prompts, and 3 rollouts more before the first one can learn."""
    run = RLRunConfig(output_dir="runs/x", num_iterations=3)
    rollout, update = RolloutConfig(prompts_per_iteration=8), UpdateConfig(staleness=2, num_replayed=1)
    config = grpo(run=run, rollout=rollout, update=update)
    assert "; 48 prompts in all, 0.75 epochs of 64 rows. The first one samples 4 times as many; " in config.plan(64)
    assert config.plan(64).endswith("each learns from 2 rollouts, the newest sampled 2 iterations before.")
    assert "; 24 prompts in all" in grpo(run=run, rollout=rollout).plan(64)


def test_a_run_shorter_than_its_rollouts_are_old_warns():
    algorithm = GRPOConfig(importance="truncated")
    for num_iterations, warns in ((3, True), (4, False)):
        run = RLRunConfig(output_dir="runs/x", num_iterations=num_iterations)
        config = grpo(run=run, algorithm=algorithm, update=UpdateConfig(staleness=3))
        assert ["every response is of the first policy" in warning for warning in config.warnings()] == [True] * warns


@pytest.mark.parametrize(
    ("group_size", "prompts", "expected"),
    [
        (8, 16, 128),
        (8, 2, 16),
        (8, 64, 128),
        (8, 5, 40),
        (6, 16, 96),
        (5, 7, 35),
        (8, 17, 136),
        (200, 3, 200),
        (96, 4, 96),
    ],
)
def test_a_minibatch_follows_the_rollout(group_size: int, prompts: int, expected: int):
    config = grpo(
        algorithm=GRPOConfig(group_size=group_size),
        rollout=RolloutConfig(prompts_per_iteration=prompts, max_rows=group_size),
    )
    assert config.update.minibatch_size == config.minibatch_size == expected


@pytest.mark.parametrize(("prompts", "expected"), [(128, 128), (2, 2), (192, 96), (131, 131), (1000, 125)])
def test_a_minibatch_of_ppo_follows_the_rollout(prompts: int, expected: int):
    assert ppo(rollout=RolloutConfig(prompts_per_iteration=prompts)).update.minibatch_size == expected


def test_held_out_data_that_is_named_is_used():
    held_out = PromptDataConfig(path="e.jsonl")
    assert not grpo().evaluates
    assert grpo(evaluation_data=held_out).evaluates
    assert grpo(evaluation_data=held_out, evaluation=EvaluationConfig(every=3)).evaluates
    assert not grpo(evaluation_data=held_out, evaluation=EvaluationConfig(every=0)).evaluates


# --- every setting ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", KINDS)
def test_every_setting_has_a_help(run: type):
    settings = list(describe(run))
    assert len(settings) > 30
    assert [setting.path for setting in settings if not setting.help.strip()] == []


@pytest.mark.parametrize("run", KINDS)
def test_every_help_is_a_sentence(run: type):
    assert [setting.path for setting in describe(run) if not setting.help.endswith(".")] == []


def sections(run: type) -> Iterator[Any]:
    """A run's sections as they are by default, those without a default left out."""
    for field in fields(run):
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        if is_dataclass(default):
            yield field.name, default


@pytest.mark.parametrize("run", KINDS)
def test_a_section_left_out_is_the_section_with_nothing_said(run: type):
    """No second set of defaults: but for learning rates, and for how many prompts make up for groups and how often PPO
    uses them, a run adds none of its own."""
    own = {name for name, default in sections(run) if default != type(default)()}
    expected = {
        SFTRun: {"optimizer"},
        RewardModelRun: {"optimizer"},
        CriticRun: {"optimizer"},
        GRPORun: set(),
        PPORun: {"rollout", "update", "critic_optimizer"},
    }
    assert own == expected[run]


@pytest.mark.parametrize(
    "cls", [Run, BatchTrainer, RewardModelObjective, RLTrainer, Evaluator, GRPO, PPO, SampleWriter]
)
def test_what_reads_settings_has_no_defaults_of_its_own(cls: type):
    parameters = inspect.signature(cls).parameters.values()
    own = [parameter.name for parameter in parameters if parameter.default is not inspect.Parameter.empty]
    assert own == (
        ["one_step", "reward_weights"] if cls is GRPO else []
    )  # no setting; users' subclasses call this constructor without


def test_the_list_of_settings_shows_bounds():
    kinds = {setting.path: setting.type for setting in describe(PPORun)}
    assert kinds["algorithm.clip_low"] == "number, greater than 0 and at most 1"
    assert kinds["optimizer.warmup_steps"] == "whole number, 0 or greater"
    assert kinds["algorithm.stop_kl"] == "number | null, greater than 0"
    assert kinds["reward.functions.<n>.weight"] == "number"


STORED = Path(__file__).parent / "settings.txt"


def test_the_list_of_settings_is_the_one_that_was_decided_on():
    """Every setting is one more thing to understand, so a new one is a decision."""
    listed = [f"{name} {setting.path}" for name, kind in RUNS.items() for setting in describe(kind.settings)]
    stored = STORED.read_text().splitlines()
    new, gone = sorted(set(listed) - set(stored)), sorted(set(stored) - set(listed))
    assert (new, gone) == ([], []), (
        "a setting is a decision: a new one needs a user who cannot do without it, and one that is gone needs "
        "a sentence for those who still write it; if that is settled, store the list with\n"
        f'    for run in {" ".join(RUNS)}; do llmrl settings $run | cut -f1 | sed "s/^/$run /"; done '
        "> tests/settings.txt"
    )
    assert listed == stored


# --- as recipes -------------------------------------------------------------------------------------------------------

SFT_RECIPE = """
model: {path: m}
data: {path: d.jsonl}
run: {output_dir: runs/x, num_iterations: 1}
"""


def test_the_least_that_a_recipe_must_say(tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(SFT_RECIPE)
    assert read_recipe(SFTRun, recipe, []) == sft()
    recipe.write_text(SFT_RECIPE + "reward: {functions: [{name: 'rule.py:score'}]}\n")
    assert read_recipe(GRPORun, recipe, []) == grpo()
    recipe.write_text(SFT_RECIPE + "reward: {model: {path: rm}}\n")
    assert read_recipe(PPORun, recipe, ["run.num_iterations=4"]) == ppo()
    recipe.write_text(
        "model: {path: m}\ndata: {path: d.jsonl}\nevaluation_data: {path: e.jsonl}\nrun: {output_dir: runs/x}"
    )
    assert read_recipe(RewardModelRun, recipe, []) == reward_model()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.template=often", "data.template: 'often' is not one of 'auto', 'chat' or 'none'"),
        ("run.num_iteration=3", "run.num_iteration is not a setting; did you mean run.num_iterations?"),
        ("run.num_iterations=0", "run.num_iterations (0) must be at least 1"),
        (
            "evaluation_data={path: e.jsonl, num_rows: 0}",
            "evaluation_data.num_rows (0) must be at least 1, or null; leave",
        ),
        ("sft.evaluate_every=5", "sft.evaluate_every (5) needs evaluation_data"),
        ("sft.batch_size=8.5", "sft.batch_size: 8.5 is not a whole number"),
    ],
)
def test_a_recipe_is_refused_in_the_same_words(tmp_path: Path, override: str, message: str):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(SFT_RECIPE)
    with pytest.raises(SettingError) as raised:
        read_recipe(SFTRun, recipe, [override])
    assert message in str(raised.value)


PPO_RECIPE = """
model: {path: m}
data: {path: d.jsonl, num_rows: 9, subset: main, prompt_column: question, system_prompt: Add.}
evaluation_data: {path: e.jsonl, system_prompt: null}
reward: {functions: [{name: "rule.py:score"}]}
optimizer: {learning_rate: 1e-4, schedule: linear, betas: [0.9, 0.95]}
run: {output_dir: runs/x, num_iterations: 4}
"""


@pytest.fixture
def ppo_recipe(tmp_path: Path) -> Path:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(PPO_RECIPE)
    return recipe


def test_held_out_prompts_are_read_as_the_others_unless_they_say_otherwise(ppo_recipe: Path):
    read = read_recipe(PPORun, ppo_recipe, []).evaluation_data
    assert read == PromptsConfig(path="e.jsonl", subset="main", prompt_column="question")
    mixed = read_recipe(PPORun, ppo_recipe, ["data.mixed_with=[{path: m.jsonl, weight: 2.0}]"])
    assert [more.path for more in mixed.data.mixed_with] == ["m.jsonl"]
    assert mixed.evaluation_data == read
    other = read_recipe(PPORun, ppo_recipe, ["data.max_prompt_tokens=7", "evaluation_data.prompt_column=q"])
    assert other.evaluation_data is not None
    assert (other.evaluation_data.max_prompt_tokens, other.evaluation_data.prompt_column) == (7, "q")
    assert read_recipe(PPORun, ppo_recipe, ["evaluation_data=null"]).evaluation_data is None


def test_held_out_prompts_that_are_not_named_are_not_those_of_the_data(ppo_recipe: Path):
    ppo_recipe.write_text("\n".join(line for line in PPO_RECIPE.splitlines() if not line.startswith("evaluation_data")))
    assert read_recipe(PPORun, ppo_recipe, []).evaluation_data is None


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("run.seed=0", OptimizerConfig(learning_rate=1e-5, schedule="linear", betas=(0.9, 0.95))),
        ("critic_optimizer.learning_rate=2", OptimizerConfig(learning_rate=2.0, schedule="linear", betas=(0.9, 0.95))),
        ("critic_optimizer.schedule=cosine", OptimizerConfig(learning_rate=1e-5, schedule="cosine", betas=(0.9, 0.95))),
    ],
)
def test_the_critic_learns_as_the_actor_does_at_a_rate_of_its_own(
    ppo_recipe: Path, override: str, expected: OptimizerConfig
):
    config = read_recipe(PPORun, ppo_recipe, [override])
    assert config.critic_optimizer == expected
    assert config.warnings() == []


@pytest.mark.parametrize(("run", "old"), [(run, old) for run in KINDS for old in getattr(run, "moved", {})])
def test_an_old_name_is_told_its_new_one(ppo_recipe: Path, run: type, old: str):
    assert old not in {setting.path for setting in describe(run)}
    with pytest.raises(SettingError) as refused:
        read_recipe(run, ppo_recipe, [f"{old}=1"])
    assert f"  {old} is not a setting any more; {run.moved[old]}" in str(refused.value).splitlines()


def test_a_command_is_found_by_the_path_that_it_makes(ppo_recipe: Path):
    run = read_recipe(PPORun, ppo_recipe, ["made_by={./d.jsonl: make d, ~/m: make m}", "data.path=d.jsonl"])
    assert [command_for(path, run) for path in ("d.jsonl", str(Path.home() / "m"), "m")] == ["make d", "make m", None]


def test_what_is_resolved_reads_back_equal(ppo_recipe: Path):
    config = read_recipe(PPORun, ppo_recipe, [])
    ppo_recipe.write_text(to_yaml(config))
    assert read_recipe(PPORun, ppo_recipe, []) == config


@pytest.mark.parametrize(
    "override",
    [
        "data.max_prompt_tokens=0",
        "data.template=often",
        "optimizer.betas=[0.9, 1]",
        "optimizer.betas=[0.9]",
        "optimizer.schedule=7",
    ],
)
def test_what_is_wrong_in_a_section_is_told_once_though_another_takes_it_over(ppo_recipe: Path, override: str):
    with pytest.raises(SettingError) as refused:
        read_recipe(PPORun, ppo_recipe, [override])
    assert [line.split()[0].rstrip(":") for line in str(refused.value).splitlines()[1:]] == [override.split("=")[0]]


def test_what_a_section_says_itself_is_told_beside_what_the_other_says(ppo_recipe: Path):
    with pytest.raises(SettingError) as refused:
        read_recipe(PPORun, ppo_recipe, ["data.max_prompt_tokens=0", "evaluation_data.max_prompt_tokens=-1"])
    assert str(refused.value).count("max_prompt_tokens (") == 2


def test_the_list_shows_of_a_section_like_another_what_is_its_own():
    listed = {setting.path: setting for setting in describe(PPORun)}
    own = {path for path in listed if path.startswith(("evaluation_data.", "critic_optimizer."))}
    assert own == {"evaluation_data.path", "evaluation_data.num_rows", "critic_optimizer.learning_rate"}
    assert listed["evaluation_data"].help.endswith("`data` may stand here too; left out, it is as there.")


def test_a_bound_in_a_list_is_refused_by_the_number_of_its_item(tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(SFT_RECIPE + "reward: {functions: [{name: 'a.py:f'}, {name: 'a.py:g', weight: .inf}]}\n")
    with pytest.raises(SettingError, match=r"reward\.functions\.1\.weight \(inf\) must be finite$"):
        read_recipe(GRPORun, recipe, [])


def test_the_settings_import_no_heavy_library():
    """So that --help and a list of settings are there at once."""
    program = "import sys, llmrl.config; print(*{name.partition('.')[0] for name in sys.modules})"
    imported = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()
    heavy = {"torch", "transformers", "accelerate", "datasets", "peft", "numpy", "jaxtyping", "pydantic", "omegaconf"}
    assert not heavy & set(imported)
