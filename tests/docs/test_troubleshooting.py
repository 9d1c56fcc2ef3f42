"""The messages that docs/troubleshooting.md explains are messages of the code."""

import ast
import re

from tests.docs.pages import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()


def messages_in_code():
    """Every text in the source of the package, those of f-strings in the pieces between their values."""
    for path in (ROOT / "llmrl").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield " ".join(node.value.split())


def test_messages_are_those_of_the_code():
    tables = PAGE.split("| message, in part |")[1:]
    cells = [row.split("|")[1] for table in tables for row in table.partition("\n\n")[0].splitlines()[2:]]
    quoted = [text for cell in cells for text in re.findall(r"`([^`]+)`", cell)]
    known = list(messages_in_code())
    assert len(quoted) > 20
    assert [text for text in quoted if not any(text in message for message in known)] == []
