"""Episodes that go on in new contexts, against sequences made by hand: each context by itself, as the actor saw it."""

from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from llmrl.algorithms.config import GRPOConfig, PPOConfig
from llmrl.algorithms.grpo import GRPO
from llmrl.algorithms.ppo import PPO
from llmrl.batches import Contexts, Episodes, Rollout, Scores, Sequences, StopReason
from llmrl.functional.losses import token_weights
from llmrl.models.critic import TransformersValueFunction, ValueModule
from llmrl.models.networks import SeparateNetworks
from llmrl.models.policy import TransformersPolicy
from tests.models.tiny import DrawnHead, build, dense, in_microbatches, make_sequences, module_of, packing

GARBAGE = 36
EPISODES = [
    [([7, 8, 9], [10, 11, 2], [1, 1, 1]), ([7, 8, 30, 31], [12, 2], [1, 1])],
    [([7, 8, 9], [13, 2], [1, 1])],
    [([20], [14, 15, 2, 5, 16, 2], [1, 1, 1, 0, 1, 1])],
    [([20], [3, 2], [1, 1]), ([20, 33, 9], [4, 2, 6, 6, 18, 2], [1, 1, 0, 0, 1, 1]), ([34], [5, 17, 19], [1, 1, 1])],
]
"""Contexts of two groups of two episodes, each `(prompt, tokens, chosen)`."""
GROUPS = [0, 0, 1, 1]
SCORES = [1.0, 0.0, 0.25, -2.0]
LIMIT = 24
FLAT = [context for episode in EPISODES for context in episode]
EPISODE_OF = [number for number, episode in enumerate(EPISODES) for _ in episode]


def branched() -> Sequences:
    """The episodes a row each."""
    rows, restarts = [], []
    for (prompt, ids, chosen), *others in EPISODES:
        begins = [0] * len(ids)
        for fed, more, picked in others:
            ids, chosen = [*ids, *fed, *more], [*chosen, *[0] * len(fed), *picked]
            begins += [1, *[0] * (len(fed) - 1 + len(more))]
        rows.append((prompt, ids, chosen))
        restarts.append(begins)
    sequences = make_sequences(rows, prompt_padding=(GARBAGE,), response_padding=(GARBAGE,))
    width = sequences.response_ids.shape[1]
    padded = torch.tensor([begins + [0] * (width - len(begins)) for begins in restarts]).bool()
    return replace(sequences, restarts=padded)


def per_episode(values: torch.Tensor) -> list[torch.Tensor]:
    """Numbers of the tokens that the actor chose, context by context, as those of each episode."""
    chosen = [torch.tensor(mask).bool() for *_, mask in FLAT]
    parts = [row[: len(mask)][mask] for row, mask in zip(values, chosen, strict=True)]
    return [
        torch.cat([part for part, number in zip(parts, EPISODE_OF, strict=True) if number == episode])
        for episode in range(len(EPISODES))
    ]


def on_rows(sequences: Sequences, parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.zeros(sequences.response_ids.shape).masked_scatter(sequences.response_mask, torch.cat(parts).float())


def make_rollout(sequences: Sequences) -> Rollout:
    width = sequences.response_ids.shape
    return Rollout(
        sequences=sequences,
        rollout_logprobs=torch.zeros(width),
        stop_reason=torch.tensor([StopReason.EOS] * 3 + [StopReason.LENGTH]),
        group_ids=torch.tensor(GROUPS),
        rows=tuple({"row": group} for group in GROUPS),
    )


def make_scores(sequences: Sequences) -> Scores:
    total = torch.tensor(SCORES)
    return Scores(total=total, per_token=torch.zeros(sequences.response_ids.shape), parts={"score": total})


def gradients(loss: torch.Tensor, *modules: Any) -> list[torch.Tensor]:
    parameters = [parameter for module in modules for parameter in module.parameters()]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if grad is None else grad for p, grad in zip(parameters, found, strict=True)]


def assert_same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other, rtol=1e-3, atol=1e-6 + 1e-4 * other.abs().max().item())


def surrogate(logprobs: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, low: float, high: float):
    """Minus the clipped objective of each token."""
    losses = []
    for live, before, advantage in zip(logprobs, old, advantages, strict=True):
        ratio = (live - before).exp()
        losses.append(-torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage))
    return torch.stack(losses)


