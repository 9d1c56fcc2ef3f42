"""Settings and metrics that pages name are those of the code."""

import re

import pytest

from llmrl import Run
from llmrl.catalogue import CATALOGUE
from llmrl.settings import describe
from llmrl.wiring.runs import RUNS
from tests.docs.pages import ROOT, prose_of

PAGES = [page for page in sorted((ROOT / "docs").glob("*.md")) if page.name != "metrics.md"]
SETTINGS = {path for kind in RUNS.values() for path, *_ in describe(kind.settings)}
ATTRIBUTES = {"run.folder", *(f"run.{name}" for name in dir(Run))}
SECTIONS = {path.partition(".")[0] for path in SETTINGS}
METRICS = {metric.name for metric in CATALOGUE}
GROUPS = {name.partition("/")[0] for name in METRICS}


def settings_in(text: str) -> set[str]:
    """Dotted names whose first part is a section, also before ``=``."""
    named = re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)(?:=[^`]*|: [^`]*)?`", text)
    return {name for name in named if name.partition(".")[0] in SECTIONS and not name.endswith((".py", ".md", ".json"))}


def metrics_in(text: str) -> set[str]:
    """Names with a slash whose first part is a group of metrics."""
    return {name for name in re.findall(r"`([<\w>]+/[<\w>]+)`", text) if name.partition("/")[0] in GROUPS}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_are_known(page):
    assert settings_in(prose_of(page)) - SETTINGS - ATTRIBUTES == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_metrics_are_known(page):
    assert metrics_in(prose_of(page)) - METRICS == set()


def test_names_are_found():
    text = "`run.seed`, `model.lora.rank=16`, `algorithm.kl_form: k3`, `runs.py`, `score/mean`, `data/files.py`, `a/b`"
    assert settings_in(text) == {"run.seed", "model.lora.rank", "algorithm.kl_form"}
    assert metrics_in(text) == {"score/mean"}
