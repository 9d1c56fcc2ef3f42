"""How pages are read: blocks, commands, links and anchors of a page that is written here."""

import pytest

from tests.docs import pages
from tests.docs.pages import anchors_of, blocks_of, links_of

PAGE = """\
# A page, of two parts

See [the other](other.md#part) and ![a picture](curve.svg).

    llmrl grpo a.yaml \\
        run.seed=1          # a comment
    make x && make y

* an item
  that goes on

```python
# rules.py: what it is for
x = 1

## no heading
```

<!-- not run: it takes a GPU -->

    docker run image

See [the last][x] too.

[x]: last.md

## A page, of two parts
"""


@pytest.fixture
def page(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    (tmp_path / "page.md").write_text(PAGE)
    return tmp_path / "page.md"


def test_blocks_are_indented_or_fenced(page):
    blocks = blocks_of(page)
    assert [(block.place, block.language) for block in blocks] == [
        ("page.md:5", "shell"),
        ("page.md:12", "python"),
        ("page.md:21", "shell"),
    ]
    assert [block.not_run for block in blocks] == [None, None, "it takes a GPU"]


def test_commands_are_words_without_comments(page):
    shell, _, docker = blocks_of(page)
    assert shell.commands == [["llmrl", "grpo", "a.yaml", "run.seed=1"], ["make", "x"], ["make", "y"]]
    assert docker.commands == [["docker", "run", "image"]]


def test_a_first_line_names_the_file(page):
    shell, python, _ = blocks_of(page)
    assert (shell.file, python.file) == (None, "rules.py")
    assert python.contents == "x = 1\n\n## no heading\n"


def test_links_and_anchors_are_those_of_the_prose(page):
    assert links_of(page) == ["other.md#part", "curve.svg", "last.md"]
    assert anchors_of(page) == {"a-page-of-two-parts", "a-page-of-two-parts-1"}
