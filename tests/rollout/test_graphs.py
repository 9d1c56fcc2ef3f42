import math

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from llmrl.rollout import graphs as graphs_module
from llmrl.rollout.graphs import GraphDecoder, bucket, check_graphs
from llmrl.rollout.support import RolloutError
from tests.hybrids import ONE_OF_EACH_KIND, build_hybrid

from .test_weights import Trained, assert_samples_from
from .tiny import EOS, SIZES, VOCAB, build, make_prompts, make_sampling, rows_of


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Buckets that tiny rollouts pass through."""
    monkeypatch.setattr(graphs_module, "COLUMN_STEP", 8)
    monkeypatch.setattr(graphs_module, "ROW_BUCKETS", (2, 4, 8, 16))
    monkeypatch.setattr(graphs_module, "STEPS_PER_READING", 3)


@pytest.fixture
def fast(native):
    def make(model, *, max_rows=64, eos_ids=EOS, **settings):
        engine = native(model, max_rows=max_rows, eos_ids=eos_ids, **settings)
        engine.graphs = GraphDecoder(eos_ids=eos_ids, vocab_size=VOCAB)
        return engine

    return make


def assert_same(ours, theirs):
    assert ours.sequences.response_ids.equal(theirs.sequences.response_ids)
    assert ours.sequences.response_mask.equal(theirs.sequences.response_mask)
    assert ours.sequences.response_lengths.equal(theirs.sequences.response_lengths)
    assert ours.stop_reason.equal(theirs.stop_reason)
    assert ours.group_ids.equal(theirs.group_ids)
    assert_close(ours.rollout_logprobs, theirs.rollout_logprobs, atol=3e-5, rtol=0)


@pytest.mark.parametrize("max_rows", [3, 4, 7, 64])
def test_the_samples_are_those_of_the_general_path(any_model, native, fast, prompts, max_rows, progress):
    sampling = make_sampling(max_response_tokens=20, first_response=6)
    theirs = native(any_model).generate(prompts, sampling)
    assert len(set(theirs.sequences.response_lengths.tolist())) > 2  # ragged, or the rest proves little
    progress.advanced = 0
    assert_same(fast(any_model, max_rows=max_rows).generate(prompts, sampling), theirs)
    assert progress.advanced == 10


def test_qwen2_too(native, fast, prompts):
    torch.manual_seed(0)
    qwen2 = Qwen2ForCausalLM(Qwen2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"})).eval()
    sampling = make_sampling(max_response_tokens=20)
    assert_same(fast(qwen2, max_rows=4).generate(prompts, sampling), native(qwen2).generate(prompts, sampling))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_responses": 5},
        {"num_responses": 1},
        {"greedy": True},
        {"temperature": 0.7},
        {"max_response_tokens": 1},
        {"max_response_tokens": 3},
        {"seed": 5, "first_response": 2**40},
    ],
    ids=str,
)
def test_the_samples_follow_the_settings(model, native, fast, prompts, changes):
    sampling = make_sampling(**changes)
    assert_same(fast(model, max_rows=6).generate(prompts, sampling), native(model).generate(prompts, sampling))


def test_without_eos_every_response_is_cut(model, native, fast, prompts):
    sampling = make_sampling(max_response_tokens=25)
    ours = fast(model, max_rows=4, eos_ids=()).generate(prompts, sampling)
    assert_same(ours, native(model, eos_ids=()).generate(prompts, sampling))
    assert ours.sequences.response_lengths.tolist() == [25] * 10


def test_padding_that_is_the_eos_is_harmless(model, native, fast):
    prompts = make_prompts([2, 2], [7, 2, 2, 2, 9], [2], pad=2)
    sampling = make_sampling(num_responses=3)
    assert_same(fast(model).generate(prompts, sampling), native(model).generate(prompts, sampling))


def test_one_engine_decodes_rollouts_of_any_size(model, native, fast, prompts):
    """Larger, smaller, greedy, larger again: what an earlier one left in the slots shows nowhere."""
    engine, general = fast(model, max_rows=8), native(model)
    for settings in (
        {"max_response_tokens": 8},
        {"max_response_tokens": 30, "num_responses": 4},
        {"max_response_tokens": 5, "num_responses": 1, "greedy": True},
        {"max_response_tokens": 30, "num_responses": 2},
        {"max_response_tokens": 30, "num_responses": 8},
    ):
        sampling = make_sampling(**settings)
        assert_same(engine.generate(prompts, sampling), general.generate(prompts, sampling))


def test_prompts_are_read_within_the_budget_of_a_pass(model, native, fast, prompts, monkeypatch):
    sampling = make_sampling()
    theirs = native(model).generate(prompts, sampling)
    monkeypatch.setattr("llmrl.rollout.native.PREFILL_TOKENS", 12)
    assert_same(fast(model).generate(prompts, sampling), theirs)


def kept(engine):
    recorded = engine.graphs.recorded
    slots = [x.data_ptr() for x in vars(recorded.slots).values()]
    return recorded, slots, recorded.addresses


def test_addresses_outlive_rollouts_refills_compaction_and_new_weights(model, fast, prompts):
    model.to(torch.float64)  # so that sampling in float32 has a copy
    engine = fast(model, max_rows=4)
    trained = Trained(model)
    engine.load_weights(trained)
    sampling = make_sampling(max_response_tokens=20)
    engine.generate(prompts, sampling)
    before, steps = kept(engine), dict(engine.graphs.recorded.steps)
    with torch.no_grad():
        model.lm_head.weight[9] += 1.0
    trained.num_steps_done += 1
    engine.load_weights(trained)
    after = engine.generate(prompts, sampling)
    assert kept(engine) == before
    assert all(engine.graphs.recorded.steps[key] is step for key, step in steps.items())
    assert_samples_from(model.float(), after, 1e-5)


def test_weights_that_moved_are_found(model, native, fast, prompts):
    engine, sampling = fast(model), make_sampling()
    engine.generate(prompts, sampling)
    recorded = engine.graphs.recorded
    model.lm_head.weight.data = model.lm_head.weight.data.flip(0).clone()
    ours = engine.generate(prompts, sampling)
    assert engine.graphs.recorded is not recorded
    assert_same(ours, native(model).generate(prompts, sampling))


def test_fewer_rows_take_smaller_steps(model, fast, prompts, monkeypatch):
    sizes = []
    run = graphs_module.RecordedSteps.run

    def noting(self, count, sampling, *, rows, columns):
        sizes.append((bucket(rows), columns))
        return run(self, count, sampling, rows=rows, columns=columns)

    monkeypatch.setattr(graphs_module.RecordedSteps, "run", noting)
    fast(model).generate(prompts, make_sampling(max_response_tokens=40))
    rows = [rows for rows, _ in sizes]
    assert rows[0] == 16
    assert rows[-1] < 16
    assert rows == sorted(rows, reverse=True)
    assert sizes[0][1] == 9 + 3  # no column that no row has reached


def test_logits_that_are_no_numbers_end_the_rollout(model, native, fast, prompts):
    sampling = make_sampling()
    engine = fast(model)
    weight = model.lm_head.weight.detach().clone()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match=r"not finite at response token 0 \(response number 0\)"):
        engine.generate(prompts, sampling)
    with torch.no_grad():
        model.lm_head.weight.copy_(weight)
    assert_same(engine.generate(prompts, sampling), native(model).generate(prompts, sampling))


def test_in_bfloat16(model, fast, prompts):
    engine = fast(model, dtype=torch.bfloat16)
    rounded = build("llama").to(torch.bfloat16)
    assert_samples_from(rounded, engine.generate(prompts, make_sampling()), 0.15)


def test_adapters_injected_in_place(model, native, fast, prompts):
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False), model)
    sampling = make_sampling()
    assert_same(fast(model).generate(prompts, sampling), native(model).generate(prompts, sampling))


def test_the_rollout_can_be_learned_from(model, fast, prompts):
    rollout = fast(model).generate(prompts, make_sampling())
    weight = torch.ones((), requires_grad=True)
    (weight * rollout.rollout_logprobs).sum().backward()
    assert_close(weight.grad, rollout.rollout_logprobs.sum())
    assert all(len(row[1]) for row in rows_of(rollout))


def test_buckets():
    assert [bucket(n) for n in (0, 1, 2, 3, 9, 16, 17, 32, 33)] == [2, 2, 2, 4, 16, 16, 32, 32, 48]


def test_models_of_plain_attention_are_accepted(any_model):
    check_graphs(any_model, VOCAB)


def test_a_rope_that_changes_with_the_length_is_refused():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(RolloutError, match="rope changes"):
        check_graphs(LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=rope)), VOCAB)


def test_other_attention_is_refused(model):
    model.set_attn_implementation("flex_attention")
    with pytest.raises(RolloutError, match="flex_attention"):
        check_graphs(model, VOCAB)


def test_a_model_that_fails_in_a_step_is_refused(model):
    def fail(module, args, kwargs):
        if kwargs["input_ids"].shape == (2, 1):
            raise RuntimeError("no single tokens here")

    model.register_forward_pre_hook(fail, with_kwargs=True)
    with pytest.raises(RolloutError, match="cannot be recorded: no single tokens here"):
        check_graphs(model, VOCAB)


def test_a_model_whose_step_gives_other_logits_is_refused(model):
    def shift(module, args, kwargs):
        shifted = kwargs["position_ids"] + (kwargs["position_ids"].shape[1] == 1)
        return args, kwargs | {"position_ids": shifted}

    model.model.rotary_emb.register_forward_pre_hook(shift, with_kwargs=True)
    with pytest.raises(RolloutError, match="off by"):
        check_graphs(model, VOCAB)


@pytest.mark.parametrize("hybrid", ONE_OF_EACH_KIND)
def test_models_that_carry_a_state_are_refused(hybrid):
    with pytest.raises(RolloutError, match="its layers carry states along the row"):
        check_graphs(build_hybrid(hybrid), VOCAB)


@pytest.mark.parametrize("call", [0, 1, 2, 5, 8, 11])
def test_after_memory_ran_out_fewer_rows_are_recorded(call, model, native, fast, prompts, progress):
    """And draw the same: in prompts, in steps, and between two readings."""
    progress.message = lambda text: None
    sampling = make_sampling(max_response_tokens=20)
    theirs = native(model).generate(prompts, sampling)
    fewer = fast(model, max_rows=4).generate(prompts, sampling)
    engine, calls, progress.advanced = fast(model), [], 0

    def run_out(*_):
        calls.append(engine.graphs.recorded)
        if len(calls) == call + 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.model.layers[1].register_forward_pre_hook(run_out)
    ours = engine.generate(prompts, sampling)
    assert_same(ours, theirs)
    assert torch.equal(ours.rollout_logprobs, fewer.rollout_logprobs)
    assert engine.graphs.recorded.slots.num_rows == 4
    assert engine.graphs.recorded not in calls[: call + 1]
    assert progress.advanced == 10


def test_memory_that_runs_out_in_the_probe_is_not_said_to_be_the_model(model, monkeypatch):
    def run_out(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model, "forward", run_out)
    with pytest.raises(torch.OutOfMemoryError):
        check_graphs(model, VOCAB)
