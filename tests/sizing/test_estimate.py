from dataclasses import replace

import pytest
import torch
from pydantic import TypeAdapter
from transformers import AutoModelForCausalLM

from llmrl.batches import Batch, Prompts, Scores
from llmrl.config import GRPORun, PPORun, RewardModelRun, SFTRun
from llmrl.models.adapters import load_adapted
from llmrl.reports.progress import Silent
from llmrl.rollout.native import NativeEngine
from llmrl.sizing import Estimate, Item, Strategy, estimate_memory, read_shape, shape_of
from llmrl.sizing.estimate import _Supervised
from llmrl.trainers.stored import StoredRollouts
from llmrl.wiring.engines import recorded_routers
from tests.mixtures import config_of
from tests.models.quantized import save_base
from tests.rollout.tiny import make_sampling

RUN = {"output_dir": "out", "num_iterations": 1}
RULE = {"functions": [{"name": "rule.py:rule"}]}
REWARD_MODEL = {"model": {"path": "reward"}}


def sft(**model) -> SFTRun:
    data = {"path": "x", "max_tokens": 10}
    return TypeAdapter(SFTRun).validate_python(
        {"model": {"path": "m", **model}, "data": data, "run": RUN, "sft": {"microbatch_tokens": 30}}
    )


def rl(kind, *, kl_coef: float = 0.0, reward=RULE, critic=None, algorithm=None, update=None, **model):
    settings = {
        "model": {"path": "m", **model},
        "data": {"path": "x", "max_prompt_tokens": 6},
        "reward": reward,
        "run": RUN,
        "algorithm": {"kl_coef": kl_coef} | ({"group_size": 4} if kind is GRPORun else {}) | (algorithm or {}),
        "rollout": {"prompts_per_iteration": 4, "max_response_tokens": 4},
        "update": {"minibatch_size": 4, "microbatch_tokens": 30} | (update or {}),
    }
    return TypeAdapter(kind).validate_python(settings | ({"critic": {"network": critic}} if critic else {}))


def item(estimate: Estimate, name: str) -> int:
    return sum(part.num_bytes for part in estimate.items if part.name == name)


def test_the_peak_is_the_largest_phase():
    items = (
        Item(name="weights", num_bytes=10),
        Item(name="keys", num_bytes=7, phases=("rollout",)),
        Item(name="gradients", num_bytes=5, phases=("update",)),
    )
    estimate = Estimate(items=items, host_loading=0, host_training=0)
    assert (estimate.peak, estimate.peak_phase, estimate.of("scoring")) == (17, "rollout", 10)


def test_supervised_by_hand(shape):
    """1704 parameters, 3 rows of 10 tokens."""
    estimate = estimate_memory(sft(), shape, Strategy())
    assert {part.name: part.num_bytes for part in estimate.items} == {
        "weights": 4 * 1704,
        "AdamW's states": 8 * 1704,
        "gradients": 4 * 1704,
        "activations": 30 * (96 + 2 * 552),
        "the fullest moment of a pass": 2 * 4 * 30 * 8 + 3 * 4 * 30 * 32 + 2 * 4 * 256,
    }
    assert estimate.peak_phase == "update"
    assert estimate.host_loading == 4 * 1704


def test_a_rollout_by_hand(shape):
    """16 rows of 10 columns, rounded up to 128; keys and values of 2 layers; 4 prompts of 6 tokens read once."""
    estimate = estimate_memory(rl(GRPORun), shape, Strategy())
    assert item(estimate, "keys and values") == 16 * 128 * (2 * 2 * 4 * 4)
    first = 24 * (64 + 4 * (3 * 16 + 3 * 8))
    assert item(estimate, "a step of the rollout") == max(first, 2 * 16 * 128 * 8 * 4 + 5 * 4 * 16 * 32)
    assert item(estimate, "copy to sample from") == item(estimate, "reference") == 0


def test_frozen_copies_by_hand(shape):
    estimate = estimate_memory(
        rl(PPORun, kl_coef=0.1, reward=REWARD_MODEL, dtype="bfloat16"), shape, Strategy(), reward_shape=shape
    )
    assert item(estimate, "copy to sample from") == 2 * 1704
    assert item(estimate, "reference") == 4 * 1704 - 2 * 1152
    assert item(estimate, "reward model") == 4 * (1704 - 256) - 2 * 1152  # no head, its linear layers in bfloat16
    assert item(estimate, "weights") == 4 * (1704 + 1704 - 256 + 8)


