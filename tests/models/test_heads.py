import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from llmrl.models.folders import ModelError
from llmrl.models.heads import CHUNK_TOKENS, LinearHead, OwnHead, choose_head, trunk_replaced
from tests.rollout.tiny import SIZES, VOCAB

from .tiny import LINEAR, NOT_LINEAR, TEMPERATURE, build, dense, gemma2, gpt2, llama, make_sequences, module_of

NUM_TOKENS = 2 * CHUNK_TOKENS + 100


class PositionalLlama(LlamaForCausalLM):
    """Its logits grow with the position, which no hidden state tells."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        slope = torch.linspace(0.0, 1.0, output.logits.shape[-1])
        output.logits = output.logits + slope * torch.arange(output.logits.shape[1])[:, None]
        return output


@pytest.mark.parametrize("family", LINEAR)
def test_plain_models_have_a_linear_head(family):
    assert isinstance(choose_head(build(family), VOCAB), LinearHead)


@pytest.mark.parametrize("family", NOT_LINEAR)
def test_soft_caps_and_scales_have_their_own(family):
    assert isinstance(choose_head(build(family), VOCAB), OwnHead)


def test_a_soft_cap_is_found_in_random_weights_too():
    """Random weights have logits of about 0.1, where a cap of 30 is a line."""
    model = gemma2(initializer_range=0.02, final_logit_softcapping=30.0)
    assert isinstance(choose_head(model, VOCAB), OwnHead)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_an_adapter_on_the_output_layer_is_part_of_the_head(make):
    torch.manual_seed(0)
    model = make()
    get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    module = module_of(model)  # the adapter is still 0: the head must not be chosen by what the probe shows alone
    with torch.no_grad():
        model.get_output_embeddings().lora_B["default"].weight.normal_()
        assert_close(tuple(module(make_sequences()).values()), dense(model.eval()), rtol=1e-4, atol=1e-4)


def test_an_output_layer_that_is_trained_whole_has_a_linear_head():
    torch.manual_seed(0)
    model = llama()
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    module = module_of(model)
    assert isinstance(module.head, LinearHead)
    with torch.no_grad():
        model.get_output_embeddings().modules_to_save["default"].weight.normal_()
        assert_close(tuple(module(make_sequences()).values()), dense(model.eval()), rtol=1e-4, atol=1e-4)


def test_logits_that_depend_on_something_else_are_refused():
    with pytest.raises(ModelError, match=r"PositionalLlama \(llama\)"):
        choose_head(PositionalLlama(LlamaConfig(**SIZES)), VOCAB)


def test_a_model_whose_trunk_cannot_be_replaced_is_refused():
    """OPT reaches through its trunk for the decoder."""
    model = OPTForCausalLM(
        OPTConfig(
            vocab_size=40,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            word_embed_proj_dim=32,
        )
    ).eval()
    assert isinstance(choose_head(model, VOCAB), LinearHead)
    get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    trunk = model.model
    with pytest.raises(ModelError, match="OPTForCausalLM"):
        choose_head(model, VOCAB)
    assert model.model is trunk


def test_choosing_leaves_nothing_behind(family):
    model = build(family)
    ids = torch.tensor([[7, 8, 9]])
    with torch.no_grad():
        before = model(ids).logits
        choose_head(model, VOCAB)
        assert torch.equal(model(ids).logits, before)
    assert all(p.grad is None for p in model.parameters())


def many_tokens():
    torch.manual_seed(1)
    return torch.randn(NUM_TOKENS, SIZES["hidden_size"], requires_grad=True), torch.randint(VOCAB, (NUM_TOKENS,))


def test_own_head_gradient_over_chunks():
    """Gemma 2: logits are cap * tanh(hidden @ weight.T / cap)."""
    model = build("gemma2")
    hidden, ids = many_tokens()
    weight = model.lm_head.weight
    weights = torch.linspace(-1.0, 1.0, NUM_TOKENS)

    def loss(logprobs, entropy):
        return (weights * logprobs).sum() + (weights.flip(0) * entropy).sum()

    capped = 3.0 * torch.tanh(hidden @ weight.T / 3.0)
    distribution = (capped[:, :VOCAB] / TEMPERATURE).log_softmax(dim=-1)
    expected = distribution[range(NUM_TOKENS), ids], -(distribution.exp() * distribution).sum(dim=-1)
    ours = OwnHead(VOCAB)(model, hidden, ids, TEMPERATURE)
    assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert_close(
        torch.autograd.grad(loss(*ours), [hidden, weight]),
        torch.autograd.grad(loss(*expected), [hidden, weight]),
        rtol=1e-3,
        atol=1e-4,
    )


def covers_the_vocabulary(x) -> bool:
    return isinstance(x, torch.Tensor) and x.dim() > 1 and x.shape[-1] in (VOCAB, SIZES["vocab_size"])


class WidestLogits(TorchDispatchMode):
    """Watches for how many tokens at once there are numbers for the whole vocabulary."""

    def __init__(self):
        super().__init__()
        self.num_tokens = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if covers_the_vocabulary(x):
                self.num_tokens = max(self.num_tokens, x[..., 0].numel())
        return out


@pytest.mark.parametrize(("family", "head"), [("llama", LinearHead), ("gemma2", OwnHead)])
def test_logits_are_never_held_all_at_once(family, head):
    model = build(family)
    hidden, ids = many_tokens()
    with WidestLogits() as widest:
        logprobs, entropy = head(VOCAB)(model, hidden, ids, TEMPERATURE)
        (logprobs.sum() + entropy.sum()).backward()
    assert widest.num_tokens == CHUNK_TOKENS


@pytest.mark.parametrize(("family", "head"), [("llama", LinearHead), ("gemma2", OwnHead)])
def test_no_logits_wait_for_the_backward_pass(family, head):
    model = build(family)
    hidden, ids = many_tokens()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        head(VOCAB)(model, hidden, ids, TEMPERATURE)
    assert kept
    assert not any(covers_the_vocabulary(x) for x in kept)


def test_the_trunk_comes_back():
    model = build("gemma2")
    trunk, names = model.model, [name for name, _ in model.named_parameters()]
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        OwnHead(VOCAB)(model, torch.zeros(3, 5), torch.tensor([1, 2, 3]), 1.0)
    assert model.model is trunk
    with trunk_replaced(model):
        assert model.model is not trunk
    assert model.model is trunk
    assert [name for name, _ in model.named_parameters()] == names
