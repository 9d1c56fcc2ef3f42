import gc
import itertools
import math
import weakref

import pytest
import torch
from torch.testing import assert_close

from llmrl.batches import Prompts, StopReason
from llmrl.distributed.activity import HERE
from llmrl.functional.streams import Purpose, uniforms
from llmrl.memory import MemoryFull
from llmrl.rollout import cache as cache_module
from llmrl.rollout import native as native_module
from llmrl.rollout.support import RolloutError
from tests import oracles
from tests.hybrids import ONE_OF_EACH_KIND, build_hybrid

from .tiny import EOS, FAMILIES, VOCAB, build, full_forward_logprobs, make_prompts, make_sampling, rows_of


@pytest.fixture(params=[*FAMILIES, *ONE_OF_EACH_KIND])
def any_model(request):
    return build(request.param) if request.param in FAMILIES else build_hybrid(request.param)


def tokens(rollout):
    return [response for _, response, _, _ in rows_of(rollout)]


def select(prompts: Prompts, *order: int) -> Prompts:
    return prompts.select(torch.tensor(order))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_one_plain_forward(any_model, native, prompts, temperature):
    rollout = native(any_model, max_rows=4).generate(prompts, make_sampling(temperature=temperature))
    for prompt, response, logprobs, _ in rows_of(rollout):
        assert_close(logprobs, full_forward_logprobs(any_model, prompt, response, temperature), atol=3e-5, rtol=0)


@pytest.mark.parametrize("max_rows", [2, 3, 4, 7])
def test_nothing_depends_on_the_rows_decoded_at_once(any_model, native, prompts, max_rows):
    all_at_once = native(any_model).generate(prompts, make_sampling())
    assert tokens(native(any_model, max_rows=max_rows).generate(prompts, make_sampling())) == tokens(all_at_once)


def test_nothing_depends_on_order_and_neighbours(any_model, native, prompts):
    engine = native(any_model, max_rows=4)
    together = tokens(engine.generate(prompts, make_sampling()))
    for n in range(5):
        alone = engine.generate(select(prompts, n), make_sampling(first_response=2 * n))
        assert tokens(alone) == together[2 * n : 2 * n + 2]
    swapped = engine.generate(select(prompts, 3, 1), make_sampling(first_response=6))
    assert tokens(swapped)[:2] == together[6:8]


def test_the_rollout_is_well_formed(model, native, prompts, progress):
    rollout = native(model, max_rows=4).generate(prompts, make_sampling(first_response=100))
    sequences = rollout.sequences
    assert sequences.prompt_ids.equal(prompts.ids.repeat_interleave(2, dim=0))
    assert sequences.prompt_mask.equal(prompts.mask.repeat_interleave(2, dim=0))
    assert rollout.group_ids.tolist() == [50, 50, 51, 51, 52, 52, 53, 53, 54, 54]
    assert [row["row"] for row in rollout.rows] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert progress.advanced == 10
    lengths = sequences.response_lengths
    assert sequences.response_mask.equal(torch.arange(int(lengths.max())) < lengths[:, None])
    assert progress.num_looks >= lengths.max()
    assert not sequences.response_ids[~sequences.response_mask].any()
    assert not rollout.rollout_logprobs[~sequences.response_mask].any()
    assert len(set(lengths.tolist())) > 2  # ragged, or the rest proves little
    for _, response, _, finished in rows_of(rollout):
        assert finished == (response[-1] in EOS)
        assert finished or len(response) == 12
        assert not set(response[:-1]) & set(EOS)


def test_a_response_that_ends_with_its_last_allowed_token_is_finished(model, native, prompts):
    whole = native(model).generate(prompts, make_sampling())
    _, response, _, finished = next(row for row in rows_of(whole) if row[3] and 1 < len(row[1]) < 12)
    limited = native(model).generate(prompts, make_sampling(max_response_tokens=len(response)))
    index = tokens(whole).index(response)
    assert finished
    assert tokens(limited)[index] == response
    assert limited.finished[index]


