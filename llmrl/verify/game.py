"""The language model that is enumerated: two prompts, two tokens and EOS, responses of up to three tokens.

A state is the prompt and the tokens so far; actor, reference and critic are tables over states. There are 15 responses
to a prompt, so that every expectation over them, and over pairs of them, is a finite sum in float64. A response of
three tokens without EOS was truncated, and is scored like any other.
"""

import itertools
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float64, Int
from torch import Tensor

from llmrl.batches import Rollout, Scores, Sequences, StopReason, TokenOutputs

NUM_PROMPTS, NUM_TOKENS, MAX_TOKENS, EOS = 2, 3, 3, 0
UNITS = 4
"""Probabilities of the policy that samples are multiples of one over this."""
NUM_STATES = sum(NUM_TOKENS**length for length in range(MAX_TOKENS + 1))
"""Sequences of up to three tokens, those that go on after EOS included, which are never reached."""


def _responses() -> tuple[Int[Tensor, "Y T"], Bool[Tensor, "Y T"]]:
    responses = [
        response
        for length in range(1, MAX_TOKENS + 1)
        for response in itertools.product(range(NUM_TOKENS), repeat=length)
        if EOS not in response[:-1] and (response[-1] == EOS or length == MAX_TOKENS)
    ]
    ids = torch.zeros(len(responses), MAX_TOKENS, dtype=torch.long)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, response in enumerate(responses):
        ids[row, : len(response)] = torch.tensor(response)
        mask[row, : len(response)] = True
    return ids, mask


RESPONSE_IDS, RESPONSE_MASK = _responses()
"""Every response, (Y, T)."""
LENGTHS = RESPONSE_MASK.sum(dim=1)
IS_TRUNCATED = RESPONSE_IDS.gather(1, LENGTHS[:, None] - 1)[:, 0] != EOS
"""Whether a response ends by the length limit, not by itself, (Y,)."""


def states_of(ids: Int[Tensor, "B T"]) -> Int[Tensor, "B states"]:
    """The state before each token and after the last one: the children of state s are 3 s + 1, 3 s + 2 and 3 s + 3."""
    states = [torch.zeros_like(ids[:, 0])]
    for token in ids.T:
        states.append(NUM_TOKENS * states[-1] + 1 + token)
    return torch.stack(states, dim=1)


STATES = states_of(RESPONSE_IDS)


def token_logprobs(logits: Float64[Tensor, "N S V"]) -> Float64[Tensor, "N Y T"]:
    """Log-probability of each token of every response; 0 after its end."""
    chosen = logits.log_softmax(dim=-1)[:, STATES[:, :-1], RESPONSE_IDS]
    return torch.where(RESPONSE_MASK, chosen, 0.0)


def probabilities(logits: Float64[Tensor, "N S V"]) -> Float64[Tensor, "N Y"]:
    """Probability of every response; each row sums to 1."""
    return token_logprobs(logits).sum(dim=2).exp()


@dataclass(frozen=True, kw_only=True)
class Gradient:
    """Expected gradients of the losses: of the actor's logits (N, S, V), and of the values (N, S) if they have one."""

    actor: Float64[Tensor, "N S V"]
    critic: Float64[Tensor, "N S"] | None = None

    @property
    def flat(self) -> Float64[Tensor, " P"]:
        """All of it in one row."""
        return torch.cat([part.flatten() for part in (self.actor, self.critic) if part is not None])

    def __add__(self, other: "Gradient") -> "Gradient":
        critics = [part.critic for part in (self, other) if part.critic is not None]
        return Gradient(actor=self.actor + other.actor, critic=torch.stack(critics).sum(dim=0) if critics else None)


