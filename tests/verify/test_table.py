import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llmrl.cli import app
from llmrl.user_code import UserCodeFailure
from llmrl.verify.faults import FAULTS
from llmrl.verify.rows import ROWS
from llmrl.verify.table import lines_of
from llmrl.verify.verdict import Findings, Report
from tests.verify.faults import in_ppo

NUMBERS = {
    "factor": 1.0,
    "bias": 1e-15,
    "bias_kl": 0.1234,
    "cosine": 0.99995,
    "cosine_off_policy": 0.5,
    "cosine_stale": 0.75,
    "claim_error": None,
    "variance": 25.0,
    "standard_error": 0.156,
}


def test_a_line_holds_the_numbers_and_the_verdict():
    right = Report(name="right", distance=0.25, faults=(), reason="as it should be", **NUMBERS)
    wrong = Report(name="wrong one", distance=None, faults=FAULTS[:2], reason="two things", **NUMBERS)
    findings = Findings(reports=[right, wrong], failures={}, left_out=[])
    heading, first, second, *rest = lines_of(findings)
    assert heading.split()[:2] == ["estimator", "factor"]
    assert first.split() == [
        "right",
        "1.0000",
        "0",
        "0.12",
        "1.0000",
        "0.5000",
        "0.7500",
        "25",
        "0.156",
        "0.2500",
        "holds",
    ]
    assert second.split()[-2:] == ["-", "FAULT"]
    assert len({len(line) for line in (heading, first, second)}) == 1
    assert rest[1:3] == ["holds: right", "  as it should be"]
    assert rest[4:] == ["FAULT: k3 as a loss, or k1 as a loss: wrong one", "  two things"]


def test_rows_that_fail_and_rows_that_are_left_out_are_named():
    failures = {"opo": UserCodeFailure("it raised")}
    lines = lines_of(Findings(reports=[], failures=failures, left_out=["gspo", "dapo"]))
    assert lines[1:] == ["", "FAILED: opo", "  it raised", "", "2 rows left out: their settings are not read"]


def test_the_stored_table_has_every_row():
    page = (Path(__file__).parents[2] / "docs/verify.md").read_text()
    table = page.split("```text\n")[1].split("\n\n")[0].splitlines()[1:]
    names = [row.name for row in ROWS]
    assert [line[: max(map(len, names))].strip() for line in table] == names


def test_the_command_prints_the_table_and_ends_with_the_verdict(tmp_path):
    output = tmp_path / "numbers.json"
    done = CliRunner().invoke(app, ["verify", "ppo, lambda 1", "--quick", "--output", str(output)])
    assert done.exit_code == 0, done.output
    assert "holds: ppo, lambda 1\n  the gradient of the objective\n" in done.output
    (record,) = json.loads(output.read_text())
    assert record["holds"] is True
    assert record["distance"] is None


@pytest.mark.slow
def test_a_fault_is_named_with_status_1():
    done = CliRunner().invoke(app, ["verify", f"{in_ppo.__file__}:CriticLearnsAdvantages", "--quick"])
    assert done.exit_code == 1, done.output
    assert "FAULT: critic learns advantages: ppo, defaults | ppo, exact critic" in done.output


def test_an_unknown_name_has_status_2():
    done = CliRunner().invoke(app, ["verify", "rlo"])
    assert done.exit_code == 2
    assert "did you mean 'rloo'?" in done.output
