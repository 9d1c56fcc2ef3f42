"""One iteration of PPO number by number: two epochs of two minibatches, against the papers written as loops.

`Paper` is the reference. It knows tables, floats and loops, derives each gradient by hand, and imports nothing of ours;
the order in which the minibatches came is the only thing that it is told.

    GAE                     Schulman et al. 2016, arXiv:1506.02438, eq. 11-16
    clipped surrogate       Schulman et al. 2017, arXiv:1707.06347, eq. 7; entropy bonus, eq. 9
    dual clip               Ye et al. 2020, arXiv:1912.09729, eq. 5
    KL(old, new)            Schulman et al. 2017, section 4
    clipped value loss      Engstrom et al. 2020, arXiv:2005.12729, section 3
    its proximal term       Schulman et al. 2016, section 5, as a penalty
    reward with its KL      Ziegler et al. 2019, arXiv:1909.08593, eq. 2
    Adam                    Kingma and Ba 2015, arXiv:1412.6980, algorithm 1
"""

import math
from typing import Any

import pytest
import torch

from llmrl.algorithms.config import PPOConfig
from llmrl.batches import Scores
from llmrl.optim.config import OptimizerConfig
from llmrl.optim.local import LocalTrainable
from llmrl.rollout.scripted import ScriptedEngine
from tests import oracles

from .tabular import Pair, TabularActor, TabularCritic, make_ppo, make_trainer, random_logits

NUM_TOKENS, LIMIT = 4, 4
RESPONSES = [(1, 2, 0), (3, 3, 1, 2), (2, 0), (0,), (1, 1, 0), (2, 1, 3, 3), (3, 0), (1, 2, 3, 0)]
SCORES = [1.0, -2.5, 0.5, 0.0, 2.0, 0.25, -1.0, -0.75]
FINISHED = [response[-1] == 0 for response in RESPONSES]
PER_TOKEN = [[0.3 if token == 2 else 0.0 for token in response] for response in RESPONSES]
ACTOR_RATE, CRITIC_RATE, MAX_GRAD_NORM = 3.0, 2.0, 0.5


