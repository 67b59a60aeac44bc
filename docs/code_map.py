"""The map of the code: every package and module with the first sentence of its docstring.

`python docs/code_map.py` prints it, and the site shows it as a page: nobody keeps it by hand.
"""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

__all__ = ["code_map", "first_sentence", "packages"]

ROOT = Path(__file__).resolve().parents[1]


def packages(root: Path = ROOT) -> list[Path]:
    """Return the folders of the packages that the wheel ships, in its order."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    return [root / one for one in project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]]


def first_sentence(path: Path) -> str:
    """Return the first paragraph of a module's docstring on one line; empty without a docstring."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.split("\n\n")[0].split())


def code_map(root: Path = ROOT) -> str:
    """Return the map as Markdown: a heading per package, a table of its modules."""
    return "\n".join(["# Map of the code", "", *_lines(root)])


def _lines(root: Path) -> Iterator[str]:
    for package in packages(root):
        for opening in sorted(package.rglob("__init__.py")):
            folder = opening.parent
            level = "##" if folder == package else "###"
            yield from (f"{level} {folder.relative_to(root)}", "", first_sentence(opening), "")
            modules = sorted(path for path in folder.glob("*.py") if path != opening)
            if modules:
                yield from ("| module | purpose |", "|---|---|")
                yield from (f"| `{path.name}` | {first_sentence(path)} |" for path in modules)
                yield ""


if __name__ == "__main__":
    print(code_map())
