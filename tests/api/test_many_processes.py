"""A program in two processes of one launch: every rank makes the same calls, the first one writes."""

import json
import subprocess

import pytest

from tests.golden.runs import ROOT
from tests.processes import command, environment

PROGRAM = """
import json, sys
import llmrl
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = sys.argv[1]
model, tokenizer = (kind.from_pretrained(folder + "/llama") for kind in (AutoModelForCausalLM, AutoTokenizer))
rows = [json.loads(line) for line in open(folder + "/rows.jsonl")]


def digits(responses):
    return [sum(c.isdigit() for c in response) / max(len(response), 1) for response in responses]


run = llmrl.grpo(
    model,
    tokenizer=tokenizer,
    prompts=rows,
    reward=digits,
    output_dir=sys.argv[2],
    num_iterations=3,
    settings={"rollout.prompts_per_iteration": 4, "rollout.max_response_tokens": 6, "algorithm.group_size": 4},
)
for iteration in run:
    if iteration["iteration"] == 2:
        break
values = run.evaluate(rows[:4])
run.train()
size = sum(p.double().abs().sum().item() for p in run.model.parameters())
numbers = [values["eval/score"], values["difference/score"], size]
sys.stdout.write(json.dumps({"ranks": numbers}) + "\\n")
sys.stdout.flush()
"""


@pytest.mark.slow
def test_a_program_in_two_processes_is_one_run(folder, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    found = []
    for number in (1, 2):
        arguments = (str(folder), str(tmp_path / f"run{number}"))
        done = subprocess.run(
            command(*arguments, num_processes=number, program=(str(program),)),
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
            env=environment() | {"PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == 0, done.stderr
        found += [json.loads(line)["ranks"] for line in done.stdout.splitlines() if line.startswith('{"ranks"')]
    alone, first, second = found
    assert first == second
    assert first == pytest.approx(alone, rel=1e-4)
    assert sorted(path.name for path in (tmp_path / "run2" / "given").iterdir()) == sorted(
        path.name for path in (tmp_path / "run1" / "given").iterdir()
    )
