"""The table of runs."""

import subprocess
import sys
from dataclasses import is_dataclass

import pytest

from llmrl.cli import app
from llmrl.wiring.runs import RUNS


def test_the_command_line_has_every_kind_of_run():
    assert [command.name for command in app.registered_commands][: len(RUNS)] == list(RUNS)


@pytest.mark.parametrize("verb", RUNS)
def test_what_a_kind_names_is_there(verb):
    kind = RUNS[verb]
    assert is_dataclass(kind.settings)
    assert kind.checker().__name__ == kind.check.rpartition(":")[2]
    assert kind.builder().__name__ == kind.build.rpartition(":")[2]


def test_prompts_are_answered_where_an_algorithm_samples():
    for kind in RUNS.values():
        assert kind.samples == ("rollout" in kind.settings.__dataclass_fields__)
    assert RUNS["grpo"].samples
    assert not RUNS["sft"].samples


def test_reading_the_table_imports_no_heavy_library():
    heavy = "{'torch', 'transformers', 'accelerate'}"
    program = f"import sys, llmrl.wiring.runs; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
