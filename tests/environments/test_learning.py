"""Learning over turns against a slow reference: episodes as nested lists, loops over the tokens that the actor chose.

The reference has no tensor, no mask and no padding; gradients are central differences.
"""

import math
from dataclasses import dataclass, replace
from functools import cache, partial

import pytest
import torch

from llmrl.algorithms import grpo as grpo_module
from llmrl.algorithms import policy_gradient
from llmrl.algorithms import ppo as ppo_module
from llmrl.algorithms.config import GRPOConfig, PPOConfig
from llmrl.algorithms.grpo import GRPO
from llmrl.batches import Episodes, Rollout, Sequences, StopReason, TokenOutputs
from llmrl.environments.reward import EpisodeReward
from llmrl.functional import losses
from llmrl.trainers.rl import describe
from tests import oracles
from tests.algorithms.tabular import Pair, TabularActor, TabularCritic, make_ppo, random_logits

V, LIMIT = 5, 12
WIDTH = LIMIT + 1
"""One column that no response needs."""


@dataclass(frozen=True)
class Told:
    """An episode: what the actor chose in each turn, what it was fed after that, and the reward of the turn."""

    group: int
    turns: list[tuple[list[int], list[int], float]]
    end_reward: float = 0.0
    stop: StopReason = StopReason.EOS

    @property
    def failed(self):
        return self.stop == StopReason.FAILED

    @property
    def ids(self):
        return [token for chosen, fed, _ in self.turns for token in chosen + fed]

    @property
    def num_chosen(self):
        return sum(len(chosen) for chosen, _, _ in self.turns)

    def tokens(self):
        """Turn, state and id of each token that the actor chose."""
        position, previous = 0, 0
        for turn, (chosen, fed, _) in enumerate(self.turns):
            for token in chosen:
                yield turn, position * V + previous, token
                position, previous = position + 1, token
            for token in fed:
                position, previous = position + 1, token

    @property
    def end_state(self):
        return len(self.ids) * V + self.ids[-1]


EPISODES = [
    Told(0, [([3, 1, 0], [2, 4], -0.5), ([2, 0], [], 1.0)], end_reward=0.25),
    Told(0, [([1, 0], [2], 0.3), ([4, 4, 0], [], -0.2)]),
    Told(0, [([0], [], 0.1)], end_reward=-0.4),  # over after its first turn
    Told(0, [([1, 2, 0], [4], 0.2), ([3, 0], [1, 1, 2], 0.8), ([4, 0], [], -0.6)]),
    Told(1, [([2, 0], [1, 3, 3], 0.15), ([4, 1], [], 0.0)], stop=StopReason.LENGTH),
    Told(1, [([3, 0], [4], 0.4), ([1, 0], [], 9.0)], end_reward=7.0, stop=StopReason.FAILED),
    Told(1, [([2, 2, 0], [0], -1.0), ([0], [], 0.6)], stop=StopReason.TURNS),  # it was fed the id that ends a turn
    Told(1, [([1, 0], [3], 0.2), ([2, 0], [4, 4], -0.3), ([3, 3, 0], [], 0.7)], end_reward=0.1),
]
SCORED = [each for each in EPISODES if not each.failed]


def make_rollout():
    """The same as tensors, by hand: padded with the id that ends a turn."""
    ids, mask = torch.zeros(len(EPISODES), WIDTH, dtype=torch.long), torch.zeros(len(EPISODES), WIDTH, dtype=torch.bool)
    ends, rewards = torch.zeros(len(EPISODES), 3, dtype=torch.long), torch.zeros(len(EPISODES), 3)
    for row, each in enumerate(EPISODES):
        ids[row, : len(each.ids)] = torch.tensor(each.ids)
        column = 0
        for turn, (chosen, fed, reward) in enumerate(each.turns):
            mask[row, column : column + len(chosen)] = True
            ends[row, turn], rewards[row, turn] = column + len(chosen), reward
            column += len(chosen) + len(fed)
    count = len(EPISODES)
    prompts = torch.ones(count, 1, dtype=torch.long)
    return Rollout(
        sequences=Sequences.from_rows(
            prompt_ids=prompts,
            prompt_mask=prompts.bool(),
            response_ids=ids,
            response_mask=mask,
            response_lengths=torch.tensor([len(each.ids) for each in EPISODES]),
        ),
        rollout_logprobs=torch.zeros(ids.shape),
        stop_reason=torch.tensor([each.stop for each in EPISODES]),
        group_ids=torch.tensor([each.group for each in EPISODES]),
        rows=({},) * count,
        episodes=Episodes(
            turn_ends=ends,
            turn_rewards=rewards,
            end_reward=torch.tensor([each.end_reward for each in EPISODES]),
            num_calls=torch.zeros(count, dtype=torch.long),
            num_bad_calls=torch.zeros(count, dtype=torch.long),
            failures=tuple("respond" if each.failed else None for each in EPISODES),
            reasons=tuple("raised" if each.failed else None for each in EPISODES),
            openings=("",) * count,
            messages=((),) * count,
        ),
    )


