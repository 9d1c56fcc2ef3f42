import json
import math
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
import torch

from llmrl.batches import Episodes, Experience, Rollout, Scores, Sequences, StopReason
from llmrl.lines import LineFile
from llmrl.reports.samples import SampleWriter

ALPHABET = "_abcdefgh$"


def decode(ids: list[int]) -> str:
    return "".join(ALPHABET[i] for i in ids)


def experience(num_responses: int, totals: list[float] | None = None) -> Experience:
    """Prompt n of groups of two is n letters, its response the letter ``h`` n + 1 times; ids of padding are not 0."""
    numbers = torch.arange(num_responses)
    lengths = numbers + 1
    columns = torch.arange(num_responses)
    response_mask = columns < lengths[:, None]
    prompt_mask = columns.flip(0) < lengths[:, None]
    total = torch.tensor([float(n) for n in range(num_responses)] if totals is None else totals)
    sequences = Sequences.from_rows(
        prompt_ids=torch.where(prompt_mask, 1, 9),
        prompt_mask=prompt_mask,
        response_ids=torch.where(response_mask, 8, 9),
        response_mask=response_mask,
        response_lengths=lengths,
    )
    return Experience(
        rollout=Rollout(
            sequences=sequences,
            rollout_logprobs=torch.zeros(response_mask.shape),
            stop_reason=torch.where(numbers % 2 == 0, StopReason.EOS, StopReason.LENGTH),
            group_ids=100 + numbers // 2,
            rows=tuple({} for _ in range(num_responses)),
        ),
        scores=Scores(
            total=total,
            per_token=torch.zeros(response_mask.shape),
            parts={"correct": total / 2, "format": torch.ones(num_responses)},
        ),
        old_logprobs=torch.zeros(response_mask.shape),
        advantages=(numbers - 0.5)[:, None].expand(response_mask.shape),
    )


def written(file: Path) -> list[dict]:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in file.read_text().splitlines()]


def write(tmp_path: Path, num_samples: int, batch: Experience, *, iteration: int = 0) -> list[dict]:
    SampleWriter(LineFile(tmp_path / "samples.jsonl", print), num_samples=num_samples, decode=decode)(iteration, batch)
    return written(tmp_path / "samples.jsonl")


def test_a_sample_says_everything_about_a_response(tmp_path: Path):
    assert write(tmp_path, 2, experience(3), iteration=4) == [
        {
            "iteration": 5,
            "prompt": "a",
            "response": "h",
            "finished": True,
            "score": 0.0,
            "parts": {"correct": 0.0, "format": 1.0},
            "advantage": -0.5,
            "group": 100,
        },
        {
            "iteration": 5,
            "prompt": "aaa",
            "response": "hhh",
            "finished": True,
            "score": 2.0,
            "parts": {"correct": 1.0, "format": 1.0},
            "advantage": 1.5,
            "group": 101,
        },
    ]


@pytest.mark.parametrize(
    ("num_samples", "num_responses", "rows"),
    [
        (1, 8, [0]),
        (2, 8, [0, 7]),
        (4, 10, [0, 3, 6, 9]),
        (4, 4, [0, 1, 2, 3]),
        (9, 3, [0, 1, 2]),
        (3, 1, [0]),
    ],
)
def test_samples_are_spread_evenly_and_never_more_than_there_are(
    tmp_path: Path, num_samples: int, num_responses: int, rows: list[int]
):
    samples = write(tmp_path, num_samples, experience(num_responses))
    assert [len(sample["response"]) - 1 for sample in samples] == rows


def test_where_none_is_asked_for_no_file_is_touched(tmp_path: Path):
    """Nor by a rank that leaves writing to the first."""
    SampleWriter(LineFile(tmp_path / "samples.jsonl", print), num_samples=0, decode=decode)(0, experience(3))
    assert not (tmp_path / "samples.jsonl").exists()


def test_a_tool_result_in_a_response_is_shown(tmp_path: Path):
    batch = experience(2)
    batch.rollout.sequences.response_mask[1, 0] = False
    assert write(tmp_path, 2, batch)[1]["response"] == "hh"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_could_not_be_scored_is_null(tmp_path: Path, bad: float):
    samples = write(tmp_path, 2, experience(2, [1.0, bad]))
    assert [sample["score"] for sample in samples] == [1.0, None]
    assert [sample["parts"] for sample in samples] == [
        {"correct": 0.5, "format": 1.0},
        {"correct": None, "format": 1.0},
    ]


def test_iterations_are_appended_a_line_each_response_whatever_it_says(tmp_path: Path):
    writer = SampleWriter(
        LineFile(tmp_path / "samples.jsonl", print), num_samples=1, decode=lambda _: 'a\nb "c" \u2028 é'
    )
    for iteration in (0, 1):
        writer(iteration, experience(2))
    samples = written(tmp_path / "samples.jsonl")
    assert [sample["iteration"] for sample in samples] == [1, 2]
    assert samples[0]["response"] == 'a\nb "c" \u2028 é'


def test_an_episode_says_its_row_its_turns_and_where_its_contexts_begin(tmp_path: Path):
    batch, zeros = experience(3), torch.zeros(3).long()
    restarts = torch.zeros(3, 3).bool()
    restarts[2, 1] = True
    rollout = replace(
        batch.rollout,
        sequences=replace(batch.rollout.sequences, restarts=restarts),
        stop_reason=torch.tensor([StopReason.EOS, StopReason.EOS, StopReason.TURNS]),
        rows=tuple({"secret": number, "day": date(2026, 1, 2), "share": math.nan} for number in range(3)),
        episodes=Episodes(
            turn_ends=torch.tensor([[1, 0], [2, 0], [1, 3]]),
            turn_rewards=torch.tensor([[0.5, 0.0], [0.0, 0.0], [0.55, -1.0]]),
            end_reward=torch.tensor([0.0, 0.0, 2.0]),
            num_calls=zeros,
            num_bad_calls=zeros,
            failures=(None, None, None),
            reasons=(None, None, None),
            openings=("a", "aa", "aaa"),
            messages=((), (), ({"role": "assistant", "content": "h"},)),
        ),
    )
    first, _, last = write(tmp_path, 3, replace(batch, rollout=rollout))
    told = ("row", "turn_ends", "turn_rewards", "end_reward", "context_starts", "messages", "stop", "failed")
    assert {name: last[name] for name in told} == {
        "row": {"secret": 2, "day": "2026-01-02", "share": "NaN"},
        "turn_ends": [1, 3],
        "turn_rewards": [0.55, -1.0],
        "end_reward": 2.0,
        "context_starts": [1],
        "messages": [{"role": "assistant", "content": "h"}],
        "stop": "turns",
        "failed": None,
    }
    assert (first["turn_ends"], first["context_starts"]) == ([1], [])
