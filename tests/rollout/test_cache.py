import pytest
import torch
from torch.testing import assert_close
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from llmrl.rollout.cache import SLACK_COLUMNS, SlotCache, holds_states, layer_states, num_columns

HEADS, HEAD_DIM = 2, 3


def prefilled(values):
    """Keys and values of one layer: these numbers, a row a prompt and a column a token, and their negatives."""
    states = torch.tensor(values)[:, None, :, None].expand(-1, HEADS, -1, HEAD_DIM)
    return states, -states


def cache_of(*states):
    """A cache of transformers with keys and values of each layer."""
    cache = Cache(layers=[DynamicLayer() for _ in states])
    for index, (keys, values) in enumerate(states):
        cache.update(keys, values, index)
    return cache


def token(*values):
    """States of one new token for each row."""
    return torch.tensor(values)[:, None, None, None].expand(-1, HEADS, 1, HEAD_DIM)


def numbers(states):
    assert states.shape[1::2] == (HEADS, HEAD_DIM)
    assert bool((states == states[:, :1, :, :1]).all())
    return states[:, 0, :, 0].tolist()


@pytest.fixture
def cache():
    """Two layers, the keys of the second a hundred times those of the first: prompts "1 2" and "3", twice each."""
    cache = SlotCache(slots=5, columns=6)
    cache.window.end = 3
    first, second = [[1.0, 2.0], [0.0, 3.0]], [[100.0, 200.0], [0.0, 300.0]]
    cache.fill(0, cache_of(prefilled(first), prefilled(second)), copies=2)
    cache.window.rows, cache.window.start = 4, 1
    return cache


def live(cache, layer=0):
    keys, values = cache.layers[layer].view(cache.window.start, cache.window.end)
    assert_close(values, -keys)
    return numbers(keys)


def test_prompts_stand_right_aligned_once_for_every_copy(cache):
    assert live(cache) == [[1, 2], [1, 2], [0, 3], [0, 3]]
    assert live(cache, layer=1) == [[100, 200], [100, 200], [0, 300], [0, 300]]


@pytest.mark.parametrize(
    ("longest", "refills", "columns"),
    [(1, False, 128), (128, False, 128), (129, False, 256), (128 - SLACK_COLUMNS, True, 128), (65, True, 256)],
)
def test_columns_hold_the_longest_row_and_come_in_steps(longest, refills, columns):
    assert num_columns(longest, refills=refills) == columns


def test_later_prompts_stand_behind_the_live_rows(cache):
    cache.fill(4, cache_of(prefilled([[9.0]]), prefilled([[900.0]])), copies=1)
    cache.window.rows = 5
    assert live(cache)[3:] == [[0, 3], [0, 9]]


@pytest.mark.parametrize("layer", [0, 1])
def test_a_step_writes_one_column_of_the_live_rows_and_reads_the_window(cache, layer):
    keys, values = cache.layers[layer].update(token(5.0, 6.0, 7.0, 8.0), -token(5.0, 6.0, 7.0, 8.0))
    assert [row[-1] for row in numbers(keys)] == [5, 6, 7, 8]
    assert_close(values, -keys)
    assert keys.shape[2] == 3
    untouched = cache.layers[1 - layer].buffers[0][:, :, 3:]
    assert not untouched.any()
    assert not cache.layers[layer].buffers[0][4].any()


def test_the_sequence_length_is_that_of_the_window(cache):
    assert cache.get_seq_length() == 2
    cache.window.end += 1
    assert cache.get_seq_length() == 3


def test_a_row_moves_to_another_slot_in_every_layer(cache):
    cache.move_row(3, 0)
    assert live(cache) == [[0, 3], [1, 2], [0, 3], [0, 3]]
    assert live(cache, layer=1)[0] == [0, 300]


def test_copied_slots_grow_by_every_token_and_leave_the_cache_alone(cache):
    copy = cache.copy_slots([2, 0])
    assert copy.get_seq_length() == 2
    for layer in range(2):
        _, values = copy.update(token(5.0, 6.0), -token(5.0, 6.0), layer)
        assert_close(values, -layer_states(copy)[layer][0])
    assert numbers(layer_states(copy)[0][0]) == [[0, 3, 5], [1, 2, 6]]
    assert numbers(layer_states(copy)[1][0]) == [[0, 300, 5], [100, 200, 6]]
    assert live(cache) == [[1, 2], [1, 2], [0, 3], [0, 3]]


def test_columns_move_to_the_back(cache):
    cache.move_columns(-2)
    assert (cache.window.start, cache.window.end) == (3, 5)
    assert live(cache) == [[1, 2], [1, 2], [0, 3], [0, 3]]