OLD, NEW, REF = (random_logits(V, WIDTH, seed=seed) for seed in range(3))
LIVE = OLD + 0.4 * NEW
"""Far enough from the old policy for some ratios to be clipped."""
OLD_VALUES, LIVE_VALUES = (random_logits(V, WIDTH, seed=seed)[:, 0] for seed in (3, 4))


class Poisoned:
    """A network whose outputs are NaN wherever the actor chose nothing."""

    def __init__(self, network, *, by=math.nan):
        self.network = network
        self.by = by

    def __getattr__(self, name):
        def outputs(sequences):
            named = getattr(self.network, name)(sequences).named
            mask = sequences.response_mask
            return TokenOutputs(
                named={key: x.masked_fill(~mask, self.by) if x.dim() == 2 else x for key, x in named.items()}
            )

        return outputs


# --- ours -------------------------------------------------------------------------------------------------------------


def learn(config, *, poison=math.nan):
    """Losses of one minibatch, their gradients, and metrics of the experience."""
    rollout = make_rollout()
    scores = EpisodeReward("game")(rollout)
    actor, critic = TabularActor(OLD.clone()), TabularCritic(OLD_VALUES.clone(), num_tokens=V)
    reference = Poisoned(TabularActor(REF), by=poison)
    if isinstance(config, PPOConfig):
        networks = Pair(Poisoned(actor, by=poison), Poisoned(critic, by=poison))
        algorithm = make_ppo(config, networks, reference=reference, max_response_tokens=LIMIT)
    else:
        algorithm = GRPO(config, actor=Poisoned(actor, by=poison), reference=reference, max_response_tokens=LIMIT)
    with torch.no_grad():
        experience, metrics = algorithm.experience(rollout, scores)
        actor.logits.copy_(LIVE)
        critic.table.copy_(LIVE_VALUES)
    mask = experience.counted
    weights = losses.token_weights(
        mask,
        aggregation=config.aggregation,
        num_tokens=mask.sum(),
        num_responses=mask.any(dim=1).sum(),
        max_response_tokens=LIMIT,
    )
    told = {}
    for name, loss, _ in algorithm.losses(experience, weights):
        loss.backward()
        parameter = actor.logits if name == "actor" else critic.table
        told[name] = [loss.detach().double(), parameter.grad.double()]
    names = ("policy/entropy", "kl/mean", "kl/sequence")
    told["metrics"] = [torch.tensor([metrics.values()[name] for name in names]).double()]
    return told


# --- the reference ----------------------------------------------------------------------------------------------------


def logprob(table, state, token):
    return oracles.log_softmax(table[state], 1.0)[token]


def overlong(each, config):
    """DAPO, eq. 13, by the tokens that the actor chose."""
    if not config.overlong_buffer_tokens:
        return 0.0
    start = LIMIT - config.overlong_buffer_tokens
    return min(0.0, max(-1.0, (start - each.num_chosen) / config.overlong_buffer_tokens))


def learned_of(config):
    return [each for each in SCORED if each.stop == StopReason.EOS or not config.mask_truncated]


def weight(each, config, learned):
    return {
        "token": 1 / sum(other.num_chosen for other in learned),
        "sequence": 1 / len(learned) / each.num_chosen,
        "constant": 1 / len(learned) / LIMIT,
    }[config.aggregation]


