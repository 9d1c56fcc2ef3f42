import pytest

from llmrl.data.config import PromptDataConfig
from llmrl.data.files import DataError
from llmrl.wiring.rows import read_section, report_dropped

from .conftest import Heard


def read(dry, path, made_by=None):
    """The rows, or that they were read, and what was not checked."""
    unchecked = []
    config = PromptDataConfig(path=path)
    rows = read_section(config, lambda config: [{"prompt": config.path}], unchecked, dry=dry, made_by=made_by)
    return rows, unchecked


@pytest.mark.parametrize(("path", "made_by"), [("gone.jsonl", None), ("nobody/data", None), ("nobody/data", "make")])
def test_a_run_reads_whatever_it_is_told_to(path, made_by):
    assert read(False, path, made_by) == ([{"prompt": path}], [])


def test_a_missing_file_is_refused_with_the_command_that_makes_it():
    with pytest.raises(DataError, match=r"^gone\.jsonl does not exist; make it with `make data`$"):
        read(False, "./gone.jsonl", "make data")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"path": "nobody/data"}, "data.path (nobody/data) is a data set on the hub, which a dry run does not fetch"),
        (
            {"path": "gone.jsonl", "made_by": "make data"},
            "data.path (gone.jsonl) does not exist yet; `make data` makes it",
        ),
    ],
)
def test_a_dry_run_says_what_it_passes_over(settings, told):
    assert read(True, **settings) == (None, [told])


def test_a_dry_run_reads_what_is_there_and_what_nothing_makes(tmp_path):
    (tmp_path / "here.jsonl").write_text("{}")
    assert read(True, path=f"{tmp_path}/here.jsonl", made_by="make data")[0] is not None
    assert read(True, path="gone.jsonl")[0] is not None


def test_only_what_was_dropped_is_told():
    progress = Heard()
    report_dropped([], "data", "max_tokens", progress)
    report_dropped(["line 7"], "data", "max_prompt_tokens", progress)
    report_dropped([f"line {n}" for n in range(1, 13)], "evaluation_data", "max_tokens", progress)
    named = ", ".join(f"line {n}" for n in range(1, 6))
    assert progress.messages == [
        "data: dropped 1 row longer than data.max_prompt_tokens: line 7",
        f"evaluation_data: dropped 12 rows longer than evaluation_data.max_tokens: {named} and 7 more",
    ]
