"""Tiny models and rows, as objects and as files, and the settings of short runs."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.golden.runs import make_data, make_models

SHORT: dict[str, Any] = {
    "rollout.prompts_per_iteration": 4,
    "rollout.max_response_tokens": 6,
    "algorithm.group_size": 4,
    "optimizer.learning_rate": 1e-3,
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the runs of `tests.golden` read: models and rows.jsonl."""
    place = tmp_path_factory.mktemp("api")
    make_models(place)
    make_data(place)
    return place


@pytest.fixture(scope="session")
def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


@pytest.fixture
def tiny(folder: Path) -> SimpleNamespace:
    """A model with its tokenizer, as objects that know no folder."""
    model, tokenizer = (kind.from_pretrained(folder / "llama") for kind in (AutoModelForCausalLM, AutoTokenizer))
    model.config.name_or_path = model.name_or_path = ""
    return SimpleNamespace(model=model, tokenizer=tokenizer)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums in one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def digits(responses: list[str]) -> list[float]:
    """Share of digits in each response."""
    return [sum(c.isdigit() for c in response) / max(len(response), 1) for response in responses]


def without_times(metrics: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: x for name, x in row.items() if not name.endswith("_s")} for row in metrics]
