from dataclasses import replace

import pytest
import torch

from llmrl.data.prompts import encode_prompts
from llmrl.reports.progress import Silent
from llmrl.rollout.config import RolloutConfig
from llmrl.rollout.native import NativeEngine
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