class Paper:
    """Tables of logits, values and reference logits; a state is where the response stands and its last token."""

    def __init__(self, logits, values, reference, settings, adam):
        self.logits, self.values, self.reference = logits.tolist(), values.tolist(), reference.tolist()
        self.settings = settings
        self.adam = adam
        self.moments = {}
        self.num_steps = 0
        self.seen = dict.fromkeys(("risen", "fallen", "dual", "value", "norm"), 0)
        self.collect()

    def states(self, response):
        return [0, *(t * NUM_TOKENS + token for t, token in enumerate(response, 1))]

    def logprob(self, table, state, token):
        return oracles.log_softmax(table[state], 1.0)[token]

    def collect(self):
        """Old log-probabilities and values, advantages over all tokens, returns."""
        s = self.settings
        self.old, self.old_values, rewards, bootstrap = [], [], [], []
        for row, response in enumerate(RESPONSES):
            *states, behind = self.states(response)
            self.old.append([self.logprob(self.logits, *at) for at in zip(states, response, strict=True)])
            self.old_values.append([self.values[state] for state in states])
            ref = [self.logprob(self.reference, *at) for at in zip(states, response, strict=True)]
            reward = [-s["kl_coef"] * (p - q) for p, q in zip(self.old[row], ref, strict=True)]
            score = min(max(SCORES[row], -s["score_clip"]), s["score_clip"])
            if not FINISHED[row]:
                score -= s["missing_eos_penalty"]
            cut = s["bootstrap_truncated"] and not FINISHED[row]
            bootstrap.append(self.values[behind] if cut else 0.0)
            reward[-1] += 0.0 if cut else score
            rewards.append([r + own for r, own in zip(reward, PER_TOKEN[row], strict=True)])
        estimates = {}
        for gae_lambda in {s["gae_lambda"], s["value_lambda"]}:
            mask = [[True] * len(response) for response in RESPONSES]
            estimates[gae_lambda] = oracles.gae_double_sum(
                rewards, self.old_values, mask, bootstrap, gamma=s["gamma"], gae_lambda=gae_lambda
            )
        raw = estimates[s["gae_lambda"]]
        flat = [a for row in raw for a in row]
        mean = sum(flat) / len(flat)
        std = math.sqrt(sum((a - mean) ** 2 for a in flat) / len(flat) + 1e-8)
        self.advantages = [[(a - mean) / std for a in row] for row in raw]
        targets = zip(estimates[s["value_lambda"]], self.old_values, strict=True)
        self.returns = [[a + v for a, v in zip(*row, strict=True)] for row in targets]

    def minibatch(self, rows):
        """One optimizer step of both tables; returns both losses."""
        s = self.settings
        num_tokens = sum(len(RESPONSES[row]) for row in rows)
        policy_loss = value_loss = 0.0
        slopes = [[0.0] * NUM_TOKENS for _ in self.logits]
        value_slopes = [0.0] * len(self.values)
        for row in rows:
            response = RESPONSES[row]
            for t, (state, token) in enumerate(zip(self.states(response), response, strict=False)):
                weight = 1 / num_tokens if s["aggregation"] == "token" else 1 / (len(rows) * len(response))
                loss, slope, entropy_slope = self.policy_token(row, t, state, token)
                policy_loss += weight * loss
                probabilities = [math.exp(x) for x in oracles.log_softmax(self.logits[state], 1.0)]
                for j, p in enumerate(probabilities):
                    slopes[state][j] += weight * (slope * ((j == token) - p) + entropy_slope[j])
                loss, slope = self.value_token(row, t, state)
                value_loss += weight * loss
                value_slopes[state] += weight * slope
        self.num_steps += 1
        flat = [x for row in self.logits for x in row]
        flat = self.descend("actor", flat, [x for row in slopes for x in row], ACTOR_RATE)
        self.logits = [flat[i : i + NUM_TOKENS] for i in range(0, len(flat), NUM_TOKENS)]
        self.values = self.descend("critic", self.values, value_slopes, CRITIC_RATE)
        return policy_loss, value_loss

    def policy_token(self, row, t, state, token):
        """Loss, its slope in the log-probability of the token, and the slopes of the entropy bonus in the logits."""
        s, advantage = self.settings, self.advantages[row][t]
        distribution = oracles.log_softmax(self.logits[state], 1.0)
        log_ratio = distribution[token] - self.old[row][t]
        ratio = math.exp(log_ratio)
        loss = oracles.clipped_policy_token(
            distribution[token],
            self.old[row][t],
            advantage,
            clip_low=s["clip_low"],
            clip_high=s["clip_high"],
            dual_clip=s["dual_clip"],
        )
        free = abs(loss - -advantage * ratio) < 1e-12
        if not free:
            self.seen["risen" if advantage > 0 else "fallen" if ratio < 1 else "dual"] += 1
        slope = -advantage * ratio if free else 0.0
        if s["step_kl_target"] is not None:
            loss += s["step_kl_coef"] * (ratio - 1 - log_ratio)
            slope += s["step_kl_coef"] * (ratio - 1)
        entropy = oracles.entropy(self.logits[state], 1.0)
        loss -= s["entropy_coef"] * entropy
        return loss, slope, [s["entropy_coef"] * math.exp(x) * (x + entropy) for x in distribution]

    def value_token(self, row, t, state):
        """Loss, and its slope in the value."""
        value, old, target = self.values[state], self.old_values[row][t], self.returns[row][t]
        clip = self.settings["value_clip"]
        loss = oracles.clipped_value_token(value, old, target, value_clip=clip)
        free = (value - target) ** 2 / 2 == loss  # else the clipped error is larger, and does not move with the value
        self.seen["value"] += not free
        slope = value - target if free else 0.0
        moved, coef = value - old, self.settings["value_proximal_coef"]
        return loss + coef * moved**2 / 2, slope + coef * moved

    def descend(self, name, x, slopes, rate):
        norm = math.sqrt(sum(slope**2 for slope in slopes))
        self.seen["norm"] += norm > MAX_GRAD_NORM
        slopes = [slope * min(1.0, MAX_GRAD_NORM / (norm + 1e-6)) for slope in slopes]
        if not self.adam:
            return [xi - rate * slope for xi, slope in zip(x, slopes, strict=True)]
        first, second = self.moments.get(name, ([0.0] * len(x), [0.0] * len(x)))
        first = [0.9 * m + 0.1 * slope for m, slope in zip(first, slopes, strict=True)]
        second = [0.999 * v + 0.001 * slope**2 for v, slope in zip(second, slopes, strict=True)]
        self.moments[name] = first, second
        unbiased = 1 - 0.9**self.num_steps, 1 - 0.999**self.num_steps
        return [
            xi - 0.1 * rate * (m / unbiased[0]) / (math.sqrt(v / unbiased[1]) + 1e-8)
            for xi, m, v in zip(x, first, second, strict=True)
        ]


def descent(module, rate, *, adam):
    """The real trainable, with Adam or with plain gradient descent in its place."""
    config = OptimizerConfig(learning_rate=0.1 * rate if adam else rate, max_grad_norm=MAX_GRAD_NORM)
    trainable: Any = LocalTrainable(module, config, num_steps=4)
    if not adam:
        groups = [{"params": list(module.parameters()), "peak": rate}]
        trainable.optimizer = torch.optim.SGD(groups, lr=rate)
    return trainable


