"""A step is safe to record: from one to the next nothing differs but numbers in tensors that stay where they are."""

import pytest
import torch
from torch import nn
from torch.nn.functional import softmax
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from llmrl.batches import StopReason
from llmrl.rollout.graphs import move_in, states_of_one_token
from llmrl.rollout.step import NOT_FINITE, Slots, Step, attend_grouped, attention_windows, fused_norms
from tests.simulated import Simulated

from .tiny import EOS, FAMILIES, VOCAB, build, make_prompts, make_sampling

PROMPTS = ([7, 8, 9, 2, 11], [20], [3, 4, 30])


def make_step(model, *, columns=16, max_tokens=6, greedy=False):
    """Over three prompts of 5, 1 and 3 tokens, and a slot without a row."""
    slots = Slots.empty(states_of_one_token(model), rows=4, columns=columns, max_tokens=max_tokens)
    prompts = make_prompts(*PROMPTS)
    device = slots.ends.device
    with torch.no_grad():
        move_in(model, slots, prompts.to(device), [5, 1, 3], [0, 1, 2], torch.tensor([[0], [1], [3]]).to(device))
    slots.uniforms.copy_(torch.rand(4, max_tokens + 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    return Step(model, fused_norms(model), slots, make_sampling(greedy=greedy), eos_ids=EOS, vocab_size=VOCAB)


class Tape(TorchDispatchMode):
    """Each operator with shapes, scalars, and the addresses of what outlives a step."""

    def __init__(self, lasting):
        super().__init__()
        self.lasting = lasting
        self.lines = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        line = [str(operator)]
        for x in tree_flatten((args, kwargs or {}))[0]:
            if isinstance(x, torch.Tensor):
                pointer = x.untyped_storage().data_ptr()
                where = (pointer, x.storage_offset()) if pointer in self.lasting else "passing"
                line.append((tuple(x.shape), x.stride(), where))
            else:
                line.append(str(x))
        self.lines.append(line)
        return operator(*args, **(kwargs or {}))


def lasting(step):
    tensors = (*step.model.parameters(), *step.model.buffers(), *vars(step.slots).values(), step.columns, step.eos_ids)
    return {x.untyped_storage().data_ptr() for x in tensors}


@pytest.mark.parametrize("greedy", [False, True])
def test_two_steps_are_the_same_operators_on_the_same_addresses(any_model, greedy):
    step = make_step(any_model, greedy=greedy)
    tapes = []
    for _ in range(3):
        with Tape(lasting(step)) as tape:
            step()
        tapes.append(tape.lines)
    assert len(tapes[0]) > 100
    assert tapes[0] == tapes[1] == tapes[2]


def test_the_number_of_operators_is_bounded():
    """Each is a kernel that a GPU spends 2 us on: a regression shows here."""
    counts = {}
    for family in ("llama", "qwen3", "gpt2"):
        step = make_step(build(family))
        with Tape(set()) as tape:
            step()
        views = ("view", "transpose", "unsqueeze", "slice", "select", "expand", "aten.t.", "detach", "alias", "split")
        counts[family] = sum(not any(view in line[0] for view in views) for line in tape.lines)
    assert counts["llama"] <= 204
    assert counts["qwen3"] <= 240
    assert counts["gpt2"] <= 124


def test_a_step_asks_the_host_for_nothing():
    with Simulated() as device:
        step = make_step(build("llama").to(device.name))
        device.waits.clear()
        step()
        assert not device.waits


def test_a_step_gives_the_logits_of_the_model(any_model):
    with torch.no_grad():
        logits = make_step(any_model).logits()
    for slot, prompt in zip((0, 1, 3), PROMPTS, strict=True):
        with torch.no_grad():
            expected = any_model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0, -1]
        assert_close(logits[slot], expected, atol=1e-5, rtol=0)


def test_a_complete_row_stays_as_it_is_while_others_grow(model):
    step = make_step(model)
    slots = step.slots
    slots.stop_reason[0] = StopReason.EOS
    before = {name: x[0].clone() for name, x in slots.per_row.items()}
    for _ in range(3):
        step()
    for name, x in slots.per_row.items():
        kept = x[0][:-1] if name in ("ids", "logprobs") else x[0]  # the last column is where complete rows write
        assert_close(kept, before[name][: len(kept)] if kept.dim() else before[name])
    assert slots.num_drawn[3] > 0


def test_rows_end_by_the_limit_by_eos_and_by_logits_that_are_no_numbers(model):
    step = make_step(model)
    slots = step.slots
    slots.max_tokens.fill_(1)
    logits = torch.zeros(4, 40)
    logits[0, 7] = logits[1, EOS[1]] = 100.0
    logits[3, 9] = torch.nan
    step.draw(logits)
    assert slots.stop_reason.tolist() == [StopReason.LENGTH, StopReason.EOS, StopReason.EOS, NOT_FINITE]
    assert slots.num_drawn.tolist() == [1, 1, 0, 1]
    assert slots.ids[:2, 0].tolist() == [7, EOS[1]]


def test_a_moved_row_goes_on_where_it_was(model):
    alone, moved = make_step(model), make_step(model)
    for step in (alone, moved):
        step()
    addresses = [x.data_ptr() for x in vars(moved.slots).values()]
    moved.slots.move(torch.tensor([3]), torch.tensor([2]), 8)
    for step in (alone, moved):
        step()
    assert [x.data_ptr() for x in vars(moved.slots).values()] == addresses
    assert moved.slots.ids[2].tolist() == alone.slots.ids[3].tolist()
    assert_close(moved.slots.logprobs[2], alone.slots.logprobs[3])


def test_first_rows_and_columns_are_views(model):
    slots = make_step(model).slots
    first = slots.first(2, 8)
    assert first.room == {"rows": 2, "columns": 8, "max_tokens": 6}
    first.states.fill_(3.0)
    first.ends.fill_(5)
    assert bool((slots.states[:, :, :2, :, :8] == 3.0).all())
    assert not bool((slots.states[:, :, 2:] == 3.0).any())
    assert slots.ends.tolist()[:2] == [5, 5]


def test_reset_takes_all_rows_out(model):
    slots = make_step(model).slots
    slots.states.fill_(torch.nan)
    slots.reset(4)
    assert not bool(slots.states.any())
    assert slots.stop_reason.tolist() == [StopReason.EOS] * 4
    assert (slots.ends.tolist(), int(slots.max_tokens)) == ([0] * 4, 4)


def test_layers_of_several_shapes_have_no_slots():
    states = [(torch.zeros(1, 2, 1, 8),) * 2, (torch.zeros(1, 2, 1, 16),) * 2]
    with pytest.raises(ValueError, match="differ in their shapes"):
        Slots.empty(states, rows=2, columns=8, max_tokens=4)


@pytest.mark.parametrize(
    ("family", "windows"),
    [
        ("llama", {"full_attention": None}),
        ("mistral", {"sliding_attention": 4}),
        ("gemma3", {"full_attention": None, "sliding_attention": 4}),
    ],
)
def test_windows_are_known_by_the_kind_of_layer(family, windows):
    assert attention_windows(build(family)) == windows


def test_packed_attention_is_attention_by_definition():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, 1, 8, generator=generator)
    key, value = torch.randn(2, 2, 3, 5, 8, generator=generator).unbind()
    key, value = key[:, :2], value[:, :2]
    mask = torch.tensor([[0.0, 0.0, 0.0, -torch.inf, -torch.inf], [0.0] * 5])[:, None, None, :]
    output, _ = attend_grouped(nn.Identity(), query, key, value, mask, scaling=0.3)
    assert output.shape == (2, 1, 6, 8)
    for row in range(2):
        for head in range(6):
            logits = 0.3 * key[row, head // 3] @ query[row, head, 0] + mask[row, 0, 0]
            assert_close(output[row, 0, head], softmax(logits, dim=0) @ value[row, head // 3])


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias"])
def test_attention_with_more_than_a_mask_is_refused(name):
    x = torch.zeros(1, 1, 1, 8)
    with pytest.raises(TypeError, match=name):
        attend_grouped(nn.Identity(), x, x, x, torch.zeros(1, 1, 1, 1), **{name: 30.0})


def test_only_norms_that_say_the_same_are_replaced(model):
    assert len(fused_norms(model)) == 7
    assert not fused_norms(build("gemma3"))  # multiplies by 1 + weight
    assert not fused_norms(build("gpt2"))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_left_as_it_was(family):
    model = build(family)
    config, forwards = model.config._attn_implementation, [m for m in model.modules() if "forward" in vars(m)]
    make_step(model)()
    assert model.config._attn_implementation == config
    assert [m for m in model.modules() if "forward" in vars(m)] == forwards
