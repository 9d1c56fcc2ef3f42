"""Runs the scripts that make data, and reads what they write."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def run_script(script: str, out: Path) -> Path:
    """Runs a script of the repository as the command line would, in this process; returns the folder it wrote to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, "--out", str(out)])
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return out


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