def script(row, number):
    return RESPONSES[row["number"]], [0.0] * len(RESPONSES[row["number"]]), FINISHED[row["number"]]


def reward(rollout):
    per_token = torch.zeros(rollout.sequences.response_ids.shape, dtype=torch.float64)
    for row, own in enumerate(PER_TOKEN):
        per_token[row, : len(own)] = torch.tensor(own, dtype=torch.float64)
    return Scores(total=torch.tensor(SCORES, dtype=torch.float64), per_token=per_token, parts={})


DEFAULTS = {
    "gamma": 0.97,
    "gae_lambda": 0.9,
    "value_lambda": 0.9,
    "clip_low": 0.2,
    "clip_high": 0.2,
    "dual_clip": None,
    "value_clip": 0.2,
    "value_proximal_coef": 0.0,
    "entropy_coef": 0.02,
    "aggregation": "token",
    "kl_coef": 0.1,
    "step_kl_target": None,
    "step_kl_coef": 1.0,
    "score_clip": 1.5,
    "missing_eos_penalty": 0.5,
    "bootstrap_truncated": False,
}
OTHERS = {
    "gamma": 1.0,
    "value_lambda": 1.0,
    "clip_high": 0.3,
    "dual_clip": 1.05,
    "value_clip": 0.1,
    "value_proximal_coef": 0.7,
    "aggregation": "sequence",
    "step_kl_target": 0.01,
    "step_kl_coef": 0.3,
    "missing_eos_penalty": 0.0,
    "bootstrap_truncated": True,
}


@pytest.mark.parametrize("adam", [False, True], ids=["descent", "adam"])
@pytest.mark.parametrize("changes", [{}, OTHERS], ids=["plain", "every setting"])
@pytest.mark.parametrize("microbatch_tokens", [1, 10_000])
def test_an_update_is_the_papers_number_by_number(changes, adam, microbatch_tokens):
    settings = DEFAULTS | changes
    config = PPOConfig(**{name: value for name, value in settings.items() if name != "step_kl_coef"})
    logits, reference = (random_logits(NUM_TOKENS, LIMIT, seed=seed).double() for seed in (0, 1))
    values = random_logits(NUM_TOKENS, LIMIT, seed=2).double()[:, 0].contiguous()
    paper = Paper(logits, values, reference, settings, adam)

    actor, critic = TabularActor(logits.clone()), TabularCritic(values.clone(), num_tokens=NUM_TOKENS)
    trainer = make_trainer(
        make_ppo(
            config,
            Pair(actor, critic),
            reference=TabularActor(reference),
            max_response_tokens=LIMIT,
            step_kl_coef=settings["step_kl_coef"],
        ),
        ScriptedEngine(script),
        reward,
        {
            "actor": descent(actor, ACTOR_RATE, adam=adam),
            "critic": descent(critic, CRITIC_RATE, adam=adam),
        },
        update={"num_epochs": 2, "minibatch_size": 4, "microbatch_tokens": microbatch_tokens},
        prompts_per_iteration=8,
    )
    collected, steps = [], []
    trainer.observe = lambda _, experience: collected.append(experience)
    update = trainer.update

    def watched(minibatch):
        metrics = update(minibatch)
        rows = [row["number"] for row in minibatch.rollout.rows]
        steps.append((rows, metrics.values(), actor.logits.detach().clone(), critic.table.detach().clone()))
        return metrics

    trainer.update = watched
    trainer.iterate()

    (experience,) = collected
    for ours, theirs in (
        (experience.old_logprobs, paper.old),
        (experience.old_values, paper.old_values),
        (experience.advantages, paper.advantages),
        (experience.returns, paper.returns),
    ):
        for row, expected in enumerate(theirs):
            assert ours[row, : len(expected)].tolist() == pytest.approx(expected, abs=1e-6)
            assert (ours[row, len(expected) :] == 0).all()

    assert [sorted(steps[0][0] + steps[1][0]), sorted(steps[2][0] + steps[3][0])] == [list(range(8))] * 2
    for rows, told, our_logits, our_values in steps:
        policy_loss, value_loss = paper.minibatch(rows)
        assert told["policy/loss"] == pytest.approx(policy_loss, abs=1e-6)
        assert told["value/loss"] == pytest.approx(value_loss, abs=1e-6)
        assert our_logits.flatten().tolist() == pytest.approx([x for row in paper.logits for x in row], abs=2e-6)
        assert our_values.tolist() == pytest.approx(paper.values, abs=2e-6)
    assert (actor.logits - logits).abs().max() > 0.1
    expected = {"risen", "fallen", "value", "norm"} | ({"dual"} if settings["dual_clip"] else set())
    assert {name for name, count in paper.seen.items() if count} == expected  # more than the unclipped case is compared
