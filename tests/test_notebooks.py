"""The notebooks in examples/ run, with fewer iterations, and the results that are stored in them are complete."""

import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from llmrl.starters.folders import find_starter, run_in, write_starter
from tests.processes import ROOT

NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "examples").glob("*.ipynb"))}
CUTS = {
    "improve_a_model": {"num_iterations=40": "num_iterations=2"},
    "reward_model": {"pairs=pairs,": "pairs=pairs[:64],"},
    "ppo": {
        "reward_model.yaml >": "reward_model.yaml data.num_rows=64 >",
        "num_iterations=40": "num_iterations=3",
        '"rollout.prompts_per_iteration": 128': '"rollout.prompts_per_iteration": 64',
    },
}
"""What is shortened in each notebook."""
STARTERS = {"improve_a_model": "math", "reward_model": "rlhf", "ppo": "rlhf"}


def outputs(notebook) -> list[dict]:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def test_every_notebook_is_tried():
    assert NOTEBOOKS.keys() == CUTS.keys() == STARTERS.keys()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_results_are_stored(name: str):
    """Every cell was run, in order; there is a curve, no error, and no path of the machine."""
    notebook = nbformat.read(NOTEBOOKS[name], as_version=4)
    numbers = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert numbers == list(range(1, len(numbers) + 1))
    assert any("image/svg+xml" in output.get("data", {}) for output in outputs(notebook))
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    assert not re.findall(r"(?<![\w.])/(?:tmp|root|home|work|usr)/", NOTEBOOKS[name].read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The folder that its first command would write is there, with a start that has learned little."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    write_starter(find_starter(STARTERS[name]), tmp_path / "demo")
    for command in ("python data/generate.py", "llmrl sft sft.yaml run.num_iterations=20"):
        assert run_in(tmp_path / "demo", command) == 0
    notebook = nbformat.read(NOTEBOOKS[name], as_version=4)
    for full, short in CUTS[name].items():
        assert sum(full in cell.source for cell in notebook.cells) == 1, full
        for cell in notebook.cells:
            cell.source = cell.source.replace(full, short)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert any("image/svg+xml" in output.get("data", {}) for output in outputs(notebook))
