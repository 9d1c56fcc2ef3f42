"""A budget follows the memory that there is, and one line says so."""

from dataclasses import replace

import pytest
import torch

from llmrl.batches import Sequences, TokenOutputs
from llmrl.distributed.activity import HERE
from llmrl.distributed.collectives import OneProcess
from llmrl.distributed.context import Launch
from llmrl.distributed.microbatcher import Microbatcher
from llmrl.distributed.roles import DistributedNetworks, DistributedPolicy, DistributedScorer
from llmrl.memory import MemoryFull
from llmrl.microbatches import TokenBudget
from llmrl.reports.progress import Silent
from tests.contexts import context_of
from tests.distributed.threads import on_ranks

LENGTHS = [9, 2, 7, 4, 4]
BUDGET = TokenBudget(max_tokens=40, setting="sft.microbatch_tokens")


class Said(Silent):
    def __init__(self):
        self.messages = []

    def message(self, text):
        self.messages.append(text)


def rows(lengths=LENGTHS) -> Sequences:
    """A row of each length, of which one is the prompt; the id of the prompt is the number of the row."""
    return Sequences.from_rows(
        prompt_ids=torch.arange(len(lengths))[:, None],
        prompt_mask=torch.ones(len(lengths), 1, dtype=torch.bool),
        response_ids=torch.zeros(len(lengths), max(lengths), dtype=torch.long),
        response_mask=torch.arange(max(lengths)) < torch.tensor(lengths)[:, None] - 1,
        response_lengths=torch.tensor(lengths) - 1,
    )


class Holding:
    """Work on rows that has memory for a number of tokens, padding included."""

    share_trunk = False

    def __init__(self, num_tokens):
        self.num_tokens = num_tokens
        self.passes = []

    def __call__(self, parts, idle):
        for part in parts:
            self.read(rows().select(part))
        return [part.tolist() for part in parts]

    def read(self, part):
        lengths = part.num_tokens
        self.passes.append(part.prompt_ids[:, 0].tolist())
        if len(lengths) * int(lengths.max()) > self.num_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return part.prompt_ids[:, 0].float()

    def logprobs(self, sequences):
        return TokenOutputs(named={"last_values": self.read(sequences)})

    values = both = logprobs

    def scores(self, sequences):
        return self.read(sequences)

    def pair_scores(self, pairs):
        return self.read(pairs.chosen), self.read(pairs.rejected)


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.setattr(HERE, "phase", "update")


def test_the_budget_is_halved_until_it_fits_and_stays_so():
    said, work = Said(), Holding(15)
    microbatcher = Microbatcher(BUDGET, context_of(progress=said))
    parts = microbatcher.run(rows(), work)
    assert parts == [[1, 3], [4], [2], [0]]
    assert microbatcher.budget == replace(BUDGET, max_tokens=10)
    assert microbatcher.run(rows(), Holding(15)) == parts
    assert said.messages == [
        "out of memory in update with microbatches of 40 tokens (GPU): goes on with 20; set sft.microbatch_tokens=20",
        "out of memory in update with microbatches of 20 tokens (GPU): goes on with 10; set sft.microbatch_tokens=10",
    ]
    assert work.passes == [[1, 3, 4, 2], [1, 3, 4], [2, 0], [1, 3], [4], [2], [0]]


def test_what_would_split_nothing_is_not_tried():
    work = Holding(20)
    microbatcher = Microbatcher(replace(BUDGET, max_tokens=8192), context_of())
    microbatcher.run(rows(), work)
    assert microbatcher.budget.max_tokens == 16
    assert work.passes == [[1, 3, 4, 2, 0], [1, 3, 4, 2], [1, 3, 4], [2], [0]]


@pytest.mark.parametrize(("grad", "way_out"), [(True, "set model.gradient_checkpointing=true, or "), (False, "")])
def test_one_row_that_does_not_fit_is_one_line(grad, way_out):
    microbatcher = Microbatcher(BUDGET, context_of())
    with torch.set_grad_enabled(grad), pytest.raises(MemoryFull) as raised:
        microbatcher.run(rows(), Holding(8))
    assert str(raised.value) == (
        f"out of memory in update with one row in a microbatch (GPU): {way_out}shorten the longest rows, or take a "
        "smaller model"
    )


@pytest.mark.parametrize("sharding", ["deepspeed", "fsdp"])
def test_weights_that_are_sharded_have_no_way_back(sharding):
    context = replace(context_of(), launch=Launch(world_size=1, sharding=sharding))
    work = Holding(15)
    with pytest.raises(MemoryFull, match=r"with microbatches of 40 tokens .*: set .* or lower sft\.microbatch_tokens$"):
        Microbatcher(BUDGET, context).run(rows(), work)
    assert len(work.passes) == 1


def test_several_processes_have_no_way_back():
    works = [Holding(100), Holding(0)]

    def run(ranks):
        try:
            return Microbatcher(BUDGET, context_of(ranks)).run(rows(), works[ranks.rank])
        except MemoryFull as error:
            return str(error)

    fits, full = on_ranks(2, run)
    assert isinstance(fits, list)
    assert full.endswith("(GPU): set model.gradient_checkpointing=true, or lower sft.microbatch_tokens")
    assert len(works[1].passes) == 1


def test_another_error_is_not_caught():
    def fail(parts, idle):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        Microbatcher(BUDGET, context_of(OneProcess())).run(rows(), fail)


@torch.no_grad()
@pytest.mark.parametrize(
    ("role", "question"),
    [
        (DistributedPolicy, "logprobs"),
        (DistributedNetworks, "values"),
        (DistributedNetworks, "both"),
        (DistributedScorer, "scores"),
    ],
)
def test_passes_without_gradient_follow_a_budget_of_their_own(role, question):
    said, models = Said(), [Holding(15), Holding(100)]
    ours, other = (role(model, context_of(progress=said), budget=BUDGET) for model in models)
    for _ in range(2):
        for each in (ours, other):
            outputs = getattr(each, question)(rows())
            numbers = outputs if question == "scores" else outputs.last_values
            assert numbers.tolist() == [0, 1, 2, 3, 4]
    assert (ours.microbatcher.budget.max_tokens, other.microbatcher.budget.max_tokens) == (10, 40)
    assert len(said.messages) == 2
