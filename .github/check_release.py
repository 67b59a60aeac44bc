"""Check that a tag may be released: `python .github/check_release.py v1.2.3`.

The tag names the version of pyproject.toml, the changelog has a dated section for that version, and
the package names its repository.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

__all__ = ["problems"]

ROOT = Path(__file__).resolve().parents[1]


def problems(tag: str, pyproject: str, changelog: str) -> list[str]:
    """Return why a tag may not be released, one sentence each; empty if it may.

    Args:
        tag: Name of the tag, as `v1.2.3`.
        pyproject: Text of pyproject.toml.
        changelog: Text of CHANGELOG.md.
    """
    project = tomllib.loads(pyproject)["project"]
    version, found = project["version"], []
    if tag != f"v{version}":
        found.append(f"the tag is {tag}, but pyproject.toml has version {version}: tag v{version}")
    if not re.search(rf"^## {re.escape(version)} \(\d{{4}}-\d\d-\d\d\)$", changelog, re.M):
        found.append(f"CHANGELOG.md has no section `## {version} (YYYY-MM-DD)`: write its date")
    if "Repository" not in project.get("urls", {}):
        found.append("[project.urls] in pyproject.toml names no Repository: add its address")
    return found


def main() -> None:
    """Print every problem of the tag in the first argument; exit with 1 if there is one."""
    found = problems(sys.argv[1], *map(_text, ("pyproject.toml", "CHANGELOG.md")))
    for problem in found:
        print(f"error: {problem}", file=sys.stderr)
    sys.exit(bool(found))


def _text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


if __name__ == "__main__":
    main()