def test_a_copy_to_sample_from_is_whole_where_weights_are_split(shape):
    estimate = estimate_memory(rl(GRPORun), shape, Strategy(sharding="fsdp", num_devices=4))
    assert item(estimate, "copy to sample from") == 4 * 1704


def test_one_base_takes_less_than_two_networks(shape):
    lora = {"lora": {"rank": 2}}
    peaks = [
        estimate_memory(run, shape, Strategy()).peak
        for run in (
            rl(PPORun, critic="adapter", **lora),
            rl(PPORun, critic="shared"),
            rl(PPORun),
            rl(PPORun, kl_coef=0.1),
        )
    ]
    assert peaks == sorted(peaks)
    assert len(set(peaks)) == 4
    adapters = estimate_memory(rl(PPORun, critic="adapter", kl_coef=0.1, **lora), shape, Strategy())
    num_adapter = shape.num_adapter(2, ())
    assert item(adapters, "weights") == 4 * (1704 + 2 * num_adapter + 8)
    assert item(adapters, "reference") == 0


def test_heads_of_an_implicit_critic_by_hand(shape):
    """A block of 8 x 8 and two values of 8, once to learn and once as the target; the head's logits once more."""
    implicit, shared = (estimate_memory(rl(PPORun, critic=critic), shape, Strategy()) for critic in ("mtp", "shared"))
    heads = 8 * 8 + 2 * 8
    assert item(implicit, "weights") == 4 * (1704 + 2 * heads)
    assert item(implicit, "AdamW's states") == 8 * (1704 + heads)
    name = "the fullest moment of a pass"
    assert item(implicit, name) > item(shared, name)


def test_layers_that_are_trained_whole_are_the_actors_alone(shape):
    """A second matrix of 256 beside the frozen one, with its gradient and states; the engine's copy has one of them."""
    plain, whole = (
        estimate_memory(rl(PPORun, critic="adapter", dtype="bfloat16", lora=lora), shape, Strategy())
        for lora in ({"rank": 2}, {"rank": 2, "modules_to_save": ["lm_head"]})
    )
    more = {
        name: item(whole, name) - item(plain, name) for name in ("weights", "AdamW's states", "copy to sample from")
    }
    assert more == {"weights": 4 * 256, "AdamW's states": 8 * 256, "copy to sample from": 0}


def test_a_critic_of_its_own_beside_an_adapter_has_the_larger_activations(shape):
    own, adapter = (
        estimate_memory(rl(PPORun, critic=critic, lora={"rank": 2}), shape, Strategy()) for critic in ("own", "adapter")
    )
    assert item(own, "AdamW's states") > item(adapter, "AdamW's states")
    assert item(own, "activations of the critic beyond the actor's") >= 0


def test_a_critic_takes_the_same_whichever_model_it_begins_as(shape):
    settings = {"reward": REWARD_MODEL, "lora": {"rank": 2}}
    own, learned = (
        estimate_memory(rl(PPORun, critic=critic, **settings), shape, Strategy(), reward_shape=shape)
        for critic in ("own", "reward_model")
    )
    assert own == learned


def test_an_auxiliary_phase_has_the_experience_of_all_its_iterations(shape):
    """4 prompts of 6 tokens and 4 responses of 4, of 5 iterations; and a head of 8 weights on the actor."""
    plain, phasic = (
        estimate_memory(rl(PPORun, algorithm=algorithm), shape, Strategy())
        for algorithm in ({}, {"auxiliary_every": 5})
    )
    name = "experience of an auxiliary phase"
    assert (item(plain, name), item(phasic, name)) == (0, 5 * 4 * (6 * 9 + 4 * 22))
    assert [part.phases for part in phasic.items if part.name == name] == [("update",)]
    assert item(phasic, "weights") - item(plain, "weights") == 4 * 8


