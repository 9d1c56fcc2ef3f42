"""Phasic policy gradient: an auxiliary phase number by number against loops that know tables and floats, and what must
hold of it whatever the networks. The gradients in `Phase` are derived by hand; the order of the minibatches is the only
thing that it is told."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from llmrl.algorithms.auxiliary import DistillValues
from llmrl.algorithms.config import PPOConfig
from llmrl.batches import Scores, TokenOutputs
from llmrl.distributed.microbatcher import Microbatcher
from llmrl.microbatches import TokenBudget
from llmrl.optim.config import OptimizerConfig
from llmrl.optim.local import LocalTrainable
from llmrl.rollout.scripted import ScriptedEngine
from llmrl.trainers.checkpoint import join_state, split_state
from tests.contexts import context_of
from tests.distributed.threads import on_ranks

from .tabular import (
    Pair,
    TabularActor,
    TabularCritic,
    TabularEngine,
    make_ppo,
    make_trainer,
    random_logits,
    responses_of,
    state_of,
    states_of,
)

NUM_TOKENS, LIMIT = 4, 4
NUM_STATES = (LIMIT + 1) * NUM_TOKENS
RESPONSES = [(1, 2, 0), (3, 3, 1, 2), (2, 0), (0,), (1, 1, 0), (2, 1, 3, 3), (3, 0), (1, 2, 3, 0)]
UNSCORED = (2, 0)


class TabularDistilled(TabularActor):
    """An actor with an auxiliary value of every state, the head's plus the logit of token 1: both meet in a trunk."""

    def __init__(self, logits):
        super().__init__(logits)
        self.head = nn.Parameter(torch.zeros(NUM_STATES, dtype=logits.dtype))

    def logprobs(self, sequences):
        values = (self.head + self.logits[:, 1])[states_of(sequences, NUM_TOKENS)][:, :-1]
        auxiliary = {"auxiliary_values": torch.where(sequences.response_mask, values, 0.0)}
        return super().logprobs(sequences).merge(TokenOutputs(named=auxiliary))


def script(row, number):
    response = RESPONSES[number % len(RESPONSES)]
    return response, [-0.3 * (t + 1) for t in range(len(response))], response[-1] == 0


def reward(rollout):
    """Of every response the sum of its tokens; one cannot be scored."""
    responses = responses_of(rollout)
    total = torch.tensor([math.nan if one == UNSCORED else sum(one) - 3.0 for one in responses], dtype=torch.float64)
    return Scores(total=total, per_token=torch.zeros(rollout.sequences.response_ids.shape), parts={})


def descent(module, rate):
    """Plain gradient descent in the place of Adam."""
    trainable: Any = LocalTrainable(module, OptimizerConfig(learning_rate=rate, max_grad_norm=1e9), num_steps=10_000)
    trainable.optimizer = torch.optim.SGD([{"params": list(module.parameters()), "peak": rate}], lr=rate)
    return trainable


