"""Roles split over ranks answer on every rank as the role itself does in one process."""

import signal
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from llmrl.batches import PreferencePairs, Prompts, Rollout, Scores, Sequences, StopReason, TokenOutputs
from llmrl.distributed import roles
from llmrl.distributed.collectives import OneProcess
from llmrl.distributed.microbatcher import Microbatcher
from llmrl.distributed.roles import (
    DistributedEngine,
    DistributedNetworks,
    DistributedPolicy,
    DistributedReward,
    DistributedScorer,
    block,
    distribute_rows,
)
from llmrl.distributed.stop import Interrupted, Stop
from llmrl.microbatches import TokenBudget
from llmrl.optim.config import OptimizerConfig
from llmrl.optim.local import LocalTrainable
from llmrl.roles import Sampling
from tests.contexts import context_of
from tests.distributed.threads import on_ranks
from tests.rollout.tiny import make_sampling

SAMPLING = make_sampling(max_response_tokens=9, seed=0, first_response=10)
WORLD_SIZES = [2, 3, 5]


def microbatcher_of(collectives, **budget) -> Microbatcher:
    return Microbatcher(TokenBudget(**budget), context_of(collectives))


class NumberingEngine:
    """Responds with the global number of the response, as often as that says, modulo 4."""

    def __init__(self):
        self.asked = []

    def generate(self, prompts: Prompts, sampling: Sampling) -> Rollout:
        self.asked.append(len(prompts.rows))
        count = len(prompts.rows) * sampling.num_responses
        numbers = sampling.first_response + torch.arange(count)
        lengths = numbers % 4 + 1
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        index = torch.arange(len(prompts.rows)).repeat_interleave(sampling.num_responses)
        return Rollout(
            sequences=Sequences(
                unique_prompt_ids=prompts.ids,
                unique_prompt_mask=prompts.mask,
                prompt_of_row=index,
                response_ids=torch.where(mask, numbers[:, None], 0),
                response_mask=mask,
                response_lengths=lengths,
            ),
            rollout_logprobs=torch.where(mask, -0.5, 0.0),
            stop_reason=torch.where(numbers % 2 == 0, StopReason.EOS, StopReason.LENGTH),
            group_ids=numbers // sampling.num_responses,
            rows=prompts.select(index).rows,
        )

    def load_weights(self, trained):
        self.asked.append(trained)


class Lookup:
    """Actor and critic whose answers depend on the row alone; counts the rows that it is asked about."""

    share_trunk = True

    def __init__(self):
        self.num_rows = 0
        self.tokens = []

    @property
    def num_calls(self):
        return len(self.tokens)

    def _answer(self, sequences, scale, *names):
        self.num_rows += len(sequences.response_ids)
        self.tokens.append(len(sequences.num_tokens) * int(sequences.num_tokens.max()))
        ids = sequences.response_ids.float()
        return dict(zip(names, (scale * ids, scale + ids), strict=True))

    def logprobs(self, sequences):
        return TokenOutputs(named=self._answer(sequences, 2.0, "logprobs", "entropy"))

    def values(self, sequences):
        values = self._answer(sequences, 3.0, "values", "spread")["values"]
        return TokenOutputs(named={"values": values, "last_values": values.sum(dim=1)})

    def both(self, sequences):
        return self.logprobs(sequences).merge(self.values(sequences))


@pytest.fixture
def prompts() -> Prompts:
    lengths = torch.tensor([1, 3, 2, 4])
    mask = torch.arange(4) >= 4 - lengths[:, None]
    ids = torch.arange(16).view(4, 4).where(mask, 0)
    return Prompts(ids=ids, mask=mask, rows=tuple({"n": n} for n in range(4)))


@pytest.fixture
def rollout(prompts: Prompts) -> Rollout:
    return NumberingEngine().generate(prompts, SAMPLING)


def assert_same(left: Rollout, right: Rollout):
    assert left.rows == right.rows
    for name in ("rollout_logprobs", "stop_reason", "group_ids"):
        assert_close(getattr(left, name), getattr(right, name))
    for name, ours in vars(left.sequences).items():
        assert_close(ours, vars(right.sequences)[name])


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_rollout_is_that_of_one_process(world_size, prompts, rollout):
    """The same global numbers, so the same random numbers; a rank may have nothing to do."""
    engines = [NumberingEngine() for _ in range(world_size)]
    shared = on_ranks(
        world_size, lambda ranks: DistributedEngine(engines[ranks.rank], context_of(ranks)).generate(prompts, SAMPLING)
    )
    for each in shared:
        assert_same(each, rollout)
    asked = [sum(engine.asked) for engine in engines]
    assert sum(asked) == 4
    assert max(asked) - min(asked) <= 1


