"""Writes the list of blocks that are not run: `python -m tests.docs`."""

from tests.docs.test_snippets import EXCEPTIONS, exceptions

EXCEPTIONS.write_text(exceptions())
