"""The site of the documentation, built as `make site` builds it; its links and anchors are checked by the build."""

import os
import re
import subprocess
import sys

import pytest
import yaml

from tests.docs.pages import ROOT

CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text())


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def pages_in(nav):
    """File names in a navigation, which nests."""
    for entry in nav:
        (value,) = entry.values()
        yield from pages_in(value) if isinstance(value, list) else [value]


def test_every_page_stands_in_the_navigation_once():
    listed = sorted(pages_in(CONFIG["nav"]))
    assert listed == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def test_the_site_has_every_page(site):
    for name in pages_in(CONFIG["nav"]):
        assert (site / name.removesuffix(".md").replace("index", "") / "index.html").is_file()


def test_tables_and_lists_are_rendered(site):
    """The site's Markdown is stricter than GitHub's: a table or list needs an empty line before it."""
    for page in (ROOT / "docs").glob("*.md"):
        html = (site / page.stem.replace("index", "") / "index.html").read_text()
        assert html.count("<table>") >= page.read_text().count("\n|---|"), page.name
        assert "<p>* " not in html, page.name


def test_links_to_files_outside_of_the_pages_lead_to_the_repository(site):
    page = (site / "reliability" / "index.html").read_text()
    assert f'href="{CONFIG["repo_url"]}/blob/main/SECURITY.md"' in page


def test_the_reference_has_signatures_and_formulas(site):
    page = re.sub(r"<[^>]+>", "", (site / "reference" / "index.html").read_text())
    assert "gae_lambda: float" in page
    assert "δ_t = r_t" in page
    assert all(name in page for name in ("llmrl.functional.advantages", "llmrl.metrics", "in_floats"))


def test_no_page_asks_another_site(site):
    """Nothing is loaded from elsewhere: no font, script or picture."""
    text = "".join(path.read_text() for path in site.rglob("*.html"))
    assert re.findall(r'(?:<script[^>]* src|<img[^>]* src|<link rel="stylesheet" href)="(https?://[^"]+)', text) == []