def noise(parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Old log-probabilities, at some distance."""
    generator = torch.Generator().manual_seed(2)
    return [part.detach() + 0.3 * torch.randn(len(part), generator=generator) for part in parts]


# --- the pass ---------------------------------------------------------------------------------------------------------


def test_contexts_by_hand():
    contexts = Contexts.of(branched())
    assert contexts.row.tolist() == EPISODE_OF
    read = contexts.sequences
    for number, (prompt, ids, chosen) in enumerate(FLAT):
        whole = [
            *read.prompt_ids[number][read.prompt_mask[number]].tolist(),
            *read.response_ids[number, : read.response_lengths[number]].tolist(),
        ]
        assert whole == [*prompt, *ids]
        assert int(read.response_mask[number].sum()) == sum(chosen)
    assert read.restarts is None


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_each_token_has_the_logprob_that_it_was_drawn_with(family, packed):
    model = build(family)
    if packed:
        packing(model)
    sequences, policy = branched(), TransformersPolicy(module_of(model))
    expected, entropy = (on_rows(sequences, per_episode(each)) for each in dense(build(family), FLAT))
    outputs = policy.logprobs(sequences)
    assert_close(outputs.logprobs, expected, rtol=1e-4, atol=1e-4)
    assert_close(outputs.entropy, entropy, rtol=1e-4, atol=1e-4)
    split = in_microbatches(policy.logprobs, sequences, 16)
    assert_close(split.logprobs, expected, rtol=1e-4, atol=1e-4)


def test_a_critic_reads_after_the_last_token_of_the_last_context():
    critic = TransformersValueFunction(ValueModule(build("llama").base_model, DrawnHead(32), dtype=torch.float32))
    ours, theirs = critic.values(branched()), critic.values(make_sequences(FLAT))
    assert_close(ours.values, on_rows(branched(), per_episode(theirs.values)))
    last = [number for number, row in enumerate(EPISODE_OF) if row not in EPISODE_OF[number + 1 :]]
    assert_close(ours.last_values, theirs.last_values[last])


def test_padded_passes_hold_the_budget_with_a_row_for_each_context():
    tokens = branched().pass_tokens(packed=False)
    assert tokens.num_contexts is not None
    assert tokens.num_contexts.tolist() == [len(episode) for episode in EPISODES]
    longest = [max(len(prompt) + len(ids) for prompt, ids, _ in episode) for episode in EPISODES]
    assert tokens.own.tolist() == longest


def test_batches_with_and_without_contexts_are_joined_and_selected():
    sequences = branched()
    plain = make_sequences([([9], [10, 2], [1, 1])])
    joined = Sequences.cat([plain, sequences])
    assert joined.restarts is not None
    assert torch.equal(joined.select(torch.arange(1, 5)).restarts, sequences.restarts)
    assert not joined.restarts[0].any()
    assert Sequences.cat([plain, plain]).restarts is None


# --- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("aggregation", "ratio"),
    [("token", "token"), ("sequence", "token"), ("constant", "token"), ("sequence", "sequence")],
)
def test_grpo_is_that_of_sequences_made_by_hand(aggregation, ratio):
    sequences = branched()
    module, plain = module_of(build("llama")), build("llama")
    config = GRPOConfig(aggregation=aggregation, ratio=ratio, clip_low=0.2, clip_high=0.25)
    algorithm = GRPO(config, actor=TransformersPolicy(module), reference=None, max_response_tokens=LIMIT)
    with torch.no_grad():
        experience, _ = algorithm.experience(make_rollout(sequences), make_scores(sequences))
    live = per_episode(dense(plain, FLAT)[0])
    old = noise(live)
    experience = replace(experience, old_logprobs=on_rows(sequences, old))
    mask = experience.counted
    weights = token_weights(
        mask, aggregation=aggregation, num_tokens=mask.sum(), num_responses=mask.any(dim=1).sum(),
        max_response_tokens=LIMIT,
    )  # fmt: skip
    ((_, loss, _),) = algorithm.losses(experience, weights)

    num_tokens, expected = sum(map(len, live)), torch.zeros(())
    for number, (logprobs, before) in enumerate(zip(live, old, strict=True)):
        group = [score for score, of in zip(SCORES, GROUPS, strict=True) if of == GROUPS[number]]
        mean = sum(group) / len(group)
        std = (sum((score - mean) ** 2 for score in group) / len(group)) ** 0.5
        advantages = torch.full((len(logprobs),), (SCORES[number] - mean) / (std + 1e-6))
        if ratio == "sequence":
            logprobs = (logprobs - before).mean().expand(len(before))
            before = torch.zeros(len(before))
        losses = surrogate(logprobs, before, advantages, 0.2, 0.25)
        divisor = {"token": num_tokens, "sequence": len(losses) * len(EPISODES), "constant": LIMIT * len(EPISODES)}
        expected = expected + losses.sum() / divisor[aggregation]
    assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    assert_same(gradients(loss, module.model), gradients(expected, plain))


def test_ppo_is_that_of_sequences_made_by_hand():
    """The advantage of the last token of a context follows from the value of the first token in the next."""
    sequences = branched()
    gamma, gae_lambda = 0.9, 0.8
    module, plain = module_of(build("llama")), build("llama")
    head = DrawnHead(32)
    critic = ValueModule(build("llama").base_model, head, dtype=torch.float32)
    plain_critic = ValueModule(build("llama").base_model, head, dtype=torch.float32)
    algorithm = PPO(
        PPOConfig(gamma=gamma, gae_lambda=gae_lambda, kl_coef=0.0, normalize_scores=False, bootstrap_truncated=True),
        networks=SeparateNetworks(TransformersPolicy(module), TransformersValueFunction(critic)),
        reference=None, max_response_tokens=LIMIT, warmup_iterations=0, value_coef=1.0, one_step=False,
    )  # fmt: skip
    with torch.no_grad():
        experience, _ = algorithm.experience(make_rollout(sequences), make_scores(sequences))

    outputs = plain_critic(make_sequences(FLAT))
    values = per_episode(outputs["values"])
    advantages, returns = [], []
    for number, each in enumerate(values):
        known = each.tolist()
        truncated = number == 3
        after = outputs["last_values"][-1].item() if truncated else 0.0
        rewards = [0.0] * (len(known) - 1) + [0.0 if truncated else SCORES[number]]
        deltas = [r + gamma * v - u for r, v, u in zip(rewards, [*known[1:], after], known, strict=True)]
        reversed_sums = accumulate(reversed(deltas), lambda total, delta: delta + gamma * gae_lambda * total)
        found = torch.tensor(list(reversed_sums)[::-1])
        advantages.append(found)
        returns.append(found + torch.tensor(known))
    every = torch.cat(advantages).double()
    standardized = [((a - every.mean()) / (every.var(correction=0) + 1e-8).sqrt()).float() for a in advantages]
    assert_close(experience.advantages, on_rows(sequences, standardized), rtol=1e-3, atol=1e-4)
    on_mask = experience.returns * sequences.response_mask
    assert_close(on_mask, on_rows(sequences, returns), rtol=1e-3, atol=1e-4)

    live = per_episode(dense(plain, FLAT)[0])
    old, num_tokens = noise(live), sum(map(len, live))
    experience = replace(experience, old_logprobs=on_rows(sequences, old))
    weights = sequences.response_mask.float() / num_tokens
    (_, policy_loss, _), (_, value_loss, _) = algorithm.losses(experience, weights)
    low, high = algorithm.config.clip_low, algorithm.config.clip_high
    expected = sum(surrogate(*each, low, high).sum() for each in zip(live, old, standardized, strict=True)) / num_tokens
    errors = [((value - target) ** 2).sum() / 2 for value, target in zip(values, returns, strict=True)]
    assert_close(policy_loss, expected, rtol=1e-4, atol=1e-5)
    assert_close(value_loss, sum(errors) / num_tokens, rtol=1e-4, atol=1e-5)
    assert_same(gradients(policy_loss, module.model), gradients(expected, plain))
    assert_same(gradients(value_loss, critic), gradients(sum(errors) / num_tokens, plain_critic))


def test_a_turn_is_credited_across_contexts():
    """Rewards of turns come back to the turns before them, whatever context these were in."""
    sequences = branched()
    turn_ends = torch.tensor([[3, 9, 0, 0], [2, 0, 0, 0], [3, 6, 0, 0], [2, 7, 11, 15]])
    rewards = torch.tensor([[0.5, 1.0, 0, 0], [0.25, 0, 0, 0], [1.0, 0.0, 0, 0], [0.0, 2.0, 0.0, -1.0]])
    per_token = torch.zeros(sequences.response_ids.shape)
    for row, ends in enumerate(turn_ends.tolist()):
        for turn, end in enumerate(end for end in ends if end):
            assert sequences.response_mask[row, end - 1]
            per_token[row, end - 1] = rewards[row, turn]
    rollout = replace(
        make_rollout(sequences),
        episodes=Episodes(
            turn_ends=turn_ends, turn_rewards=rewards, end_reward=torch.zeros(4), num_calls=torch.zeros(4).long(),
            num_bad_calls=torch.zeros(4).long(), failures=(None,) * 4, reasons=(None,) * 4,
            openings=("",) * 4, messages=((),) * 4,
        ),
    )  # fmt: skip
    actor = TransformersPolicy(module_of(build("llama")))
    algorithm = GRPO(
        GRPOConfig(credit="turn", scale="none"), actor=actor, reference=None, max_response_tokens=LIMIT, one_step=True
    )
    scores = Scores(total=torch.zeros(4), per_token=per_token, parts={})
    advantages = algorithm.experience(rollout, scores)[0].advantages
    # the first turns of the first group have 1.5 and 0.25 to come, those of the second 1.0 and 1.0
    for row, expected in enumerate([0.625, -0.625, 0.0, 0.0]):
        assert_close(advantages[row, 0], torch.tensor(expected))
    # the second turns of the second group have 0.0 and 1.0 to come
    assert_close(advantages[2, 4], torch.tensor(-0.5))
    assert_close(advantages[3, 5:7], torch.tensor([0.5, 0.5]))
