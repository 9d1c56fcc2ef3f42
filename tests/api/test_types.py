"""A user's program passes a strict type checker."""

import subprocess
import sys

import pytest

PROGRAM = """
from collections.abc import Mapping
from typing import Any

import llmrl


def correct(responses: list[str], answer: list[str]) -> list[float]:
    return [float(gold in response) for response, gold in zip(responses, answer, strict=True)]


class Guess(llmrl.Environment):
    def __init__(self, top: int = 64) -> None:
        self.top = top

    def start(self, row: Mapping[str, Any]) -> str:
        self.secret = self.random.randint(1, self.top)
        return row["prompt"]

    async def respond(self, message: llmrl.Message) -> llmrl.Turn:
        return llmrl.Turn("higher" if int(message.text) < self.secret else "lower", reward=-0.02)

    def close(self) -> None:
        self.secret = 0


rows = [{"prompt": "1+1=", "answer": "2"}]
run = llmrl.grpo(
    "org/model",
    prompts=rows,
    reward={"correct": (correct, 2.0)},
    output_dir="runs/mine",
    num_iterations=50,
    evaluation="held_out.jsonl",
    settings={"rollout.prompts_per_iteration": 8, "algorithm.loss": correct},
)
for iteration in run:
    mean: float = iteration["score/mean"]
accuracy: float = run.evaluate(rows)["eval/accuracy"]
run.model.save_pretrained("mine")  # pyright: ignore[reportUnknownMemberType]  # its own types are partial
fine_tuned = llmrl.sft(run, data=rows, output_dir="runs/sft", num_iterations=3)
judge = llmrl.reward_model(fine_tuned, pairs=rows, evaluation=rows, output_dir="runs/judge")
try:
    llmrl.ppo(run.model, tokenizer=run.tokenizer, prompts=rows, reward=judge, output_dir="p", num_iterations=9).train()
except llmrl.Error as error:
    print(error)
texts: list[list[str]] = llmrl.generate(run.model, ["1+1="], tokenizer=run.tokenizer)
scores: list[float] = llmrl.score(judge, rows)
numbers: dict[str, float] = llmrl.evaluate("org/model", prompts=rows, reward=[correct, judge])
losses = [row["loss"] for row in llmrl.load_run("runs/sft").metrics]
"""


@pytest.mark.slow
def test_a_program_is_strictly_typed(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "wrong.py").write_text('import llmrl\n\nllmrl.grpo("m", prompts=3, output_dir="x")\n')
    (tmp_path / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict"}')
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "-p", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stdout, done.stderr
    problems = [line for line in done.stdout.splitlines() if "- error" in line or "- warning" in line]
    assert problems
    assert [line for line in problems if "wrong.py" not in line] == []
    assert "reward" in done.stdout  # which it lacks
