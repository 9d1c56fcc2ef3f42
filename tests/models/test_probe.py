import time

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertLMHeadModel,
    FalconConfig,
    FalconForCausalLM,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
)

from llmrl.models import packing
from llmrl.models.folders import ModelError
from llmrl.models.heads import LinearHead, choose_head
from llmrl.models.packing import PACKED
from llmrl.models.probe import exact_float32, pack_where_exact, probe_rows, probe_trunk
from llmrl.models.training import turn_dropout_off
from tests.hybrids import HYBRIDS, build_hybrid
from tests.models.rewards import reward_model
from tests.rollout.tiny import VOCAB

from .tiny import FAMILIES, HEAD_SIZES, PACKING, build, gpt2, llama


def bert(**changes):
    config = BertConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        **changes,
    )
    return BertLMHeadModel(config).eval()


def mixtral(**changes):
    return MixtralForCausalLM(MixtralConfig(**HEAD_SIZES, num_local_experts=4, num_experts_per_tok=2, **changes))


def phimoe(**changes):
    return PhimoeForCausalLM(PhimoeConfig(**HEAD_SIZES, num_local_experts=4, num_experts_per_tok=2, **changes))


def opt(**changes):
    settings = {"vocab_size": 40, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    return OPTForCausalLM(OPTConfig(**settings, word_embed_proj_dim=8, max_position_embeddings=64, **changes))


class Trunk(nn.Module):
    """Around the trunk of a llama: changes what comes out."""

    def __init__(self, trunk, change):
        super().__init__()
        self.trunk = trunk
        self.change = change

    def forward(self, input_ids, position_ids=None, **kwargs):
        output = self.trunk(input_ids=input_ids, position_ids=position_ids, **kwargs)
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])
        output.last_hidden_state = self.change(output.last_hidden_state, position_ids)
        return output


def changed(change):
    """A llama whose hidden states go through `change`, which sees the positions too."""
    torch.manual_seed(0)
    model = llama()
    model.model = Trunk(model.model, change)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_models_whose_passes_agree_pass_in_train_mode(family):
    model = build(family).train()
    turn_dropout_off(model)
    assert probe_trunk(model, longest=5000) == 32


def test_a_model_that_attends_both_ways_is_refused():
    with pytest.raises(ModelError, match=r"BertLMHeadModel \(bert\) .*a later token .*attend both ways, by"):
        probe_trunk(bert())
    probe_trunk(bert(is_decoder=True))


def test_both_ways_is_found_in_the_weights_of_a_new_model():
    with pytest.raises(ModelError, match="a later token changes"):
        probe_trunk(bert(initializer_range=0.02))


PLANTED = {
    "two passes over the same rows differ": lambda x, _: x + 0.01 * x.abs().max() * torch.rand(x.shape),
    "a row changes with its neighbours": lambda x, _: x * (1 + 0.01 * (x.shape[0] > 1)),
    "a row changes with how long its neighbours are": lambda x, positions: x * (1 + 0.01 * (positions.max() >= 4999)),
    "a later token changes what stands before it": lambda x, _: x + 0.01 * x.flip(1),
}


@pytest.mark.parametrize("what", PLANTED)
def test_what_disagrees_is_named(what):
    with pytest.raises(
        ModelError, match=f"LlamaForCausalLM .llama. cannot be used here: {what}.* choose another model"
    ):
        probe_trunk(changed(PLANTED[what]), longest=5000)


def test_a_pass_that_fails_is_told_with_its_reason():
    with pytest.raises(
        ModelError, match=r"a plain pass over a few tokens fails \(KeyError: 'experts'\); choose another"
    ):
        probe_trunk(changed(lambda *_: {}["experts"]))


def test_nothing_but_rounding_is_let_through():
    probe_trunk(changed(lambda x, _: x + 1e-6 * torch.rand(x.shape)), longest=5000)
    with pytest.raises(ModelError, match="by nan of its hidden states"):
        probe_trunk(changed(lambda x, _: x * torch.nan), longest=5000)


@pytest.mark.parametrize(
    ("make", "noise"),
    [
        (mixtral, {"router_jitter_noise": 0.1}),
        (phimoe, {"router_jitter_noise": 0.3, "input_jitter_noise": 0.1}),
        (opt, {"layerdrop": 0.9, "dropout": 0.0}),
        (gpt2, {}),
    ],
)
def test_the_noise_of_train_mode_is_off(make, noise):
    torch.manual_seed(0)
    model = make(**noise).train()
    with pytest.raises(ModelError, match="two passes over the same rows differ"):
        probe_trunk(model)
    turn_dropout_off(model)
    with torch.no_grad():
        ids = torch.randint(40, (3, 9))
        as_sampled = model.eval()(input_ids=ids).logits
        assert torch.equal(model.train()(input_ids=ids).logits, as_sampled)
    probe_trunk(model)
    choose_head(model, VOCAB)


