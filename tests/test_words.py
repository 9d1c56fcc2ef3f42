"""Words that CONTRIBUTING.md rules out, in the text of the package and of its pages."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FORBIDDEN = (
    r"(?i)\bbehind the\b",
    r"(?i)\bso many\b",
    r"(?i)\bbut for\b",
    r"(?i)\b(?:tells|told)\b",
    r"(?i)\bnobody\b",
    r"(?i)\bfor the while\b",
    r"(?i)\breckon\w*\b",
    r"\A\s*Of ",
)
"""One pattern for each row of the table in CONTRIBUTING.md."""
ARGUMENT = re.compile(r"^ *\w+: Of ", re.MULTILINE)
"""An argument in a docstring whose description begins as a docstring must not."""


def texts(source: str) -> Iterator[tuple[int, str]]:
    """Yields ``(line, text)`` of comments and of string literals: docstrings, help and messages."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string.removeprefix("#")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def is_forbidden(text: str) -> bool:
    """Whether a text has forbidden words, also across the lines of a docstring."""
    in_one_line = re.sub(r"\s+", " ", text)
    return any(re.search(rule, in_one_line) for rule in FORBIDDEN) or ARGUMENT.search(text) is not None


def problems(source: str) -> list[str]:
    """``line: text`` of every comment and string of a Python file that has forbidden words."""
    return [f"{line}: {text}" for line, text in texts(source) if is_forbidden(text)]


def ruled_out() -> list[str]:
    """The column of what not to write, from the table in CONTRIBUTING.md."""
    _, _, table = (ROOT / "CONTRIBUTING.md").read_text().partition("| use | not |\n|---|---|\n")
    rows = table.partition("\n\n")[0].splitlines()
    return [row.strip("|").split("|")[1].strip() for row in rows]


def test_every_pattern_is_a_row_of_the_table():
    found = [[rule for rule in FORBIDDEN if re.search(rule, example)] for example in ruled_out()]
    assert found == [[rule] for rule in FORBIDDEN]


@pytest.mark.parametrize(
    "planted",
    [
        'def f():\n    """The states behind the last token."""\n',
        'LIMIT = 3\n"""Draws so\n    many tokens."""\n',
        "x = 1  # Nobody reads it\n",
        'raise ValueError(f"row {row} "\n    f"is the last but for {x}")\n',
        'print("of which the user is " "told")\n',
        'def f():\n    """Of the whole run."""\n',
        'def f(x):\n    """The mean.\n\n    Args:\n        x: Of the whole run.\n    """\n',
    ],
)
def test_a_planted_one_is_found(planted: str):
    assert len(problems(planted)) == 1


@pytest.mark.parametrize(
    "fine",
    [
        'def f():\n    """Leaves nothing behind. One of the rows, of which there are two."""\n',
        "told = 1\n",
        'print("number of rows: of the first", "this many", "butter")\n',
    ],
)
def test_other_words_are_none(fine: str):
    assert problems(fine) == []


def test_the_package_has_none():
    found = {str(path.relative_to(ROOT)): problems(path.read_text()) for path in (ROOT / "llmrl").rglob("*.py")}
    assert found
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_the_pages_have_none():
    pages = [
        ROOT / "README.md",
        ROOT / "SECURITY.md",
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "reward_models").glob("*.md"),
    ]
    found = [
        f"{page.name}:{number}: {line}"
        for page in pages
        for number, line in enumerate(page.read_text().splitlines(), 1)
        if is_forbidden(line)
    ]
    assert found == []