def test_replayed_rollouts_are_learned_from_and_those_that_wait_lie_on_the_host(shape):
    """4 prompts of 6 tokens and 4 responses of 4 to each; in a mixture two bytes more a layer."""
    name, settings = "experience", {"staleness": 3, "num_replayed": 2}
    plain, stale, mixture = (
        estimate_memory(rl(GRPORun, update=update), model, Strategy())
        for update, model in (({}, shape), (settings, shape), (settings, replace(shape, num_routers=5)))
    )
    row = 6 * 9 + 4 * 45
    assert (item(plain, name), item(stale, name)) == (16 * row, 3 * 16 * row)
    assert item(mixture, name) == 3 * 16 * (row + 4 * 5 * 2)
    assert (plain.host_training, stale.host_training) == (0, 5 * (4 * 6 * 9 + 16 * 4 * 17))
    assert mixture.host_training == 5 * (4 * 6 * 9 + 16 * 4 * (17 + 5 * 2))
    offloads = Strategy(sharding="deepspeed", zero_stage=2, num_devices=2, bucket_elements=10, offloads_optimizer=True)
    both, alone = (estimate_memory(rl(GRPORun, update=x), shape, offloads).host_training for x in (settings, {}))
    assert both - alone == stale.host_training


def tensor_bytes(value) -> int:
    """Bytes of all tensors in a batch, in tuples and mappings of it."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else vars(value).values()
    return sum(tensor_bytes(x) for x in parts if isinstance(x, torch.Tensor | Batch | dict | tuple))


@pytest.mark.parametrize(("family", "num_routers"), [("llama", 0), ("qwen3_moe", 2), ("deepseek_v3", 1)])
def test_what_waits_is_as_large_as_estimated(family, num_routers):
    """Rollouts of the engine of models that never end a response, and those of a run that waits for them."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(family, vocab_size=32))
    engine = NativeEngine(model, eos_ids=(), vocab_size=32, dtype=torch.float32, max_rows=64, progress=Silent())
    engine.routers = recorded_routers(model)
    ids = torch.ones(4, 64, dtype=torch.long)
    prompts = Prompts(ids=ids, mask=ids.bool(), rows=({"prompt": "x"},) * 4)
    config = rl(GRPORun, update={"staleness": 2, "num_replayed": 1})
    config = replace(
        config,
        data=replace(config.data, max_prompt_tokens=64),
        rollout=replace(config.rollout, max_response_tokens=32),
    )
    stored = StoredRollouts(staleness=2, num_replayed=1)
    new = []
    for number in range(stored.num_missing):
        sampling = make_sampling(num_responses=4, max_response_tokens=32, seed=0, first_response=16 * number)
        rollout = engine.generate(prompts, sampling)
        total = torch.zeros(16)
        new.append((rollout, Scores(total=total, per_token=torch.zeros(16, 32), parts={"rule": total})))
    stored.exchange(new)
    shape = shape_of(model.config)
    estimated = estimate_memory(config, shape, Strategy()).host_training
    assert shape.num_routers == num_routers
    assert tensor_bytes(stored.waiting) == pytest.approx(estimated, rel=0.1)
    assert tensor_bytes(stored.waiting) > estimated  # by a few numbers a response, which are not counted


def test_pairs_have_no_logits(shape):
    data = {"path": "x", "max_tokens": 10}
    settings = {
        "model": {"path": "m"}, "data": data, "evaluation_data": data, "run": {"output_dir": "out"},
        "reward_model": {"microbatch_tokens": 40},
    }  # fmt: skip
    estimate = estimate_memory(TypeAdapter(RewardModelRun).validate_python(settings), shape, Strategy())
    assert item(estimate, "the fullest moment of a pass") == 0
    assert item(estimate, "weights") == 4 * (1704 - 256 + 8)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offloading_moves_bytes_to_the_host(shape, stage):
    zero = Strategy(sharding="deepspeed", zero_stage=stage, num_devices=4, bucket_elements=10)
    kept, moved = (
        estimate_memory(sft(), shape, strategy) for strategy in (zero, replace(zero, offloads_optimizer=True))
    )
    assert moved.peak < kept.peak
    assert moved.host_training > kept.host_training == 0