def advantages_by_group(config):
    """Of each turn of each scored episode."""
    compare = {"mean": lambda s, g: oracles.group_relative(s, g, scale=config.scale)}.get(
        config.baseline, oracles.leave_one_out
    )
    ends = [each.end_reward + overlong(each, config) for each in SCORED]
    if config.credit == "response":
        scores = [end + sum(reward for *_, reward in each.turns) for end, each in zip(ends, SCORED, strict=True)]
        advantages = compare(scores, [each.group for each in SCORED])
        return [[advantage] * len(each.turns) for advantage, each in zip(advantages, SCORED, strict=True)]
    found = [[0.0] * len(each.turns) for each in SCORED]
    for turn in range(3):
        having = [n for n, each in enumerate(SCORED) if len(each.turns) > turn]
        to_go = [ends[n] + sum(reward for *_, reward in SCORED[n].turns[turn:]) for n in having]
        for n, advantage in zip(having, compare(to_go, [SCORED[n].group for n in having]), strict=True):
            found[n][turn] = advantage
    return found


def grpo_loss(config, live):
    old, ref = OLD.tolist(), REF.tolist()
    learned, total = learned_of(config), 0.0
    for each, advantages in zip(SCORED, advantages_by_group(config), strict=True):
        if each not in learned:
            continue
        gaps = [logprob(live, state, token) - logprob(old, state, token) for _, state, token in each.tokens()]
        mean_gap = sum(gaps) / len(gaps)
        for (turn, state, token), gap in zip(each.tokens(), gaps, strict=True):
            log_ratio = mean_gap if config.ratio == "sequence" else gap
            loss = oracles.clipped_policy_token(
                log_ratio, 0.0, advantages[turn], clip_low=0.2, clip_high=0.2, dual_clip=None
            )
            d = logprob(live, state, token) - logprob(ref, state, token)
            loss += config.kl_coef * math.exp(gap) * (math.exp(-d) - 1 + d)
            loss -= config.entropy_coef * oracles.entropy(live[state], 1.0)
            total += weight(each, config, learned) * loss
    return total


def ppo_targets(config):
    """Standardized advantages and returns of each token, by episode."""
    old, ref, values = OLD.tolist(), REF.tolist(), OLD_VALUES.tolist()
    advantages, returns = [], []
    for each in learned_of(config):
        rewards = [
            -config.kl_coef * (logprob(old, state, token) - logprob(ref, state, token))
            for _, state, token in each.tokens()
        ]
        last = -1
        for chosen, _, reward in each.turns:
            last += len(chosen)
            rewards[last] += reward
        is_cut = each.stop != StopReason.EOS
        bootstrap = values[each.end_state] if is_cut and config.bootstrap_truncated else 0.0
        if not (is_cut and config.bootstrap_truncated):
            rewards[-1] += each.end_reward - config.missing_eos_penalty * is_cut + overlong(each, config)
        before = [values[state] for _, state, _ in each.tokens()]
        (found,) = oracles.gae_double_sum(
            [rewards],
            [before],
            [[True] * len(rewards)],
            [bootstrap],
            gamma=config.gamma,
            gae_lambda=config.gae_lambda,
        )
        advantages.append(found)
        returns.append([x + value for x, value in zip(found, before, strict=True)])
    every = [x for row in advantages for x in row]
    mean = sum(every) / len(every)
    scale = math.sqrt(sum((x - mean) ** 2 for x in every) / len(every) + 1e-8)
    return [[(x - mean) / scale for x in row] for row in advantages], returns


def ppo_loss(config, every_advantage, live):
    old, learned, total = OLD.tolist(), learned_of(config), 0.0
    for each, advantages in zip(learned, every_advantage, strict=True):
        for (_, state, token), advantage in zip(each.tokens(), advantages, strict=True):
            loss = oracles.clipped_policy_token(
                logprob(live, state, token), logprob(old, state, token), advantage,
                clip_low=0.2, clip_high=0.2, dual_clip=None,
            )  # fmt: skip
            loss -= config.entropy_coef * oracles.entropy(live[state], 1.0)
            total += weight(each, config, learned) * loss
    return total


