"""Actor and critic as tables over a few tokens: everything about them can be enumerated.

The state before token t is where the response stands and what its last token was, so that with at most two tokens it is
the whole response so far. Token 0 ends a response.
"""

import itertools
import math
from typing import Any

import torch
from torch import nn

from llmrl.algorithms.ppo import PPO
from llmrl.batches import Prompts, Rollout, Scores, Sequences, StopReason, TokenOutputs
from llmrl.functional.streams import uniforms
from llmrl.microbatches import TokenBudget
from llmrl.models.networks import SeparateNetworks
from llmrl.trainers.config import UpdateConfig
from llmrl.trainers.rl import RLTrainer
from tests.contexts import context_of, sampling_of

END = 0


def state_of(tokens, num_tokens):
    """The number of the state behind these tokens."""
    return len(tokens) * num_tokens + (tokens[-1] if tokens else 0)


def states_of(sequences, num_tokens):
    """``(B, T + 1)``: the state before each token, and behind a whole row of T."""
    ids = sequences.response_ids
    previous = torch.nn.functional.pad(ids, (1, 0))
    return torch.arange(ids.shape[1] + 1) * num_tokens + previous


class TabularActor(nn.Module):
    """Logits of the next token in every state."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def logprobs(self, sequences):
        distribution = self.logits.log_softmax(dim=-1)[states_of(sequences, self.logits.shape[1])[:, :-1]]
        chosen = distribution.gather(-1, sequences.response_ids[..., None]).squeeze(-1)
        entropy = -(distribution.exp() * distribution).sum(dim=-1)
        logprobs, entropy = (torch.where(sequences.response_mask, x, 0.0) for x in (chosen, entropy))
        return TokenOutputs(named={"logprobs": logprobs, "entropy": entropy})

    def probability(self, response):
        """Of a whole response."""
        num_tokens = self.logits.shape[1]
        distribution = self.logits.detach().double().log_softmax(dim=-1)
        steps = (distribution[state_of(response[:t], num_tokens), token] for t, token in enumerate(response))
        return math.exp(sum(map(float, steps)))


class TabularCritic(nn.Module):
    """The value of every state."""

    def __init__(self, table, *, num_tokens):
        super().__init__()
        self.table = nn.Parameter(table)
        self.num_tokens = num_tokens

    def values(self, sequences):
        values = self.table[states_of(sequences, self.num_tokens)]
        last = values.gather(1, sequences.response_lengths[:, None]).squeeze(1)
        values = torch.where(sequences.response_mask, values[:, :-1], 0.0)
        return TokenOutputs(named={"values": values, "last_values": last})


class Pair(SeparateNetworks):
    """`ActorCritic` of any two, which may say that they share a trunk."""

    def __init__(self, actor, critic, *, share_trunk=False):
        super().__init__(actor, critic)
        self.share_trunk = share_trunk


class TabularEngine:
    """Samples from a tabular actor as it is now."""

    def __init__(self, actor):
        self.actor = actor

    @torch.no_grad()
    def generate(self, prompts, sampling):
        count, limit = len(prompts.rows) * sampling.num_responses, sampling.max_response_tokens
        number = sampling.first_response + torch.arange(count)
        probabilities = self.actor.logits.double().softmax(dim=-1)
        ids, alive, masks = torch.zeros(count, 0, dtype=torch.long), torch.ones(count, dtype=torch.bool), []
        for t in range(limit):
            state = t * probabilities.shape[1] + (ids[:, -1] if t else torch.zeros_like(number))
            u = uniforms(sampling.seed, sampling.purpose, number, torch.full_like(number, t))
            below = probabilities[state].cumsum(dim=-1)[:, :-1] <= u[:, None]
            token = torch.where(alive, below.sum(dim=-1), END)
            masks.append(alive)
            ids, alive = torch.cat([ids, token[:, None]], dim=1), alive & (token != END)
        mask = torch.stack(masks, dim=1)
        sequences = Sequences(
            unique_prompt_ids=prompts.ids,
            unique_prompt_mask=prompts.mask,
            prompt_of_row=torch.arange(len(prompts.rows)).repeat_interleave(sampling.num_responses),
            response_ids=ids,
            response_mask=mask,
            response_lengths=mask.sum(dim=1),
        )
        rows = tuple(row for row in prompts.rows for _ in range(sampling.num_responses))
        return Rollout(
            sequences=sequences,
            rollout_logprobs=self.actor.logprobs(sequences).logprobs.float(),
            stop_reason=torch.where(~alive, StopReason.EOS, StopReason.LENGTH),
            group_ids=number // sampling.num_responses,
            rows=rows,
        )

    def load_weights(self, trained): ...


class NumberedPrompts:
    """One token each, and rows that are numbered in the order in which they are dealt."""

    def __init__(self):
        self.position = 0

    def next(self, num_prompts):
        numbers = range(self.position, self.position + num_prompts)
        self.position += num_prompts
        ids = torch.ones(num_prompts, 1, dtype=torch.long)
        return Prompts(ids=ids, mask=ids.bool(), rows=tuple({"number": number} for number in numbers))

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def responses_of(rollout):
    """As tuples of the tokens that the actor chose."""
    sequences = rollout.sequences
    rows = zip(sequences.response_ids.tolist(), sequences.response_mask.tolist(), strict=True)
    return [tuple(token for token, chosen in zip(*row, strict=True) if chosen) for row in rows]


def reward_of(scores):
    """`RewardFunction` that looks responses up."""

    def reward(rollout):
        total = torch.tensor([scores[response] for response in responses_of(rollout)])
        return Scores(total=total, per_token=torch.zeros(rollout.sequences.response_ids.shape), parts={})

    return reward


def all_responses(num_tokens, max_response_tokens):
    """Every response there is: it ends with the first token 0, or at the limit."""
    return [
        response
        for length in range(1, max_response_tokens + 1)
        for response in itertools.product(range(num_tokens), repeat=length)
        if END not in response[:-1] and (response[-1] == END or length == max_response_tokens)
    ]


def random_logits(num_tokens, max_response_tokens, *, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn((max_response_tokens + 1) * num_tokens, num_tokens, generator=generator)


def make_trainer(algorithm, engine, reward, trained, *, update, prompts_per_iteration, group_size=1, seed=0):
    """The real loop around all that."""
    return RLTrainer(
        algorithm=algorithm,
        engine=engine,
        reward=reward,
        prompts=NumberedPrompts(),
        trained=trained,
        update=UpdateConfig(**update),
        budget=TokenBudget(max_tokens=UpdateConfig(**update).microbatch_tokens),
        prompts_per_iteration=prompts_per_iteration,
        sampling=sampling_of(group_size, seed=seed, max_response_tokens=algorithm.max_response_tokens),
        context=context_of(),
        observe=lambda iteration, experience: None,
        reference=None,
        auxiliary=None,
        balance=None,
    )


def make_ppo(
    config,
    networks,
    *,
    reference=None,
    max_response_tokens,
    warmup_iterations=0,
    value_coef=0.5,
    step_kl_coef=None,
    one_step=False,
) -> Any:
    """PPO on these networks."""
    ppo = PPO(
        config,
        networks=networks,
        reference=reference,
        max_response_tokens=max_response_tokens,
        warmup_iterations=warmup_iterations,
        value_coef=value_coef,
        one_step=one_step,
    )
    if step_kl_coef is not None and ppo.step_kl_control is not None:
        ppo.step_kl_control.coef = step_kl_coef
    return ppo