@pytest.mark.parametrize("shift", [1, 2])
def test_columns_move_to_the_front_even_onto_themselves(shift):
    cache = SlotCache(slots=1, columns=6)
    cache.window.end = 6
    cache.fill(0, cache_of(prefilled([[1.0, 2.0, 3.0, 4.0]])), copies=1)
    cache.window.rows, cache.window.start = 1, 2
    cache.move_columns(shift)
    assert (cache.window.start, cache.window.end) == (2 - shift, 6 - shift)
    assert live(cache) == [[1, 2, 3, 4]]


def test_an_unwritten_column_is_a_number(cache):
    """Attention multiplies it by a weight of 0, which would make NaN of a NaN."""
    assert not cache.layers[0].buffers[0][4].any()
    assert not cache.layers[0].buffers[1][:, :, 3:].any()


def written(*values):
    """A cache of transformers after one token a row: a convolution of kernel 2 and a recurrence, the same beside
    attention, and a layer that holds nothing."""
    layers = [LinearAttentionLayer(), LinearAttentionAndFullAttentionLayer(), DummyLayer()]
    rows = torch.tensor(values)
    for layer in layers[:2]:
        layer.update_conv_state(torch.stack([torch.zeros_like(rows), rows], dim=1)[:, None])
        layer.update_recurrent_state(10 * rows[:, None])
    layers[1].update(*prefilled([[value] for value in values]))
    return Cache(layers=layers)


@pytest.fixture
def mixed():
    """Prompts 1 and 2, twice each."""
    cache = SlotCache(slots=5, columns=6)
    cache.window.end = 1
    cache.fill(0, written(1.0, 2.0), copies=2)
    cache.window.rows = 4
    return cache


def states(cache):
    """What convolution and recurrence have of each live row, the same in both layers."""
    layers = [
        (layer.conv_states[0][:, 0].tolist(), layer.recurrent_states[0][:, 0].tolist()) for layer in cache.layers[:2]
    ]
    assert layers[0] == layers[1]
    return layers[0]


def test_states_of_a_prompt_go_to_every_copy(mixed):
    assert states(mixed) == ([[0, 1], [0, 1], [0, 2], [0, 2]], [10, 10, 20, 20])
    assert live(mixed, layer=1) == [[1], [1], [2], [2]]


def test_a_step_overwrites_the_states_of_the_live_rows(mixed):
    mixed.fill(4, written(9.0), copies=1)
    for index in range(2):
        full = mixed.update_conv_state(torch.tensor([5.0, 6.0, 7.0, 8.0])[:, None, None], index)
        assert full[:, 0].tolist() == [[0, 1, 5], [0, 1, 6], [0, 2, 7], [0, 2, 8]]
        mixed.update_recurrent_state(torch.tensor([[50.0], [60.0], [70.0], [80.0]]), index)
        assert mixed.has_previous_state(index)
    assert states(mixed) == ([[1, 5], [1, 6], [2, 7], [2, 8]], [50, 60, 70, 80])
    mixed.window.rows = 5
    assert states(mixed)[1][4] == 90
    assert states(mixed)[0][4] == [0, 9]


def test_a_row_moves_with_its_states(mixed):
    mixed.move_row(3, 0)
    assert states(mixed) == ([[0, 2], [0, 1], [0, 2], [0, 2]], [20, 10, 20, 20])
    assert live(mixed, layer=1) == [[2], [1], [2], [2]]


def test_states_stay_where_columns_move(mixed):
    mixed.move_columns(-2)
    assert states(mixed) == ([[0, 1], [0, 1], [0, 2], [0, 2]], [10, 10, 20, 20])
    assert live(mixed, layer=1) == [[1], [1], [2], [2]]


def test_copied_states_go_on_and_leave_the_cache_alone(mixed):
    copy = mixed.copy_slots([2, 0])
    for index in range(2):
        copy.update_conv_state(torch.tensor([5.0, 6.0])[:, None, None], index)
        copy.update_recurrent_state(torch.tensor([[50.0], [60.0]]), index)
    assert states(copy) == ([[2, 5], [1, 6]], [50, 60])
    assert states(mixed) == ([[0, 1], [0, 1], [0, 2], [0, 2]], [10, 10, 20, 20])
    mixed.fill(1, copy, copies=1, rows=slice(1, 2))
    assert states(mixed) == ([[0, 1], [1, 6], [0, 2], [0, 2]], [10, 60, 20, 20])


def test_a_layer_that_was_never_written_to_holds_nothing():
    assert all(holds_states(layer) for layer in written(1.0).layers)
    assert not any(holds_states(kind()) for kind in (DynamicLayer, LinearAttentionLayer))
