"""The implicit critic as tables: against theory, a loop over tokens, and PPO itself."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from llmrl.algorithms.config import PPOConfig
from llmrl.algorithms.implicit import ImplicitPPO
from llmrl.batches import TokenOutputs
from llmrl.functional.losses import clipped_policy_loss
from llmrl.functional.mtp import next_chosen
from llmrl.models.mtp import TargetHeads
from llmrl.optim.config import OptimizerConfig
from llmrl.optim.local import LocalTrainable
from tests.contexts import sampling_of

from .tabular import (
    NumberedPrompts,
    Pair,
    TabularActor,
    TabularEngine,
    all_responses,
    make_ppo,
    make_trainer,
    random_logits,
    reward_of,
    states_of,
)
from .test_ppo_theory import distribution, optimum, pair_scores, total_variation, values_by_enumeration

SETTINGS = {"prediction_coef": 0.1, "target_rate": 0.5, "value_grad_clamp": 1.0}


class TabularHeads(nn.Module):
    """Values of every head in every state, and logits of the further tokens."""

    def __init__(self, num_heads, num_states, num_tokens, *, seed=None):
        super().__init__()
        generator = torch.Generator().manual_seed(seed or 0)
        spread = 0.0 if seed is None else 1.0
        self.values = nn.Parameter(spread * torch.randn(1 + num_heads, num_states, generator=generator))
        self.logits = nn.Parameter(spread * torch.randn(num_heads, num_states, num_tokens, generator=generator))


class TabularImplicit(nn.Module):
    """Actor, heads and target heads: the outputs of `MTPModule`."""

    share_trunk = True

    def __init__(self, actor, heads, targets=None):
        super().__init__()
        self.actor, self.heads = actor, heads
        self.targets = (copy.deepcopy(heads) if targets is None else targets).requires_grad_(False)

    def both(self, sequences):
        states, mask = states_of(sequences, self.actor.logits.shape[1]), sequences.response_mask
        named = dict(self.actor.logprobs(sequences).named)
        for prefix, heads in (("", self.heads), ("target_", self.targets)):
            tables = heads.values[:, states]
            named |= {f"{prefix}values/{k}": torch.where(mask, x[:, :-1], 0.0) for k, x in enumerate(tables)}
            named[f"{prefix}last_values"] = tables[0].gather(1, sequences.response_lengths[:, None]).squeeze(1)
        ids, known = sequences.response_ids, mask
        for k, logits in enumerate(self.heads.logits.log_softmax(dim=-1)[:, states[:, :-1]], start=1):
            ids, known = next_chosen(ids, mask), next_chosen(known, mask)
            named[f"predicted/{k}"] = torch.where(known, logits.gather(-1, ids[..., None]).squeeze(-1), 0.0)
        return TokenOutputs(named={**named, "values": named["values/0"]})

    logprobs = values = both


def make_implicit(config, networks, *, reference=None, max_response_tokens=2, value_coef=0.5, **changes):
    return ImplicitPPO(
        config,
        targets=TargetHeads(networks.heads, networks.targets),
        num_heads=len(networks.heads.logits),
        networks=networks,
        reference=reference,
        max_response_tokens=max_response_tokens,
        warmup_iterations=0,
        value_coef=value_coef,
        one_step=False,
        **(SETTINGS | changes),
    )


def networks_of(actor, num_heads, *, seed=None, targets=None):
    num_states, num_tokens = actor.logits.shape
    return TabularImplicit(actor, TabularHeads(num_heads, num_states, num_tokens, seed=seed), targets)


def train(config, networks, scores, *, num_iterations, rates, reference, **changes):
    """The real loop: 512 responses an iteration, two epochs of two minibatches."""
    actor, limit = networks.actor, max(map(len, scores))
    algorithm = make_implicit(config, networks, reference=reference, max_response_tokens=limit, **changes)
    optimizer = OptimizerConfig(learning_rate=rates[1], schedule="linear", max_grad_norm=math.inf)
    peaks = {"actor.logits": rates[0]}
    trained = {"actor": LocalTrainable(networks, optimizer, num_steps=4 * num_iterations, peaks=peaks)}
    trainer = make_trainer(
        algorithm,
        TabularEngine(actor),
        reward_of(scores),
        trained,
        update={"num_epochs": 2, "minibatch_size": 256, "microbatch_tokens": 10**6},
        prompts_per_iteration=512,
    )
    return [trainer.iterate().values() for _ in range(num_iterations)]


# --- theory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_heads", [1, 2])
def test_the_enumerated_game_reaches_its_optimum(num_heads):
    scores, actor = pair_scores(), TabularActor(random_logits(4, 2, seed=1))
    before, reference = distribution(actor, scores), copy.deepcopy(actor).requires_grad_(False)
    best = optimum(before, scores, 0.3)
    assert total_variation(before, best) > 0.3
    networks = networks_of(actor, num_heads)
    train(PPOConfig(kl_coef=0.3), networks, scores, num_iterations=40, rates=(0.08, 0.1), reference=reference)
    assert total_variation(distribution(actor, scores), best) < 0.05


def test_heads_of_a_frozen_actor_learn_the_values_and_the_tokens_of_its_policy():
    scores = {y: 1 + 2 * score for y, score in pair_scores().items()}
    actor, reference = (TabularActor(random_logits(4, 2, seed=seed)) for seed in (1, 2))
    networks = networks_of(actor, 1)
    known = values_by_enumeration(actor, reference, scores, kl_coef=0.3, gamma=0.7)
    config = PPOConfig(kl_coef=0.3, gamma=0.7)
    train(config, networks, scores, num_iterations=60, rates=(0.0, 0.1), reference=reference, value_grad_clamp=9.0)
    learned = networks.heads.values[0].tolist()
    assert max(abs(learned[state] - value) for state, (_, value) in known.items()) < 0.1
    second = [sum(actor.probability((a, b)) for a in range(1, 4)) for b in range(4)]
    predicted = networks.heads.logits[0, 0].softmax(0).tolist()
    assert predicted == pytest.approx([p / sum(second) for p in second], abs=0.05)  # of responses that go on
    ahead = sum(actor.probability((a,)) * known[4 + a][1] for a in range(1, 4))
    assert networks.heads.values[1, 0].item() == pytest.approx(ahead, abs=0.1)  # v_1 of the first state: one move on


# --- the losses, number by number -------------------------------------------------------------------------------------


def sampled(algorithm, networks):
    """An experience of 24 responses of three tokens at most."""
    scores = {y: float(sum(y) % 3) for y in all_responses(4, 3)}
    with torch.no_grad():
        sampling = sampling_of(1, seed=0, max_response_tokens=3)
        rollout = TabularEngine(networks.actor).generate(NumberedPrompts().next(24), sampling)
        return algorithm.experience(rollout, reward_of(scores)(rollout))[0]


def setup(**changes):
    actor = TabularActor(random_logits(4, 3, seed=1))
    targets = TabularHeads(2, 16, 4, seed=3)
    networks = networks_of(actor, 2, seed=2, targets=targets)
    config = PPOConfig(kl_coef=0.0, gamma=0.9, bootstrap_truncated=changes.pop("bootstrap_truncated", False))
    algorithm = make_implicit(
        config, networks, max_response_tokens=3, value_grad_clamp=0.8, prediction_coef=0.3, value_coef=0.7, **changes
    )
    return algorithm, networks


def slow_loss(batch, networks, weights, *, bootstrap_truncated):
    """0.7 times the values' and 0.3 times the predictions' loss, one token and one head at a time, K = 2."""
    value, prediction = 0.0, 0.0
    states = states_of(batch.sequences, 4)
    for row, mask in enumerate(batch.sequences.response_mask):
        length = int(mask.sum())
        ids = batch.sequences.response_ids[row].tolist()
        end = float(batch.scores.total[row])
        if bootstrap_truncated and not batch.rollout.finished[row]:
            end = 0.9 * float(networks.targets.values[0, states[row, length]])
        for t in range(length):
            for k in range(3):
                reward = end if t + k == length - 1 else 0.0
                if k < 2:
                    after = float(networks.targets.values[k + 1, states[row, t]])
                else:
                    after = float(networks.targets.values[2, states[row, t + 1]]) if t + 1 < length else 0.0
                error = networks.heads.values[k, states[row, t]] - (reward + 0.9 * after)
                size = error.abs()
                huber = 0.5 * error**2 if float(size.detach()) <= 0.8 else 0.8 * (size - 0.4)
                value = value + float(weights[row, t]) * huber / 3
                if k and t + k < length:
                    logits = networks.heads.logits[k - 1, states[row, t]]
                    prediction = prediction - float(weights[row, t]) * logits.log_softmax(0)[ids[t + k]] / 2
    return 0.7 * value + 0.3 * prediction


@pytest.mark.parametrize("bootstrap_truncated", [False, True])
def test_losses_and_gradients_are_those_of_the_slow_loop(bootstrap_truncated):
    algorithm, networks = setup(bootstrap_truncated=bootstrap_truncated)
    batch = sampled(algorithm, networks)
    assert len(set(batch.sequences.response_lengths.tolist())) == 3
    weights = torch.where(batch.counted, 1.0 + torch.arange(batch.counted.numel()).view_as(batch.counted), 0.0) / 100
    ((name, loss, metrics),) = algorithm.losses(batch, weights)
    outputs = networks.both(batch.sequences)
    policy, _ = clipped_policy_loss(
        outputs.logprobs, batch.old_logprobs, batch.advantages, weights, clip_low=0.2, clip_high=0.2
    )
    expected = policy + slow_loss(batch, networks, weights, bootstrap_truncated=bootstrap_truncated)
    assert name == "actor"
    assert_close(loss, expected)
    learning = [*networks.actor.parameters(), *networks.heads.parameters()]
    ours, theirs = (torch.autograd.grad(x, learning) for x in (loss, expected))
    assert_close(ours, theirs)
    assert 0 < metrics.values()["value/clamp_fraction"] < 1


def test_a_split_into_microbatches_changes_nothing():
    algorithm, networks = setup()
    batch = sampled(algorithm, networks)
    weights = torch.where(batch.counted, 1 / batch.counted.sum(), 0.0)
    ((_, whole, _),) = algorithm.losses(batch, weights)
    parts = []
    for rows in torch.arange(24).split(5):
        ((_, loss, _),) = algorithm.losses(batch.select(rows), weights[rows])
        parts.append(loss)
    assert_close(sum(parts), whole)
    gradients = [torch.autograd.grad(x, list(networks.heads.parameters())) for x in (whole, sum(parts))]
    assert_close(*gradients)


def test_advantages_are_those_of_ppo_on_the_first_values():
    algorithm, networks = setup()
    ppo = make_ppo(algorithm.config, Pair(networks, networks, share_trunk=True), max_response_tokens=3, value_coef=0.7)
    ours, theirs = sampled(algorithm, networks), sampled(ppo, networks)
    for name in ("advantages", "returns", "old_values", "old_logprobs"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


# --- state ------------------------------------------------------------------------------------------------------------


def test_target_heads_move_once_an_iteration_and_are_part_of_the_state():
    algorithm, networks = setup(target_rate=0.25)
    batch = sampled(algorithm, networks)
    before, live = networks.targets.values.clone(), networks.heads.values
    algorithm.finish(batch)
    assert_close(networks.targets.values, 0.75 * before + 0.25 * live.detach())
    state = copy.deepcopy(algorithm.state_dict())
    other, others = setup()
    other.load_state_dict(state)
    assert torch.equal(others.targets.values, networks.targets.values)
    assert not math.isclose(float(before[0, 0]), float(others.targets.values[0, 0]))
