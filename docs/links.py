"""Hook of mkdocs: links from a page to files of the repository outside of docs/ lead to the repository on the web."""

import re

OUTSIDE = re.compile(r"\]\(\.\./([^)\s]+)\)")


def on_page_markdown(markdown: str, *, config, **_) -> str:
    """The text of a page, with whole addresses in place of `../...`."""
    return OUTSIDE.sub(rf"]({config.repo_url}/blob/main/\1)", markdown)
