import pytest

from llmrl.user_code import UserCodeError
from llmrl.verify.rows import ROWS
from llmrl.verify.targets import UnknownEstimator, rows_of
from tests.verify.faults import in_grpo, in_ppo


def test_rows_are_found_by_algorithm_and_by_name():
    assert rows_of(None) == list(ROWS)
    assert {row.algorithm for row in rows_of("ppo")} == {"ppo"}
    assert len(rows_of("grpo")) + len(rows_of("ppo")) == len(ROWS)
    assert [row.name for row in rows_of("rloo")] == ["rloo"]


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(UnknownEstimator, match="is no row of the table; did you mean 'dapo'"):
        rows_of("dapoo")


def test_a_class_is_made_with_the_settings_of_every_row_of_its_kind():
    grpo, ppo = f"{in_grpo.__file__}:WrongSign", f"{in_ppo.__file__}:KLOfTheWrongSign"
    assert [(row.name, row.code) for row in rows_of(grpo)] == [(row.name, grpo) for row in rows_of("grpo")]
    assert [(row.name, row.code) for row in rows_of(ppo)] == [(row.name, ppo) for row in rows_of("ppo")]


def test_a_function_is_what_its_parameters_say(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def two(a, b): ...\ndef four(a, b, c, d): ...\ndef three(a, b, c): ...\n")
    assert [row.settings["baseline"] for row in rows_of(f"{file}:two")] == [f"{file}:two"]
    assert [row.settings["loss"] for row in rows_of(f"{file}:four")] == [f"{file}:four"] * 2
    with pytest.raises(UserCodeError, match=r"takes \(a, b, c\); expected a class"):
        rows_of(f"{file}:three")
    with pytest.raises(UserCodeError, match="has no 'twoo'; did you mean 'two'"):
        rows_of(f"{file}:twoo")