def test_weights_are_loaded_by_every_engine():
    engine = NumberingEngine()
    weights = LocalTrainable(nn.Linear(1, 1), OptimizerConfig(), num_steps=1)
    DistributedEngine(engine, context_of(OneProcess())).load_weights(weights)
    assert engine.asked == [weights]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_scores_are_those_of_one_process(world_size, rollout):
    def reward(part: Rollout) -> Scores:
        total = part.group_ids.float() + len(part.rows[0])
        return Scores(total=total, per_token=part.rollout_logprobs * 2, parts={"n": total * 3})

    expected = reward(rollout)
    for scores in on_ranks(world_size, lambda ranks: DistributedReward(reward, ranks)(rollout)):
        assert_close(scores.total, expected.total)
        assert_close(scores.per_token, expected.per_token)
        assert_close(scores.parts["n"], expected.parts["n"])


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_a_function_that_compares_a_group_sees_all_of_it(world_size, rollout):
    """Groups of unequal sizes, as far as a reward may know; the best of each gets 1."""
    groups = torch.tensor([5, 5, 5, 2, 7, 7, 7, 7])
    rollout = replace(rollout, group_ids=groups)

    def best_of_group(part: Rollout) -> Scores:
        number = part.rollout_logprobs.new_tensor([row["n"] for row in part.rows]) + part.sequences.response_ids[:, 0]
        best = torch.stack([number[part.group_ids == group].max() for group in part.group_ids])
        total = (number == best).float()
        return Scores(total=total, per_token=part.rollout_logprobs, parts={"best": total})

    expected = best_of_group(rollout)
    assert expected.total.sum() == 3
    for scores in on_ranks(world_size, lambda ranks: DistributedReward(best_of_group, ranks)(rollout)):
        assert_close(scores.total, expected.total)
        assert_close(scores.per_token, expected.per_token)


@pytest.mark.parametrize("world_size", [2, 3, 11])
@pytest.mark.parametrize("question", ["logprobs", "values", "both"])
def test_without_gradient_ranks_ask_equally_often_within_the_budget(world_size, question, rollout):
    networks = [Lookup() for _ in range(world_size)]

    @torch.no_grad()
    def ask(ranks):
        shared = DistributedNetworks(networks[ranks.rank], context_of(ranks), budget=TokenBudget(max_tokens=15))
        return getattr(shared, question)(rollout.sequences)

    expected = getattr(Lookup(), question)(rollout.sequences)
    for answers in on_ranks(world_size, ask):
        assert_close(answers.named, expected.named)
    assert len({each.num_calls for each in networks}) == 1  # where weights are split, all must come
    assert all(asked <= 15 for each in networks for asked in each.tokens)


def test_with_gradient_a_rank_is_asked_about_what_it_is_given(rollout):
    policy = Lookup()
    outputs = DistributedPolicy(policy, context_of(), budget=TokenBudget(max_tokens=1)).logprobs(rollout.sequences)
    assert policy.num_rows == len(outputs.logprobs) == len(rollout.rows)


@pytest.mark.parametrize("packed", [False, True])
def test_answers_of_a_row_stay_with_it(packed, rollout):
    """Rows are dealt by length and come back in their own order."""
    number = rollout.sequences.response_ids[:, :1].float()

    @torch.no_grad()
    def ask(ranks):
        microbatcher = microbatcher_of(ranks, max_tokens=12, packed=packed)
        return distribute_rows(lambda part: part, rollout.sequences, microbatcher)

    for answer in on_ranks(3, ask):
        assert_close(answer.response_ids[:, :1].float(), number)


class Ids:
    """`Scorer` that scores by ids; counts the calls."""

    def __init__(self):
        self.num_calls = 0

    def scores(self, sequences):
        self.num_calls += 1
        return sequences.response_ids[:, 0].float()

    def pair_scores(self, pairs):
        return self.scores(pairs.chosen), -self.scores(pairs.rejected)


@pytest.mark.parametrize("world_size", [2, 3, 11])
def test_a_scorer_of_all_ranks_scores_as_one(world_size, rollout):
    sequences = rollout.sequences
    pairs = PreferencePairs(chosen=sequences, rejected=sequences, margin=torch.zeros(len(rollout.rows)))
    scorers = [Ids() for _ in range(world_size)]

    @torch.no_grad()
    def ask(ranks):
        shared = DistributedScorer(scorers[ranks.rank], context_of(ranks), budget=TokenBudget(max_tokens=20))
        return shared.scores(sequences), *shared.pair_scores(pairs)

    first = sequences.response_ids[:, 0].float()
    for scores, chosen, rejected in on_ranks(world_size, ask):
        assert_close((scores, chosen, rejected), (first, first, -first))
    assert len({scorer.num_calls for scorer in scorers}) == 1