def test_a_cut_response_is_the_beginning_of_the_whole_one(model, native, prompts):
    whole = tokens(native(model).generate(prompts, make_sampling()))
    cut = tokens(native(model).generate(prompts, make_sampling(max_response_tokens=3)))
    assert cut == [response[:3] for response in whole]


def test_one_token_responses(model, native, prompts):
    rollout = native(model, max_rows=2).generate(prompts, make_sampling(max_response_tokens=1))
    assert rollout.sequences.response_lengths.tolist() == [1] * 10


def test_streams_differ_by_seed_purpose_and_number(model, native, prompts):
    engine = native(model)
    samples = [
        tokens(engine.generate(prompts, sampling))
        for sampling in (
            make_sampling(),
            make_sampling(seed=12),
            make_sampling(purpose=Purpose.EVALUATION),
            make_sampling(first_response=10),
        )
    ]
    assert all(a != b for i, a in enumerate(samples) for b in samples[:i])
    assert tokens(engine.generate(prompts, make_sampling())) == samples[0]


def test_greedy_takes_the_likeliest_and_reports_the_logprob_at_the_temperature(any_model, native, prompts):
    rollout = native(any_model, max_rows=3).generate(prompts, make_sampling(greedy=True, temperature=0.5))
    for prompt, response, logprobs, _ in rows_of(rollout):
        assert_close(logprobs, full_forward_logprobs(any_model, prompt, response, 0.5), atol=3e-5, rtol=0)
        for t in range(len(response)):
            logits = any_model(input_ids=torch.tensor([prompt + response[:t]])).logits[0, -1, :VOCAB]
            assert logits.argmax() == response[t]


def test_refill_with_a_later_prompt_longer_than_what_is_live(any_model, native):
    prompts = make_prompts([20], [21], [7, 8, 9, 2, 11, 12, 13, 14, 15, 16, 17])
    rollout = native(any_model, max_rows=2).generate(prompts, make_sampling(max_response_tokens=5))
    for prompt, response, logprobs, _ in rows_of(rollout):
        assert_close(logprobs, full_forward_logprobs(any_model, prompt, response), atol=3e-5, rtol=0)


@pytest.fixture
def moves(monkeypatch):
    """How far each move of the window to the front went, with room for few steps between them."""
    monkeypatch.setattr(cache_module, "SLACK_COLUMNS", 1)
    monkeypatch.setattr(cache_module, "COLUMN_STEP", 1)
    shifts = []
    move_columns = native_module.SlotCache.move_columns
    monkeypatch.setattr(
        native_module.SlotCache,
        "move_columns",
        lambda cache, shift: (shifts.append(shift), move_columns(cache, shift)),
    )
    return shifts


def test_the_window_moves_to_the_front_without_a_trace(any_model, native, prompts, moves):
    many = Prompts.cat([prompts, prompts, prompts])
    rollout = native(any_model, max_rows=3).generate(many, make_sampling(num_responses=1, seed=12))
    assert len(moves) > 1
    assert min(moves) >= 1
    for prompt, response, logprobs, _ in rows_of(rollout):
        assert_close(logprobs, full_forward_logprobs(any_model, prompt, response), atol=3e-5, rtol=0)


def test_every_prompt_is_prefilled_once_and_no_finished_row_is_decoded(model, native, prompts):
    work = {"prompt": 0, "response": 0}

    def count(module, args, kwargs):
        ids, mask = kwargs["input_ids"], kwargs["attention_mask"]
        prefill = mask.shape[1] == ids.shape[1]
        work["prompt" if prefill else "response"] += int(mask.sum()) if prefill else ids.numel()

    model.register_forward_pre_hook(count, with_kwargs=True)
    rollout = native(model, max_rows=4).generate(prompts, make_sampling())
    assert work["prompt"] == 9 + 1 + 4 + 3 + 6
    assert work["response"] == int(rollout.sequences.response_lengths.sum()) - 10  # the prefill gives the first tokens