def value_loss(config, every_return, live):
    old, learned, total = OLD_VALUES.tolist(), learned_of(config), 0.0
    for each, returns in zip(learned, every_return, strict=True):
        for (_, state, _), target in zip(each.tokens(), returns, strict=True):
            loss = oracles.clipped_value_token(live[state], old[state], target, value_clip=config.value_clip)
            total += weight(each, config, learned) * loss
    return total


def with_gradient(loss, table):
    """A loss and its gradient, each entry by the difference of two losses."""
    at, flat = table.double(), table.double().flatten()
    slopes = torch.zeros_like(flat)
    states = {state for each in EPISODES for _, state, _ in each.tokens()}
    width = flat.numel() // len(table)
    for entry in (state * width + k for state in states for k in range(width)):
        sides = []
        for step in (1e-5, -1e-5):
            moved = flat.clone()
            moved[entry] += step
            sides.append(loss(moved.view_as(at).tolist()))
        slopes[entry] = (sides[0] - sides[1]) / 2e-5
    return [torch.tensor(loss(at.tolist())).double(), slopes.view_as(at)]


@cache
def reference_of(config):
    old, ref = OLD.tolist(), REF.tolist()
    kept = learned_of(config)
    tokens = [(state, token) for each in kept for _, state, token in each.tokens()]
    nats = sum(logprob(old, *each) - logprob(ref, *each) for each in tokens)
    entropy = sum(oracles.entropy(old[state], 1.0) for state, _ in tokens)
    told = {"metrics": [torch.tensor([entropy / len(tokens), nats / len(tokens), nats / len(kept)]).double()]}
    if isinstance(config, PPOConfig):
        advantages, returns = ppo_targets(config)
        told["actor"] = with_gradient(partial(ppo_loss, config, advantages), LIVE)
        told["critic"] = with_gradient(partial(value_loss, config, returns), LIVE_VALUES)
    else:
        told["actor"] = with_gradient(partial(grpo_loss, config), LIVE)
    return told


COMMON = {"entropy_coef": 0.05, "kl_coef": 0.2, "overlong_buffer_tokens": 7}
PPO_COMMON = {**COMMON, "gamma": 0.9, "gae_lambda": 0.8, "missing_eos_penalty": 0.3}
GRPO_COMMON = {**COMMON, "group_size": 4, "kl_form": "k3"}
BY_OTHERS = {**GRPO_COMMON, "baseline": "leave_one_out", "scale": "none"}
CONFIGS = {
    "ppo": PPOConfig(**COMMON, gamma=0.9, gae_lambda=0.8, missing_eos_penalty=0.3),
    "ppo, each response the same": PPOConfig(
        kl_coef=0.2, gae_lambda=0.7, aggregation="sequence", bootstrap_truncated=True
    ),
    "ppo, without the truncated": PPOConfig(**COMMON, aggregation="constant", mask_truncated=True),
    "grpo": GRPOConfig(**GRPO_COMMON),
    "grpo, each response the same": GRPOConfig(**BY_OTHERS, aggregation="sequence"),
    "turns": GRPOConfig(**GRPO_COMMON, credit="turn"),
    "turns, by the others": GRPOConfig(**BY_OTHERS, credit="turn", aggregation="constant"),
    "turns, without the truncated": GRPOConfig(**GRPO_COMMON, credit="turn", mask_truncated=True),
    "turns, a ratio for a response": GRPOConfig(**GRPO_COMMON, credit="turn", aggregation="sequence", ratio="sequence"),
}


def differences(ours, theirs):
    """What differs, of losses, gradients and metrics."""
    assert ours.keys() == theirs.keys()
    return [
        f"{name} {part}"
        for name in ours
        for part, (left, right) in enumerate(zip(ours[name], theirs[name], strict=True))
        if not torch.allclose(left, right, rtol=2e-5, atol=2e-6)
    ]


@pytest.mark.parametrize("name", CONFIGS)
def test_losses_gradients_and_metrics_are_those_of_the_reference(name):
    assert differences(learn(CONFIGS[name]), reference_of(CONFIGS[name])) == []


# --- planted bugs -----------------------------------------------------------------------------------------------------


def late(x):
    """One column too late."""
    return x.roll(1, dims=1)