def test_one_process_asks_the_engine_and_the_reward_about_everything(monkeypatch, prompts, rollout):
    """And gets their very answers."""
    zeros = torch.zeros(len(rollout.rows))
    scores = Scores(total=zeros, per_token=torch.zeros_like(rollout.rollout_logprobs), parts={})
    engine = NumberingEngine()
    monkeypatch.setattr(engine, "generate", lambda *asked: rollout if asked == (prompts, SAMPLING) else None)
    assert DistributedEngine(engine, context_of(OneProcess())).generate(prompts, SAMPLING) is rollout

    def reward(asked: Rollout) -> Scores:
        assert asked is rollout
        return scores

    assert DistributedReward(reward, OneProcess())(rollout) is scores


def numbered(lengths: list[int]) -> Sequences:
    """A row of each length, of which one is the prompt; the id of the prompt is the number of the row, from 1."""
    return Sequences.from_rows(
        prompt_ids=1 + torch.arange(len(lengths))[:, None],
        prompt_mask=torch.ones(len(lengths), 1, dtype=torch.bool),
        response_ids=torch.zeros(len(lengths), max(lengths, default=1), dtype=torch.long),
        response_mask=torch.arange(max(lengths, default=1)) < torch.tensor(lengths, dtype=torch.long)[:, None] - 1,
        response_lengths=torch.tensor(lengths, dtype=torch.long) - 1,
    )


class Asked:
    """Answers a row with ten times its number, and remembers what it was asked."""

    def __init__(self) -> None:
        self.parts: list[list[int]] = []

    def __call__(self, part: Sequences) -> TokenOutputs:
        number = part.prompt_ids[:, 0]
        self.parts.append(number.tolist())
        return TokenOutputs(named={"values": 10.0 * number[:, None], "last_values": 10.0 * number})


@torch.no_grad()
@pytest.mark.parametrize(
    ("max_tokens", "parts"), [(1, [[2], [4], [3], [1]]), (6, [[2, 4], [3], [1]]), (100, [[2, 4, 3, 1]])]
)
def test_answers_come_in_row_order_however_they_are_asked(max_tokens, parts):
    ask = Asked()
    outputs = distribute_rows(ask, numbered([9, 1, 7, 3]), microbatcher_of(OneProcess(), max_tokens=max_tokens))
    assert outputs.last_values.tolist() == [10, 20, 30, 40]
    assert outputs.values.tolist() == [[10], [20], [30], [40]]
    assert ask.parts == parts


@torch.no_grad()
def test_a_signal_ends_them_before_the_next_microbatch(monkeypatch):
    class Signalled(Asked):
        def __call__(self, part: Sequences) -> TokenOutputs:
            stop.note(signal.SIGTERM)
            return super().__call__(part)

    stop, ask = Stop(), Signalled()
    monkeypatch.setattr(roles, "STOP", stop)
    with stop.leaving(lambda: True, alone=True), pytest.raises(Interrupted):
        distribute_rows(ask, numbered([9, 1, 7, 3]), microbatcher_of(OneProcess(), max_tokens=1))
    assert ask.parts == [[2]]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
def test_of_no_rows_there_is_one_question(world_size, packed):
    """So that the answer has its fields and widths."""
    asked = [Asked() for _ in range(world_size)]

    @torch.no_grad()
    def ask(ranks):
        return distribute_rows(asked[ranks.rank], numbered([]), microbatcher_of(ranks, max_tokens=10, packed=packed))

    for outputs in on_ranks(world_size, ask):
        assert outputs.values.shape == (0, 1)
    assert [each.parts for each in asked] == [[[]]] * world_size


def test_shared_networks_say_whether_they_share_a_trunk():
    def share_trunk(ranks):
        return DistributedNetworks(Lookup(), context_of(ranks), budget=TokenBudget(max_tokens=8)).share_trunk

    assert on_ranks(2, share_trunk) == [True, True]


@pytest.mark.parametrize(("count", "world_size"), [(7, 3), (2, 4), (8, 2)])
def test_blocks_are_everything_in_order(count, world_size):
    blocks = on_ranks(world_size, lambda ranks: list(range(*block(count, ranks))))
    assert [n for each in blocks for n in each] == list(range(count))
    assert max(map(len, blocks)) - min(map(len, blocks)) <= 1