@pytest.mark.parametrize("hybrid", ONE_OF_EACH_KIND)
def test_a_hybrid_reads_prompts_of_one_length_at_once_and_no_padding(hybrid, native, monkeypatch):
    """Prompts of 9, 1, 4, 1, 4 and 4 tokens; the last of 4 exceeds the budget of its pass."""
    prompts = make_prompts([7, 8, 9, 2, 11, 12, 13, 14, 15], [20], [3, 4, 30, 31], [21], [2, 2, 17, 18], [5, 6, 7, 8])
    monkeypatch.setattr(native_module, "PREFILL_TOKENS", 11)
    passes = []
    read = native_module.read_prompts

    def record(model, prompts, chosen, width, cache):
        passes.append((len(chosen), width))
        assert bool(prompts.mask[chosen, -width:].all())
        return read(model, prompts, chosen, width, cache)

    monkeypatch.setattr(native_module, "read_prompts", record)
    native(build_hybrid(hybrid)).generate(prompts, make_sampling())
    assert passes == [(2, 1), (2, 4), (1, 4), (1, 9)]


@pytest.mark.parametrize("hybrid", ONE_OF_EACH_KIND)
def test_no_number_of_a_slot_outlives_its_row(hybrid, native, prompts, monkeypatch):
    """Slots that hold NaN before a row moves in, in the place of what another row has left."""
    expected = native(build_hybrid(hybrid), max_rows=4).generate(prompts, make_sampling())

    class Poisoned(native_module.SlotCache):
        def fill(self, slot, source, copies, **which):
            super().fill(slot, source, copies, **which)
            for layer in self.layers:
                for state in cache_module._fixed_states(layer):
                    state[slot + copies * len(cache_module._fixed_states(source.layers[0])[0]) :] = math.nan

    monkeypatch.setattr(native_module, "SlotCache", Poisoned)
    rollout = native(build_hybrid(hybrid), max_rows=4).generate(prompts, make_sampling())
    assert rollout.rollout_logprobs.equal(expected.rollout_logprobs)


@pytest.mark.parametrize(("budget", "passes"), [(1, 5), (12, 3), (20, 2), (10_000, 1)])
def test_prompts_are_prefilled_within_a_budget_of_tokens(model, native, prompts, monkeypatch, budget, passes):
    """Prompts of 9, 1, 4, 3 and 6 tokens, in order: a pass is as wide as its longest."""
    everything = tokens(native(model).generate(prompts, make_sampling()))
    monkeypatch.setattr(native_module, "PREFILL_TOKENS", budget)
    sizes = []

    def record(module, args, kwargs):
        ids, mask = kwargs["input_ids"], kwargs["attention_mask"]
        if mask.shape[1] == ids.shape[1]:
            sizes.append(tuple(ids.shape))

    model.register_forward_pre_hook(record, with_kwargs=True)
    assert tokens(native(model).generate(prompts, make_sampling())) == everything
    assert len(sizes) == passes
    assert all(rows == 1 or rows * width <= budget for rows, width in sizes)
    assert sum(rows for rows, _ in sizes) == 5


def test_every_free_slot_is_filled_before_the_next_step(model, native, prompts, monkeypatch):
    monkeypatch.setattr(native_module, "PREFILL_TOKENS", 1)
    widths = []

    def record(module, args, kwargs):
        if kwargs["input_ids"].shape[1] == 1 < kwargs["attention_mask"].shape[1]:
            widths.append(len(kwargs["input_ids"]))

    model.register_forward_pre_hook(record, with_kwargs=True)
    native(model, eos_ids=()).generate(prompts, make_sampling())
    assert widths == [10] * 11  # five groups of two, the first token of each by its prefill


