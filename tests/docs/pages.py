"""Pages of the documentation: their headings, links and blocks of code.

A block is fenced, or indented by four spaces after an empty line; an indented one holds shell commands. A first line
``# path`` names the file that a block shows. ``<!-- not run: reason -->`` before a block keeps it from being run.
"""

import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "reward_models").glob("*.md")),
    *sorted((ROOT / "data").glob("*/README.md")),
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?<=\n\n)((?: {4}.*\n|\n(?= {4}))+)")
NOT_RUN = re.compile(r"<!-- not run: (.+?) -->\s*\Z")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)|^\[[^\]]+\]: (\S+)", re.MULTILINE)
FILE = re.compile(r"# ([\w./-]+\.\w+)(?:: .*)?\n")


@dataclass(frozen=True)
class Block:
    """A block of code of a page."""

    page: Path
    line: int
    language: str
    text: str
    not_run: str | None

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def file(self) -> str | None:
        """The file that the block shows."""
        named = FILE.match(self.text)
        return named[1] if named else None

    @property
    def contents(self) -> str:
        """What that file holds: the block without the line that names it."""
        return self.text.partition("\n")[2]

    @property
    def commands(self) -> list[list[str]]:
        """The words of each shell command, comments left out."""
        lines = self.text.replace("\\\n", " ").splitlines()
        words = [shlex.split(line, comments=True) for line in lines]
        return [command for line in words for command in _split(line) if command]


def _split(words: list[str]) -> Iterator[list[str]]:
    """The commands of a line, which ``&&`` joins."""
    command: list[str] = []
    for word in words:
        if word == "&&":
            yield command
            command = []
        else:
            command.append(word)
    yield command


def blocks_of(page: Path) -> list[Block]:
    """Every block of a page, in order."""
    text = page.read_text()
    fenced = [(match.start(), match[1], match[2]) for match in FENCE.finditer(text)]
    plain = FENCE.sub(lambda match: "\n" * match[0].count("\n"), text)
    assert plain.count("\n") == text.count("\n")
    lines = text.splitlines(keepends=True)
    starts = [sum(map(len, lines[: plain.count("\n", 0, match.start())])) for match in INDENTED.finditer(plain)]
    indented = [
        (start, "shell", textwrap.dedent(match[1]))
        for start, match in zip(starts, INDENTED.finditer(plain), strict=True)
    ]
    return [
        Block(page, text.count("\n", 0, start) + 1, language, code, _reason(text[:start]))
        for start, language, code in sorted(fenced + indented)
    ]


def _reason(before: str) -> str | None:
    marker = NOT_RUN.search(before)
    return marker[1] if marker else None


def prose_of(page: Path) -> str:
    """The text of a page without its blocks."""
    return INDENTED.sub("", FENCE.sub("", page.read_text()))


def anchors_of(page: Path) -> set[str]:
    """What links to headings of a page end with, by GitHub's rule."""
    slugs: list[str] = []
    for heading in HEADING.findall(prose_of(page)):
        kept = re.sub(r"[^\w\- ]", "", heading.lower())
        slug = kept.strip().replace(" ", "-")
        slugs.append(f"{slug}-{slugs.count(slug)}" if slug in slugs else slug)
    return set(slugs)


def links_of(page: Path) -> list[str]:
    """Every address that a page links to."""
    return [inline or reference for inline, reference in LINK.findall(prose_of(page))]
