"""The sanity checks, each on a model or data in which it must fail, and on one in which it must not."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmrl.batches import Sequences
from llmrl.models.reward_checks import sanity_checks
from llmrl.models.reward_model import RewardModule, TransformersRewardModel

from .test_reward_model import CHOSEN, PROMPTS, reward_model, scorer_of, sequences
from .tiny import EOS, make_tokenizer

END, PADDING, DATE = "end token scored", "padding inert", "template free of today's date"
ENDED = [[*response, EOS] for response in CHOSEN]


class Rule(nn.Module):
    """A model whose score is a function of the batch."""

    def __init__(self, score: Any) -> None:
        super().__init__()
        self.score = score
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, batch: Sequences) -> Tensor:
        return self.score(batch).float()


def scored_by(score: Any) -> TransformersRewardModel:
    return TransformersRewardModel(Rule(score))


def failed(scorer: Any, *, responses: Any = ENDED, dtype=torch.float32, template: str = "{{ messages }}") -> set[str]:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    prompts = [PROMPTS[n % len(PROMPTS)] for n in range(len(responses))]
    checks = sanity_checks(scorer, sequences(prompts, responses), tokenizer, dtype=dtype)
    assert checks.keys() == {END, PADDING, DATE}
    assert all(type(passed) is bool for passed in checks.values())  # JSON-ready
    return {name for name, passed in checks.items() if not passed}


def last_ids(batch: Sequences) -> Tensor:
    return batch.response_ids.gather(1, batch.response_lengths[:, None] - 1).squeeze(1)


# --- what is as it should be ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sound_model_passes(family, dtype):
    assert failed(scorer_of(reward_model(family), dtype=dtype), dtype=dtype) == set()


def test_a_head_of_zeros_passes():
    assert failed(scored_by(lambda batch: torch.zeros(len(batch.response_lengths)))) == set()


def test_few_responses_are_enough():
    assert failed(scored_by(last_ids), responses=ENDED[:1]) == set()


def test_only_a_few_responses_are_scored():
    seen = []

    def count(batch: Sequences) -> Tensor:
        seen.append(len(batch.response_lengths))
        return last_ids(batch)

    assert failed(scored_by(count), responses=ENDED * 4) == set()
    assert seen == [8, *[1] * 8]


# --- planted failures -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [0, 11])
def test_a_response_that_was_cut(row):
    """Even one that is not among the few that are scored."""
    responses = [list(response) for response in ENDED * 3]
    responses[row][-1] = 20
    assert failed(scorer_of(reward_model("llama")), responses=responses) == {END}


def test_an_end_token_before_the_last_is_none():
    assert failed(scored_by(last_ids), responses=[[EOS, 20], [20, EOS]]) == {END}


@pytest.mark.parametrize(
    "score",
    [
        lambda batch: batch.response_ids[:, -1],  # the last column, as a tokenizer pads it
        lambda batch: batch.prompt_ids[:, 0],
        lambda batch: batch.response_ids.sum(dim=1),
        lambda batch: batch.prompt_ids.sum(dim=1),
        lambda batch: torch.full((len(batch.response_lengths),), batch.response_ids.shape[1]),
        lambda batch: torch.arange(len(batch.response_lengths)),  # the place in the batch
        lambda batch: batch.num_tokens + batch.num_tokens.float().mean(),  # the company
        lambda batch: torch.full((len(batch.response_lengths),), torch.nan),
    ],
    ids=["last column", "first column", "responses", "prompts", "width", "place", "company", "nan"],
)
def test_a_score_that_padding_or_company_changes(score):
    assert failed(scored_by(score)) == {PADDING}


def test_a_model_that_looks_at_padding():
    """Bidirectional attention, over the columns behind the last token."""
    scorer = scorer_of(reward_model("llama"))

    def see_everything(_, args, kwargs):
        batch, width = kwargs["input_ids"].shape
        return args, {**kwargs, "attention_mask": torch.ones(batch, 1, width, width, dtype=torch.bool)}

    assert isinstance(scorer.module, RewardModule)
    scorer.module.model.base_model.register_forward_pre_hook(see_everything, with_kwargs=True)
    assert failed(scorer) == {PADDING}


def test_rounding_passes_in_bfloat16_alone():
    def rounded(batch: Sequences) -> Tensor:
        return 1.0 + 0.01 * (len(batch.response_lengths) == 1) * torch.ones(len(batch.response_lengths))

    assert failed(scored_by(rounded)) == {PADDING}
    assert failed(scored_by(rounded), dtype=torch.bfloat16) == set()


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_rounding_is_in_parts_of_the_largest_score(scale):
    def slightly(batch: Sequences, share: float) -> Tensor:
        return scale * (1.0 + share * (len(batch.response_lengths) == 1) * torch.ones(len(batch.response_lengths)))

    assert failed(scored_by(lambda batch: slightly(batch, 2e-5))) == set()
    assert failed(scored_by(lambda batch: slightly(batch, 5e-4))) == {PADDING}


def test_a_template_that_tells_the_date():
    template = "{{ strftime_now('%d %b %Y') }}{{ messages }}"
    assert failed(scored_by(last_ids), template=template) == {DATE}