def test_rollouts_of_other_lengths_have_buffers_of_one_size(model, native, monkeypatch):
    columns = []
    monkeypatch.setattr(
        native_module,
        "SlotCache",
        lambda slots, count: columns.append(count) or cache_module.SlotCache(slots, count),
    )
    for length in (3, 7, 30):
        native(model).generate(make_prompts([7] * length, [8]), make_sampling())
    assert columns == [128, 128, 128]


def test_attention_reads_no_column_without_a_live_token(model, native, prompts, moves):
    rollout = native(model, max_rows=4)
    wasted = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: wasted.append(bool((~kwargs["attention_mask"]).all(dim=0).any())), with_kwargs=True
    )
    rollout.generate(prompts, make_sampling())
    assert not any(wasted)


def test_no_buffer_outlives_the_call(model, native, prompts, monkeypatch):
    """Nor does it wait for the garbage collector: the update that follows needs the memory."""
    buffers = []
    new_buffer = native_module.SlotCache._buffer

    def remember(cache, states):
        buffer = new_buffer(cache, states)
        buffers.append(weakref.ref(buffer))
        return buffer

    monkeypatch.setattr(native_module.SlotCache, "_buffer", remember)
    engine = native(model, max_rows=4)
    gc.disable()
    try:
        engine.generate(prompts, make_sampling())
        assert len(buffers) == 2 * 3  # keys and values of three layers
        assert not any(buffer() for buffer in buffers)
    finally:
        gc.enable()


def test_nan_names_the_prompt(model, native, prompts):
    with torch.no_grad():
        model.get_input_embeddings().weight[30] = math.nan  # a token of prompt 2 only
    with pytest.raises(FloatingPointError, match=r"prompt 2 of this rollout are not finite at response token 0 "):
        native(model, max_rows=4).generate(prompts, make_sampling(max_response_tokens=1))


def test_a_failed_call_leaves_nothing_in_the_buffers(model, native, prompts):
    long = [7, 8, 9, 2, 11, 12, 13, 14, 15]
    sampling = make_sampling(num_responses=1)
    engine = native(model, max_rows=4)
    engine.generate(make_prompts(long, long, long, long, long), sampling)
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        healthy = embedding[11].clone()
        embedding[11] = math.nan
        with pytest.raises(FloatingPointError):
            engine.generate(make_prompts(long, long, long, long, long), sampling)
        embedding[11] = healthy
    rollout = engine.generate(make_prompts([20], [21], [22], [23], long), sampling)
    for prompt, response, logprobs, _ in rows_of(rollout):
        assert_close(logprobs, full_forward_logprobs(model, prompt, response), atol=3e-5, rtol=0)


def test_padding_of_the_embedding_is_never_sampled(model, native, prompts):
    with torch.no_grad():
        model.lm_head.weight[VOCAB:] = 100 * model.lm_head.weight[7]
    rollout = native(model).generate(prompts, make_sampling(num_responses=4))
    for prompt, response, logprobs, _ in rows_of(rollout):
        assert max(response) < VOCAB
        assert_close(logprobs, full_forward_logprobs(model, prompt, response), atol=3e-5, rtol=0)


def test_first_tokens_follow_the_softmax(model, native):
    draws = 4000
    prompts = make_prompts([7, 8, 9])
    engine = native(model, max_rows=draws)
    rollout = engine.generate(
        prompts, make_sampling(num_responses=draws, max_response_tokens=1, temperature=1.5, seed=5)
    )
    observed = torch.bincount(rollout.sequences.response_ids[:, 0], minlength=VOCAB).double()
    logits = model(input_ids=torch.tensor([[7, 8, 9]])).logits[0, -1, :VOCAB].double().detach()
    expected = draws * (logits / 1.5).softmax(dim=-1)
    likely = expected > 5
    statistic = ((observed - expected) ** 2 / expected)[likely].sum()
    degrees = int(likely.sum()) - 1
    assert degrees > 10
    assert statistic < degrees + 4 * math.sqrt(2 * degrees)  # four standard deviations of chi-square


