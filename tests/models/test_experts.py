"""Balance of the experts of a mixture: what is counted, the Switch loss and its gradient, and the loss-free bias."""

import copy

import pytest
import torch
from packaging.version import Version
from torch import nn
from transformers import AutoModelForCausalLM

from llmrl.functional.statistics import Loads, Mean
from llmrl.metrics import Metrics
from llmrl.models.experts import BIAS, Experts, check_balance, router_class, watched
from llmrl.models.folders import ModelError
from llmrl.models.heads import choose_head
from llmrl.models.policy import PolicyModule
from tests.mixtures import FAMILIES, VERSION, config_of

from .tiny import make_sequences as sequences

VOCAB = 64


def mixture(family):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(family, vocab_size=VOCAB))
    for name, p in model.named_parameters():
        if "gate.weight" in name:
            nn.init.normal_(p, std=1.0)  # routers that choose
    return model.train()


def policy(family, **settings):
    model = mixture(family)
    module = PolicyModule(model, choose_head(model, VOCAB), temperature=1.0, dtype=torch.float32)
    module.experts = watched(model.base_model, **{"bias_rate": 0.0} | settings)
    assert module.experts is not None
    return module


def many_tokens():
    """Sixteen responses of 24 random tokens."""
    numbers = torch.randint(VOCAB, (16, 26), generator=torch.Generator().manual_seed(0)).tolist()
    return sequences([(row[:2], row[2:], [1] * 24) for row in numbers])


def by_hand(module, batch):
    """Loss of each token with the shares that `experts` has, and choices by response, one token after another: each
    response alone in a row of its own, its routers' inputs caught and multiplied out."""
    trunk, experts = module.model.base_model, module.experts
    losses, counts = torch.zeros(batch.response_mask.shape), []
    for b in range(len(batch.response_ids)):
        prompt = batch.prompt_ids[b][batch.prompt_mask[b]]
        response = batch.response_ids[b][: int(batch.response_lengths[b])]
        inputs = []

        def keep(_module, args, kept=inputs):
            kept.append(args[0])

        hooks = [router.register_forward_pre_hook(keep) for router in experts.routers]
        with torch.no_grad():
            trunk(input_ids=torch.cat([prompt, response])[None], use_cache=False)
        for hook in hooks:
            hook.remove()
        count = torch.zeros(len(inputs), 4)
        for t in batch.response_mask[b].nonzero().flatten().tolist():
            for layer, (router, x) in enumerate(zip(experts.routers, inputs, strict=True)):
                logits = (x.reshape(-1, x.shape[-1]) @ router.weight.T)[len(prompt) + t - 1]
                scores = logits.sigmoid() if hasattr(router, BIAS) else logits.softmax(dim=0)
                p = scores / scores.sum()
                choice = scores + router.get_buffer(BIAS) if hasattr(router, BIAS) else scores
                for expert in choice.argsort(descending=True)[:2].tolist():
                    count[layer, expert] += 1
                f = torch.full((4,), 0.25) if experts.shares is None else experts.shares[layer]
                losses[b, t] += sum(4 * f[e] * p[e] for e in range(4)) / len(inputs)
        counts.append(count)
    return losses, torch.stack(counts)


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_choices_are_those_counted_token_by_token(family):
    module, batch = policy(family), sequences()
    outputs = module(batch)
    loss, counts = by_hand(module, batch)
    torch.testing.assert_close(outputs["balance"], loss, atol=1e-5, rtol=0)
    assert torch.equal(outputs["routed"], counts)
    torch.testing.assert_close(outputs["balance"][batch.response_mask], torch.ones(int(batch.response_mask.sum())))
    module.experts.finish_step(Metrics({"experts": Loads(outputs["routed"].sum(dim=0))}))
    torch.testing.assert_close(module.experts.shares, counts.sum(dim=0) / (2 * batch.response_mask.sum()))
    torch.testing.assert_close(module(batch)["balance"], by_hand(module, batch)[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_other_outputs_are_those_of_a_pass_that_nobody_watches(family):
    module, batch = policy(family), sequences()
    watching = module(batch)
    with torch.no_grad():
        assert module(batch).keys() == {"logprobs", "entropy"}
    module.experts = None
    for name, output in module(batch).items():
        assert torch.equal(output, watching[name])


def test_its_gradient_is_that_of_the_formula_and_flows_through_checkpoints():
    gradients = []
    for checkpointing in (False, True):
        module, batch = policy("qwen3_moe"), sequences()
        if checkpointing:
            module.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        module.experts.shares = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.0, 0.5, 0.5, 0.0]])
        (module(batch)["balance"] * batch.response_mask).sum().backward()
        gradients.append({name: p.grad for name, p in module.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)
    module, last = policy("qwen3_moe"), "model.model.layers.1.mlp.gate.weight"
    module.experts.shares = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.0, 0.5, 0.5, 0.0]])
    weight, step = dict(module.named_parameters())[last], 1e-2
    for place in ((0, 0), (1, 7), (3, 31)):
        moved = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[place] += sign * step
            moved.append(float((module(batch)["balance"].detach().double() * batch.response_mask).sum()))
            with torch.no_grad():
                weight[place] -= sign * step
        difference = (moved[0] - moved[1]) / (2 * step)
        assert float(gradients[0][last][place]) == pytest.approx(difference, abs=2e-3, rel=0.02)


