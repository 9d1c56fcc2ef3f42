"""Reward models against one forward a row, nothing padded, and against plain transformers."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    FalconConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import get_verbosity

from llmrl.batches import PreferencePairs, Sequences
from llmrl.models.checking import check_model, check_reward_model
from llmrl.models.config import LoraSettings, ModelConfig
from llmrl.models.folders import ModelError
from llmrl.models.reward_loading import adapt, choose_pad, load_reward_model
from llmrl.models.reward_model import (
    PairRow,
    RewardModule,
    TransformersRewardModel,
    score_layer,
    shares_prompts_exactly,
)
from llmrl.models.reward_record import Normalization, normalization_on, saved_normalization
from llmrl.models.saving import save_policy
from llmrl.models.training import turn_dropout_off
from tests.rollout.tiny import SIZES, VOCAB

from .tiny import EOS, FAMILIES, assert_same_gradients, gpt2, llama, make_sequences, make_tokenizer, save_folder

SHARING = ("llama", "qwen3", "gpt2")
SLIDING = ("mistral", "gemma2", "gemma3")
PAD = 36  # in none of the rows
PROMPTS = [[7, 8, 9], [EOS, 14, EOS], [3, 4, 5, 6, 30, 31, 32, 33], [34], [35, 18]]
CHOSEN = [[10, 11, 20, 12, EOS], [15, EOS], [EOS], [16, EOS, 17], [19, EOS, 22, EOS]]
REJECTED = [[21, EOS], [EOS, 15, EOS], [13, 12, 11, 10, EOS], [EOS], [19, EOS]]

Ids = Sequence[list[int]]


def reward_model(family: str) -> Any:
    """The same weights each time, in eval mode."""
    torch.manual_seed(0)
    config = FAMILIES[family]().config
    config.num_labels = 1
    return AutoModelForSequenceClassification.from_config(config).eval()


def scorer_of(model: Any, *, microbatch_tokens=10_000, shares_prompts=False, dtype=torch.float32):
    """In train mode without dropout, as a run has it."""
    turn_dropout_off(model)
    module = RewardModule(model.train(), dtype=dtype)
    return TransformersRewardModel(module, microbatch_tokens=microbatch_tokens, shares_prompts=shares_prompts)


def sequences(prompts: Ids = PROMPTS, responses: Ids = CHOSEN, **padding: Any) -> Sequences:
    return make_sequences([(p, r, [1] * len(r)) for p, r in zip(prompts, responses, strict=True)], **padding)


def pairs(prompts: Ids = PROMPTS, chosen: Ids = CHOSEN, rejected: Ids = REJECTED, **padding: Any) -> PreferencePairs:
    sides = [sequences(prompts, side, **padding) for side in (chosen, rejected)]
    return PreferencePairs(chosen=sides[0], rejected=sides[1], margin=torch.zeros(len(prompts)))


def alone(model: Any, prompts: Ids = PROMPTS, responses: Ids = CHOSEN) -> Tensor:
    """The last hidden state of each row times the head."""
    scores = []
    for prompt, response in zip(prompts, responses, strict=True):
        hidden = model.base_model(input_ids=torch.tensor([prompt + response]), use_cache=False).last_hidden_state
        scores.append(hidden[0, -1] @ model.score.weight[0])
    return torch.stack(scores)


def weighted_gradients(model: Any, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """Of a sum in which each score has a weight of its own."""
    weights = torch.linspace(-1.0, 2.0, len(chosen))
    ((weights * chosen).sum() + (weights.flip(0) * rejected).sum()).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def move(module: nn.Module) -> None:
    """What training does: other weights wherever they may learn."""
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))


@pytest.fixture(params=SHARING + SLIDING)
def family(request) -> str:
    return request.param


@pytest.fixture
def causal(tmp_path) -> str:
    """The folder of a causal language model, which has no head."""
    torch.manual_seed(0)
    return save_folder(tmp_path / "causal", llama())


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
    ("family", "shares_prompts"),
    [(family, False) for family in SHARING + SLIDING] + [(family, True) for family in SHARING],
)
def test_padding_never_leaks(family, shares_prompts):
    """Neither ids that no embedding has nor one whose embedding is NaN."""
    model = reward_model(family)
    with torch.no_grad():
        expected = [alone(model, responses=side) for side in (CHOSEN, REJECTED)]
        model.get_input_embeddings().weight[PAD] = torch.nan
    scorer = scorer_of(model, shares_prompts=shares_prompts)
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
        scorer = scorer_of(model, shares_prompts=True)
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


# --- pairs in a row ---------------------------------------------------------------------------------------------------


def test_pairs_in_a_row_by_hand():
    """The picture of the docstring, beside a longer row."""
    a, b, x, y, z = 7, 8, 10, 20, 21
    row = PairRow(pairs([[a, b], [3]], [[x], [11, 12]], [[y, z], [22, 23, 24]], response_padding=(-1,)))
    assert row.ids.tolist() == [[a, b, x, y, z, 0], [3, 11, 12, 22, 23, 24]]
    assert row.positions[0, :5].tolist() == [0, 1, 2, 2, 3]
    assert row.positions[1].tolist() == [0, 1, 2, 1, 2, 3]
    assert row.last.tolist() == [[2, 4], [2, 5]]
    assert row.attends.shape == (2, 1, 6, 6)
    assert row.attends[0, 0, :5].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 1, 0, 1, 1, 0],
    ]
    assert row.attends[1, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 0, 0, 1, 0, 0],
        [1, 0, 0, 1, 1, 0],
        [1, 0, 0, 1, 1, 1],
    ]
    assert row.attends.any(dim=-1).all()  # a token that attends to nothing is NaN


@pytest.mark.parametrize("family", SHARING)
def test_a_shared_prompt_changes_neither_scores_nor_gradients(family):
    scorer, plain = scorer_of(reward_model(family), shares_prompts=True), reward_model(family)
    assert shares_prompts_exactly(scorer.module, VOCAB)
    ours = scorer.pair_scores(pairs())
    theirs = alone(plain, responses=CHOSEN), alone(plain, responses=REJECTED)
    assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert ours[0].shape == ours[1].shape == (5,)
    assert_same_gradients(weighted_gradients(scorer.module.model, *ours), weighted_gradients(plain, *theirs))


def test_pairs_on_rows_of_their_own(family):
    scorer, plain = scorer_of(reward_model(family), shares_prompts=False), reward_model(family)
    ours = scorer.pair_scores(pairs())
    theirs = alone(plain, responses=CHOSEN), alone(plain, responses=REJECTED)
    assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert_same_gradients(weighted_gradients(scorer.module.model, *ours), weighted_gradients(plain, *theirs))


@pytest.mark.parametrize(("shares_prompts", "shape"), [(True, (1, 11)), (False, (2, 8))])
def test_a_shared_prompt_is_encoded_once(shares_prompts, shape):
    scorer = scorer_of(reward_model("llama"), shares_prompts=shares_prompts)
    shapes = []
    scorer.module.model.base_model.register_forward_pre_hook(
        lambda _, __, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    scorer.pair_scores(pairs([PROMPTS[0]], [CHOSEN[0]], [[21, 22, EOS]]))
    assert shapes == [shape]


def test_a_row_may_be_longer_than_the_model_has_positions():
    """Its responses are not, and padding asks for no position of its own."""
    model = reward_model("gpt2")  # 64 positions
    long = [[n % 30 for n in range(40)], [(7 * n + 1) % 30 for n in range(50)]]
    prompts, chosen, rejected = [[7, 8], [3]], [long[0], [11]], [long[1], [EOS]]
    with torch.no_grad():
        expected = alone(model, prompts, chosen), alone(model, prompts, rejected)
        scores = scorer_of(model, shares_prompts=True).pair_scores(pairs(prompts, chosen, rejected))
    assert_close(scores, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [4, 4096])
@pytest.mark.parametrize("family", SLIDING)
def test_models_with_a_window_do_not_share_prompts(family, window):
    """Not even where the probe would fit into it."""
    config = FAMILIES[family]().config
    config.num_labels, config.sliding_window = 1, window
    model = AutoModelForSequenceClassification.from_config(config)
    assert not shares_prompts_exactly(scorer_of(model).module, VOCAB)


def test_other_kernels_of_attention_do_not_share_prompts():
    model = reward_model("llama")
    model.set_attn_implementation("eager")
    assert not shares_prompts_exactly(scorer_of(model).module, VOCAB)


@pytest.mark.parametrize("ignored", ["attention_mask", "position_ids"])
def test_a_model_that_takes_no_notice_of_the_row_does_not_share_prompts(ignored):
    model = reward_model("llama")

    def ignore(_, args, kwargs):
        return args, {**kwargs, ignored: None}

    model.base_model.register_forward_pre_hook(ignore, with_kwargs=True)
    assert not shares_prompts_exactly(scorer_of(model).module, VOCAB)


def test_a_broken_model_does_not_share_prompts():
    model = reward_model("llama")
    with torch.no_grad():
        model.base_model.norm.weight[0] = torch.nan
    assert not shares_prompts_exactly(scorer_of(model).module, VOCAB)


def test_asking_leaves_nothing_behind():
    module = scorer_of(reward_model("llama")).module
    assert shares_prompts_exactly(module, 3)  # a vocabulary smaller than the probe
    assert all(p.grad is None for p in module.parameters())
    assert module.training


def test_rounding_is_no_reason_not_to_share_prompts():
    """The kernels of a mask and of none may round differently in bfloat16, so it is float32 that is asked."""
    module = scorer_of(reward_model("llama"), dtype=torch.bfloat16).module
    dtypes = []
    module.model.base_model.layers[0].mlp.register_forward_hook(lambda _, __, output: dtypes.append(output.dtype))
    assert shares_prompts_exactly(module, VOCAB)
    assert set(dtypes) == {torch.float32}


def test_a_bias_that_counts_columns_does_not_share_prompts():
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = AutoModelForSequenceClassification.from_config(FalconConfig(**sizes, alibi=True, num_labels=1))
    assert not shares_prompts_exactly(scorer_of(model).module, VOCAB)


# --- arithmetic -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shares_prompts", [False, True])
def test_bfloat16_is_the_arithmetic_and_not_the_result(shares_prompts):
    exact = torch.stack(scorer_of(reward_model("llama")).pair_scores(pairs()))
    scorer = scorer_of(reward_model("llama"), shares_prompts=shares_prompts, dtype=torch.bfloat16)
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
    assert torch.equal(last, scorer.module.last_hidden(sequences()))  # which the last norm has left unrounded
    exact = last.double() @ scorer.module.model.score.weight[0].double()
    assert_close(scores.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("microbatch_tokens", [1, 12, 40, 10_000])
@pytest.mark.parametrize("shares_prompts", [False, True])
def test_microbatches_change_nothing(microbatch_tokens, shares_prompts):
    scorer = scorer_of(reward_model("llama"), microbatch_tokens=microbatch_tokens, shares_prompts=shares_prompts)
    with torch.no_grad():
        expected = alone(scorer.module.model), alone(scorer.module.model, responses=REJECTED)
        assert_close(scorer.pair_scores(pairs()), expected, rtol=1e-4, atol=1e-4)
    assert_close(scorer.scores(sequences()), expected[0], rtol=1e-4, atol=1e-4)


def test_microbatches_hold_their_budget():
    scorer = scorer_of(reward_model("llama"), microbatch_tokens=12)
    shapes = []
    scorer.module.model.base_model.register_forward_pre_hook(
        lambda _, __, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    scorer.scores(sequences())
    assert shapes == [(2, 5), (1, 6), (1, 8), (1, 9)]  # lengths 8, 5, 9, 4, 6


@pytest.mark.parametrize("shares_prompts", [False, True])
def test_the_tokens_of_a_pair_are_those_of_its_forward_pass(shares_prompts):
    """By what a pair alone takes, padding between its sides included."""
    scorer = scorer_of(reward_model("llama"), shares_prompts=shares_prompts)
    shapes = []
    scorer.module.model.base_model.register_forward_pre_hook(
        lambda _, __, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    for row in range(len(PROMPTS)):
        scorer.pair_scores(pairs().select(torch.tensor([row])))
    assert scorer.pair_tokens(pairs()).tolist() == [rows * width for rows, width in shapes]


@pytest.mark.parametrize("shares_prompts", [False, True])
def test_microbatches_of_unequal_pairs_hold_their_budget(shares_prompts):
    """A long response beside a short one: two rows of the longer."""
    scorer = scorer_of(reward_model("llama"), microbatch_tokens=48, shares_prompts=shares_prompts)
    shapes = []
    scorer.module.model.base_model.register_forward_pre_hook(
        lambda _, __, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    with torch.no_grad():
        scorer.pair_scores(pairs([[7]] * 6, [[8, *[9] * 10]] * 6, [[10]] * 6))
    assert shapes == ([(3, 13), (3, 13)] if shares_prompts else [(4, 12)] * 3)


def test_no_rows_have_no_scores():
    scorer = scorer_of(reward_model("llama"))
    none = torch.tensor([], dtype=torch.long)
    assert scorer.scores(sequences().select(none)).shape == (0,)
    with torch.no_grad():
        assert [scores.shape for scores in scorer.pair_scores(pairs().select(none))] == [(0,), (0,)]


# --- loading ----------------------------------------------------------------------------------------------------------


def test_a_new_head_of_zeros(causal):
    model = load_reward_model(ModelConfig(path=causal), head_init="zero")
    assert not score_layer(model).weight.any()
    assert not scorer_of(model).scores(sequences()).any()


def test_a_new_normal_head_has_variance_1_over_hidden_size_plus_1(tmp_path):
    """arXiv:2009.01325, appendix B."""
    wide = llama(hidden_size=1023, num_attention_heads=1, num_key_value_heads=1, num_hidden_layers=1)
    path = save_folder(tmp_path, wide)
    torch.manual_seed(3)
    weight = score_layer(load_reward_model(ModelConfig(path=path), head_init="normal")).weight
    assert weight.shape == (1, 1023)
    assert weight.var().item() == pytest.approx(1 / 1024, rel=5 * (2 / 1023) ** 0.5)
    assert abs(weight.mean().item()) < 5 * 1 / 32 / 1023**0.5


@pytest.mark.parametrize("from_scratch", [False, True])
def test_what_is_random_comes_from_the_seed(causal, from_scratch):
    weights = []
    for _ in range(2):
        torch.manual_seed(3)
        model = load_reward_model(ModelConfig(path=causal, from_scratch=from_scratch), head_init="normal")
        weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
    assert all(torch.equal(x, weights[1][name]) for name, x in weights[0].items())
    trained = load_file(Path(causal) / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(weights[0]["model.embed_tokens.weight"], trained) != from_scratch


@pytest.mark.parametrize("head_init", ["zero", "normal", None])
def test_a_head_that_is_there_is_kept(head_init, tmp_path):
    model = reward_model("llama")
    path = save_folder(tmp_path, model)
    loaded = load_reward_model(ModelConfig(path=path), head_init=head_init)
    assert torch.equal(loaded.score.weight, model.score.weight)


def test_weights_are_float32_and_dropout_is_off(tmp_path):
    torch.manual_seed(0)
    path = save_folder(tmp_path, gpt2().bfloat16())
    model = load_reward_model(ModelConfig(path=path), head_init="normal").train()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert max(module.p for module in model.modules() if isinstance(module, nn.Dropout)) == 0.0


def refusal(call, *args, **settings) -> str:
    with pytest.raises(ModelError) as error:
        call(*args, **settings)
    return str(error.value)


def test_a_missing_head_is_refused(causal):
    config = ModelConfig(path=causal)
    assert "such as score.weight, are missing" in refusal(load_reward_model, config, head_init=None)
    message = refusal(check_reward_model, config, needs_head=True)
    assert message.startswith(f"model.path ({causal}) has no score head; train one with `llmrl reward-model`")
    check_reward_model(config, needs_head=False)


@pytest.fixture
def table():
    """What transformers says of a load."""
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("transformers").addHandler(handler)
    yield records
    logging.getLogger("transformers").removeHandler(handler)


def test_a_new_head_is_no_news(causal, table):
    verbosity = get_verbosity()
    load_reward_model(ModelConfig(path=causal), head_init="normal")
    assert table == []
    assert get_verbosity() == verbosity
    AutoModelForSequenceClassification.from_pretrained(causal)  # which would say it
    assert table


def drop(weights):
    del weights["model.norm.weight"]


def bend(weights):
    weights["model.norm.weight"] = weights["model.norm.weight"][:-1].clone()


def add_to_trunk(weights):
    weights["model.norm.bias"] = torch.zeros(3)


def add_to_head(weights):
    weights["score.bias"] = torch.zeros(1)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (drop, "model.norm.weight, are missing for a LlamaForSequenceClassification and would be random"),
        (bend, "model.norm.weight, are of another shape than its config.json says"),
        (add_to_trunk, "model.norm.bias, are not those of a LlamaForSequenceClassification"),
        (add_to_head, "score.bias, are not those of a LlamaForSequenceClassification"),
    ],
)
def test_weights_that_do_not_fit_are_refused_whatever_becomes_of_the_head(causal, table, change, told):
    file = Path(causal) / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})
    message = refusal(load_reward_model, ModelConfig(path=causal), head_init="normal")
    assert message == f"model.path ({causal}): 1 weights, such as {told}; choose a model that is complete"
    assert table == []


@pytest.mark.parametrize("name", ["transformer.h.0.attn.masked_bias", "transformer.h.0.attn.attention.bias"])
def test_causal_masks_of_old_folders_are_left_out(tmp_path, name):
    path = save_folder(tmp_path, gpt2())
    file = Path(path) / "model.safetensors"
    save_file({**load_file(file), name: torch.zeros(3)}, file, metadata={"format": "pt"})
    load_reward_model(ModelConfig(path=path), head_init="normal")


@pytest.mark.parametrize("head_init", ["normal", None])
def test_a_classifier_that_lost_its_head_is_refused(tmp_path, head_init):
    path = save_folder(tmp_path, reward_model("llama"))
    file = Path(path) / "model.safetensors"
    weights = load_file(file)
    del weights["score.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    assert refusal(load_reward_model, ModelConfig(path=path), head_init=head_init) == (
        f"model.path ({path}): 1 weights, such as score.weight, are missing for a LlamaForSequenceClassification and "
        "would be random; choose a model that is complete"
    )
    load_reward_model(ModelConfig(path=path, from_scratch=True), head_init="normal")


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_broken_config_is_named(tmp_path, text):
    path = save_folder(tmp_path, reward_model("llama"))
    (tmp_path / "config.json").write_text(text)
    told = f"model.path ({path}) has a config.json that is no JSON object; save the model again"
    assert refusal(check_reward_model, ModelConfig(path=path), needs_head=True) == told
    assert refusal(check_model, ModelConfig(path=path)) == told


def test_one_label_by_its_number(tmp_path):
    path = save_folder(tmp_path, reward_model("llama"))
    settings = json.loads((tmp_path / "config.json").read_text())
    settings = {name: value for name, value in settings.items() if name not in ("id2label", "label2id")}
    (tmp_path / "config.json").write_text(json.dumps({**settings, "num_labels": 1}))
    check_reward_model(ModelConfig(path=path), needs_head=True)
    assert load_reward_model(ModelConfig(path=path), head_init=None).config.num_labels == 1


def test_heads_of_other_kinds_are_left_out(causal):
    file = Path(causal) / "model.safetensors"
    save_file({**load_file(file), "v_head.summary.weight": torch.zeros(3)}, file, metadata={"format": "pt"})
    load_reward_model(ModelConfig(path=causal), head_init="normal")


@pytest.mark.parametrize("num_labels", [2, 3])
def test_several_labels_are_refused(num_labels, tmp_path):
    model = LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=num_labels))
    config = ModelConfig(path=save_folder(tmp_path, model))
    sentence = f"model.path ({config.path}) has {num_labels} labels; a reward model has exactly one"
    for needs_head in (True, False):
        assert refusal(check_reward_model, config, needs_head=needs_head) == sentence
    for head_init in (None, "normal"):  # a model of the hub is not checked before
        assert refusal(load_reward_model, config, head_init=head_init) == sentence


def test_a_folder_with_one_label_and_a_hub_name_pass(tmp_path):
    path = save_folder(tmp_path, reward_model("llama"))
    for name in (path, "nobody/such-a-model"):
        check_reward_model(ModelConfig(path=name), needs_head=True)


def test_an_adapter_is_refused(causal, tmp_path):
    """Before anything loads: the folder that it lies in holds the merged model."""
    config = ModelConfig(path=causal, lora=LoraSettings(rank=2))
    adapted = adapt(load_reward_model(config, head_init="normal"), config)
    adapted.save_pretrained(str(tmp_path / "final" / "adapter"))
    path = str(tmp_path / "final" / "adapter")
    for needs_head in (True, False):
        message = refusal(check_reward_model, ModelConfig(path=path), needs_head=needs_head)
        assert message.startswith(f"model.path ({path}) is a peft adapter")


def test_a_model_that_reads_its_score_in_another_way_is_refused(tmp_path):
    config = BertConfig(
        vocab_size=40, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_labels=1
    )
    path = save_folder(tmp_path, BertForSequenceClassification(config))
    message = refusal(load_reward_model, ModelConfig(path=path), head_init="normal")
    assert message.startswith("BertForSequenceClassification (bert) has no linear layer `score` to one number")


def test_a_head_with_several_outputs_is_none():
    assert "has no linear layer `score` to one number" in refusal(
        score_layer, LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=2))
    )


# --- adapters ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapted(causal):
    """``(model, adapted)`` in the middle of training."""
    torch.manual_seed(0)
    config = ModelConfig(path=causal, lora=LoraSettings(rank=2))
    model = load_reward_model(config, head_init="zero")
    adapted = adapt(model, config)
    move(adapted)
    return model, adapted


def test_without_lora_there_are_no_adapters(causal):
    config = ModelConfig(path=causal)
    model = load_reward_model(config, head_init="zero")
    assert adapt(model, config) is None
    assert all(p.requires_grad for p in model.parameters())


def test_adapters_and_the_head_learn_and_nothing_else(adapted):
    model, _ = adapted
    assert score_layer(model) is model.score
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name in learning if "lora_" not in name] == ["score.modules_to_save.default.weight"]
    assert any("lora_A" in name for name in learning)
    scorer = scorer_of(model, shares_prompts=shares_prompts_exactly(RewardModule(model, dtype=torch.float32), VOCAB))
    assert scorer.shares_prompts
    torch.cat(scorer.pair_scores(pairs())).sum().backward()
    assert all((p.grad is not None) == (name in learning) for name, p in model.named_parameters())
    assert model.score.modules_to_save["default"].weight.grad.any()


def test_the_merged_folder_and_the_adapter_score_alike(adapted, causal, tmp_path):
    model, view = adapted
    ours = scorer_of(model).scores(sequences())
    assert ours.any()
    Normalization(mean=0.5, std=2.0).write(model.config)
    save_policy(tmp_path / "final", model=model, adapted=view, tokenizer=make_tokenizer(), dtype=torch.float32)

    merged = load_reward_model(ModelConfig(path=str(tmp_path / "final")), head_init=None)
    assert isinstance(merged.score, nn.Linear)
    assert saved_normalization(merged.config) == Normalization(mean=0.5, std=2.0)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "final")
    base = AutoModelForSequenceClassification.from_pretrained(causal, num_labels=1)
    beside = PeftModel.from_pretrained(base, str(tmp_path / "final" / "adapter")).get_base_model()
    beside.score = beside.score.modules_to_save["default"]
    with torch.no_grad():
        for other in (merged, plain, beside):
            assert_close(alone(other), ours, rtol=1e-4, atol=1e-4)
    assert torch.equal(scorer_of(model).scores(sequences()), ours)  # saving changed nothing


# --- the pad ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "pad", "chosen", "differs"),
    [
        (["<eos>", "<mine>"], "<mine>", "<mine>", True),  # has one of its own
        (["<eos>", "<mine>", "<pad>"], "<mine>", "<mine>", True),
        (["<eos>", "<unk>", "<pad>"], "<eos>", "<pad>", True),
        (["<eos>", "<unk>", "<pad>"], None, "<pad>", True),
        (["<eos>", "<unk>"], "<eos>", "<unk>", True),
        (["<eos>", "<|endoftext|>"], "<eos>", "<eos>", False),  # which begins every text
        (["<eos>", "<|padding|>"], None, "<|padding|>", True),
        (["<eos>", "<PAD>"], "<eos>", "<PAD>", True),
        (["<eos>", "<|reserved_special_token_0|>"], "<eos>", "<|reserved_special_token_0|>", True),
        (["<eos>"], "<eos>", "<eos>", False),
        (["<eos>"], None, "<eos>", False),
    ],
)
def test_a_pad_of_its_own_where_the_vocabulary_has_one_to_spare(words, pad, chosen, differs):
    vocabulary = {word: n for n, word in enumerate(["word", "<|endoftext|>", *words])}
    if "<|endoftext|>" not in words:
        del vocabulary["<|endoftext|>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="word")),
        eos_token="<eos>",
        bos_token="<|endoftext|>" if "<|endoftext|>" in words else None,
        pad_token=pad,
    )
    size = len(tokenizer)
    model = reward_model("llama")
    assert choose_pad(tokenizer, model) == differs
    assert tokenizer.pad_token == chosen
    assert model.config.pad_token_id == vocabulary[chosen]
    assert len(tokenizer) == size  # no id that the model has no embedding for


# --- normalization ----------------------------------------------------------------------------------------------------


def test_normalized_scores_have_mean_0_and_standard_deviation_1():
    scores = torch.tensor([1.0, 2.0, 4.0, 9.0])
    assert normalization_on(scores) == Normalization(mean=4.0, std=9.5**0.5)
    normalized = normalization_on(scores)(scores)
    assert_close(normalized.mean(), torch.tensor(0.0))
    assert_close(normalized.square().mean(), torch.tensor(1.0))
    assert_close(normalization_on(scores)(torch.tensor([4.0 + 9.5**0.5])), torch.tensor([1.0]))


def test_scores_that_are_all_equal_keep_their_spread():
    constant = torch.full((7,), 0.1)
    assert normalization_on(constant).std == 1.0
    assert normalization_on(constant)(constant).tolist() == [0.0] * 7


def test_scores_far_from_0_keep_their_spread():
    """Sums in float32 would lose it."""
    scores = 10_000 + torch.tensor([0.0, 0.25]).repeat(500)
    assert normalization_on(scores) == Normalization(mean=10_000.125, std=0.125)


def test_normalization_is_stored_with_the_model_and_not_applied_by_it(tmp_path):
    model = reward_model("llama")
    assert saved_normalization(model.config) is None
    before = scorer_of(model).scores(sequences())
    written = Normalization(mean=-1 / 3, std=0.7)
    written.write(model.config)
    path = save_folder(tmp_path, model)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["llmrl_score_mean"], config["llmrl_score_std"]) == (-1 / 3, 0.7)
    loaded = load_reward_model(ModelConfig(path=path), head_init=None)
    assert saved_normalization(loaded.config) == written
    assert torch.equal(scorer_of(loaded).scores(sequences()), before)
