import pytest
import torch
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaAttention

from llmrl.batches import Sequences
from llmrl.config import PPORun
from llmrl.models.config import CriticConfig, LoraSettings, ModelConfig
from llmrl.models.folders import ModelError
from llmrl.rollout.config import RolloutConfig
from llmrl.rollout.native import NativeEngine
from llmrl.rollout.support import RolloutError, cache_argument
from llmrl.trainers.config import RewardModelConfig, UpdateConfig
from llmrl.wiring.actors import load_actor
from llmrl.wiring.critics import load_networks
from llmrl.wiring.passes import check_sampling
from llmrl.wiring.reward_model import load_trained_reward_model
from llmrl.wiring.rewards import load_scorer
from tests.contexts import CPU, on_cpu
from tests.hybrids import HYBRIDS
from tests.models.tiny import DrawnHead

from .conftest import TINY

ENGINES = ["native", "transformers"]


def actor_of(config=TINY):
    return load_actor(config, CPU, temperature=0.7, seed=0)


@pytest.fixture(params=ENGINES)
def engine(request):
    return RolloutConfig(engine=request.param, temperature=0.7)


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2)], ids=["full", "lora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_that_samples_from_what_trains_passes(engine, lora, dtype):
    config = ModelConfig(path=TINY.path, from_scratch=TINY.from_scratch, lora=lora, dtype=dtype)
    actor = actor_of(config)
    check_sampling(actor, engine)
    assert actor.model.training


@pytest.mark.parametrize(
    ("planted", "way_out"), [("native", "set rollout.engine=transformers"), ("transformers", "choose another model")]
)
def test_a_cache_that_forgets_is_refused_with_a_way_out(planted, way_out, monkeypatch):
    """A model that, with something in its cache, sees another token than it was given."""
    actor = actor_of()
    forward = actor.model.base_model.forward

    def forgetful(input_ids=None, **kwargs):
        cache = kwargs.get(cache_argument(type(actor.model)))
        if cache is not None and cache.get_seq_length():
            input_ids = input_ids.roll(1) + 1
        return forward(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(actor.model.base_model, "forward", forgetful)
    with pytest.raises(RolloutError, match=rf"the {planted} engine cannot decode .* by \d.*; {way_out}"):
        check_sampling(actor, RolloutConfig(engine=planted))


@pytest.mark.parametrize("family", ["zamba2", "nemotron_h", "minimax"])
def test_a_hybrid_that_decodes_another_function_than_it_trains_is_refused(family, tmp_path):
    """In transformers: a least time step that decoding leaves out, and padding that reaches a state."""
    config = HYBRIDS[family]()
    config.vocab_size, config.time_step_min, config.initializer_range = 99, 0.1, 0.3
    config.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(TINY.path).save_pretrained(tmp_path)
    actor = actor_of(ModelConfig(path=str(tmp_path), from_scratch=True))
    with pytest.raises(RolloutError, match=f"of type {family}: its log-probabilities differ by .*; choose another"):
        check_sampling(actor, RolloutConfig(engine="transformers"))
    with pytest.raises(RolloutError, match=rf"native engine cannot decode models of type {family}: "):
        check_sampling(actor, RolloutConfig(engine="native"))


def test_other_log_probabilities_than_those_that_train_are_refused(engine, monkeypatch):
    actor = actor_of()
    eval_mode = actor.model.eval

    def other_model():
        torch.nn.init.normal_(actor.model.get_output_embeddings().weight)
        return eval_mode()

    before = actor.model.get_output_embeddings().weight.detach().clone()
    monkeypatch.setattr(actor.model, "eval", other_model)
    actor.module.register_forward_pre_hook(lambda *_: None)
    exact = actor.module.head

    def head(model, *args):
        with torch.no_grad():
            model.get_output_embeddings().weight.copy_(before)
        return exact(model, *args)

    actor.module.head = head
    with pytest.raises(RolloutError, match="differ by"):
        check_sampling(actor, engine)


def test_a_short_table_of_positions_is_enough(tmp_path, engine):
    tokenizer = AutoTokenizer.from_pretrained(TINY.path)
    tokenizer.save_pretrained(tmp_path)
    size = max(tokenizer.get_vocab().values()) + 1
    GPT2LMHeadModel(GPT2Config(vocab_size=size, n_embd=8, n_layer=1, n_head=2, n_positions=6)).save_pretrained(tmp_path)
    check_sampling(actor_of(ModelConfig(path=str(tmp_path))), engine)


def test_the_rope_of_a_run_is_that_of_its_longest_sequence(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(TINY.path)
    tokenizer.save_pretrained(tmp_path)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    size = max(tokenizer.get_vocab().values()) + 1
    config = LlamaConfig(vocab_size=size, **sizes, max_position_embeddings=32, rope_parameters=rope)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    settings = {"temperature": 1.0, "seed": 0}
    assert load_actor(ModelConfig(path=str(tmp_path)), CPU, **settings, longest=32).warnings == ()
    actor = load_actor(ModelConfig(path=str(tmp_path)), CPU, **settings, longest=33)
    assert "sequences here may have 33" in actor.warnings[0]
    short = torch.arange(5)[None]
    with torch.no_grad():
        alone = actor.model(short).logits
        beside = actor.model(torch.cat([torch.nn.functional.pad(short, (0, 35)), torch.ones(1, 40).long()])).logits
    torch.testing.assert_close(beside[:1, :5], alone)


def save(folder, model):
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY.path).save_pretrained(folder)
    return ModelConfig(path=str(folder))


def opt_350m():
    """As OPT-350m: hidden states of 16 numbers, projected to 8 at the end of the trunk."""
    sizes = {"hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"word_embed_proj_dim": 8, "max_position_embeddings": 64, "do_layer_norm_before": False}
    return OPTForCausalLM(OPTConfig(vocab_size=99, **sizes))


@pytest.mark.parametrize("network", ["own", "shared"])
def test_a_critic_is_as_wide_as_what_it_reads(config, tmp_path, network, monkeypatch):
    monkeypatch.setattr("llmrl.wiring.critics.ValueHead", DrawnHead)
    model = save(tmp_path / "opt", opt_350m())
    run = PPORun(
        model=model,
        data=config.data,
        reward=config.reward,
        rollout=config.rollout,
        critic=CriticConfig(network=network),
        update=UpdateConfig(minibatch_size=16),
        run=config.run,
    )
    actor = actor_of(model)
    networks = load_networks(run, actor)
    ids = torch.arange(6).view(2, 3)
    mask = torch.ones_like(ids, dtype=torch.bool)
    sequences = Sequences.from_rows(
        prompt_ids=ids, prompt_mask=mask, response_ids=ids, response_mask=mask, response_lengths=torch.tensor([3, 3])
    )
    outputs = networks.both.values(sequences)
    values, last_values = outputs.values, outputs.last_values
    assert (values.shape, last_values.shape) == ((2, 3), (2,))
    assert values.abs().min() > 0


@pytest.mark.parametrize("trains", [True, False])
def test_a_reward_model_that_attends_both_ways_is_refused(tmp_path, monkeypatch, trains):
    """A llama whose mask is taken off: the shape of a reward model, and not its manners."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=99, **sizes, initializer_range=0.3, num_labels=1, pad_token_id=0)
    folder = save(tmp_path / "scores", LlamaForSequenceClassification(config))

    def load():
        if trains:
            return load_trained_reward_model(folder, RewardModelConfig(), CPU, seed=0)
        return load_scorer(folder, normalize=True, place=on_cpu)

    load()
    attend = LlamaAttention.forward

    def both_ways(self, *args, attention_mask=None, **kwargs):
        self.is_causal = False
        return attend(self, *args, attention_mask=None, **kwargs)

    monkeypatch.setattr(LlamaAttention, "forward", both_ways)
    with pytest.raises(ModelError, match="a later token changes"):
        load()


def test_a_model_that_generate_cannot_run_is_refused_in_one_line(monkeypatch):
    """And an error of the native engine, which is ours, stays what it is."""
    actor = actor_of()

    def fail(*_, **__):
        raise ValueError("no layer\nkeeps a length")

    monkeypatch.setattr(actor.model, "generate", fail)
    with pytest.raises(RolloutError, match="of type llama: ValueError: no layer keeps a length; choose another model"):
        check_sampling(actor, RolloutConfig(engine="transformers"))
    monkeypatch.setattr(NativeEngine, "generate", fail)
    with pytest.raises(ValueError, match=r"^no layer\nkeeps a length$"):
        check_sampling(actor, RolloutConfig(engine="native"))