def test_a_router_that_draws_experts_learns_and_keeps_its_threshold():
    torch.manual_seed(0)
    model = phimoe(router_jitter_noise=0.3)
    before = model.eval()(input_ids=torch.tensor([[7, 8, 9]])).logits
    turn_dropout_off(model)
    logits = model.train()(input_ids=torch.tensor([[7, 8, 9]])).logits
    assert torch.equal(logits, before)
    logits.square().sum().backward()
    assert model.model.layers[0].mlp.router.weight.grad.abs().max() > 0
    assert model.model.layers[0].training


def test_noise_that_is_read_from_the_config_is_refused_with_its_name():
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = FalconForCausalLM(FalconConfig(**sizes, hidden_dropout=0.1)).train()
    turn_dropout_off(model)
    with pytest.raises(ModelError, match=r"two passes .* set to 0 in its config\.json .*hidden_dropout \(0\.1\)"):
        probe_trunk(model)


def test_the_width_is_that_of_what_comes_out():
    """OPT-350m projects its last hidden states to the width of its embeddings."""
    assert probe_trunk(opt().eval()) == 8
    assert probe_trunk(opt().eval().base_model) == 8


def test_an_adapted_model_is_tried_with_its_adapter():
    model = llama()
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
    with pytest.raises(ModelError, match="two passes"):
        probe_trunk(model.train())
    turn_dropout_off(model)
    assert probe_trunk(model) == 32


def test_few_positions_and_few_tokens_are_enough():
    torch.manual_seed(0)
    model = gpt2(n_positions=5, vocab_size=6).eval()
    assert probe_rows(model, 6).shape == (2, 5)
    assert probe_trunk(model, longest=5000) == 32
    assert isinstance(choose_head(model, 6), LinearHead)


def test_probing_leaves_nothing_behind():
    model = build("llama").train()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    probe_trunk(model, longest=100)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert model.training


def test_it_computes_in_float32_whatever_is_allowed():
    matmul = torch.backends.cuda.matmul
    seen = []
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        model = changed(lambda x, _: seen.append(matmul.fp32_precision) or x)
        probe_trunk(model)
        assert matmul.fp32_precision == "tf32"
        with pytest.raises(KeyError), exact_float32():
            raise KeyError
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before
    assert set(seen) == {"ieee"}


def test_the_head_is_chosen_in_float32_too(monkeypatch):
    model, seen = llama(), []
    forward = LlamaForCausalLM.forward
    monkeypatch.setattr(
        LlamaForCausalLM,
        "forward",
        lambda *args, **kwargs: seen.append(torch.backends.cuda.matmul.fp32_precision) or forward(*args, **kwargs),
    )
    choose_head(model, VOCAB)
    assert set(seen) == {"ieee"}


def test_the_passes_are_short():
    model = build("llama")
    begun = time.monotonic()
    probe_trunk(model, longest=10**9)
    assert time.monotonic() - begun < 1


# --- packed rows ------------------------------------------------------------------------------------------------------


def packs(model):
    trunk = model.base_model
    is_set = {layer.self_attn.config._attn_implementation for layer in getattr(trunk, "layers", [])} or {PACKED}
    return packing.packs(trunk, torch.float32, torch.device("cpu")) and is_set == {PACKED}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_models_whose_attention_allows_it_pack(family, checkpointing):
    model = build(family).train()
    turn_dropout_off(model)
    if checkpointing:
        model.gradient_checkpointing_enable()
    pack_where_exact(model)
    assert packs(model) == (family in PACKING)


@pytest.mark.parametrize(("longest", "is_packed"), [(0, False), (17, False), (16, True), (5, True)])
def test_a_window_holds_the_longest_sequence_or_nothing_is_packed(longest, is_packed):
    """It counts columns, of which a packed row has more."""
    for family in ("mistral", "gemma3"):
        config = FAMILIES[family]().config
        config.sliding_window, config.num_labels = 16, 1
        model = AutoModelForSequenceClassification.from_config(config)
        pack_where_exact(model, longest=longest)
        assert packs(model) == is_packed


@pytest.mark.parametrize("kind", ["chunked_attention", "linear_attention"])
def test_layers_of_another_kind_do_not_pack(kind):
    model = build("llama")
    model.config.layer_types = ["full_attention", kind]
    pack_where_exact(model)
    assert not packs(model)


