"""Hook of mkdocs: the pages of the site that are written elsewhere or generated.

The README is the site's first page, `CONTRIBUTING.md` and `CHANGELOG.md` are pages, and the map of
the code is made from the modules' docstrings, so none of them has a second copy.
"""

from __future__ import annotations

import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from docs.code_map import ROOT, code_map

COPIES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to those under `docs/`."""
    for source, page in COPIES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=site_links(text)))
    files.append(File.generated(config, "code-map.md", content=code_map()))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Turn the links of a page under `docs/` to copied pages into links within the site."""
    for source, page in COPIES.items():
        markdown = re.sub(rf"\]\((?:\.\./)+{source}", f"]({page}", markdown)
    return markdown


def site_links(text: str) -> str:
    """Turn the links of a document at the root into links within the site."""
    text = text.replace("](docs/", "](")
    for source, page in COPIES.items():
        text = text.replace(f"]({source}", f"]({page}")
    return text
