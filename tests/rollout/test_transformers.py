import math

import pytest
import torch
from torch.testing import assert_close
from transformers import GenerationConfig

from .tiny import full_forward_logprobs, make_sampling, rows_of


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.6, "seed": 3, "first_response": 40}, {"greedy": True}])
def test_equals_the_native_engine_token_for_token(any_model, generating, native, prompts, changes):
    sampling = make_sampling(**changes)
    ours = native(any_model, max_rows=4).generate(prompts, sampling)
    theirs = generating(any_model).generate(prompts, sampling)
    assert theirs.sequences.response_ids.equal(ours.sequences.response_ids)
    assert theirs.sequences.response_mask.equal(ours.sequences.response_mask)
    assert theirs.sequences.prompt_ids.equal(ours.sequences.prompt_ids)
    assert theirs.finished.equal(ours.finished)
    assert theirs.group_ids.equal(ours.group_ids)
    assert theirs.rows == ours.rows
    assert_close(theirs.rollout_logprobs, ours.rollout_logprobs, atol=1e-5, rtol=0)


def test_logprobs_are_those_of_one_plain_forward(any_model, generating, prompts, progress):
    rollout = generating(any_model).generate(prompts, make_sampling(temperature=0.7))
    for prompt, response, logprobs, _ in rows_of(rollout):
        assert_close(logprobs, full_forward_logprobs(any_model, prompt, response, 0.7), atol=1e-5, rtol=0)
    assert progress.advanced == 10
    assert progress.num_looks == rollout.sequences.response_lengths.max()


@pytest.mark.parametrize(
    "hostile",
    [
        {"do_sample": True, "top_p": 0.1, "top_k": 2, "temperature": 0.1},
        {"repetition_penalty": 3.0, "no_repeat_ngram_size": 1},
        {"max_length": 4, "max_new_tokens": 2},
        {"min_new_tokens": 12, "forced_eos_token_id": 2},
        {"suppress_tokens": [7, 8, 9, 10, 11], "begin_suppress_tokens": [12, 13], "bad_words_ids": [[14], [15]]},
        {"eos_token_id": list(range(6, 36)), "num_beams": 3, "num_return_sequences": 2},
        {"exponential_decay_length_penalty": (1, 9.0), "sequence_bias": [[[16], 30.0]]},
    ],
)
def test_the_generation_config_of_the_model_never_leaks(model, generating, prompts, hostile):
    before = generating(model).generate(prompts, make_sampling())
    model.generation_config = GenerationConfig(**hostile)
    config = model.generation_config
    after = generating(model).generate(prompts, make_sampling())
    assert after.sequences.response_ids.equal(before.sequences.response_ids)
    assert after.rollout_logprobs.equal(before.rollout_logprobs)
    assert model.generation_config is config


def test_reads_the_live_weights(model, generating, prompts):
    engine = generating(model)
    engine.generate(prompts, make_sampling())
    with torch.no_grad():
        model.lm_head.weight[9] += 1.0
    for prompt, response, logprobs, _ in rows_of(engine.generate(prompts, make_sampling())):
        assert_close(logprobs, full_forward_logprobs(model, prompt, response), atol=1e-5, rtol=0)


def test_nan_is_refused_and_everything_restored(model, generating, prompts):
    config = model.generation_config
    model.train()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="prompt 0 of this rollout"):
        generating(model).generate(prompts, make_sampling())
    assert model.generation_config is config
    assert model.training
