import pytest
import torch

from llmrl.build import build_engine, load_for_sampling, respond
from llmrl.reports.progress import Silent
from llmrl.rollout.config import RolloutConfig

from .conftest import TINY


@pytest.mark.parametrize("engine", ["native", "transformers"])
def test_any_end_of_tokenizer_and_generation_config_ends_a_response(engine):
    tokenizer, model = load_for_sampling(TINY)
    model.generation_config.eos_token_id = [4, 9]
    built = build_engine(RolloutConfig(engine=engine), model, tokenizer, dtype=model.dtype, progress=Silent())
    assert set(built.eos_ids) == {4, 9, tokenizer.eos_token_id}


def test_responses_to_texts_come_in_groups_and_greedy_ones_agree():
    def groups(temperature):
        return respond(
            TINY,
            ["1+1=", "2+2="],
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
