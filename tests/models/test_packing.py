"""Packed attention against its definition, token by token, and what it refuses."""

import copy

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from llmrl.models.heads import LinearHead, choose_head
from llmrl.models.packing import PackedAttention, Packing, Runs, packed_attention_forward, packs
from llmrl.models.saving import save_policy
from tests.rollout.tiny import VOCAB

from .tiny import build, make_tokenizer
from .tiny import packing as packing_model

CPU = torch.device("cpu")
PROMPTS = [5, 1, 40]
RESPONSES = [[4, 1, 70], [], [3, 33]]
"""Lengths of the responses to each prompt."""


def packing(prompts: list[int], responses: list[list[int]]) -> Packing:
    own = [*prompts, *(n for of_prompt in responses for n in of_prompt)]
    return Packing(sum(prompts), Runs.of(own, own, CPU), Runs.of([sum(n) for n in responses], prompts, CPU))


def sequences(prompts: list[int], responses: list[list[int]]) -> list[tuple[list[int], list[int]]]:
    """Columns of the prompt and of the response of each sequence."""
    columns = iter(range(sum(prompts) + sum(map(sum, responses))))
    of_prompts = [[next(columns) for _ in range(n)] for n in prompts]
    return [
        (of_prompts[i], [next(columns) for _ in range(n)])
        for i, of_prompt in enumerate(responses)
        for n in of_prompt
    ]  # fmt: skip


def by_definition(query: Tensor, key: Tensor, value: Tensor, prompts, responses, scale: float) -> Tensor:
    """softmax(q k / sqrt) v of each token over the tokens up to it in its sequence, one token and head at a time."""
    out = torch.zeros_like(query)
    groups = query.shape[1] // key.shape[1]
    seen: dict[int, list[int]] = {}
    first = 0
    for n in prompts:
        seen |= {first + i: list(range(first, first + i + 1)) for i in range(n)}
        first += n
    for prompt, response in sequences(prompts, responses):
        seen |= {column: prompt + response[: i + 1] for i, column in enumerate(response)}
    rows = []
    for token in range(len(query)):
        heads = [
            ((key[seen[token], h // groups] @ query[token, h]) * scale).softmax(0) @ value[seen[token], h // groups]
            for h in range(query.shape[1])
        ]
        rows.append(torch.stack(heads))
    assert len(rows) == len(out)
    return torch.stack(rows)


def tensors(num_tokens: int, *, heads: int = 4, kv_heads: int = 2, size: int = 8) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [
        torch.randn(num_tokens, n, size, generator=random).mul(2).requires_grad_() for n in (heads, kv_heads, kv_heads)
    ]


@pytest.mark.parametrize(
    ("prompts", "responses"),
    [(PROMPTS, RESPONSES), ([1], [[1]]), ([3, 4], [[2], [5]]), ([2], [[]]), ([7], [[1] * 9]), ([2, 3], [[0, 4], [0]])],
)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_and_its_gradients_by_definition(prompts, responses, kv_heads):
    inputs = tensors(sum(prompts) + sum(map(sum, responses)), kv_heads=kv_heads)
    out = PackedAttention.apply(*inputs, packing(prompts, responses), 0.3)
    expected = by_definition(*inputs, prompts, responses, 0.3)
    assert_close(out, expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad((x * weights).sum(), inputs) for x in (out, expected)]
    assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_scores_too_large_for_an_exponential():
    """The parts are joined by their log-sum-exps, which neither overflow nor vanish. Scores of thousands are rounded
    by up to 5e-4, so where two are nearly tied, values of 100 mix by that much more or less."""
    inputs = [x.detach().mul(40).requires_grad_() for x in tensors(sum(PROMPTS) + sum(map(sum, RESPONSES)))]
    out = PackedAttention.apply(*inputs, packing(PROMPTS, RESPONSES), 1.0)
    assert_close(out, by_definition(*inputs, PROMPTS, RESPONSES, 1.0), rtol=1e-4, atol=0.05)
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), inputs))


def test_without_a_layout_it_is_torchs_attention():
    query, key, value = (x.transpose(0, 1)[None] for x in tensors(6, kv_heads=4))
    module = torch.nn.Module()
    out, _ = packed_attention_forward(module, query, key, value, None, scaling=0.3)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3)
    assert_close(out, expected.transpose(1, 2))


@pytest.mark.parametrize(
    "asked", [{"dropout": 0.1}, {"softcap": 30.0}, {"s_aux": torch.ones(4)}, {"indices": torch.ones(1, 6, 2)}]
)
def test_what_it_does_not_have_is_refused(asked):
    query, key, value = (x.transpose(0, 1)[None] for x in tensors(6))
    with pytest.raises(ValueError, match=f"packed attention has no {next(iter(asked))}"):
        packed_attention_forward(torch.nn.Module(), query, key, value, None, packing=packing([2], [[4]]), **asked)


def test_what_changes_no_score_is_let_through():
    query, key, value = (x.transpose(0, 1)[None] for x in tensors(6))
    nothing = {"dropout": 0.0, "softcap": None, "sliding_window": 9, "position_ids": torch.arange(6)[None]}
    packed_attention_forward(torch.nn.Module(), query, key, value, None, packing=packing([2], [[4]]), **nothing)


# --- a model that packs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "dtype", "changes", "capability", "is_packed"),
    [
        ("cpu", torch.float32, {}, None, True),
        ("cpu", torch.bfloat16, {"head_dim": 300}, None, True),
        ("cuda", torch.bfloat16, {}, (8, 0), True),
        ("cuda", torch.bfloat16, {}, (9, 0), True),
        ("cuda", torch.float32, {}, (9, 0), False),
        ("cuda", torch.bfloat16, {}, (7, 5), False),
        ("cuda", torch.bfloat16, {"head_dim": 300}, (9, 0), False),
        ("cuda", torch.bfloat16, {"head_dim": 12}, (9, 0), False),
        ("cuda", torch.bfloat16, {"head_dim": None, "hidden_size": 48}, (9, 0), False),
        ("mps", torch.bfloat16, {}, None, False),
    ],
)
def test_devices_that_have_a_kernel(device, dtype, changes, capability, is_packed, monkeypatch):
    """Heads are 8 numbers wide, 12 where 48 are split over 4."""
    model = packing_model(build("llama"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    for name, value in changes.items():
        setattr(model.config, name, value)
    assert packs(model.base_model, dtype, torch.device(device)) == is_packed


def test_a_copy_packs_too_and_a_model_that_does_not_is_left_alone():
    model, other = packing_model(build("llama")), build("llama")
    assert packs(copy.deepcopy(model).base_model, torch.float32, CPU)
    assert not packs(other.base_model, torch.float32, CPU)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_without_a_layout_a_model_is_what_it_was(family):
    """Rows, padded rows, sampling with a cache, and the head that is found for it."""
    ours, plain = packing_model(build(family)), build(family)
    ids = torch.tensor([[7, 8, 9, 10], [7, 7, 11, 12]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    with torch.no_grad():
        for some in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}):
            assert torch.equal(ours(**some).logits, plain(**some).logits)
    sampled = [
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
        for model in (ours, plain)
    ]
    assert torch.equal(*sampled)
    assert isinstance(choose_head(ours, VOCAB), LinearHead)


def test_a_saved_model_says_nothing_of_it(tmp_path):
    model = packing_model(build("llama"))
    save_policy(tmp_path, model=model, adapted=None, tokenizer=make_tokenizer(), dtype=torch.float32)
    assert all("packed" not in file.read_text() for file in tmp_path.glob("*.json"))
    assert type(model).from_pretrained(tmp_path).config._attn_implementation == "sdpa"
