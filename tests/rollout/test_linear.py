import pytest
import torch
from torch import nn
from torch.testing import assert_close

from llmrl.rollout import linear as linear_module
from llmrl.rollout.linear import FEW_ROWS, LEAST_WEIGHTS, apply_linear, few_row_forwards, replacing

from .test_graphs import assert_same
from .test_weights import assert_samples_from
from .tiny import build, make_sampling


@pytest.fixture
def small(monkeypatch):
    """Tiny layers count as large, on any CPU."""
    monkeypatch.setattr(linear_module, "LEAST_WEIGHTS", 1)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)


@pytest.fixture
def refuse_linear(monkeypatch):
    def fail(x, weight, bias):
        raise AssertionError("the plain product of few rows")

    return lambda: monkeypatch.setattr(linear_module, "linear", fail)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1,), (3,), (4,), (9, 1), (2, 32), (65,), (8, 10)], ids=str)
def test_values_and_gradients_are_those_of_a_product(shape, bias):
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(12, 7, bias=bias)
    x = torch.randn(*shape, 12, generator=generator).requires_grad_()
    upstream = torch.randn(*shape, 7, generator=generator)
    y = apply_linear(layer, x)
    assert y.is_contiguous()
    assert_close(y, torch.einsum("...i,oi->...o", x, layer.weight) + (layer.bias if bias else 0.0))
    (y * upstream).sum().backward()
    assert_close(x.grad, torch.einsum("...o,oi->...i", upstream, layer.weight))
    assert_close(layer.weight.grad, torch.einsum("...o,...i->oi", upstream, x.detach()))
    if bias:
        assert_close(layer.bias.grad, upstream.flatten(end_dim=-2).sum(dim=0))


def test_rows_that_lie_in_columns_are_read_right():
    layer, x = nn.Linear(12, 7), torch.randn(12, 5).T
    assert_close(apply_linear(layer, x[:, None]), (x @ layer.weight.T + layer.bias)[:, None])


@pytest.mark.parametrize("rows", [4, 64])
def test_few_rows_are_turned(rows, refuse_linear):
    refuse_linear()
    apply_linear(nn.Linear(12, 7), torch.zeros(rows, 1, 12))


@pytest.mark.parametrize("rows", [1, 3, 65])
def test_other_numbers_of_rows_are_not(rows, refuse_linear):
    refuse_linear()
    with pytest.raises(AssertionError, match="plain product"):
        apply_linear(nn.Linear(12, 7), torch.zeros(rows, 12))


@pytest.mark.parametrize("has_mkl", [True, False])
def test_large_layers_in_float32_are_chosen(has_mkl, monkeypatch):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: has_mkl)
    large, thin, half = nn.Linear(512, 512), nn.Linear(512, 511), nn.Linear(512, 512).bfloat16()
    assert large.weight.numel() == LEAST_WEIGHTS
    own = nn.Linear(512, 512)
    own.forward = lambda x: x  # another library's
    special = nn.modules.linear.NonDynamicallyQuantizableLinear(512, 512)
    elsewhere = nn.Linear(512, 512, device="meta")
    chosen = list(few_row_forwards(nn.ModuleList([large, thin, half, own, special, elsewhere])))
    assert chosen == ([large] if has_mkl else [])


def test_modules_are_left_as_they_were(small):
    model = build("llama")
    forwards = few_row_forwards(model)
    assert len(forwards) == 3 * 7 + 1
    with replacing(forwards):
        assert all("forward" in vars(module) for module in forwards)
        assert not few_row_forwards(model)
    assert not any("forward" in vars(module) for module in model.modules())


def test_the_samples_are_the_same(any_model, native, prompts, small, monkeypatch):
    """Over rollouts whose steps have few rows, and one."""
    sampling = make_sampling(max_response_tokens=20)
    ours = native(any_model).generate(prompts, sampling)
    monkeypatch.setattr(linear_module, "FEW_ROWS", range(0))
    assert_same(ours, native(any_model).generate(prompts, sampling))


def test_an_engine_decodes_through_them(model, native, prompts, small, monkeypatch):
    rows = []

    def noting(layer, x):
        rows.append(x.numel() // layer.in_features)
        return apply_linear(layer, x)

    monkeypatch.setattr(linear_module, "apply_linear", noting)
    native(model).generate(prompts, make_sampling())
    assert len(rows) % 22 == 0  # each layer in each pass
    assert set(rows) & set(FEW_ROWS)


def test_the_next_rollout_reads_weights_that_have_changed(model, native, prompts, small):
    engine = native(model)
    engine.generate(prompts, make_sampling())
    with torch.no_grad():
        model.lm_head.weight[9, 3] += 2.0
        model.model.layers[1].mlp.down_proj.weight = nn.Parameter(-model.model.layers[1].mlp.down_proj.weight)
    assert_samples_from(model, engine.generate(prompts, make_sampling()), 1e-5)
