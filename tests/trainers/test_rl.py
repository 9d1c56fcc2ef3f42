"""The loop, with fakes where they are enough and tiny transformers models where the numbers matter."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from llmrl.algorithms.config import GRPOConfig, PPOConfig
from llmrl.algorithms.grpo import GRPO
from llmrl.batches import Prompts, Scores, StopReason
from llmrl.microbatches import TokenBudget
from llmrl.models.heads import choose_head
from llmrl.models.policy import PolicyModule, TransformersPolicy
from llmrl.optim.config import OptimizerConfig
from llmrl.optim.local import LocalTrainable
from llmrl.reports.progress import Silent
from llmrl.rollout.native import NativeEngine
from llmrl.trainers.config import UpdateConfig
from llmrl.trainers.rl import FlatGroupsError, RLTrainer
from tests.algorithms import tabular
from tests.contexts import context_of, sampling_of

VOCAB, EOS, LIMIT = 12, 0, 6
MODELS = {
    "rotary": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.4,
        )
    ),
    "absolute": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_positions=32, n_embd=16, n_layer=2, n_head=2, initializer_range=0.4)
    ),
}


class Counting:
    """Prompts of ragged lengths, numbered in the order in which they are dealt."""

    def __init__(self):
        self.position = 0

    def next(self, num_prompts):
        numbers = range(self.position, self.position + num_prompts)
        self.position += num_prompts
        lengths = torch.tensor([1 + number % 3 for number in numbers])
        mask = torch.arange(3) >= 3 - lengths[:, None]
        ids = torch.where(mask, torch.tensor([[1 + number % 7] for number in numbers]), 0)
        return Prompts(ids=ids, mask=mask, rows=tuple({"number": number} for number in numbers))

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def scored(rollout, total):
    return Scores(total=total, per_token=torch.zeros(rollout.sequences.response_ids.shape), parts={"part": total})


def length_reward(rollout):
    return scored(rollout, rollout.sequences.response_lengths.float())


class Recorder:
    """Remembers experiences."""

    def __init__(self):
        self.seen = []

    def __call__(self, iteration, experience):
        self.seen.append((iteration, experience))


def make_trainer(
    kind="rotary",
    *,
    config=None,
    reward=length_reward,
    learning_rate=0.01,
    sampled_in=torch.float32,
    microbatch_tokens=8192,
    one_step=False,
    **update,
):
    torch.manual_seed(0)
    model = MODELS[kind]().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    module = PolicyModule(model, choose_head(model, VOCAB), temperature=1.0, dtype=torch.float32)
    config = config or GRPOConfig(group_size=4)
    return RLTrainer(
        algorithm=GRPO(
            config,
            actor=TransformersPolicy(module),
            reference=None,
            max_response_tokens=LIMIT,
            one_step=one_step,
        ),
        engine=NativeEngine(model, eos_ids=(EOS,), vocab_size=VOCAB, dtype=sampled_in, max_rows=8, progress=Silent()),
        reward=reward,
        prompts=Counting(),
        trained={"actor": LocalTrainable(module, OptimizerConfig(learning_rate=learning_rate), num_steps=100)},
        update=UpdateConfig(**({"minibatch_size": 12} | update)),
        budget=TokenBudget(max_tokens=microbatch_tokens),
        prompts_per_iteration=6,
        sampling=sampling_of(config.group_size, seed=3, max_response_tokens=LIMIT),
        context=context_of(),
        observe=Recorder(),
        reference=None,
        auxiliary=None,
        balance=None,
    )


def weights_of(trainer):
    return copy.deepcopy(trainer.trained["actor"].module.state_dict())


def distance(left, right):
    return max(float((left[name] - right[name]).abs().max()) for name in left)


@pytest.mark.parametrize("kind", MODELS)
def test_the_first_minibatch_is_on_policy(kind):
    values = make_trainer(kind).iterate().values()
    assert values["policy/ratio_max_deviation"] < 1e-5
    assert values["policy/rollout_gap"] < 1e-5  # what the engine reported is what the trainer computes


@pytest.mark.parametrize("kind", MODELS)
def test_learning_rate_0_moves_nothing_in_two_epochs(kind):
    trainer = make_trainer(kind, learning_rate=0.0, num_epochs=2)
    before = weights_of(trainer)
    values = trainer.iterate().values()
    assert distance(before, weights_of(trainer)) == 0
    assert values["policy/approx_kl"] == pytest.approx(0, abs=1e-9)
    assert values["policy/clip_fraction"] == 0


@pytest.mark.parametrize("kind", MODELS)
def test_microbatches_change_memory_and_never_the_result(kind):
    trainers = [make_trainer(kind, microbatch_tokens=tokens) for tokens in (1, 20, 10_000)]
    for trainer in trainers:
        # plain gradient descent: where the gradient is 0, as at GPT-2's key bias, Adam steps on rounding noise
        trained = trainer.trained["actor"]
        trained.optimizer = torch.optim.SGD([{"params": list(trained.parameters.values()), "peak": 0.1}], lr=0.0)
        trainer.iterate()
    first, *others = map(weights_of, trainers)
    untrained = make_trainer(kind).trained["actor"].module.state_dict()
    assert distance(first, untrained) > 1e-3
    for other in others:
        assert distance(first, other) < 1e-5


def by_gradient_descent(trainer):
    """The trainer with an optimizer that goes no further than the gradient."""
    trained = trainer.trained["actor"]
    trained.optimizer = torch.optim.SGD([{"params": list(trained.parameters.values()), "peak": 0.1}], lr=0.0)
    return trainer


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_an_iteration_of_one_step_needs_no_pass_for_old_log_probabilities(kind, ratio):
    """Ragged prompts and responses, padded with the id that ends them, in many microbatches."""
    config = GRPOConfig(group_size=4, ratio=ratio, aggregation="sequence")
    settings = {"config": config, "minibatch_size": 24, "microbatch_tokens": 20}
    ours, plain = (by_gradient_descent(make_trainer(kind, one_step=x, **settings)) for x in (True, False))
    passes = []
    for trainer in (ours, plain):
        module = trainer.trained["actor"].module
        module.register_forward_pre_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    values = told(ours)
    num_passes = len(passes)
    assert num_passes > 3
    assert all(passes)  # with gradient
    assert values == pytest.approx(told(plain), rel=1e-4, abs=1e-6)
    assert passes[num_passes:] == [False] + [True] * num_passes
    assert distance(weights_of(ours), make_trainer(kind).trained["actor"].module.state_dict()) > 1e-3
    assert distance(weights_of(ours), weights_of(plain)) < 1e-6
    ((_, experience),) = ours.observe.seen
    assert experience.old_logprobs is None
    assert values["policy/ratio_max_deviation"] == 0


@pytest.mark.parametrize("update", [{"num_epochs": 2, "minibatch_size": 24}, {"minibatch_size": 12}])
def test_several_steps_never_go_without_old_log_probabilities(update):
    with pytest.raises(AssertionError, match="later steps move away"):
        make_trainer(one_step=True, **update).iterate()


def test_the_ratio_deviation_is_that_of_the_first_minibatch():
    trainer = make_trainer(learning_rate=0.1, num_epochs=4)
    values = trainer.iterate().values()
    assert values["policy/ratio_max_deviation"] < 1e-5
    assert values["policy/approx_kl"] > 1e-4  # later minibatches have moved away


def test_every_response_has_a_number_of_its_own():
    trainer = make_trainer()
    trainer.iterate()
    trainer.iterate()
    (_, first), (_, second) = trainer.observe.seen
    assert first.rollout.group_ids.tolist() == [g for g in range(6) for _ in range(4)]
    assert second.rollout.group_ids.tolist() == [g for g in range(6, 12) for _ in range(4)]
    assert trainer.num_responses == 48


def test_minibatches_are_epochs_of_whole_groups():
    trainer = make_trainer(minibatch_size=8, num_epochs=2)
    with torch.no_grad():
        rollout, scores, _ = trainer.collect(trainer.prompts.next(6))
        experience, _ = trainer.algorithm.experience(rollout, scores)
    dealt = [part.rollout.group_ids.tolist() for part in trainer.minibatches(experience)]
    assert len(dealt) == 6
    for groups in dealt:
        assert len(groups) == 8
        assert groups[0] == groups[3] != groups[4] == groups[7]
    epochs = [[g for part in epoch for g in part[::4]] for epoch in (dealt[:3], dealt[3:])]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(6))
    assert epochs[0] != epochs[1]
    assert dealt == [part.rollout.group_ids.tolist() for part in trainer.minibatches(experience)]


def flat_for_even_prompts(rollout):
    even = torch.tensor([row["number"] % 2 == 0 for row in rollout.rows])
    spread = torch.arange(len(rollout.rows)) % 4
    return scored(rollout, torch.where(even, 1.0, spread.float()))


def test_flat_groups_are_replaced_by_groups_of_new_prompts():
    trainer = make_trainer(config=GRPOConfig(group_size=4, max_redraws=3), reward=flat_for_even_prompts)
    values = trainer.iterate().values()
    (_, experience) = trainer.observe.seen[0]
    numbers = [row["number"] for row in experience.rollout.rows[::4]]
    # of 0..5 stay 1 3 5; of 6..8 stays 7; of 9, 10 stays 9; of 11 stays 11
    assert numbers == [1, 3, 5, 7, 9, 11]
    assert experience.rollout.group_ids[::4].tolist() == [1, 3, 5, 7, 9, 11]  # 12 groups drawn, no number twice
    assert values["group/flat_fraction"] == 0.5  # of everything drawn
    assert values["tokens/sampled"] > experience.rollout.sequences.response_lengths.sum()


def test_flat_groups_without_end_are_a_clear_error():
    trainer = make_trainer(
        config=GRPOConfig(group_size=4, max_redraws=2), reward=lambda r: scored(r, torch.ones(len(r.rows)))
    )
    with pytest.raises(FlatGroupsError, match=r"after 2 redraws only 0 of 6 groups .* raise algorithm\.max_redraws"):
        trainer.iterate()


def test_without_redraws_flat_groups_stay():
    trainer = make_trainer(reward=flat_for_even_prompts)
    trainer.iterate()
    assert [row["number"] for row in trainer.observe.seen[0][1].rollout.rows[::4]] == list(range(6))


def failing_once():
    calls = []

    def reward(rollout):
        calls.append(rollout)
        if len(calls) == 2:
            raise RuntimeError("the verifier is away")
        return length_reward(rollout)

    return reward


def test_a_failure_before_the_update_can_be_gone_back_behind():
    trainer, undisturbed = make_trainer(reward=failing_once()), make_trainer()
    trainer.iterate()
    with pytest.raises(RuntimeError, match="away"):
        trainer.iterate()
    assert trainer.rewind()
    assert (trainer.iteration, trainer.num_responses, trainer.prompts.position) == (1, 24, 6)
    trainer.iterate()
    undisturbed.iterate()
    undisturbed.iterate()
    assert distance(weights_of(trainer), weights_of(undisturbed)) == 0


def failing_after(steps, trainer):
    """The second microbatch after so many optimizer steps fails."""
    losses, parts = trainer.algorithm.losses, []

    def failing(batch, weights):
        if trainer.trained["actor"].num_steps_done == steps:
            parts.append(batch)
            if len(parts) == 2:
                raise ArithmeticError
        return losses(batch, weights)

    trainer.algorithm.losses = failing


def test_a_failure_before_the_first_optimizer_step_can_too():
    trainer, undisturbed = (make_trainer(microbatch_tokens=8) for _ in range(2))
    failing_after(0, trainer)
    with pytest.raises(ArithmeticError):
        trainer.iterate()
    assert trainer.rewind()
    trainer.iterate()
    undisturbed.iterate()
    assert distance(weights_of(trainer), weights_of(undisturbed)) == 0


def test_a_failure_after_the_first_optimizer_step_cannot():
    trainer = make_trainer(microbatch_tokens=8)
    failing_after(1, trainer)
    with pytest.raises(ArithmeticError):
        trainer.iterate()
    assert not trainer.rewind()


@pytest.mark.parametrize("settings", [{"num_epochs": 2}, {"one_step": True, "minibatch_size": 24}])
def test_state_continues_bit_for_bit(settings):
    straight, first = make_trainer(**settings), make_trainer(**settings)
    for _ in range(4):
        straight.iterate()
    for _ in range(2):
        first.iterate()
    second = make_trainer(**settings)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for _ in range(2):
        second.iterate()
    assert distance(weights_of(straight), weights_of(second)) == 0


def assert_engine_has_the_weights_of(trainer):
    """Of float32, rounded to what is sampled in."""
    copy_of = dict(trainer.engine.weights._model.named_parameters())
    for name, p in trainer.trained["actor"].module.model.named_parameters():
        assert copy_of[name] is not p
        assert torch.equal(copy_of[name], p.to(torch.bfloat16)), name


def test_an_engine_with_a_copy_samples_from_what_was_just_learned():
    trainer = make_trainer(sampled_in=torch.bfloat16)
    before = weights_of(trainer)
    for _ in range(2):
        trainer.iterate()
        assert_engine_has_the_weights_of(trainer)
    assert distance(before, weights_of(trainer)) > 0.01


def test_an_engine_with_a_copy_samples_from_what_was_loaded():
    learned, resumed = (make_trainer(sampled_in=torch.bfloat16) for _ in range(2))
    learned.iterate()
    resumed.load_state_dict(learned.state_dict())
    assert_engine_has_the_weights_of(resumed)
    ours, theirs = (trainer.iterate().values()["score/mean"] for trainer in (resumed, learned))
    assert ours == theirs


def test_a_group_is_one_prompt_though_its_size_changed_on_the_way():
    first, second = make_trainer(), make_trainer(config=GRPOConfig(group_size=5), minibatch_size=15)
    first.iterate()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.iterate()
    ((_, after),) = second.observe.seen
    groups = after.rollout.group_ids.view(6, 5)
    assert groups.equal(groups[:, :1].expand(-1, 5))
    assert len(groups[:, 0].unique()) == 6
    rows = [row["number"] for row in after.rollout.rows]
    assert rows == [rows[5 * n] for n in range(6) for _ in range(5)]
    assert second.num_responses == 25 + 30  # no number of the first 24 is used again


def test_the_shuffle_differs_by_iteration_and_by_epoch():
    trainer = make_trainer(num_epochs=2, minibatch_size=4)
    trainer.iterate()
    _, experience = trainer.observe.seen[0]
    orders = []
    for trainer.iteration in range(2):
        groups = [int(minibatch.rollout.group_ids[0]) for minibatch in trainer.minibatches(experience)]
        orders += [groups[:6], groups[6:]]
    assert all(sorted(order) == list(range(6)) for order in orders)
    assert all(left != right for i, left in enumerate(orders) for right in orders[:i])


def test_metrics_name_what_the_design_names():
    values = make_trainer().iterate().values()
    for name in (
        "policy/loss",
        "policy/clip_fraction",
        "policy/approx_kl",
        "policy/entropy",
        "policy/ratio_max_deviation",
        "score/mean",
        "score/std",
        "response/length",
        "response/finished_fraction",
        "group/flat_fraction",
        "time/rollout_s",
        "time/update_s",
        "tokens/per_s",
    ):
        assert name in values, name


def test_the_reward_is_learned():
    trainer = make_trainer(learning_rate=0.03)
    lengths = [trainer.iterate().values()["score/mean"] for _ in range(15)]
    assert lengths[-1] > lengths[0] + 1


def test_a_rollout_that_nothing_could_score_is_counted_and_teaches_nothing():
    trainer = make_trainer(reward=lambda rollout: scored(rollout, torch.full((24,), torch.nan)))
    before = weights_of(trainer)
    values = trainer.iterate().values()
    assert values["score/unscored"] == 24
    assert "score/mean" not in values
    assert distance(before, weights_of(trainer)) == 0


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf])
def test_a_score_that_is_not_finite_counts_as_unscored(bad):
    total = torch.arange(24) % 5
    trainer = make_trainer(reward=lambda rollout: scored(rollout, torch.where(total == 3, bad, total)))
    other = make_trainer(reward=lambda rollout: scored(rollout, torch.where(total == 3, torch.nan, total)))
    values, same = (each.iterate().values() for each in (trainer, other))
    assert values["score/unscored"] == 5
    assert values["score/mean"] == same["score/mean"]
    assert distance(weights_of(trainer), weights_of(other)) == 0


def test_responses_on_which_a_function_failed_are_counted():
    def reward(rollout):
        failed = torch.arange(24) < 5
        total = torch.ones(24).masked_fill(failed, torch.nan)
        tokens = torch.zeros(rollout.sequences.response_ids.shape)
        return Scores(total=total, per_token=tokens, parts={"rule": total}, failed={"rule": failed})

    values = make_trainer(reward=reward).iterate().values()
    assert (values["reward/rule/failed"], values["score/unscored"]) == (5, 5)


def test_what_nothing_could_score_moves_nothing_by_what_the_optimizer_remembers():
    """Not even after iterations that did learn; where some could be scored, the others are no reason to wait."""
    unscored = torch.zeros(24, dtype=torch.bool)
    total = torch.arange(24) % 5
    trainer = make_trainer(reward=lambda rollout: scored(rollout, torch.where(unscored, torch.nan, total)))
    trainer.iterate()
    before, trained = weights_of(trainer), trainer.trained["actor"]
    unscored[:] = True
    values = trainer.iterate().values()
    assert distance(before, weights_of(trainer)) == 0
    assert trained.num_steps_done == 2
    assert "actor/learning_rate" not in values
    unscored[8:] = False
    values = trainer.iterate().values()
    assert trained.num_steps_done == 4
    assert distance(before, weights_of(trainer)) > 0


def test_the_ratio_deviation_is_that_of_the_first_minibatch_that_is_learned_from(monkeypatch):
    unscored = torch.arange(24) < 8
    total = torch.arange(24) % 5
    trainer = make_trainer(
        reward=lambda rollout: scored(rollout, torch.where(unscored, torch.nan, total)), minibatch_size=8
    )
    in_order = torch.arange(6)
    monkeypatch.setattr("llmrl.trainers.rl.permutation", lambda *_, **__: in_order)
    assert trainer.iterate().values()["policy/ratio_max_deviation"] < 1e-5
    assert trainer.trained["actor"].num_steps_done == 2


# --- an algorithm that has a state of its own -------------------------------------------------------------------------

STEERED = PPOConfig(normalize_scores=True, score_clip=2.0, kl_coef=0.1, kl_target=0.5, step_kl_target=0.01)
CRITIC_ALONE = 1
"""Iterations."""


def make_ppo_trainer(*, reward=length_reward, config=STEERED):
    """Actor, critic and reference as tables; 24 responses an iteration, two epochs of two minibatches."""
    actor, reference = (tabular.TabularActor(tabular.random_logits(5, LIMIT, seed=seed)) for seed in (0, 1))
    critic = tabular.TabularCritic(torch.zeros(len(actor.logits)), num_tokens=5)
    optimizer = OptimizerConfig(learning_rate=0.05, schedule="linear")
    algorithm = tabular.make_ppo(
        config,
        tabular.Pair(actor, critic),
        reference=reference,
        max_response_tokens=LIMIT,
        warmup_iterations=CRITIC_ALONE,
    )
    modules = {"actor": actor, "critic": critic}
    return tabular.make_trainer(
        algorithm,
        tabular.TabularEngine(actor),
        reward,
        {name: LocalTrainable(module, optimizer, num_steps=20) for name, module in modules.items()},
        update={"num_epochs": 2, "minibatch_size": 12},
        prompts_per_iteration=24,
    )


def told(trainer):
    """The metrics of an iteration, its clock left out."""
    values = trainer.iterate().values()
    return {name: value for name, value in values.items() if not name.endswith("_s")}


def everything(trainer):
    tables = {name: trained.module.state_dict() for name, trained in trainer.trained.items()}
    return {f"{network}.{name}": x.clone() for network, table in tables.items() for name, x in table.items()}


@pytest.mark.parametrize("stop", [1, 3])
def test_a_resumed_ppo_run_is_the_uninterrupted_one_bit_for_bit(stop):
    straight, first, second = (make_ppo_trainer() for _ in range(3))
    for _ in range(stop):
        straight.iterate()
        first.iterate()
    saved = copy.deepcopy(first.state_dict())
    saved["cursor"] = json.loads(json.dumps(saved["cursor"]))
    second.load_state_dict(saved)
    assert second.algorithm.state_dict() == straight.algorithm.state_dict()
    for _ in range(3):
        assert told(second) == told(straight)
    assert distance(everything(second), everything(straight)) == 0
    state = straight.algorithm.state_dict()
    assert second.algorithm.state_dict() == state
    # and all of it has moved
    assert state["num_iterations"] == stop + 3
    assert state["score_moments"][0] == 24 * (stop + 3)
    assert state["kl"]["coef"] != 0.1
    assert state["step_kl"]["coef"] != 1.0


@pytest.mark.parametrize("stop", [0, 1, 2])
def test_what_an_algorithm_remembers_is_rewound_with_the_iteration(stop):
    """The failure comes after the moments and the price of a nat have moved, before the first optimizer step."""
    trainer, undisturbed = make_ppo_trainer(), make_ppo_trainer()
    for _ in range(stop):
        trainer.iterate()
        undisturbed.iterate()
    before, losses = trainer.algorithm.state_dict(), trainer.algorithm.losses

    def fail(batch, weights):
        raise ArithmeticError

    trainer.algorithm.losses = fail
    with pytest.raises(ArithmeticError):
        trainer.iterate()
    assert trainer.algorithm.state_dict() != before
    assert trainer.rewind()
    assert trainer.algorithm.state_dict() == before
    trainer.algorithm.losses = losses
    for _ in range(2):
        assert told(trainer) == told(undisturbed)
    assert distance(everything(trainer), everything(undisturbed)) == 0
    assert trainer.algorithm.state_dict() == undisturbed.algorithm.state_dict()


def test_the_critic_learns_alone_first():
    trainer = make_ppo_trainer()
    before = everything(trainer)
    values = told(trainer)
    after = everything(trainer)
    assert torch.equal(before["actor.logits"], after["actor.logits"])
    assert not torch.equal(before["critic.table"], after["critic.table"])
    assert "policy/loss" not in values
    assert "actor/learning_rate" not in values
    assert trainer.trained["actor"].num_steps_done == 0
    assert trainer.trained["critic"].num_steps_done == 4
    assert "policy/loss" in told(trainer)
    assert not torch.equal(everything(trainer)["actor.logits"], after["actor.logits"])
    assert trainer.trained["actor"].num_steps_done == 4


def test_an_iteration_ends_where_the_algorithm_says():
    trainer = make_ppo_trainer(config=PPOConfig(stop_kl=1e-9))
    told(trainer)  # the critic alone: there is no step to stop at
    assert trainer.trained["critic"].num_steps_done == 4
    told(trainer)  # the first step of the actor is on-policy, and the second is not
    assert trainer.trained["actor"].num_steps_done == 2


def test_the_updates_are_finished_once_after_the_last():
    trainer, happened = make_ppo_trainer(), []
    update, finish = trainer.update, trainer.algorithm.finish

    def watched_update(minibatch):
        happened.append("update")
        return update(minibatch)

    def watched_finish(experience):
        happened.append(f"finish {len(experience.rollout.rows)}")
        assert not torch.is_grad_enabled()
        return finish(experience)

    trainer.update, trainer.algorithm.finish = watched_update, watched_finish
    assert "policy/step_kl" not in told(trainer)
    assert "policy/step_kl" in told(trainer)
    assert happened == ["update"] * 4 + ["finish 24"] + ["update"] * 4 + ["finish 24"]


def test_a_group_of_one_is_never_called_flat():
    values = told(make_ppo_trainer())
    assert "group/flat_fraction" not in values
    assert {"kl/sequence", "kl/mean", "kl/coef", "value/explained_variance", "value/clip_fraction"} <= values.keys()


def test_a_phase_ends_when_the_gpu_has_done_what_it_asked_for(monkeypatch):
    """Else its time would be the next one's."""
    seen, trainer = [], make_trainer()
    now = iter(range(100))
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: seen.append(next(now)))
    with trainer.phase("update", 1):
        pass
    assert (seen, trainer.seconds) == ([1], {"update": 2})


# --- truncated responses ----------------------------------------------------------------------------------------------


def test_a_minibatch_of_truncated_responses_takes_no_step():
    """With momentum from an earlier step, a gradient of zero would still move the weights."""
    trainer = make_trainer(config=GRPOConfig(group_size=4, mask_truncated=True, entropy_coef=0.1))
    generate, reasons = trainer.engine.generate, iter([StopReason.EOS, StopReason.LENGTH])

    def ended_by(*arguments):
        rollout = generate(*arguments)
        return replace(rollout, stop_reason=torch.full_like(rollout.stop_reason, next(reasons)))

    trainer.engine.generate = ended_by
    trainer.iterate()
    before, num_steps = weights_of(trainer), trainer.trained["actor"].num_steps_done
    values = trainer.iterate().values()
    assert distance(weights_of(trainer), before) == 0
    assert trainer.trained["actor"].num_steps_done == num_steps > 0
    assert values["response/finished_fraction"] == 0
    assert all(math.isfinite(value) for value in values.values())
    assert not {"policy/loss", "advantage/mean"} & values.keys()
