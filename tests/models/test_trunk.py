"""Hidden states against one forward a row, nothing padded, by hand and by invariance."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from llmrl.batches import Sequences
from llmrl.models.packing import Packing
from llmrl.models.training import turn_dropout_off
from llmrl.models.trunk import (
    computing_in,
    encode,
    last_hidden_states,
    on_mask,
    packed_row,
    rows_of_sequences,
)

from .rewards import PAD
from .tiny import EOS, FAMILIES, PACKING, ROWS, assert_same_gradients, build, make_sequences, packing

LAYOUTS = ["rows", "packed"]
GARBAGE: dict[str, Any] = {"prompt_padding": (PAD, 0, 7), "response_padding": (-1, PAD, 10**6)}


def trunk_of(family: str, layout: str = "rows") -> Any:
    """The same weights each time."""
    model = build(family)
    return (packing(model) if layout == "packed" else model).base_model


def groups(*, first_prompt: int = 7) -> Sequences:
    """Five responses to two of three prompts, in no order, one of them empty; nothing responds to the last prompt."""
    responses = [[10, 11, 20], [15], [16, 17, EOS, 5], [], [19, 21]]
    lengths = torch.tensor([len(ids) for ids in responses])
    mask = torch.arange(4) < lengths[:, None]
    return Sequences(
        unique_prompt_ids=torch.tensor([[EOS, EOS, first_prompt], [3, 4, 5], [EOS, 30, 31]]),
        unique_prompt_mask=torch.tensor([[False, False, True], [True, True, True], [False, True, True]]),
        prompt_of_row=torch.tensor([1, 0, 1, 0, 1]),
        response_ids=torch.tensor([ids + [PAD] * (4 - len(ids)) for ids in responses]),
        response_mask=mask,
        response_lengths=lengths,
    )


def rows_of(sequences: Sequences) -> Any:
    """Prompt, response and which tokens count, without padding."""
    return [
        (prompt[mask].tolist(), ids[:length].tolist(), [1] * int(length))
        for prompt, mask, ids, length in zip(
            sequences.prompt_ids, sequences.prompt_mask, sequences.response_ids, sequences.response_lengths, strict=True
        )
    ]


def exact(trunk: Any, batch: Any) -> Any:
    return encode(trunk, batch, dtype=torch.float32)


def alone(trunk: Any, prompt: list[int], response: list[int]) -> Tensor:
    """States before each response token and at the last one, from one forward: (T + 1, H)."""
    hidden = trunk(input_ids=torch.tensor([prompt + response]), use_cache=False).last_hidden_state[0]
    return hidden[len(prompt) - 1 :]


def of_rows(trunk: Any, rows: Any = ROWS) -> tuple[Tensor, Tensor]:
    """``(before, last)`` of rows of prompt, response and which tokens count."""
    states = [alone(trunk, prompt, response) for prompt, response, _ in rows]
    chosen = [torch.tensor(counts, dtype=torch.bool) for *_, counts in rows]
    before = torch.cat([state[:-1][counts] for state, counts in zip(states, chosen, strict=True)])
    return before, torch.stack([state[-1] for state in states])


# --- sequences --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "layout"), [*((family, "rows") for family in FAMILIES), *((family, "packed") for family in PACKING)]
)
@pytest.mark.parametrize(
    "sequences", [make_sequences(), groups(), make_sequences(ROWS[:1])], ids=["rows", "groups", "one"]
)
def test_each_state_is_that_of_the_row_alone(family, layout, sequences):
    """Ragged rows, pad equal to EOS, EOS as a token like any other, tool output that no mask picks."""
    trunk, mask = trunk_of(family, layout), sequences.response_mask
    hidden = exact(trunk, sequences)
    before, last = of_rows(trunk, rows_of(sequences))
    every = torch.arange(mask.shape[1]) < sequences.response_lengths[:, None]
    assert_close(hidden.before(every), before, rtol=1e-4, atol=1e-4)
    assert_close(hidden.before(mask), before[mask[every]], rtol=1e-4, atol=1e-4)
    assert_close(hidden.last(), last, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_padding_never_leaks(family, layout):
    """Neither ids that no embedding has nor one whose embedding is NaN: bit for bit."""
    trunk, mask = trunk_of(family, layout), make_sequences().response_mask
    clean = exact(trunk, make_sequences())
    with torch.no_grad():
        trunk.get_input_embeddings().weight[PAD] = torch.nan
    other = exact(trunk, make_sequences(**GARBAGE))
    assert torch.equal(other.before(mask), clean.before(mask))
    assert torch.equal(other.last(), clean.last())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_row_sees_neither_other_prompts_nor_other_responses(family, layout):
    trunk, sequences, other = trunk_of(family, layout), groups(), groups(first_prompt=8)
    other.response_ids[0] = torch.tensor([30, 31, 32, PAD])
    before, after = (exact(trunk, each).last() for each in (sequences, other))
    assert_close(after[[2, 4]], before[[2, 4]], rtol=1e-5, atol=1e-5)
    assert (after[[0, 1, 3]] != before[[0, 1, 3]]).any(dim=-1).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_any_tokens_may_be_asked_for(family, layout):
    """In reading order, whether the actor chose them or not."""
    sequences, trunk = make_sequences(), trunk_of(family, layout)
    mask = torch.zeros_like(sequences.response_mask)
    mask[4, 3] = mask[0, 2] = mask[3, 0] = True
    states = [alone(trunk, *ROWS[row][:2])[token] for row, token in [(0, 2), (3, 0), (4, 3)]]
    assert_close(exact(trunk, sequences).before(mask), torch.stack(states), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_after_a_response_of_no_tokens_the_last_is_that_of_the_prompt(layout):
    trunk = trunk_of("llama", layout)
    for rows in ([([7, 8], [], []), ([9], [10, 11], [1, 1])], [([7, 8], [], [])]):
        hidden = exact(trunk, make_sequences(rows))
        expected = torch.stack([alone(trunk, prompt, response)[-1] for prompt, response, _ in rows])
        assert_close(hidden.last(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradients_are_those_of_the_rows_alone(family, layout, checkpointing):
    def gradients_of(before: Tensor, last: Tensor, trunk: Any) -> dict[str, Tensor]:
        weights = torch.linspace(-1.0, 2.0, before.numel()).view_as(before)
        ((weights * before).sum() + (torch.linspace(0.5, 1.0, last.numel()).view_as(last) * last).sum()).backward()
        return {name: p.grad for name, p in trunk.named_parameters()}

    ours, plain, sequences = trunk_of(family, layout), trunk_of(family), groups()
    if checkpointing:
        turn_dropout_off(ours)
        ours.train().gradient_checkpointing_enable()
    hidden = exact(ours, sequences)
    assert_same_gradients(
        gradients_of(hidden.before(sequences.response_mask), hidden.last(), ours),
        gradients_of(*of_rows(plain, rows_of(sequences)), plain),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_may_have_more_tokens_than_the_model_positions(layout):
    trunk = trunk_of("gpt2", layout)  # 64 positions
    rows = [([7, 8], [n % 30 for n in range(60)], [1] * 60), ([3], [(7 * n + 1) % 30 for n in range(60)], [1] * 60)]
    assert_close(exact(trunk, make_sequences(rows)).last(), of_rows(trunk, rows)[1], rtol=1e-4, atol=1e-4)


def test_a_packed_pass_reads_each_token_once():
    trunk, shapes = trunk_of("llama", "packed"), []
    trunk.register_forward_pre_hook(lambda _, __, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True)
    exact(trunk, groups().select(torch.arange(5)))
    assert shapes == [(1, 1 + 3 + 3 + 1 + 4 + 2)]


def test_a_packed_row_by_hand():
    """The picture of `packing`, with a row of "ab" after that of "c"."""
    a, b, c, x, y, z, v = 7, 8, 3, 10, 20, 21, 30
    layout = packed_row(
        Sequences(
            unique_prompt_ids=torch.tensor([[a, b], [PAD, c]]),
            unique_prompt_mask=torch.tensor([[True, True], [False, True]]),
            prompt_of_row=torch.tensor([0, 1, 0]),
            response_ids=torch.tensor([[x, PAD], [v, PAD], [y, z]]),
            response_mask=torch.tensor([[True, False], [True, False], [True, True]]),
            response_lengths=torch.tensor([1, 1, 2]),
        )
    )
    assert layout.ids.tolist() == [[a, b, c, x, y, z, v]]
    assert layout.row.tolist() == [0, 0, 0]
    assert layout.prompt_end.tolist() == [2, 3, 2]
    assert layout.start.tolist() == [3, 6, 4]
    assert layout.lengths.tolist() == [1, 1, 2]
    assert layout.context["position_ids"].tolist() == [[0, 1, 0, 2, 2, 3, 1]]
    packing = layout.context["packing"]
    assert isinstance(packing, Packing)
    assert packing.num_prompt_tokens == 3
    assert packing.own.query_lengths == packing.own.key_lengths == [2, 1, 1, 2, 1]
    assert (packing.prefixes.query_lengths, packing.prefixes.key_lengths) == ([3, 1], [2, 1])
    assert packing.own.query_ends.tolist() == [0, 2, 3, 4, 6, 7]
    assert packing.prefixes.query_ends.tolist() == [0, 3, 4]
    assert packing.prefixes.key_ends.tolist() == [0, 2, 3]
    assert packing.own.query_ends.dtype == torch.int32


def test_rows_at_the_left_margin_by_hand():
    layout = rows_of_sequences(make_sequences(ROWS[1:4], prompt_padding=(36,), response_padding=(35,)))
    assert layout.ids.tolist() == [
        [2, 14, 15, 0, 0, 0, 0, 0, 0],
        [3, 4, 5, 6, 30, 31, 32, 33, 2],
        [34, 16, 17, 0, 0, 0, 0, 0, 0],
    ]
    assert layout.start.tolist() == layout.prompt_end.tolist() == [2, 8, 1]
    assert layout.row.tolist() == [0, 1, 2]
    assert layout.lengths.tolist() == [1, 1, 2]
    assert layout.context == {}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_rows_have_no_states_and_need_no_pass(layout):
    sequences = make_sequences().select(torch.tensor([], dtype=torch.long))
    trunk, passes = trunk_of("llama", layout), []
    trunk.register_forward_pre_hook(lambda *_: passes.append(1))
    hidden = exact(trunk, sequences)
    assert hidden.before(sequences.response_mask).shape == hidden.last().shape == (0, 32)
    assert not passes


# --- the pass ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "product"), [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_the_arithmetic_of_the_pass(dtype, product, layout):
    trunk, seen = trunk_of("llama", layout), []
    trunk.layers[0].mlp.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):  # whatever stands around it
        encode(trunk, make_sequences(), dtype=dtype)
    assert seen == [product]
    assert not torch.is_autocast_enabled("cpu")


def test_autocast_keeps_no_copies_of_the_weights():
    with computing_in(torch.bfloat16, torch.device("cpu")):
        assert not torch.is_autocast_cache_enabled()


def test_the_pass_keeps_no_cache():
    seen = []
    trunk = trunk_of("llama")
    trunk.register_forward_hook(lambda _, __, output: seen.append(list(output)))
    last_hidden_states(trunk, torch.tensor([[7, EOS, 8]]))
    assert seen == [["last_hidden_state"]]


def test_numbers_on_a_mask_by_hand():
    mask = torch.tensor([[True, False, True], [False, False, False], [False, True, False]])
    numbers = torch.tensor([1.5, torch.nan, 3.0], dtype=torch.bfloat16)
    placed = on_mask(mask, numbers)
    assert placed.dtype == torch.float32
    assert_close(placed, torch.tensor([[1.5, 0, torch.nan], [0, 0, 0], [0, 3.0, 0]]), equal_nan=True)