def test_modes_are_restored_even_after_an_exception(model, native, prompts):
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    model.gradient_checkpointing_enable()
    engine = native(model)
    engine.generate(prompts, make_sampling())
    assert [module.training for module in model.modules()] == modes
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.nan
    with pytest.raises(FloatingPointError):
        engine.generate(prompts, make_sampling())
    assert [module.training for module in model.modules()] == modes


def test_the_rollout_can_be_learned_from(model, native, prompts):
    rollout = native(model).generate(prompts, make_sampling())
    weight = torch.ones((), requires_grad=True)
    (weight * rollout.rollout_logprobs).sum().backward()  # an inference tensor would refuse
    assert_close(weight.grad, rollout.rollout_logprobs.sum())


def test_a_group_larger_than_max_rows_is_refused(model, native, prompts):
    with pytest.raises(RolloutError, match=r"rollout\.max_rows \(4\) must hold a whole group of 5 responses"):
        native(model, max_rows=4).generate(prompts, make_sampling(num_responses=5))


def responds_by_definition(model, prompt, number, sampling, answers):
    """``(ids, chosen, log-probabilities of the chosen, stop reason)``: a forward over the whole row for each token, and
    an answer fed after the actor has chosen as many tokens as its key says."""
    ids, chosen, logprobs, stop_reason = [], [], [], StopReason.NONE
    while stop_reason == StopReason.NONE:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + ids]), use_cache=False).logits[0, -1, :VOCAB].double()
        position = torch.tensor([sum(chosen)])
        u = uniforms(sampling.seed, sampling.purpose, torch.tensor([number]), position).item()
        ids.append(oracles.inverse_cdf(logits.softmax(dim=0).tolist(), u))
        chosen.append(True)
        logprobs.append(logits.log_softmax(dim=0)[ids[-1]].item())
        answer = answers.get(sum(chosen), [])
        ended = ids[-1] in EOS and not answer
        ids += answer
        chosen += [False] * len(answer)
        if ended:
            stop_reason = StopReason.EOS
        elif len(ids) == sampling.max_response_tokens:
            stop_reason = StopReason.LENGTH
    return ids, chosen, torch.tensor(logprobs), stop_reason


@pytest.fixture
def feed(monkeypatch):
    """Has the engine feed these answers, by the index of a response and the tokens that it has chosen so far."""

    def feed_answers(answers):
        left = {index: dict(by_count) for index, by_count in answers.items()}

        class Feeding(native_module.Decoding):
            def retire(self):
                counts = self.responses.chosen.sum(dim=1).tolist()
                due = {row.index: left[row.index].pop(counts[row.index], []) for row in self.rows}
                self.feed({index: answer for index, answer in due.items() if answer})
                super().retire()

        monkeypatch.setattr(native_module, "Decoding", Feeding)

    return feed_answers


def assert_responds_by_definition(model, rollout, sampling, answers):
    sequences = rollout.sequences
    for index, (prompt, _, logprobs, _) in enumerate(rows_of(rollout)):
        expected = responds_by_definition(
            model, prompt, sampling.first_response + index, sampling, answers.get(index, {})
        )
        length = int(sequences.response_lengths[index])
        assert sequences.response_ids[index, :length].tolist() == expected[0]
        assert sequences.response_mask[index, :length].tolist() == expected[1]
        assert_close(logprobs, expected[2], atol=3e-5, rtol=0)
        assert rollout.stop_reason[index] == expected[3]