@dataclass(frozen=True, kw_only=True)
class Game:
    """Everything that the gradient of an estimator depends on, as tables."""

    scores: Float64[Tensor, "N Y"]
    sampler: Float64[Tensor, "N S V"]
    """Logits of the policy that the responses come from; its probabilities are multiples of 1/4."""
    old: Float64[Tensor, "N S V"]
    """Logits of the actor at the start of the iteration."""
    current: Float64[Tensor, "N S V"]
    """Logits of the actor, where the gradient is taken."""
    reference: Float64[Tensor, "N S V"]
    old_values: Float64[Tensor, "N S"]
    values: Float64[Tensor, "N S"]
    kl_coef: float
    entropy_coef: float = 0.0

    def objective(self, logits: Float64[Tensor, "N S V"]) -> Float64[Tensor, ""]:
        """J = E[score] - kl_coef KL(policy, reference) of whole responses, mean over prompts."""
        logprobs = token_logprobs(logits).sum(dim=2)
        log_ratio = logprobs - token_logprobs(self.reference).sum(dim=2)
        return (logprobs.exp() * (self.scores - self.kl_coef * log_ratio)).sum(dim=1).mean()

    def gradient(self) -> Float64[Tensor, "N S V"]:
        """The gradient of the objective at the current actor."""
        logits = self.current.clone().requires_grad_()
        return torch.autograd.grad(self.objective(logits), logits)[0]

    def optimum(self) -> Float64[Tensor, "N Y"]:
        """Probabilities that maximize the objective: reference * exp(score / kl_coef), normalized."""
        return (probabilities(self.reference).log() + self.scores / self.kl_coef).softmax(dim=1)

    def exact_values(self) -> Float64[Tensor, "N S"]:
        """The values of the old actor, of scores minus the KL penalty, undiscounted; 0 after the end."""
        values = torch.zeros_like(self.old_values)
        logprobs, total = token_logprobs(self.old), torch.zeros_like(values)
        penalties = self.kl_coef * (logprobs - token_logprobs(self.reference))
        for t in range(MAX_TOKENS):
            to_go = self.scores - penalties[:, :, t:].sum(dim=2)
            weights = torch.where(RESPONSE_MASK[:, t], probabilities(self.old), 0.0)
            at = STATES[:, t].expand(NUM_PROMPTS, -1)
            values = values.scatter_add(1, at, weights * to_go)
            total = total.scatter_add(1, at, weights)
        return torch.where(total > 0, values / total.clamp(min=1e-300), 0.0)


def make_game(*, kl_coef: float) -> Game:
    """The game on-policy: sampler, old and current actor are one. Scores of the second prompt are spread wider."""
    state, prompt = torch.arange(NUM_STATES), torch.arange(NUM_PROMPTS)
    likeliest = (2 * prompt[:, None] + state) % NUM_TOKENS
    likely = torch.nn.functional.one_hot(likeliest, NUM_TOKENS).double()
    sampler = ((1.0 + likely) / UNITS).log()
    scores = torch.rand(NUM_PROMPTS, len(LENGTHS), generator=_generator(1), dtype=torch.float64)
    critic = moved(torch.zeros(NUM_PROMPTS, NUM_STATES, dtype=torch.float64), by=0.5, seed=2)
    return Game(
        scores=scores * torch.tensor([[1.0], [2.5]]) + torch.tensor([[0.0], [0.5]]),
        sampler=sampler,
        old=sampler,
        current=sampler,
        reference=moved(sampler, by=0.5, seed=3),
        old_values=critic,
        values=critic,
        kl_coef=kl_coef,
    )


def with_exact_critic(game: Game) -> Game:
    """The game with a critic that is right about the old actor."""
    values = game.exact_values()
    return replace(game, old_values=values, values=values + (game.values - game.old_values))