@pytest.mark.skipif(Version("5.6") > VERSION, reason="its routers are those that the test makes")
def test_routers_that_return_probabilities_have_the_same_loss(monkeypatch):
    """In transformers 5.3 those of Qwen, Mixtral and OLMoE did."""
    losses, shares = [], torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.0, 0.5, 0.5, 0.0]])
    for old in (False, True):
        if old:
            (kind,) = {type(router) for router in policy("qwen3_moe").experts.routers}
            forward = kind.forward

            def normalized(self, hidden, forward=forward):
                logits, scores, chosen = forward(self, hidden)
                return logits.float().softmax(dim=-1), scores, chosen

            monkeypatch.setattr(kind, "forward", normalized)
        module = policy("qwen3_moe")
        module.experts.shares = shares
        losses.append(module(sequences())["balance"])
    torch.testing.assert_close(losses[1], losses[0])
    assert losses[0].std() > 0.1


def test_learning_by_it_alone_evens_the_choices():
    module, batch = policy("qwen3_moe"), many_tokens()
    gates = [router.weight for router in module.experts.routers]
    optimizer, loads = torch.optim.SGD(gates, lr=3.0), []
    for _ in range(100):
        outputs = module(batch)
        metrics = Metrics({"experts": Loads(outputs["routed"].sum(dim=0).detach())})
        loads.append(metrics.values()["experts/load_max"])
        ((outputs["balance"] * batch.response_mask).sum() / batch.response_mask.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        module.experts.finish_step(metrics)
    assert loads[-1] - 1 < 0.7 * (loads[0] - 1)


def test_the_bias_rises_where_fewer_than_the_mean_choose():
    module = policy("deepseek_v3", bias_rate=0.5)
    counts = torch.tensor([[5.0, 1.0, 3.0, 3.0]])  # mean 3
    module.experts.finish_step(Metrics({"experts": Loads(counts)}))
    (router,) = module.experts.routers
    assert router.get_buffer(BIAS).tolist() == [-0.5, 0.5, 0.0, 0.0]
    module.experts.finish_step(Metrics())  # a step that learned nothing
    assert router.get_buffer(BIAS).tolist() == [-0.5, 0.5, 0.0, 0.0]


def test_the_bias_alone_evens_the_choices():
    module, batch = policy("deepseek_v3", bias_rate=0.02), many_tokens()
    module.experts.routers[0].get_buffer(BIAS)[0] = 1.0  # everything chooses the first
    loads = []
    for _ in range(100):
        metrics = Metrics({"experts": Loads(module(batch)["routed"].sum(dim=0).detach())})
        module.experts.finish_step(metrics)
        loads.append(metrics.values()["experts/load_max"])
    assert loads[0] == 2.0  # of two experts for each token, in place of half a one
    assert max(loads[-20:]) < 1.3


def test_its_state_is_all_that_the_next_step_needs():
    module, batch = policy("deepseek_v3", bias_rate=0.1), sequences()
    for _ in range(3):
        module.experts.finish_step(Metrics({"experts": Loads(module(batch)["routed"].sum(dim=0).detach())}))
    state = copy.deepcopy(module.experts.state_dict())
    other = policy("deepseek_v3", bias_rate=0.1)
    other.experts.load_state_dict(state)
    for name, output in module(batch).items():
        assert torch.equal(other(batch)[name], output)
    fresh = policy("deepseek_v3")
    fresh.experts.load_state_dict(policy("deepseek_v3").experts.state_dict())  # before the first step
    assert fresh.experts.shares is None


def test_loads_are_pooled_as_counts_and_read_at_the_end():
    parts = [torch.tensor([[3.0, 1.0], [0.0, 2.0]]), torch.tensor([[1.0, 3.0], [0.0, 6.0]])]
    pooled = Metrics({"experts": Loads(parts[0]), "x": Mean(1.0, 2.0)})
    pooled = pooled.in_floats().merge(Metrics({"experts": Loads(parts[1])}).per_step())
    assert pooled.values() == {"experts/load_max": 2.0, "experts/unused_fraction": 0.25, "x": 0.5}
    assert Metrics({"experts": Loads(torch.zeros(2, 2))}).values() == {}


def test_models_without_experts_or_without_a_bias_are_refused():
    def check(family, *, bias):
        config = config_of(family, vocab_size=VOCAB)
        check_balance(AutoModelForCausalLM._model_mapping[type(config)], config, path="some/model", bias=bias)

    for family, bias in (("qwen3_moe", False), ("deepseek_v3", True)):
        check(family, bias=bias)
    with pytest.raises(ModelError, match=r"some/model.* is no mixture of experts .*set algorithm\.balance_coef"):
        check("llama", bias=False)
    with pytest.raises(ModelError, match=r"some/model.*Qwen3MoeTopKRouter.*without a bias.*balance_bias_rate"):
        check("qwen3_moe", bias=True)


def test_a_model_without_routers_is_not_watched():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of("llama", vocab_size=VOCAB))
    assert router_class(type(model.base_model)) is None
    assert watched(model.base_model, bias_rate=0.0) is None
    assert Experts(model.base_model).routers == []
