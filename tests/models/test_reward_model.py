"""Reward models against one forward a row, nothing padded, and against plain transformers."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification

from llmrl.batches import PreferencePairs
from llmrl.distributed.roles import DistributedScorer
from llmrl.microbatches import TokenBudget
from llmrl.models.config import ModelConfig
from llmrl.models.reward_loading import choose_pad, load_reward_model
from llmrl.models.saving import save_policy
from llmrl.models.trunk import encode
from tests.contexts import context_of
from tests.models.rewards import (
    CHOSEN,
    PACKING,
    PAD,
    PROMPTS,
    REJECTED,
    SLIDING,
    alone,
    pairs,
    reward_model,
    scorer_of,
    sequences,
)

from .tiny import EOS, assert_same_gradients, make_sequences, make_tokenizer


def weighted_gradients(model: Any, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """Of a sum in which each score has a weight of its own."""
    weights = torch.linspace(-1.0, 2.0, len(chosen))
    ((weights * chosen).sum() + (weights.flip(0) * rejected).sum()).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.fixture(params=PACKING + SLIDING)
def family(request) -> str:
    return request.param


# --- which token is scored --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_each_row_scores_as_it_does_alone(family, training):
    """Pad is EOS, and EOS stands in prompts, inside responses and at their ends."""
    model = reward_model(family)
    with torch.no_grad():
        expected = alone(model)
    scorer = scorer_of(model)
    scorer.module.train(training)
    assert_close(scorer.scores(sequences()), expected, rtol=1e-4, atol=1e-4)
    for row in range(len(PROMPTS)):
        score = scorer.scores(sequences().select(torch.tensor([row])))
        assert_close(score, expected[row : row + 1], rtol=1e-4, atol=1e-4)


def test_scores_without_a_gradient_and_in_float32():
    scores = scorer_of(reward_model("llama")).scores(sequences())
    assert (scores.requires_grad, scores.dtype, scores.shape) == (False, torch.float32, (5,))


@pytest.mark.parametrize(
    ("family", "packed"),
    [(family, False) for family in PACKING + SLIDING] + [(family, True) for family in PACKING],
)
def test_padding_never_leaks(family, packed):
    """Neither ids that no embedding has nor one whose embedding is NaN."""
    model = reward_model(family)
    scorer = scorer_of(model, packed=packed)
    with torch.no_grad():
        expected = [alone(model, responses=side) for side in (CHOSEN, REJECTED)]
        model.get_input_embeddings().weight[PAD] = torch.nan
    garbage: dict[str, Any] = {"prompt_padding": (PAD, 0, 7), "response_padding": (-1, PAD, 10**6)}
    assert torch.equal(scorer.scores(sequences(**garbage)), scorer.scores(sequences()))
    with torch.no_grad():
        scores = scorer.pair_scores(pairs(**garbage))
    assert_close(scores, tuple(expected), rtol=1e-4, atol=1e-4)


def test_tool_output_counts_like_any_other_token():
    """The last token is the last attended one, whoever chose it."""
    model = reward_model("llama")
    sides = [[10, 11, 12], [20, 21, 22, 23]]
    chosen, rejected = (make_sequences([([7, 8], ids, [1, 0, 1, 0][: len(ids)])]) for ids in sides)
    with torch.no_grad():
        expected = tuple(alone(model, [[7, 8]], [ids]) for ids in sides)
        scorer = scorer_of(model, packed=True)
        both = scorer.pair_scores(PreferencePairs(chosen=chosen, rejected=rejected, margin=torch.zeros(1)))
    assert_close(both, expected, rtol=1e-4, atol=1e-4)
    assert_close(scorer.scores(rejected), expected[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_plain_transformers_gives_the_same_scores_from_the_saved_folder(family, side, tmp_path):
    """Wherever its own rule, the last id that is not pad, names the same token."""
    ours = scorer_of(reward_model(family))
    tokenizer = make_tokenizer()
    tokenizer.pad_token = f"t{PAD}"
    assert choose_pad(tokenizer, ours.module.model)
    save_policy(tmp_path / "final", model=ours.module.model, adapted=None, tokenizer=tokenizer, dtype=torch.float32)
    rows = [p + r for p, r in zip(PROMPTS, CHOSEN, strict=True)]
    width = max(map(len, rows))
    gaps = [[PAD] * (width - len(row)) for row in rows]
    ids = torch.tensor([gap + row if side == "left" else row + gap for row, gap in zip(rows, gaps, strict=True)])
    mask = (ids != PAD).long()
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "final").eval()
    with torch.no_grad():
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)  # GPT-2 would count padding on the left
        logits = plain(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    assert_close(ours.scores(sequences()), logits[:, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_saved_folder_scores_alike(family, dtype, tmp_path):
    scorer = scorer_of(reward_model(family))
    save_policy(tmp_path / "final", model=scorer.module.model, adapted=None, tokenizer=make_tokenizer(), dtype=dtype)
    loaded = load_reward_model(ModelConfig(path=str(tmp_path / "final")), head_init=None)
    ours, theirs = scorer.scores(sequences()), scorer_of(loaded.eval()).scores(sequences())
    assert_close(theirs, ours, rtol=0, atol=float(ours.abs().max()) * (1e-6 if dtype == torch.float32 else 0.1))


# --- pairs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", PACKING)
def test_packing_changes_neither_scores_nor_gradients(family):
    scorer, plain = scorer_of(reward_model(family), packed=True), reward_model(family)
    ours = scorer.pair_scores(pairs())
    theirs = alone(plain, responses=CHOSEN), alone(plain, responses=REJECTED)
    assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert ours[0].shape == ours[1].shape == (5,)
    assert_same_gradients(weighted_gradients(scorer.module.model, *ours), weighted_gradients(plain, *theirs))


def test_pairs_on_rows_of_their_own(family):
    scorer, plain = scorer_of(reward_model(family), packed=False), reward_model(family)
    ours = scorer.pair_scores(pairs())
    theirs = alone(plain, responses=CHOSEN), alone(plain, responses=REJECTED)
    assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert_same_gradients(weighted_gradients(scorer.module.model, *ours), weighted_gradients(plain, *theirs))


@pytest.mark.parametrize(("packed", "shape"), [(True, (1, 11)), (False, (2, 8))])
def test_a_shared_prompt_is_encoded_once(packed, shape):
    scorer = scorer_of(reward_model("llama"), packed=packed)
    shapes = []
    scorer.module.model.base_model.register_forward_pre_hook(
        lambda _, __, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    scorer.pair_scores(pairs([PROMPTS[0]], [CHOSEN[0]], [[21, 22, EOS]]))
    assert shapes == [shape]


def test_a_row_may_be_longer_than_the_model_has_positions():
    """Its sequences are not."""
    model = reward_model("gpt2")  # 64 positions
    long = [[n % 30 for n in range(40)], [(7 * n + 1) % 30 for n in range(50)]]
    prompts, chosen, rejected = [[7, 8], [3]], [long[0], [11]], [long[1], [EOS]]
    with torch.no_grad():
        expected = alone(model, prompts, chosen), alone(model, prompts, rejected)
        scores = scorer_of(model, packed=True).pair_scores(pairs(prompts, chosen, rejected))
    assert_close(scores, expected, rtol=1e-4, atol=1e-4)


# --- arithmetic -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_bfloat16_is_the_arithmetic_and_not_the_result(packed):
    exact = torch.stack(scorer_of(reward_model("llama")).pair_scores(pairs()))
    scorer = scorer_of(reward_model("llama"), packed=packed, dtype=torch.bfloat16)
    rough = torch.stack(scorer.pair_scores(pairs()))
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, exact)
    assert_close(rough, exact, rtol=0, atol=0.1 * exact.detach().abs().max().item())
    rough.sum().backward()
    assert {p.grad.dtype for p in scorer.module.parameters() if p.grad is not None} == {torch.float32}


def test_the_head_computes_in_float32():
    scorer = scorer_of(reward_model("llama"), dtype=torch.bfloat16)
    seen = []
    scorer.module.model.score.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    with torch.autocast("cpu", dtype=torch.bfloat16):  # whatever stands around it
        scores = scorer.module(sequences())
    ((last, output),) = seen
    assert last.dtype == output.dtype == torch.float32
    hidden = encode(scorer.module.model.base_model, sequences(), dtype=torch.bfloat16)
    assert torch.equal(last, hidden.last())  # which the last norm has left unrounded
    exact = last.double() @ scorer.module.model.score.weight[0].double()
    assert_close(scores.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("microbatch_tokens", [1, 12, 40, 10_000])
@pytest.mark.parametrize("packed", [False, True])
def test_microbatches_change_nothing(microbatch_tokens, packed):
    scorer = scorer_of(reward_model("llama"), packed=packed)
    in_microbatches = DistributedScorer(
        scorer, context_of(), budget=TokenBudget(max_tokens=microbatch_tokens, packed=packed)
    )
    with torch.no_grad():
        expected = alone(scorer.module.model), alone(scorer.module.model, responses=REJECTED)
        assert_close(in_microbatches.pair_scores(pairs()), expected, rtol=1e-4, atol=1e-4)
    assert_close(in_microbatches.scores(sequences()), expected[0], rtol=1e-4, atol=1e-4)


def test_microbatches_hold_their_budget():
    scorer = scorer_of(reward_model("llama"))
    shapes = []
    scorer.module.model.base_model.register_forward_pre_hook(
        lambda _, __, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    DistributedScorer(scorer, context_of(), budget=TokenBudget(max_tokens=12)).scores(sequences())
    assert shapes == [(2, 5), (1, 6), (1, 8), (1, 9)]  # lengths 8, 5, 9, 4, 6


@pytest.mark.parametrize("packed", [False, True])
def test_the_tokens_of_a_pair_are_those_of_its_forward_pass(packed):
    """By what a pair alone takes, padding between its sides included."""
    scorer = scorer_of(reward_model("llama"), packed=packed)
    shapes = []
    scorer.module.model.base_model.register_forward_pre_hook(
        lambda _, __, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    for row in range(len(PROMPTS)):
        scorer.pair_scores(pairs().select(torch.tensor([row])))
    each = [pairs().select(torch.tensor([row])).pass_tokens(packed=packed) for row in range(len(PROMPTS))]
    of_prompts = [0 if tokens.of_prompt is None else int(tokens.of_prompt) for tokens in each]
    assert [int(tokens.own) + prompt for tokens, prompt in zip(each, of_prompts, strict=True)] == [
        rows * width for rows, width in shapes
    ]


@pytest.mark.parametrize("packed", [False, True])
def test_microbatches_of_unequal_pairs_hold_their_budget(packed):
    """A long response beside a short one: two rows of the longer, or 1 + 11 + 1 tokens."""
    scorer = scorer_of(reward_model("llama"), packed=packed)
    shapes = []
    scorer.module.model.base_model.register_forward_pre_hook(
        lambda _, __, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    with torch.no_grad():
        unequal = pairs([[7]] * 6, [[8, *[9] * 10]] * 6, [[10]] * 6)
        DistributedScorer(scorer, context_of(), budget=TokenBudget(max_tokens=48, packed=packed)).pair_scores(unequal)
    assert shapes == ([(1, 39), (1, 39)] if packed else [(4, 12)] * 3)


def test_no_rows_have_no_scores():
    scorer = scorer_of(reward_model("llama"))
    none = torch.tensor([], dtype=torch.long)
    assert scorer.scores(sequences().select(none)).shape == (0,)
    with torch.no_grad():
        assert [scores.shape for scores in scorer.pair_scores(pairs().select(none))] == [(0,), (0,)]