@pytest.mark.parametrize("judge", ["by the kinds of layers", "by the states"])
@pytest.mark.parametrize("family", HYBRIDS)
def test_models_that_carry_a_state_do_not_pack(family, judge, monkeypatch):
    """Nor where the config says nothing of it: the states of a packed row are others."""
    if judge == "by the states":
        monkeypatch.setattr("llmrl.models.probe._attends_by_position", lambda *_: True)
    model = build_hybrid(family).train()
    own = model.config._attn_implementation
    pack_where_exact(model, longest=16)
    assert model.config._attn_implementation == own != PACKED


def test_other_kernels_of_attention_do_not_pack():
    model = reward_model("llama")
    model.set_attn_implementation("eager")
    pack_where_exact(model)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("ignored", ["packing", "position_ids"])
@pytest.mark.parametrize("part", ["model", "layers.1"])
def test_a_model_that_ignores_the_layout_does_not_pack(ignored, part):
    """Nor one of whose layers a single one does: without the layout attention is over the whole row."""
    model = reward_model("gpt2" if part == "model" and ignored == "packing" else "llama")

    def ignore(_, args, kwargs):
        named = "position_embeddings" if ignored == "position_ids" and part != "model" else ignored
        other = None if named != "position_embeddings" else tuple(x.roll(1, dims=1) for x in kwargs[named])
        return args, {**kwargs, named: other}

    module = model.base_model if part == "model" else model.base_model.layers[1]
    module.register_forward_pre_hook(ignore, with_kwargs=True)
    pack_where_exact(model)
    assert model.config._attn_implementation == "sdpa"


def test_a_model_that_fails_on_the_layout_does_not_pack():
    model = reward_model("llama")

    def fail(_, __, kwargs):
        if "packing" in kwargs:
            raise TypeError("forward() got an unexpected keyword argument 'packing'")

    model.base_model.layers[0].register_forward_pre_hook(fail, with_kwargs=True)
    pack_where_exact(model)
    assert model.config._attn_implementation == "sdpa"


def test_a_model_that_computes_otherwise_by_the_name_of_its_attention_does_not_pack():
    """Sampling and the choice of a head pass no layout: they must find what they found before."""
    model = reward_model("llama")

    def notice(module, __, kwargs, output):
        if module.config._attn_implementation != "sdpa" and "packing" not in kwargs:
            output.last_hidden_state = 1.01 * output.last_hidden_state

    model.base_model.register_forward_hook(notice, with_kwargs=True)
    pack_where_exact(model)
    assert model.config._attn_implementation == "sdpa"


def test_every_state_is_compared():
    """Also those after the first."""
    model = reward_model("llama")

    def spoil(_, __, kwargs, output):
        if "packing" in kwargs:
            output.last_hidden_state = output.last_hidden_state.clone()
            output.last_hidden_state[:, -1] *= 1.01

    model.base_model.register_forward_hook(spoil, with_kwargs=True)
    pack_where_exact(model)
    assert model.config._attn_implementation == "sdpa"


def test_a_broken_model_does_not_pack():
    model = reward_model("llama")
    with torch.no_grad():
        model.base_model.norm.weight[0] = torch.nan
    pack_where_exact(model)
    assert not packs(model)


def test_trying_leaves_nothing_behind():
    model = llama(vocab_size=3).train()  # a vocabulary smaller than the probe
    pack_where_exact(model)
    assert packs(model)
    assert all(p.grad is None for p in model.parameters())
    assert model.training


def test_a_model_with_fewer_positions_than_the_probe_does_not_pack():
    model = gpt2(n_positions=5).eval()
    pack_where_exact(model)
    assert not packs(model)


def test_rounding_is_no_reason_not_to_pack():
    """The kernels may round differently in bfloat16, so it is float32 that is tried."""
    model, dtypes = reward_model("llama"), []
    model.base_model.layers[0].mlp.register_forward_hook(lambda _, __, output: dtypes.append(output.dtype))
    pack_where_exact(model)
    assert packs(model)
    assert set(dtypes) == {torch.float32}


def test_a_bias_that_counts_columns_does_not_pack():
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = AutoModelForSequenceClassification.from_config(FalconConfig(**sizes, alibi=True, num_labels=1))
    pack_where_exact(model)
    assert not packs(model)


@pytest.mark.parametrize("base_packs", [False, True])
def test_a_head_on_the_trunk_of_another_model_asks_the_trunk(base_packs):
    """Whose settings are its own."""
    base, model = build("llama"), reward_model("llama")
    if base_packs:
        pack_where_exact(base)
    model.model = base.model
    pack_where_exact(model)
    assert packs(model)
    assert packs(base)
