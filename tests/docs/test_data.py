"""Every form of rows that docs/data.md shows is read, and means what the page says."""

import json
import re

import pytest

from llmrl.data.config import PreferenceDataConfig, PromptDataConfig, SupervisedDataConfig
from llmrl.data.preferences import parse_preferences, read_preference_rows
from llmrl.data.prompts import read_prompt_rows
from llmrl.data.supervised import read_supervised_rows
from tests.docs.pages import ROOT

PAGE = (ROOT / "docs" / "data.md").read_text()
SECTIONS = dict(re.findall(r"^### (\w+)\n(.*?)(?=^###? )", PAGE, re.MULTILINE | re.DOTALL))


def files_of(section, folder):
    """A file for each block of a section, one row a line."""
    for number, block in enumerate(re.findall(r"```json\n(.*?)```", SECTIONS[section], re.DOTALL)):
        decoder, rows = json.JSONDecoder(), []
        while block.strip():
            row, end = decoder.raw_decode(block)
            rows.append(row)
            block = block[end:].lstrip()
        path = folder / f"{number}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        yield str(path)


def test_prompts_are_read(tmp_path):
    (path,) = files_of("Prompts", tmp_path)
    rows = read_prompt_rows(PromptDataConfig(path=path))
    assert [row["answer"] for row in rows] == ["132"] * 3


def test_examples_are_read(tmp_path):
    counts = [len(read_supervised_rows(SupervisedDataConfig(path=path))) for path in files_of("Examples", tmp_path)]
    assert counts == [2, 1]


@pytest.mark.parametrize("number", range(4))
def test_pairs_are_read_as_a_prompt_and_two_responses(tmp_path, number):
    config = PreferenceDataConfig(path=list(files_of("Pairs", tmp_path))[number])
    pairs, counts = parse_preferences(read_preference_rows(config), config)
    assert counts.kept == counts.rows == (2 if number == 0 else 1)
    for pair in pairs:
        prompt = pair.prompt if isinstance(pair.prompt, str) else pair.prompt[0]["content"]
        assert "ow was it?" in prompt or "the corner cafe:" in prompt
        assert "ovely" in pair.chosen
        assert "it rained" in pair.rejected.lower()
