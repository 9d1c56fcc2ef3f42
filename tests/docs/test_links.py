"""Links between pages and to files of the repository, and what pages may not hold."""

import re
from pathlib import Path

import pytest
import yaml

from tests.docs.pages import PAGES, ROOT, anchors_of, blocks_of, links_of, prose_of

REPOSITORY = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["repo_url"]
ON_THE_WEB = (f"{REPOSITORY}/blob/main/", f"{REPOSITORY.replace('github.com', 'raw.githubusercontent.com')}/main/")
"""Where files of the repository are on the web. The README's links begin there, since PyPI shows it too."""
LANGUAGES = {"python", "yaml", "json", "text", "shell"}
MAX_README = 7_500
MAX_LINE, MAX_CELL = 160, 120


def target_of(link: str, page: Path) -> Path | None:
    """The file of the repository that a link leads to."""
    for start in ON_THE_WEB:
        if link.startswith(start):
            return ROOT / link.removeprefix(start)
    if link.startswith(("https://", "http://")):
        return None
    return (page.parent / link).resolve() if not link.startswith("#") else page.with_name(page.name + link)


def is_broken(link: str, page: Path) -> bool:
    target = target_of(link, page)
    if target is None:
        return False
    name, _, anchor = target.name.partition("#")
    path = target.with_name(name)
    return not path.exists() or (anchor != "" and anchor not in anchors_of(path))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    assert [link for link in links_of(page) if is_broken(link, page)] == []


@pytest.mark.parametrize(
    "link", ["gone.md", "data.md#gone", "#gone", f"{ON_THE_WEB[0]}gone.md", f"{ON_THE_WEB[0]}docs/data.md#gone"]
)
def test_a_broken_link_is_found(link):
    assert is_broken(link, ROOT / "docs" / "runs.md")


def test_the_readme_is_readable_wherever_it_is_shown():
    """On PyPI there is no folder that a relative link could begin in."""
    readme = ROOT / "README.md"
    assert [link for link in links_of(readme) if not link.startswith(("https://", "#"))] == []
    assert len(readme.read_text()) <= MAX_README


def test_every_block_says_what_it_is():
    unknown = [block.place for page in PAGES for block in blocks_of(page) if block.language not in LANGUAGES]
    assert unknown == []


def is_long(line: str) -> bool:
    cells = line.split("|") if line.startswith("|") else []
    return max(map(len, cells)) > MAX_CELL if cells else len(line) > MAX_LINE


def test_lines_and_cells_are_short():
    found = [
        f"{page.relative_to(ROOT)}:{number}"
        for page in PAGES
        for number, line in enumerate(page.read_text().splitlines(), 1)
        if is_long(line)
    ]
    assert found == []


NAMED = re.compile(r"`((?:[\w-]+/)+[\w-]+\.(?:py|yaml|md|sh|jsonl?|svg))(?::\w+)?`")
"""A file that a page names in its text."""
ROOMS = (ROOT, ROOT / "llmrl", ROOT / "recipes" / "accelerate")
MADE = ("data/", "runs/", "path/to/", "llmrl/x/", "tests/x/")
"""What exists only after a command, or as an example."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_are_there(page):
    named = {name for name in NAMED.findall(prose_of(page)) if not name.startswith(MADE)}
    assert [name for name in named if not any((room / name).is_file() for room in ROOMS)] == []


def test_the_figures_of_the_readme_are_those_of_the_page():
    rows = re.findall(r"^\| \[.*", (ROOT / "README.md").read_text(), re.MULTILINE)
    numbers = [number for row in rows for number in re.findall(r"-?\d+\.\d\d+(?: \[[\d., ]+\])?", row)]
    told = " ".join((ROOT / "docs" / "figures.md").read_text().split())
    assert len(numbers) >= 8
    assert [number for number in numbers if number not in told] == []