def early(x):
    """One column too early."""
    return x.roll(-1, dims=1)


def shifts(place, name, argument, shift=late):
    """A plant: a function is called with an argument that is off by one."""

    def plant(patch):
        function = getattr(place, name)

        def planted(*arguments, **named):
            changed = list(arguments)
            changed[argument] = shift(changed[argument])
            return function(*changed, **named)

        patch.setattr(place, name, planted)

    return plant


def counts_what_was_fed(patch):
    patch.setattr(Rollout, "num_chosen", property(lambda self: self.sequences.response_lengths))


def turns_begin_late(patch):
    turns = Rollout.turn_of_token.fget
    patch.setattr(Rollout, "turn_of_token", property(lambda self: late(turns(self))))


def turns_land(by):
    def plant(patch):
        ends = EpisodeReward.__call__

        def planted(self, rollout):
            moved = rollout.episodes.turn_ends + by
            return ends(self, replace(rollout, episodes=replace(rollout.episodes, turn_ends=moved)))

        patch.setattr(EpisodeReward, "__call__", planted)

    return plant


def learns_from_what_was_fed(patch):
    """From the first token after each turn."""
    counted = ppo_module.counted_tokens

    def planted(rollout, scores):
        mask = counted(rollout, scores)
        return mask | late(mask)

    patch.setattr("llmrl.batches.counted_tokens", planted)
    patch.setattr(ppo_module, "counted_tokens", planted)


BY_TURN = [name for name in CONFIGS if name.startswith(("ppo", "turns"))]
PLANTS = {
    "the mask of the losses": (CONFIGS, learns_from_what_was_fed),
    "weights": (CONFIGS, shifts(losses, "token_weights", 0)),
    "entropy bonus": (CONFIGS, shifts(policy_gradient, "masked_sum", 1)),
    "lengths of the penalty": (["ppo", "grpo", "turns"], counts_what_was_fed),
    "rewards of turns, late": (BY_TURN, turns_land(1)),
    "rewards of turns, early": (["ppo", "turns"], turns_land(-1)),
    "score": (["ppo"], shifts(ppo_module, "shape_rewards", 2, early)),
    "nats of the reward": (["ppo"], shifts(ppo_module, "shape_rewards", 1)),
    "gae": (["ppo"], shifts(ppo_module, "gae", 2)),
    "moments of advantages": (["ppo"], shifts(ppo_module, "standardize", 1)),
    "values": (["ppo"], shifts(ppo_module, "gae", 1, early)),
    "nats of the loss": (["grpo", "turns"], shifts(grpo_module, "masked_sum", 1)),
    "ratio of a response": (["turns, a ratio for a response"], shifts(grpo_module, "sequence_log_ratio", 2)),
    "turn of a token": (["turns"], turns_begin_late),
    "rewards from a turn on": (["turns"], shifts(grpo_module, "rewards_to_go", 3)),
}


@pytest.mark.parametrize(("plant", "name"), [(plant, name) for plant, (names, _) in PLANTS.items() for name in names])
def test_a_mask_that_is_off_by_one_shows(plant, name, monkeypatch):
    PLANTS[plant][1](monkeypatch)
    assert differences(learn(CONFIGS[name], poison=0.0), reference_of(CONFIGS[name])) != []


def test_lengths_turns_and_rewards_are_told_by_the_tokens_that_the_actor_chose():
    rollout = make_rollout()
    values = describe(rollout, EpisodeReward("game")(rollout), 4).values()
    turns = [turn for each in EPISODES for turn in each.turns]
    chosen = [each.num_chosen for each in EPISODES]
    assert values["response/length"] == pytest.approx(sum(chosen) / len(EPISODES))
    assert values["turn/count"] == pytest.approx(len(turns) / len(EPISODES))
    assert values["turn/length"] == pytest.approx(sum(chosen) / len(turns))
    assert values["turn/reward"] == pytest.approx(sum(reward for *_, reward in turns) / len(turns))
    scores = [each.end_reward + sum(reward for *_, reward in each.turns) for each in SCORED]
    assert values["score/mean"] == pytest.approx(sum(scores) / len(SCORED))
    assert values["score/unscored"] == values["environment/failed/respond"] == 1
