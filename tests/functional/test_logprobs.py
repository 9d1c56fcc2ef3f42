import math

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmrl.functional.logprobs import entropy, linear_token_logprobs, token_logprobs
from tests import oracles

TEMPERATURE = 0.7


@pytest.fixture
def logits():
    return 3 * torch.randn(2, 3, 11)


@pytest.fixture
def ids():
    return torch.randint(11, (2, 3))


class Head:
    """Hidden states and an output layer, with the dense way to the same numbers."""

    def __init__(self, m, h=6, v=11, *, bias=True, dtype=torch.float64):
        self.hidden = torch.randn(m, h, dtype=dtype, requires_grad=True)
        self.weight = torch.randn(v, h, dtype=dtype, requires_grad=True)
        self.bias = torch.randn(v, dtype=dtype, requires_grad=True) if bias else None
        self.ids = torch.randint(v, (m,))

    def ours(self, **settings):
        return linear_token_logprobs(
            self.hidden, self.weight, self.ids, bias=self.bias, temperature=TEMPERATURE, **settings
        )

    def dense(self):
        logits = self.hidden @ self.weight.T
        logits = logits if self.bias is None else logits + self.bias
        logprobs = (logits / TEMPERATURE).log_softmax(dim=-1)
        return logprobs[torch.arange(len(self.ids)), self.ids], -(logprobs.exp() * logprobs).sum(dim=-1)

    def gradients(self, loss):
        inputs = [x for x in (self.hidden, self.weight, self.bias) if x is not None]
        return torch.autograd.grad(loss, inputs)


def test_by_hand():
    logits = torch.tensor([[[0.0, math.log(3.0)]]])
    assert_close(token_logprobs(logits, torch.tensor([[1]])), torch.tensor([[math.log(0.75)]]))
    assert_close(entropy(logits), torch.tensor([[-0.75 * math.log(0.75) - 0.25 * math.log(0.25)]]))
    # at temperature 1/2 the odds of 3 become odds of 9
    assert_close(token_logprobs(logits, torch.tensor([[0]]), temperature=0.5), torch.tensor([[math.log(0.1)]]))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_by_definition(logits, ids, temperature):
    ours = (
        token_logprobs(logits.double(), ids, temperature=temperature),
        entropy(logits.double(), temperature=temperature),
    )
    for b in range(2):
        for t in range(3):
            row = logits[b, t].double().tolist()
            expected = oracles.log_softmax(row, temperature)[ids[b, t]]
            assert ours[0][b, t].item() == pytest.approx(expected, rel=1e-12)
            assert ours[1][b, t].item() == pytest.approx(oracles.entropy(row, temperature), rel=1e-12)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_the_softmax_is_in_float32_at_least(logits, ids, dtype, expected):
    logits = logits.to(dtype)
    assert token_logprobs(logits, ids).dtype == entropy(logits).dtype == expected
    assert_close(token_logprobs(logits, ids).double(), token_logprobs(logits.double(), ids), rtol=1e-6, atol=1e-6)
    hidden = torch.randn(4, 3, dtype=dtype)
    assert {x.dtype for x in linear_token_logprobs(hidden, hidden, torch.arange(4))} == {expected}


def test_the_likelihood_ignores_a_common_shift_of_logits(logits, ids):
    assert_close(token_logprobs(logits + 1000, ids), token_logprobs(logits, ids), atol=1e-3, rtol=1e-3)
    assert_close(entropy(logits + 1000), entropy(logits), atol=1e-3, rtol=1e-3)


def test_equal_logits_have_the_entropy_of_the_uniform():
    assert_close(entropy(torch.zeros(1, 2, 50)), torch.full((1, 2), math.log(50)))


def test_gradient_of_the_logprob_is_one_hot_minus_softmax(logits, ids):
    logits = logits.double().requires_grad_()
    token_logprobs(logits, ids, temperature=TEMPERATURE).sum().backward()
    expected = torch.eye(11, dtype=torch.float64)[ids] - (logits.detach() / TEMPERATURE).softmax(-1)
    assert_close(logits.grad, expected / TEMPERATURE)


def test_a_token_of_probability_0_harms_neither_value_nor_gradient(logits, ids):
    ids = ids % 10
    dropped = logits.clone()
    dropped[..., 10] = -torch.inf
    short, long = logits[..., :10].clone().requires_grad_(), dropped.requires_grad_()
    for x in (short, long):
        (token_logprobs(x, ids) + entropy(x)).sum().backward()
    assert_close(entropy(long), entropy(short))
    assert_close(long.grad[..., :10], short.grad)
    assert (long.grad[..., 10] == 0).all()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk_tokens", [1, 3, 7, 100])
def test_linear_equals_the_dense_path(bias, chunk_tokens):
    head = Head(7, bias=bias)
    ours, dense = head.ours(chunk_tokens=chunk_tokens), head.dense()
    assert_close(ours, dense)
    a, b = torch.randn(2, 7, dtype=torch.float64)
    for losses in (lambda lp, _: (a * lp).sum(), lambda _, h: (b * h).sum(), lambda lp, h: (a * lp + b * h).sum()):
        assert_close(
            head.gradients(losses(*head.ours(chunk_tokens=chunk_tokens))), head.gradients(losses(*head.dense()))
        )


