"""The benchmarks: the roofline, forced lengths, the table, and that llmrl and TRL learn the same from one rollout."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llmrl.batches import Prompts
from llmrl.reports.progress import Silent
from llmrl.rollout.graphs import PROBE_SAMPLING, GraphDecoder, SlotDecoding
from llmrl.rollout.native import NativeEngine
from llmrl.rollout.sampler import Sampler
from llmrl.rollout.step import Step

ROOT = Path(__file__).parents[1]
TINY = ROOT / "recipes" / "models" / "tiny_word_llama"
TRL = ROOT / ".peers" / "trl-1.16.0"


@pytest.fixture
def roofline(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return import_module("roofline")


@pytest.fixture
def table(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return import_module("table")


@pytest.fixture
def lengths(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return import_module("lengths")


@pytest.fixture
def shape(roofline):
    return roofline.Shape(layer_weights=10, head_weights=4, attention_width=3, cache_bytes=2, weight_bytes=2)


@pytest.mark.parametrize(("bytes_per_s", "seconds"), [(1.0, 84 + 64 + 76), (0.1, 84 + 360 + 380)])
def test_a_rollout_takes_the_longer_of_arithmetic_and_memory(roofline, shape, bytes_per_s, seconds):
    """A prompt of 2 tokens, responses of 1 and 3: the first token comes from the prompt's pass, two steps of one row
    follow. Prompt 2 (10 x 2 + 4) + 12 x 3 FLOPs, steps 28 + 12 x 3 and 28 + 12 x 4; bytes 28 + 2 x 4 and 28 + 2 x 5."""
    limits = roofline.Limits(flops_per_s=1.0, bytes_per_s=bytes_per_s)
    assert roofline.rollout_floor(shape, limits, prompts=[2], lengths=[1, 3]) == pytest.approx(seconds)


@pytest.mark.parametrize(("head", "seconds"), [(True, 2 * (60 + 16) + 12 * 18), (False, 2 * 60 + 12 * 18)])
def test_a_pass_reads_each_prompt_once(roofline, shape, head, seconds):
    """The tokens attend to 1, 2, then 3, then 3, 4 and 5: 18 in all."""
    limits = roofline.Limits(flops_per_s=1.0, bytes_per_s=1.0)
    assert roofline.forward_floor(shape, limits, prompts=[2], lengths=[1, 3], head=head) == pytest.approx(seconds)


def test_a_pair_is_a_prompt_with_two_responses_forward_and_backward(roofline, shape):
    limits = roofline.Limits(flops_per_s=1.0, bytes_per_s=1.0)
    assert roofline.pairs_floor(shape, limits, [(2, 1, 3)]) == pytest.approx(3 * (2 * 60 + 12 * 18))


def test_the_shape_of_a_model_is_read_without_weights(roofline):
    config = AutoConfig.from_pretrained(TINY)
    shape, hidden = roofline.read_shape(TINY, "bfloat16"), config.hidden_size
    kv = config.num_key_value_heads * hidden // config.num_attention_heads
    per_layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * config.intermediate_size
    assert shape.layer_weights == config.num_hidden_layers * per_layer
    assert shape.head_weights == config.vocab_size * hidden
    assert shape.attention_width == config.num_hidden_layers * hidden
    assert shape.cache_bytes == 2 * 2 * config.num_hidden_layers * kv


def test_lengths_are_forced_by_eos_alone(lengths):
    logits = torch.zeros(2, 3)
    lengths.force_length(logits, torch.tensor([1, 2]), eos_id=1)
    assert logits.softmax(dim=1).tolist() == [[0.0, 1.0, 0.0], [0.5, 0.0, 0.5]]


@pytest.mark.parametrize("recorded", [False, True], ids=["general", "recorded"])
def test_every_engine_keeps_forced_lengths(lengths, monkeypatch, recorded):
    """Of 2 x 3 responses, two at a time; without them the responses are others."""
    for cls, name in ((Sampler, "extend"), (SlotDecoding, "_uniforms"), (Step, "draw")):
        monkeypatch.setattr(cls, name, getattr(cls, name))  # takes out again what is forced
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(TINY))
    model.generation_config.eos_token_id = None
    common = {"eos_ids": (2,), "vocab_size": model.config.vocab_size}
    engine = NativeEngine(model, dtype=model.dtype, max_rows=3, progress=Silent(), **common)
    if recorded:
        engine.graphs = GraphDecoder(**common)
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    prompts = Prompts(ids=ids, mask=torch.ones_like(ids, dtype=torch.bool), rows=({}, {}))
    sampling = replace(PROBE_SAMPLING, greedy=False, num_responses=3, max_response_tokens=9, first_response=12)
    wanted = torch.tensor([1, 9, 4, 2, 7, 3])
    lengths.force_sampler(wanted, eos_id=2)
    sequences = engine.generate(prompts, sampling).sequences
    assert sequences.response_lengths.tolist() == wanted.tolist()
    last = sequences.response_ids[torch.arange(6), wanted - 1]
    assert last.tolist() == [2] * 6
    assert (sequences.response_ids.eq(2) & sequences.response_mask).sum() == 6


def record_of(others: float) -> dict[str, Any]:
    """Results of a workload, in which other programs took this many percent of a core."""
    summary = {
        side: {
            "step_s_median": seconds,
            "step_s_min": seconds - 0.5,
            "step_cpu_s_median": 2 * seconds,
            "step_cpu_s_min": 2 * seconds - 0.5,
            "peak_mib_median": 1024.0 * seconds,
            "peak_mib_min": 512.0 * seconds,
        }
        for side, seconds in (("llmrl", 2.0), ("trl_tuned", 5.0), ("trl", 7.0))
    }
    return {
        "model": "tiny",
        "describes": "a step",
        "settings": {"dtype": "bfloat16", "turns": 3},
        "load_average_before": [0.5],
        "load_average_after": [2.0],
        "machine": {"threads": 2, "processor": "a CPU"},
        "versions": {"torch": "2"},
        "summary": summary,
        "roofline": {"fractions": {side: {"step": 0.5, "step_cpu": 0.25} for side in summary}},
        "samples": {side: [{"others_cpu_percent": others, "overhead_s": 0.1, "step_s": 2.0}] for side in summary},
    }


@pytest.fixture
def written(table, tmp_path, monkeypatch) -> Callable[..., str]:
    """What the page of figures is with the table of these results, by their file names."""

    def write(**records: dict[str, Any]) -> str:
        for name, record in records.items():
            (tmp_path / f"{name}_tiny_bfloat16_cpu.json").write_text(json.dumps(record))
        page = tmp_path / "figures.md"
        page.write_text(f"above\n{table.BEGIN}\nwhat was there\n{table.END}\nbelow\n")
        monkeypatch.setattr(table, "FIGURES", page)
        monkeypatch.setattr(table, "RESULTS", tmp_path)
        monkeypatch.setattr(sys, "argv", ["table.py"])
        table.main()
        return page.read_text()

    return write


@pytest.mark.parametrize(
    ("others", "cells"),
    [
        (1.0, "2.00 s (1.50) | 5.00 s (4.50) | x 2.50 | 7.00 s (6.50) | x 3.50 | 50 % / 50 % / 50 %"),
        (90.0, "4.00 CPU s (3.50) | 10.00 CPU s (9.50) | x 2.50 | 14.00 CPU s (13.50) | x 3.50 | 25 % / 25 % / 25 %"),
    ],
    ids=["quiet", "busy"],
)
def test_the_table_is_made_of_the_results(written, others, cells):
    text = written(W4=record_of(others))
    assert f"| W4: a step, bfloat16 | {cells} | 2.0 / 5.0 / 7.0 GiB |" in text.splitlines()
    load = "turns of each side: 3, load average 0.5 before and 2.0 after"
    assert f"W4: tiny in bfloat16, 2 threads of a CPU; torch 2; {load}." in " ".join(text.split())
    assert text.startswith("above\n")
    assert text.endswith("\nbelow\n")
    assert "what was there" not in text


def test_memory_and_overhead_are_lines_of_their_own(written):
    record = record_of(1.0)
    del record["roofline"]
    text = written(W17=record, W8=record, W7=record)
    rows = [line for line in text.splitlines() if line.startswith("| W")]
    assert [row[2:].partition(":")[0] for row in rows] == ["W7", "W8", "W10", "W10", "W17", "W18"]
    peak = "2.00 GiB (1.00) | 5.00 GiB (2.50) | x 2.50 | 7.00 GiB (3.50) | x 3.50 |  |  |"
    assert f"| W10: peak memory of W8, shared trunk, bfloat16 | {peak}" in rows
    assert "| W18: overhead of W7, bfloat16 | 0.10 s, 5.0 % |  |  |  |  |  |  |" in rows
    assert len({row.count("|") for row in rows}) == 1


def test_a_workload_measured_in_two_types_has_a_row_for_each(written, tmp_path):
    other = record_of(1.0)
    other["settings"] = {"dtype": "float32", "turns": 3}
    (tmp_path / "W4_tiny_float32_cpu.json").write_text(json.dumps(other))
    rows = [line.partition(" | ")[0] for line in written(W4=record_of(1.0)).splitlines() if line.startswith("| W4")]
    assert rows == ["| W4: a step, bfloat16", "| W4: a step, float32"]


def test_the_page_of_figures_has_the_table_of_the_stored_results(table, tmp_path, monkeypatch):
    page = ROOT / "docs" / "figures.md"
    monkeypatch.setattr(table, "FIGURES", tmp_path / "figures.md")
    table.FIGURES.write_text(page.read_text())
    monkeypatch.setattr(sys, "argv", ["table.py"])
    table.main()
    assert table.FIGURES.read_text() == page.read_text()


@pytest.mark.parametrize("place", [0, 1])
def test_a_number_that_is_nan_is_the_largest(monkeypatch, place):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    differences = import_module("learning").differences
    theirs = {name: {"losses": [1.0], "grad_norms": [2.0]} for name in ("actor", "critic")}
    ours = {name: {"losses": [1.0], "grad_norms": [2.0]} for name in theirs}
    ours[["actor", "critic"][place]] = {"losses": [math.nan], "grad_norms": [math.nan]}
    assert all(math.isnan(difference) for difference in differences(ours, theirs).values())


def test_what_follows_from_other_workloads_stands_for_them(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    expand = import_module("bench").expand
    assert expand(["W18", "W9", "W10"]) == ["W4", "W7", "W9", "W8", "W8-lora"]


@pytest.mark.slow
@pytest.mark.skipif(not TRL.is_dir(), reason="TRL 1.16.0 is not in .peers: make .peers/trl-1.16.0")
def test_first_losses_and_gradients_are_those_of_trl(tmp_path: Path):
    torch.manual_seed(0)
    model = tmp_path / "model"
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(TINY)).save_pretrained(model)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(model)
    program, output = ROOT / "benchmarks" / "learning.py", tmp_path / "learning.json"
    command = [sys.executable, program, model, "--dtype", "float32", "--output", output]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(output.read_text())
    assert record["steps"]["llmrl"]["actor"]["losses"][0] != 0
    assert record["loss_difference"] < 1e-5
    assert record["grad_norm_difference"] < 1e-4


def test_sampled_tokens_count_up_to_the_first_evaluation_that_is_good_enough(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    program = import_module("sample_efficiency")
    lines = [
        {"iteration": 0, "eval/accuracy": 0.3},
        {"iteration": 1, "tokens/sampled": 100},
        {"iteration": 2, "tokens/sampled": 50, "eval/accuracy": 0.95},
        {"iteration": 3, "tokens/sampled": 70, "eval/accuracy": 0.99},
    ]
    assert [program.tokens_until(accuracy, lines) for accuracy in (0.2, 0.9, 0.96, 1.0)] == [0, 150, 220, None]


def test_the_interval_of_sampled_tokens_by_hand(monkeypatch):
    """Mean 200, standard deviation 100 and 3 seeds: 4.303 * 100 / sqrt(3) = 248."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    summary = import_module("sample_efficiency").summary
    assert summary([100, 200, 300, None]) == "200 tokens [-48, 448]; 3 of 4 seeds reached it"
    assert summary([None, 7]) == "1 of 2 seeds reached it, after 7 tokens"
    assert summary([None]) == "0 of 1 seeds reached it"
