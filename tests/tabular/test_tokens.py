"""The tree of responses: its size by counting, its values by enumeration, its policy that of a language model."""

import itertools

import pytest
import torch
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from llmrl.tabular import objective, regularized_iteration, token_mdp, visitation


def test_states_are_prefixes():
    tokens = token_mdp(len, vocabulary=2, max_tokens=2, eos=1)
    assert tokens.prefixes == [(), (0,), (1,), (0, 0), (0, 1)]
    assert tokens.mdp.terminal.tolist() == [False, False, True, True, True]
    assert tokens.mdp.expected_rewards.tolist() == [[0, 1], [2, 2], [0, 0], [0, 0], [0, 0]]


@pytest.fixture
def model():
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=3,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=8,
        initializer_range=1.0,
    )
    return LlamaForCausalLM(shape).eval()


@torch.no_grad()
def test_a_language_model_as_a_policy(model):
    """The expected score by summing over all 27 responses the product of the model's own probabilities."""

    def score(response):
        return float(sum(response) ** 2)

    tokens = token_mdp(score, vocabulary=3, max_tokens=3, eos=None)
    policy = tokens.policy_of(lambda ids: model(ids).logits[:, -1], prompt=(2, 0))
    expected = 0.0
    for response in itertools.product(range(3), repeat=3):
        logprobs = model(torch.tensor([(2, 0, *response)])).logits.log_softmax(dim=-1)[0, 1:-1]
        expected += logprobs.gather(1, torch.tensor(response)[:, None]).sum().exp().item() * score(response)
    assert objective(tokens.mdp, policy).item() == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_the_optimum_under_a_kl_is_that_over_whole_responses(model):
    """Token by token or over responses, the optimum is reference(y) exp(score(y) / kl_coef), normalized."""
    tokens = token_mdp(lambda response: float(response.count(1)), vocabulary=3, max_tokens=2, eos=0)
    reference = tokens.policy_of(lambda ids: model(ids).logits[:, -1], prompt=(1,))
    best = regularized_iteration(tokens.mdp, reference, kl_coef=0.4).policy
    ended = tokens.mdp.terminal

    def of_responses(policy):
        moves = torch.einsum("sa,san->sn", policy, tokens.mdp.transitions)
        return (visitation(tokens.mdp, policy) @ moves)[ended]

    scores = torch.tensor([float(prefix.count(1)) for prefix in tokens.prefixes]).double()[ended]
    weights = of_responses(reference) * (scores / 0.4).exp()
    assert_close(of_responses(best), weights / weights.sum(), rtol=1e-9, atol=1e-12)


def test_what_is_no_tree_is_refused(model):
    with pytest.raises(ValueError, match=r"eos \(3\)"):
        token_mdp(len, vocabulary=3, max_tokens=2, eos=3)
    with pytest.raises(ValueError, match=r"max_tokens \(0\)"):
        token_mdp(len, vocabulary=3, max_tokens=0, eos=None)
    with pytest.raises(ValueError, match="prompt"):
        token_mdp(len, vocabulary=3, max_tokens=1, eos=None).policy_of(lambda ids: model(ids).logits[:, -1], prompt=())