def test_linear_gradcheck():
    head = Head(5, h=3, v=4)
    function = lambda hidden, weight, bias: linear_token_logprobs(  # noqa: E731
        hidden, weight, head.ids, bias=bias, temperature=TEMPERATURE, chunk_tokens=2
    )
    assert torch.autograd.gradcheck(function, (head.hidden, head.weight, head.bias))


def test_linear_where_a_bias_forbids_a_token():
    head = Head(5)
    head.ids = head.ids % 10
    with torch.no_grad():
        head.bias[10] = -torch.inf
    logprobs, entropies = head.ours(chunk_tokens=2)
    gradients = head.gradients((logprobs + 5 * entropies).sum())
    logits = (head.hidden @ head.weight[:10].T + head.bias[:10])[None]
    expected = (
        token_logprobs(logits, head.ids[None], temperature=TEMPERATURE)[0],
        entropy(logits, temperature=TEMPERATURE)[0],
    )
    assert_close((logprobs, entropies), expected)
    assert_close(gradients, head.gradients((expected[0] + 5 * expected[1]).sum()))


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_linear_skips_what_is_frozen(frozen):
    head = Head(5)
    getattr(head, frozen).requires_grad_(False)
    logprobs, entropies = head.ours(chunk_tokens=2)
    (logprobs + entropies).sum().backward()
    ours = {name: getattr(head, name).grad for name in ("hidden", "weight", "bias")}
    assert ours.pop(frozen) is None
    for name, gradient in ours.items():
        (dense,) = torch.autograd.grad(sum(head.dense()).sum(), getattr(head, name))
        assert_close(gradient, dense)


def test_linear_of_no_tokens():
    head = Head(0)
    logprobs, entropies = head.ours()
    assert logprobs.shape == entropies.shape == (0,)
    for gradient in head.gradients((logprobs + entropies).sum()):
        assert (gradient == 0).all()


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation makes, views left out."""

    def __init__(self):
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        held = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        sizes = [x.numel() for x in made if x.untyped_storage().data_ptr() not in held]
        self.num_elements = max(self.num_elements, *sizes, 0)
        return out


@pytest.mark.parametrize("frozen_head", [True, False])
def test_linear_never_holds_all_logits(frozen_head):
    m, h, v, chunk = 40, 8, 101, 4
    head = Head(m, h, v)
    head.weight.requires_grad_(not frozen_head)
    with LargestTensor() as largest:
        logprobs, entropies = head.ours(chunk_tokens=chunk)
        (logprobs + entropies).sum().backward()
    # A chunk of logits, or the gradient of a weight that is trained. All logits would be 4040.
    assert largest.num_elements == (chunk * v if frozen_head else v * h)
    with LargestTensor() as largest:
        sum(head.dense()).sum().backward()
    assert largest.num_elements >= m * v  # the recorder sees what the dense path makes


def test_linear_sums_the_weight_gradient_in_float32():
    """Many small chunks: sums kept in bfloat16 would stall at a few hundred times the first term."""
    hidden = torch.ones(2048, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    logprobs, _ = linear_token_logprobs(hidden, weight, torch.zeros(2048, dtype=torch.long), chunk_tokens=1)
    logprobs.sum().backward()
    assert weight.grad.dtype == torch.bfloat16
    assert weight.grad.tolist() == [[1024.0], [-1024.0]]  # one half per token


def test_linear_under_autocast_multiplies_in_its_dtype():
    head = Head(9, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logprobs, entropies = head.ours(chunk_tokens=4)
        logits = torch.nn.functional.linear(head.hidden, head.weight, head.bias)
    assert logits.dtype == torch.bfloat16
    expected = token_logprobs(logits[None], head.ids[None], temperature=TEMPERATURE)[0]
    assert logprobs.dtype == torch.float32
    assert_close(logprobs, expected)
    ours = head.gradients((logprobs + 0.5 * entropies).sum())
    assert {gradient.dtype for gradient in ours} == {torch.float32}
    exact = head.dense()
    for gradient, reference in zip(ours, head.gradients((exact[0] + 0.5 * exact[1]).sum()), strict=True):
        assert_close(gradient, reference, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_temperature_is_positive(logits, ids, temperature):
    calls = [
        lambda: token_logprobs(logits, ids, temperature=temperature),
        lambda: entropy(logits, temperature=temperature),
        lambda: linear_token_logprobs(logits[0], logits[0], ids[0], temperature=temperature),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="temperature"):
            call()


@pytest.mark.usefixtures("production")
def test_shapes_are_checked_at_the_door(logits):
    with pytest.raises(ValueError, match=r"logits \(2, 3, 11\), ids \(3, 2\)"):
        token_logprobs(logits, torch.zeros(3, 2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"hidden \(3, 11\), weight \(4, 5\), ids \(3,\)"):
        linear_token_logprobs(logits[0], torch.zeros(4, 5), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"bias \(5,\)"):
        linear_token_logprobs(logits[0], logits[0], torch.zeros(3, dtype=torch.long), bias=torch.zeros(5))
