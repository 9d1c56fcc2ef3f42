"""The picture of a run's learning curve, and the run that the documentation shows."""

import json
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
METRICS = ROOT / "benchmarks" / "results" / "word_problems_smollm2_h100.jsonl"


def test_a_picture_of_the_stored_run(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "curve.svg"
    monkeypatch.setattr(sys, "argv", ["curve.py", str(METRICS), str(picture)])
    runpy.run_path(str(ROOT / "docs" / "curve.py"), run_name="__main__")
    drawn = picture.read_text()
    assert drawn.count("<path") > 20
    assert "<!-- accuracy -->" in drawn
    assert "<!-- tokens of a response -->" in drawn


def test_the_figures_told_are_those_of_the_stored_run():
    rows = [json.loads(line) for line in METRICS.read_text().splitlines()]
    accuracy = {row["iteration"]: row for row in rows if "eval/accuracy" in row}
    assert accuracy[0]["eval/accuracy_high"] < accuracy[150]["eval/accuracy_low"]
    told = " ".join((ROOT / "docs" / "figures.md").read_text().split())
    for iteration in (0, 50, 125, 150):
        low, high = (accuracy[iteration][f"eval/accuracy_{side}"] for side in ("low", "high"))
        assert f"{accuracy[iteration]['eval/accuracy']:.2f} [{low:.2f}, {high:.2f}]" in told