def build(*, every, engine=None, warmup=0, microbatch_tokens=10_000, make=descent, group=None, prompts=4, **changes):
    """A trainer of this many responses an iteration, half of them to a minibatch."""
    settings = {"auxiliary_every": every} | changes
    config = PPOConfig(kl_coef=0.0, **(settings if every is not None else {}))
    actor = TabularDistilled(random_logits(NUM_TOKENS, LIMIT).double())
    critic = TabularCritic(random_logits(NUM_TOKENS, LIMIT, seed=2).double()[:, 0].contiguous(), num_tokens=NUM_TOKENS)
    networks = Pair(actor, critic)
    update = {"num_epochs": 1, "minibatch_size": prompts // 2, "microbatch_tokens": microbatch_tokens}
    trained = {"actor": make(actor, 0.8), "critic": make(critic, 0.5)}
    trainer = make_trainer(
        make_ppo(config, networks, max_response_tokens=LIMIT, warmup_iterations=warmup),
        engine or ScriptedEngine(script),
        reward,
        trained,
        update=update,
        prompts_per_iteration=prompts,
    )
    if every is not None:
        trainer.auxiliary = DistillValues(
            networks=networks,
            every=every,
            num_epochs=config.auxiliary_epochs,
            kl_coef=config.auxiliary_kl_coef,
            warmup_iterations=warmup,
        )
    if group is not None:
        trainer.microbatcher = Microbatcher(TokenBudget(max_tokens=microbatch_tokens), context_of(group))
        for trainable in trained.values():
            trainable.collectives = group
    return trainer


def tables(trainer):
    return {
        f"{name}.{part}": p.detach().clone()
        for name, trainable in trainer.trained.items()
        for part, p in trainable.module.named_parameters()
    }


class Phase:
    """The auxiliary phase as loops over responses and tokens."""

    def __init__(self, trainer, returns, *, kl_coef):
        now = tables(trainer)
        self.logits, self.head = now["actor.logits"].tolist(), now["actor.head"].tolist()
        self.values = now["critic.table"].tolist()
        self.returns = returns
        self.kl_coef = kl_coef
        self.old = [self.distribution(state) for state in range(NUM_STATES)]

    def distribution(self, state):
        total = math.log(sum(math.exp(x) for x in self.logits[state]))
        return [x - total for x in self.logits[state]]

    def minibatch(self, rows):
        """One step on ``(response, its returns)``; returns the losses of head and critic, and the KL."""
        num_tokens = sum(len(response) for response, _ in rows)
        head_loss = critic_loss = kl = 0.0
        slopes = [[0.0] * NUM_TOKENS for _ in range(NUM_STATES)]
        head_slopes, critic_slopes = [0.0] * NUM_STATES, [0.0] * NUM_STATES
        for response, returns in rows:
            for t, token in enumerate(response):
                state = state_of(response[:t], NUM_TOKENS)
                now = self.distribution(state)
                sampled = -0.3 * (t + 1)
                importance = math.exp(self.old[state][token] - sampled)
                ratio = math.exp(now[token] - self.old[state][token])
                kl += importance * (ratio - 1 - math.log(ratio)) / num_tokens
                for other in range(NUM_TOKENS):
                    along = (other == token) - math.exp(now[other])
                    slopes[state][other] += self.kl_coef * importance * (ratio - 1) * along / num_tokens
                error = self.head[state] + self.logits[state][1] - returns[t]
                head_loss += 0.5 * error**2 / num_tokens
                critic_loss += 0.5 * (self.values[state] - returns[t]) ** 2 / num_tokens
                head_slopes[state] += error / num_tokens
                slopes[state][1] += error / num_tokens
                critic_slopes[state] += (self.values[state] - returns[t]) / num_tokens
        for state in range(NUM_STATES):
            self.logits[state] = [x - 0.8 * dx for x, dx in zip(self.logits[state], slopes[state], strict=True)]
            self.head[state] -= 0.8 * head_slopes[state]
            self.values[state] -= 0.5 * critic_slopes[state]
        return head_loss, critic_loss, kl


@pytest.mark.parametrize("microbatch_tokens", [1, 10_000])
@pytest.mark.parametrize("kl_coef", [1.0, 0.3])
def test_a_phase_is_the_papers_number_by_number(kl_coef, microbatch_tokens):
    trainer = build(every=2, auxiliary_epochs=3, auxiliary_kl_coef=kl_coef, microbatch_tokens=microbatch_tokens)
    collected, steps = [], []
    trainer.observe = lambda _, experience: collected.append(experience)
    update = trainer.update

    def watched(minibatch, losses_of=None):
        if losses_of is not None:
            if not steps:
                steps.append(Phase(trainer, None, kl_coef=kl_coef))
            metrics = update(minibatch, losses_of)
            steps.append((minibatch, metrics.values(), tables(trainer)))
            return metrics
        return update(minibatch)

    trainer.update = watched
    assert "auxiliary/kl" not in trainer.iterate().values()
    assert not steps
    trainer.iterate()

    returns = {}
    for experience in collected:
        for row, response in enumerate(responses_of(experience.rollout)):
            returns[response] = experience.returns[row, : len(response)].tolist()
    assert len(returns) == 8  # each response came once, in one of two iterations
    phase, *steps = steps
    assert len(steps) == 3 * 4
    seen, moved = [], 0.0
    for minibatch, told, now in steps:
        responses = responses_of(minibatch)
        seen += responses
        rows = [(one, returns[one]) for one in responses if one != UNSCORED]
        head_loss, critic_loss, kl = phase.minibatch(rows)
        moved = max(moved, kl)
        assert told["auxiliary/value_loss"] == pytest.approx(head_loss, abs=1e-6)
        assert told["auxiliary/critic_loss"] == pytest.approx(critic_loss, abs=1e-6)
        assert told["auxiliary/kl"] == pytest.approx(kl, abs=1e-6)
        expected = [x for row in phase.logits for x in row]
        assert now["actor.logits"].flatten().tolist() == pytest.approx(expected, abs=1e-6)
        assert now["actor.head"].tolist() == pytest.approx(phase.head, abs=1e-6)
        assert now["critic.table"].tolist() == pytest.approx(phase.values, abs=1e-6)
    assert sorted(seen) == sorted(RESPONSES * 3)
    assert moved > 0.01
    assert trainer.auxiliary.kept == []


def adam(module, rate):
    return LocalTrainable(module, OptimizerConfig(learning_rate=0.1 * rate, weight_decay=0.1), num_steps=10_000)


def sampled(**settings):
    """A trainer that samples from the actor as it is."""
    trainer = build(make=adam, **settings)
    trainer.engine = TabularEngine(trainer.trained["actor"].module)
    return trainer


def test_a_policy_phase_longer_than_the_run_is_ppo_to_the_bit():
    plain, phasic = sampled(every=None), sampled(every=4)
    for _ in range(3):
        expected, metrics = plain.iterate().values(), phasic.iterate().values()
        assert {k: v for k, v in metrics.items() if not k.startswith("time/") and k != "tokens/per_s"} == {
            k: v for k, v in expected.items() if not k.startswith("time/") and k != "tokens/per_s"
        }
    assert_close(tables(phasic), tables(plain), rtol=0, atol=0)
    phasic.iterate()
    assert tables(phasic)["actor.head"].any()


def test_a_run_goes_on_in_the_middle_of_a_phase_to_the_bit():
    """State as a checkpoint holds it: tensors by path, and JSON."""
    straight = sampled(every=3)
    states = []
    for _ in range(7):
        straight.iterate()
        tensors, rest = split_state(straight.state_dict())
        states.append(({name: x.clone() for name, x in tensors.items()}, json.dumps(rest)))
    kept = [join_state(tensors, json.loads(rest))["cursor"]["auxiliary"]["kept"] for tensors, rest in states]
    assert [len(parts) for parts in kept] == [1, 2, 0, 1, 2, 0, 1]
    for done in (2, 3, 4):
        resumed = sampled(every=3)
        tensors, rest = states[done - 1]
        resumed.load_state_dict(join_state(dict(tensors), json.loads(rest)))
        for _ in range(7 - done):
            resumed.iterate()
        assert_close(tables(resumed), tables(straight), rtol=0, atol=0)


def test_two_ranks_learn_what_one_learns():
    def learn(group):
        trainer = build(every=2, group=group, microbatch_tokens=6)
        metrics = [trainer.iterate().values() for _ in range(4)]
        return tables(trainer), [one.get("auxiliary/kl") for one in metrics]

    (alone,) = on_ranks(1, learn)
    for ours in on_ranks(2, learn):
        assert_close(ours[0], alone[0], rtol=1e-9, atol=1e-9)
        assert [kl is None for kl in ours[1]] == [True, False, True, False]
        assert [kl for kl in ours[1] if kl] == pytest.approx([kl for kl in alone[1] if kl], rel=1e-5)


def test_the_warm_up_of_the_critic_belongs_to_no_phase():
    trainer = build(every=2, warmup=3)
    before = tables(trainer)["actor.logits"]
    phases = ["auxiliary/kl" in trainer.iterate().values() for _ in range(3)]
    assert_close(tables(trainer)["actor.logits"], before, rtol=0, atol=0)
    phases += ["auxiliary/kl" in trainer.iterate().values() for _ in range(4)]
    assert phases == [False, False, False, False, True, False, True]


def test_what_is_not_counted_is_never_read():
    """NaN where nothing was chosen, and in the response that could not be scored."""
    learned = []
    for poison in (0.0, math.nan):
        trainer = build(every=2)
        collect = trainer.auxiliary.collect

        def collected(iteration, experience, poison=poison, collect=collect):
            rollout = experience.rollout
            off = torch.where(experience.counted, 0.0, poison)
            logprobs = rollout.rollout_logprobs + off
            return collect(
                iteration,
                replace(
                    experience, returns=experience.returns + off, rollout=replace(rollout, rollout_logprobs=logprobs)
                ),
            )

        trainer.auxiliary.collect = collected
        trainer.iterate()
        (kept,) = trainer.auxiliary.kept
        assert kept.returns.isfinite().all()
        assert kept.rollout_logprobs.isfinite().all()
        trainer.iterate()
        learned.append(tables(trainer))
    assert_close(learned[1], learned[0], rtol=0, atol=0)


def test_the_head_learns_and_a_large_coefficient_holds_the_policy():
    """The actor before a phase and after it, where it stands before its first token."""
    moved, explained = {}, {}
    for kl_coef in (0.0, 1.0, 30.0):
        trainer = sampled(every=1, auxiliary_epochs=10, auxiliary_kl_coef=kl_coef, prompts=400)
        actor, learn_again = trainer.trained["actor"].module, trainer.learn_again
        distances = []

        def watched(auxiliary, experience, actor=actor, learn_again=learn_again, distances=distances):
            before = actor.logits[0].detach().log_softmax(dim=0)
            metrics = learn_again(auxiliary, experience)
            now = actor.logits[0].detach().log_softmax(dim=0)
            distances.append((before.exp() * (before - now)).sum().item())
            return metrics

        trainer.learn_again = watched
        seen = [trainer.iterate().values()["auxiliary/explained_variance"] for _ in range(4)]
        moved[kl_coef], explained[kl_coef] = sum(distances), seen
    assert moved[30.0] < 0.3 * moved[1.0] < 0.3 * moved[0.0]
    assert all(seen[-1] > seen[0] for seen in explained.values())