def test_longer_microbatches_and_no_checkpointing_take_more(shape):
    plain, checkpoints = estimate_memory(sft(), shape, Strategy()), sft(gradient_checkpointing=True)
    assert estimate_memory(checkpoints, shape, Strategy()).peak < plain.peak
    longer = replace(sft(), sft=replace(sft().sft, microbatch_tokens=60))
    assert item(estimate_memory(longer, shape, Strategy()), "activations") == 2 * item(plain, "activations")


def test_a_single_microbatch_never_meets_its_gradients(shape):
    once = replace(sft(), sft=replace(sft().sft, batch_size=3))
    estimate = estimate_memory(once, shape, Strategy())
    assert item(estimate, "gradients") == 0
    assert estimate.peak < estimate_memory(sft(), shape, Strategy()).peak


@pytest.mark.parametrize(
    ("budget", "num_rows", "packing", "expected"),
    [
        (100, 64, True, (16, 4 * (6 + 4 * 4), 64)),  # four whole groups of 22 tokens
        (100, 64, False, (10, 10 * 10, 40)),
        (100, 8, True, (8, 2 * 22, 32)),  # no more than there are
        (21, 64, True, (3, 6 + 3 * 4, 12)),  # as many rows of a group as fit
        (5, 64, True, (1, 10, 4)),  # one, however small the budget
        (5, 64, False, (1, 10, 4)),
    ],
)
def test_a_packed_pass_reads_a_prompt_once(shape, budget, num_rows, packing, expected):
    """Groups of 4 responses of 4 tokens to prompts of 6: rows, tokens of the trunk, scored tokens."""
    parts = _Supervised(sft(), shape, Strategy())
    rows = parts.work(
        budget=budget, length=4, response_tokens=4, num_rows=num_rows, prompt=6, group=4 if packing else 1
    )
    assert (rows.rows, rows.num_tokens, rows.num_scored) == expected


def test_without_packing_a_pass_of_grpo_is_estimated_in_padded_rows(shape):
    """A group of 6 + 4 x 4 tokens fits into 30, and three rows of 10."""
    packed, padded = (estimate_memory(rl(GRPORun, packing=packing), shape, Strategy()) for packing in (True, False))
    assert item(packed, "activations") * 30 == item(padded, "activations") * 22


def test_a_reference_that_moves(shape):
    """A copy is kept as one that stays; an average wholly in float32; with LoRA it is a second adapter."""

    def reference(algorithm, **model):
        config = rl(GRPORun, kl_coef=0.1, algorithm=algorithm, **model)
        return estimate_memory(config, shape, Strategy())

    stays = item(reference({}, dtype="bfloat16"), "reference")
    assert stays == item(reference({"reference_refresh_every": 5}, dtype="bfloat16"), "reference")
    averages = {"reference_refresh_every": 1, "reference_mixing": 0.1}
    assert item(reference(averages, dtype="bfloat16"), "reference") == 4 * 1704
    lora = {"lora": {"rank": 2}}
    adapted = reference({"reference_refresh_every": 5}, **lora)
    assert item(adapted, "reference") == item(adapted, "AdamW's states") // 2 > 0
    assert item(reference({}, **lora), "reference") == 0


def test_a_base_of_four_bits_has_the_bytes_of_a_real_one(tmp_path):
    """Weights that stay as they are in float32, and once more in bfloat16 to sample from; 4 bits stand there once."""
    bnb = pytest.importorskip("bitsandbytes", reason="the extra quantized is not installed")
    path = save_base(tmp_path, "llama", hidden_size=256, intermediate_size=512)
    config = rl(GRPORun, path=path, dtype="bfloat16", quantization="nf4", lora={"rank": 2})
    model, _ = load_adapted(config.model)
    stored = [p for p in model.parameters() if isinstance(p, bnb.nn.Params4bit)]
    others = sum(p.numel() for p in model.parameters() if not isinstance(p, bnb.nn.Params4bit))
    bits = sum(p.nbytes + p.quant_state.absmax.nbytes + p.quant_state.state2.absmax.nbytes for p in stored)
    estimate = estimate_memory(config, read_shape(config.model), Strategy())
    assert item(estimate, "weights") == pytest.approx(4 * others + bits, rel=1e-3)
    assert item(estimate, "copy to sample from") == 2 * others
    assert estimate.host_loading == item(estimate, "weights")