def moved(table: Tensor, *, by: float, seed: int) -> Tensor:
    """A table with normal noise on it, the same for a seed."""
    return table + by * torch.randn(table.shape, generator=_generator(seed), dtype=torch.float64)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Responses as an algorithm meets them, and how often each of them counts."""

    rollout: Rollout
    scores: Scores
    frequency: Float64[Tensor, " B"]
    unit_size: int
    """Rows that are drawn together, and follow each other."""
    are_rollouts: bool = False
    """Whether each unit is a rollout of its own, not a group of one large rollout."""

    @property
    def rollouts(self) -> list[tuple[Rollout, Scores]]:
        """What an algorithm gets at once."""
        if not self.are_rollouts:
            return [(self.rollout, self.scores)]
        units = torch.arange(len(self.frequency)).split(self.unit_size)
        return [(self.rollout.select(rows), self.scores.select(rows)) for rows in units]


def population(game: Game, group_size: int) -> Draws:
    """A batch in which every group of responses occurs exactly as often as its probability says."""
    counts = (probabilities(game.sampler) * UNITS**MAX_TOKENS).round().long()
    groups = [
        torch.cartesian_prod(*[torch.arange(len(LENGTHS)).repeat_interleave(count)] * group_size) for count in counts
    ]
    return _draws(game, *_of_prompts([group.view(-1, group_size) for group in groups]))


def enumeration(game: Game, group_size: int) -> Draws:
    """Every group of responses once, counted by its probability under the sampler."""
    group = torch.cartesian_prod(*[torch.arange(len(LENGTHS))] * group_size)
    prompt, response = _of_prompts([group.view(-1, group_size)] * NUM_PROMPTS)
    return _weighted(game, _draws(game, prompt, response))


def every_rollout(game: Game) -> Draws:
    """Every rollout of one response to each prompt, counted by its probability under the sampler."""
    response = torch.cartesian_prod(*[torch.arange(len(LENGTHS))] * NUM_PROMPTS)
    draws = _weighted(game, _draws(game, torch.arange(NUM_PROMPTS).expand_as(response), response))
    rollout = replace(draws.rollout, group_ids=torch.arange(response.numel()))
    return replace(draws, rollout=rollout, are_rollouts=True)


def _weighted(game: Game, draws: Draws) -> Draws:
    """Units of equal number, counted by their probability."""
    rollout = draws.rollout
    chance = rollout.rollout_logprobs.sum(dim=1).view(-1, draws.unit_size).sum(dim=1).exp()
    return replace(draws, frequency=(chance / chance.mean()).repeat_interleave(draws.unit_size))


def _of_prompts(groups: list[Int[Tensor, "N G"]]) -> tuple[Int[Tensor, "U G"], Int[Tensor, "U G"]]:
    """Prompts and responses of the groups of each prompt."""
    prompts = [torch.full_like(group, n) for n, group in enumerate(groups)]
    return torch.cat(prompts), torch.cat(groups)


def _draws(game: Game, prompts: Int[Tensor, "U G"], responses: Int[Tensor, "U G"]) -> Draws:
    unit_size, prompt, response = prompts.shape[1], prompts.flatten(), responses.flatten()
    ids, mask = RESPONSE_IDS[response], RESPONSE_MASK[response]
    total = game.scores[prompt, response]
    prompt_ids = torch.arange(1, NUM_PROMPTS + 1)[:, None]
    rollout = Rollout(
        sequences=Sequences(
            unique_prompt_ids=prompt_ids,
            unique_prompt_mask=torch.ones_like(prompt_ids, dtype=torch.bool),
            prompt_of_row=prompt,
            response_ids=ids,
            response_mask=mask,
            response_lengths=LENGTHS[response],
        ),
        rollout_logprobs=token_logprobs(game.sampler)[prompt, response],
        stop_reason=torch.where(IS_TRUNCATED[response], StopReason.LENGTH, StopReason.EOS),
        group_ids=torch.arange(len(total)) // unit_size,
        rows=tuple({"prompt": n} for n in prompt.tolist()),
    )
    scores = Scores(total=total, per_token=torch.zeros(mask.shape, dtype=total.dtype), parts={})
    return Draws(rollout=rollout, scores=scores, frequency=torch.ones_like(total), unit_size=unit_size)


class TablePolicy:
    """`Policy` of a table of logits. `passes` holds, for each forward pass, the prompts, states and logits that were
    read, so that the gradient of a loss can be had row by row.

    Args:
        logits: The table.
        off_mask: What stands where there is no token.
    """

    def __init__(self, logits: Float64[Tensor, "N S V"], *, off_mask: float = 0.0) -> None:
        self.logits = logits
        self.off_mask = off_mask
        self.passes: list[tuple[Tensor, Tensor, Tensor]] = []

    def logprobs(self, sequences: Sequences) -> TokenOutputs:
        """See `Policy`."""
        mask, prompt, states = sequences.response_mask, *_where(sequences)
        read = self.logits[prompt, states[:, :-1].clamp(max=self.logits.shape[1] - 1)]
        if torch.is_grad_enabled():
            read = read.detach().requires_grad_()
            self.passes.append((prompt.expand_as(mask), states[:, :-1], read))
        logprobs = read.log_softmax(dim=-1)
        ids = torch.where(mask, sequences.response_ids, 0)
        chosen = logprobs.gather(-1, ids[..., None]).squeeze(-1)
        entropy = -(logprobs.exp() * logprobs).sum(dim=-1)
        outputs = {"logprobs": chosen, "entropy": entropy}
        return TokenOutputs(named={name: torch.where(mask, x, self.off_mask) for name, x in outputs.items()})


class TableCritic:
    """`ValueFunction` of a table of values; `passes` as in `TablePolicy`."""

    def __init__(self, table: Float64[Tensor, "N S"], *, off_mask: float = 0.0) -> None:
        self.table = table
        self.off_mask = off_mask
        self.passes: list[tuple[Tensor, Tensor, Tensor]] = []

    def values(self, sequences: Sequences) -> TokenOutputs:
        """See `ValueFunction`."""
        mask, prompt, states = sequences.response_mask, *_where(sequences)
        read = self.table[prompt, states]
        if torch.is_grad_enabled():
            read = read.detach().requires_grad_()
            self.passes.append((prompt.expand_as(states), states, read))
        last = read.gather(1, sequences.response_lengths[:, None]).squeeze(1)
        return TokenOutputs(named={"values": torch.where(mask, read[:, :-1], self.off_mask), "last_values": last})


def _where(sequences: Sequences) -> tuple[Int[Tensor, "B 1"], Int[Tensor, "B states"]]:
    """The prompt of each row, and the states of its tokens; any state where there is none."""
    ids = torch.where(sequences.response_mask, sequences.response_ids, 0)
    states = states_of(ids).clamp(max=NUM_STATES - 1)
    return sequences.prompt_ids[:, -1:] - 1, states