def make_answers(num_responses):
    """Answers of one to five tokens, EOS among them, to about half of the first six tokens of each response."""
    generator = torch.Generator().manual_seed(3)

    def integer(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    return {
        index: {count: [integer(0, VOCAB) for _ in range(integer(1, 6))] for count in range(1, 7) if integer(0, 2)}
        for index in range(num_responses)
    }


@pytest.mark.parametrize("max_rows", [2, 4, 10])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fed_response_goes_on_as_by_definition(family, native, prompts, feed, progress, max_rows):
    model = build(family)
    sampling, answers = make_sampling(max_response_tokens=40, first_response=6), make_answers(10)
    feed(answers)
    rollout = native(model, max_rows=max_rows).generate(prompts, sampling)
    assert_responds_by_definition(model, rollout, sampling, answers)
    assert rollout.sequences.response_mask.sum() < rollout.sequences.response_lengths.sum() - 50
    assert progress.advanced == 10


@pytest.mark.parametrize("hybrid", ONE_OF_EACH_KIND)
def test_the_states_of_fed_rows_go_on_as_by_definition(hybrid, native, feed):
    model, prompts = build_hybrid(hybrid), make_prompts([7, 8, 9, 2, 11], [20], [3, 4])
    sampling = make_sampling(max_response_tokens=14)
    answers = {0: {1: [9, 2, 10]}, 1: {1: [11, 12, 13], 3: [14]}, 2: {1: [15, 16]}, 3: {}, 4: {1: [17]}, 5: {}}
    feed(answers)
    rollout = native(model, max_rows=4).generate(prompts, sampling)
    assert_responds_by_definition(model, rollout, sampling, answers)
    assert rollout.sequences.response_mask.sum() < rollout.sequences.response_lengths.sum() - 6


@pytest.mark.parametrize("budget", [1, 8])
def test_answers_are_read_within_the_budget_of_a_pass(model, native, prompts, feed, monkeypatch, budget):
    monkeypatch.setattr(native_module, "PREFILL_TOKENS", budget)
    sizes = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    answers = {index: {3: [9] * (1 + index % 4)} for index in range(10)}
    feed(answers)
    sampling = make_sampling(max_response_tokens=30, num_responses=2)
    rollout = native(model).generate(prompts, sampling)
    assert all(rows == 1 or width == 1 or rows * width <= budget for rows, width in sizes)
    model._forward_pre_hooks.clear()
    assert_responds_by_definition(model, rollout, sampling, answers)


def test_a_long_answer_moves_the_window_to_the_back(any_model, native, feed, moves):
    """In the shortest row, which begins at the first column, beside the longest one."""
    prompts = make_prompts([7, 8, 9, 2, 11, 12, 13, 14, 15], [20, 21, 22, 23, 24, 25, 26, 27, 28])
    sampling, answers = make_sampling(max_response_tokens=30, num_responses=1), {0: {1: [9] * 20}, 1: {2: [10, 11]}}
    feed(answers)
    rollout = native(any_model).generate(prompts, sampling)
    assert min(moves) < 0
    assert_responds_by_definition(any_model, rollout, sampling, answers)


def test_fed_rows_stand_next_to_the_end_of_a_table_of_positions(native, feed):
    """The padding of a short answer beside a long one has no position of its own."""
    gpt2 = build("gpt2")
    prompts = make_prompts([7] * 50, [8])
    sampling, answers = make_sampling(max_response_tokens=14, num_responses=1), {0: {2: [9]}, 1: {2: [10] * 11}}
    feed(answers)
    rollout = native(gpt2, eos_ids=()).generate(prompts, sampling)
    assert rollout.sequences.response_lengths.tolist() == [14, 14]


def test_a_response_that_is_fed_up_to_the_limit_is_cut(model, native, prompts, feed):
    sampling, answers = make_sampling(), {3: {1: [9] * 11}}
    feed({index: answers.get(index, {}) for index in range(10)})
    rollout = native(model, max_rows=4).generate(prompts, sampling)
    assert rollout.stop_reason[3] == StopReason.LENGTH
    assert rollout.sequences.response_mask[3].sum() == 1
    assert_responds_by_definition(model, rollout, sampling, answers)


def test_an_answer_without_room_is_refused(model, native, prompts, feed):
    feed({index: {1: [9] * 12} for index in range(10)})
    with pytest.raises(ValueError, match=r"12 tokens to feed to response 0 .* must be at most 11"):
        native(model).generate(prompts, make_sampling())


def test_the_layout_of_live_rows_is_copied_to_the_device_only_when_it_changes(model, native, prompts, monkeypatch):
    copies = []
    tensor = native_module.Decoding._tensor
    monkeypatch.setattr(
        native_module.Decoding, "_tensor", lambda self, numbers: copies.append(numbers) or tensor(self, numbers)
    )
    native(model, eos_ids=()).generate(prompts, make_sampling())
    assert len(copies) == 3  # at first none; the rows of one prefill; these with their columns, for eleven steps


# --- less memory ------------------------------------------------------------------------------------------------------


def failing(model, fails):
    """Lets memory run out in the middle of the passes that a test names. Returns the rows of each pass so far."""
    passes, numbers = [], itertools.count()

    def run_out(_, args):
        passes.append(len(args[0]))
        if fails(next(numbers)):
            raise torch.OutOfMemoryError("CUDA out of memory")

    layers = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    layers[1].register_forward_pre_hook(run_out)
    return passes


@pytest.fixture
def said(progress, monkeypatch):
    """What engines say in a rollout."""
    monkeypatch.setattr(HERE, "phase", "rollout")
    messages = []
    progress.message = messages.append
    return messages


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_fewer_rows_after_memory_ran_out_draw_the_same_responses(family, greedy, native, prompts, progress, said):
    """Equal to the bit with an engine that had fewer rows, to rounding with the one that has them all."""
    sampling = make_sampling(greedy=greedy)
    all_at_once = native(build(family)).generate(prompts, sampling)
    fewer = native(build(family), max_rows=4).generate(prompts, sampling)
    counted = build(family)
    passes = failing(counted, lambda n: False)
    native(counted).generate(prompts, sampling)
    num_passes = len(passes)
    assert num_passes >= 12
    for call in range(0, num_passes, 3):
        model = build(family)
        failing(model, lambda n, call=call: n == call)
        engine = native(model)
        progress.advanced = 0
        rollout = engine.generate(prompts, sampling)
        assert torch.equal(rollout.rollout_logprobs, fewer.rollout_logprobs)
        assert torch.equal(rollout.sequences.response_ids, fewer.sequences.response_ids)
        assert tokens(rollout) == tokens(all_at_once)
        assert progress.advanced == 10
        assert engine.rows_that_fit == 5
    line = "out of memory in rollout with 10 responses decoded at once (GPU): goes on with 4; set rollout.max_rows=4"
    assert set(said) == {line}
    assert len(said) == len(range(0, num_passes, 3))


def test_what_was_learned_of_memory_stays(model, native, prompts, said):
    engine = native(model)
    passes = failing(model, lambda n: n in (0, 1))
    engine.generate(prompts, make_sampling())
    assert max(passes[2:]) == 2
    passes.clear()
    again = engine.generate(prompts, make_sampling())
    assert max(passes) == 2
    assert tokens(again) == tokens(native(build("llama")).generate(prompts, make_sampling()))
    assert len(said) == 2
    passes.clear()
    engine.generate(prompts, make_sampling(num_responses=5))  # as in an evaluation: a whole group all the same
    assert max(passes) == 5


def test_a_group_without_memory_is_one_line(model, native, prompts, progress, said):
    failing(model, lambda n: True)
    with pytest.raises(MemoryFull) as raised:
        native(model).generate(prompts, make_sampling())
    assert str(raised.value) == (
        "out of memory in rollout with 2 responses decoded at once (GPU): lower rollout.max_response_tokens, the "
        "responses per prompt, or the length of prompts"
    )
    assert progress.advanced == 0
    assert len(said) == 2
