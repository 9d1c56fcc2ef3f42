"""Hidden states against one forward a row, nothing padded, by hand and by invariance."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from llmrl.batches import PreferencePairs
from llmrl.models.trunk import (
    computing_in,
    encode,
    last_hidden_states,
    on_mask,
    rows_of_pairs,
    rows_of_sequences,
)

from .rewards import CHOSEN, PAD, PROMPTS, REJECTED, SHARING, pairs
from .tiny import EOS, ROWS, assert_same_gradients, build, make_sequences

GARBAGE: dict[str, Any] = {"prompt_padding": (PAD, 0, 7), "response_padding": (-1, PAD, 10**6)}


def trunk_of(family: str) -> Any:
    """The same weights each time."""
    return build(family).base_model


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


def of_pairs(trunk: Any) -> tuple[Tensor, Tensor]:
    """``(before, last)`` of every token of both responses, chosen and rejected in turn, a row each."""
    both = [
        (prompt, response, [1] * len(response))
        for prompt, chosen, rejected in zip(PROMPTS, CHOSEN, REJECTED, strict=True)
        for response in (chosen, rejected)
    ]
    return of_rows(trunk, both)


def mask_of_pairs(batch: PreferencePairs) -> Tensor:
    """(2B, T) over chosen and rejected in turn."""
    sides = [side.response_mask for side in (batch.chosen, batch.rejected)]
    width = max(side.shape[1] for side in sides)
    wide = [torch.nn.functional.pad(side, (0, width - side.shape[1])) for side in sides]
    return torch.stack(wide, dim=1).flatten(0, 1)


# --- sequences --------------------------------------------------------------------------------------------------------


def test_each_state_is_that_of_the_row_alone(family):
    """Ragged rows, pad equal to EOS, EOS as a token like any other, tool output that no mask picks."""
    sequences, trunk = make_sequences(), trunk_of(family)
    hidden = exact(trunk, sequences)
    before, last = of_rows(trunk)
    assert_close(hidden.before(sequences.response_mask), before, rtol=1e-4, atol=1e-4)
    assert_close(hidden.last(), last, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_padding_never_leaks(family):
    """Neither ids that no embedding has nor one whose embedding is NaN: bit for bit."""
    trunk, mask = trunk_of(family), make_sequences().response_mask
    clean = exact(trunk, make_sequences())
    with torch.no_grad():
        trunk.get_input_embeddings().weight[PAD] = torch.nan
    other = exact(trunk, make_sequences(**GARBAGE))
    assert torch.equal(other.before(mask), clean.before(mask))
    assert torch.equal(other.last(), clean.last())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_any_tokens_may_be_asked_for(family):
    """In reading order, whether the actor chose them or not."""
    sequences, trunk = make_sequences(), trunk_of(family)
    mask = torch.zeros_like(sequences.response_mask)
    mask[4, 3] = mask[0, 2] = mask[3, 0] = True
    states = [alone(trunk, *ROWS[row][:2])[token] for row, token in [(0, 2), (3, 0), (4, 3)]]
    assert_close(exact(trunk, sequences).before(mask), torch.stack(states), rtol=1e-4, atol=1e-4)


def test_after_a_response_of_no_tokens_the_last_is_that_of_the_prompt():
    trunk = trunk_of("llama")
    hidden = exact(trunk, make_sequences([([7, 8], [], []), ([9], [10, 11], [1, 1])]))
    expected = torch.stack([alone(trunk, [7, 8], [])[0], alone(trunk, [9], [10, 11])[-1]])
    assert_close(hidden.last(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradients_are_those_of_the_rows_alone(family):
    def gradients_of(before: Tensor, last: Tensor, trunk: Any) -> dict[str, Tensor]:
        weights = torch.linspace(-1.0, 2.0, before.numel()).view_as(before)
        ((weights * before).sum() + (torch.linspace(0.5, 1.0, last.numel()).view_as(last) * last).sum()).backward()
        return {name: p.grad for name, p in trunk.named_parameters()}

    ours, plain, sequences = trunk_of(family), trunk_of(family), make_sequences()
    hidden = exact(ours, sequences)
    assert_same_gradients(
        gradients_of(hidden.before(sequences.response_mask), hidden.last(), ours), gradients_of(*of_rows(plain), plain)
    )


def test_rows_at_the_left_margin_by_hand():
    layout = rows_of_sequences(make_sequences(ROWS[1:4], prompt_padding=(36,), response_padding=(35,)))
    assert layout.ids.tolist() == [
        [2, 14, 15, 0, 0, 0, 0, 0, 0],
        [3, 4, 5, 6, 30, 31, 32, 33, 2],
        [34, 16, 17, 0, 0, 0, 0, 0, 0],
    ]
    assert layout.start.tolist() == layout.prompt_length.tolist() == [2, 8, 1]
    assert layout.row.tolist() == [0, 1, 2]
    assert layout.lengths.tolist() == [1, 1, 2]
    assert layout.context == {}


def test_no_rows_have_no_states_and_need_no_pass():
    sequences = make_sequences().select(torch.tensor([], dtype=torch.long))
    trunk, passes = trunk_of("llama"), []
    trunk.register_forward_pre_hook(lambda *_: passes.append(1))
    hidden = exact(trunk, sequences)
    assert hidden.before(sequences.response_mask).shape == hidden.last().shape == (0, 32)
    assert not passes


# --- pairs that share a row -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SHARING)
def test_each_response_of_a_pair_has_the_states_that_it_has_alone(family):
    """Pad equal to EOS; positions count on from the prompt, absolute ones too."""
    trunk, batch = trunk_of(family), pairs()
    hidden = exact(trunk, batch)
    before, last = of_pairs(trunk)
    assert_close(hidden.before(mask_of_pairs(batch)), before, rtol=1e-4, atol=1e-4)
    assert_close(hidden.last(), last, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_padding_of_pairs_never_leaks(family):
    trunk = trunk_of(family)
    clean = exact(trunk, pairs())
    with torch.no_grad():
        trunk.get_input_embeddings().weight[PAD] = torch.nan
    other = exact(trunk, pairs(**GARBAGE))
    assert torch.equal(other.last(), clean.last())
    assert torch.equal(other.before(mask_of_pairs(pairs())), clean.before(mask_of_pairs(pairs())))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_one_response_of_a_pair_does_not_see_the_other(family):
    trunk = trunk_of(family)
    other = [[30] * len(ids) for ids in CHOSEN]
    before, after = (exact(trunk, pairs(chosen=chosen)).last().unflatten(0, (-1, 2)) for chosen in (CHOSEN, other))
    assert_close(after[:, 1], before[:, 1], rtol=1e-5, atol=1e-5)
    assert (after[:, 0] != before[:, 0]).any(dim=-1).all()


def test_pairs_in_a_row_by_hand():
    """The picture of the docstring, beside a longer row."""
    a, b, x, y, z = 7, 8, 10, 20, 21
    layout = rows_of_pairs(pairs([[a, b], [3]], [[x], [11, 12]], [[y, z], [22, 23, 24]], response_padding=(-1,)))
    assert layout.ids.tolist() == [[a, b, x, y, z, 0], [3, 11, 12, 22, 23, 24]]
    assert layout.row.tolist() == [0, 0, 1, 1]
    assert layout.prompt_length.tolist() == [2, 2, 1, 1]
    assert layout.start.tolist() == [2, 3, 1, 3]
    assert layout.lengths.tolist() == [1, 2, 2, 3]
    positions, attends = layout.context["position_ids"], layout.context["attention_mask"]
    assert positions.tolist() == [[0, 1, 2, 2, 3, 0], [0, 1, 2, 1, 2, 3]]
    assert attends.shape == (2, 1, 6, 6)
    assert attends[0, 0, :5].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 1, 0, 1, 1, 0],
    ]
    assert attends[1, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 0, 0, 1, 0, 0],
        [1, 0, 0, 1, 1, 0],
        [1, 0, 0, 1, 1, 1],
    ]
    assert attends.any(dim=-1).all()  # a token that attends to nothing is NaN


def test_no_pairs_have_no_states():
    hidden = exact(trunk_of("llama"), pairs().select(torch.tensor([], dtype=torch.long)))
    assert hidden.last().shape == (0, 32)


# --- the pass ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "product"), [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_the_arithmetic_of_the_pass(dtype, product):
    trunk, seen = trunk_of("llama"), []
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
    trunk.register_forward_hook(lambda _, __, output: seen.append(output.past_key_values))
    last_hidden_states(trunk, torch.tensor([[7, EOS, 8]]))
    assert seen == [None]


def test_numbers_on_a_mask_by_hand():
    mask = torch.tensor([[True, False, True], [False, False, False], [False, True, False]])
    numbers = torch.tensor([1.5, torch.nan, 3.0], dtype=torch.bfloat16)
    placed = on_mask(mask, numbers)
    assert placed.dtype == torch.float32
    assert_close(placed, torch.tensor([[1.5, 0, torch.nan], [0, 0, 0], [0, 3.0, 0]]), equal_nan=True)
