from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from llmrl.data.prompts import encode_prompts
from llmrl.models.config import ModelConfig
from llmrl.models.loading import load_model, load_tokenizer
from llmrl.reports.progress import Silent
from llmrl.rollout.config import RolloutConfig
from llmrl.rollout.native import NativeEngine
from llmrl.rollout.support import RolloutError
from llmrl.wiring import engines
from llmrl.wiring.engines import build_engine, load_for_sampling, respond
from tests.contexts import CPU

from .conftest import TINY


@pytest.mark.parametrize("engine", ["native", "transformers"])
def test_any_end_of_tokenizer_and_generation_config_ends_a_response(engine):
    tokenizer, model = load_for_sampling(TINY, CPU)
    model.generation_config.eos_token_id = [4, 9]
    built = build_engine(RolloutConfig(engine=engine), model, tokenizer, dtype=model.dtype, progress=Silent())
    assert set(built.eos_ids) == {4, 9, tokenizer.eos_token_id}


def test_an_adapter_is_merged_into_its_base_in_float32_and_rounded_once(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    torch.manual_seed(0)
    load_model(TINY).save_pretrained(base)
    load_tokenizer(TINY).save_pretrained(base)
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    adapted.save_pretrained(str(adapter))
    sampled = {
        dtype: load_for_sampling(ModelConfig(path=str(adapter), dtype=dtype), CPU)[1]
        for dtype in ("float32", "bfloat16")
    }
    ids = torch.tensor([[5, 6, 7]])
    assert_close(sampled["float32"](ids).logits, adapted(ids).logits, rtol=0.0, atol=1e-5)
    with adapted.disable_adapter():
        assert (sampled["float32"](ids).logits - adapted(ids).logits).abs().max() > 1e-3
    weights = dict(sampled["bfloat16"].named_parameters())
    assert all(torch.equal(p.bfloat16(), weights[name]) for name, p in sampled["float32"].named_parameters())


def test_responses_to_texts_come_in_groups_and_greedy_ones_agree():
    def groups(temperature):
        return respond(
            TINY,
            ["1+1=", "2+2="],
            CPU,
            system_prompt=None,
            temperature=temperature,
            num_responses=3,
            max_response_tokens=5,
            seed=0,
        )

    torch.manual_seed(0)
    greedy = groups(0.0)
    assert [len(group) for group in greedy] == [3, 3]
    assert all(len(set(group)) == 1 for group in greedy)
    assert any(len(set(group)) > 1 for group in groups(1.0))


def test_responses_are_sampled_as_the_command_asks(monkeypatch):
    seen = []

    def encode(rows, tokenizer, data):
        seen.append((data.system_prompt, [row["prompt"] for row in rows]))
        return encode_prompts([{"prompt": row["prompt"]} for row in rows], tokenizer, replace(data, system_prompt=None))

    class Engine(NativeEngine):
        def generate(self, prompts, sampling):
            seen.append((sampling, self.max_rows))
            return super().generate(prompts, sampling)

    monkeypatch.setattr(engines, "encode_prompts", encode)
    monkeypatch.setattr(engines, "NativeEngine", Engine)
    settings = {"temperature": 0.4, "num_responses": 70, "max_response_tokens": 2, "seed": 5}
    respond(TINY, ["1+1="], CPU, system_prompt="be brief", **settings)
    told, (sampling, max_rows) = seen
    assert told == ("be brief", ["1+1="])
    assert {name: getattr(sampling, name) for name in settings} == settings
    assert not sampling.greedy
    assert max_rows == 70


class Elsewhere:
    """A model that says that it lies on a GPU."""

    device = torch.device("cuda")

    def __init__(self, model):
        self.model = model

    def __getattr__(self, name):
        return getattr(self.model, name)


@pytest.fixture
def built(monkeypatch):
    """Builds an engine as on a GPU, and returns it with what it said."""

    def build(**settings):
        tokenizer, model = load_for_sampling(TINY, CPU)
        monkeypatch.setattr(engines.NativeEngine, "__init__", init_elsewhere)
        said = []
        progress = Silent()
        progress.message = said.append
        config = RolloutConfig(max_rows=5, **settings)
        return build_engine(config, model, tokenizer, dtype=model.dtype, progress=progress), said

    def init_elsewhere(self, model, **settings):
        init(self, model, **settings)
        fresh = self.weights.fresh
        self.weights.fresh = lambda: Elsewhere(fresh())

    init = engines.NativeEngine.__init__
    return build


def test_responses_are_decoded_by_graphs_on_a_gpu(built, monkeypatch):
    asked = []
    monkeypatch.setattr(engines, "check_graphs", lambda model, vocab_size, routers: asked.append(vocab_size))
    engine, said = built()
    assert (engine.graphs.eos_ids, engine.graphs.vocab_size) == (engine.eos_ids, *asked)
    assert said == []
    assert built(graphs="off")[0].graphs is None


def test_a_model_that_cannot_be_recorded_is_decoded_without_graphs_and_a_line_says_why(built, monkeypatch):
    def refuse(model, vocab_size, routers):
        raise RolloutError("its rope changes")

    monkeypatch.setattr(engines, "check_graphs", refuse)
    engine, said = built()
    assert engine.graphs is None
    assert said == ["Responses are decoded without CUDA graphs, which is slower: its rope changes."]


def test_on_a_cpu_there_are_no_graphs():
    tokenizer, model = load_for_sampling(TINY, CPU)
    engine = build_engine(RolloutConfig(), model, tokenizer, dtype=model.dtype, progress=Silent())
    assert engine.graphs is None
