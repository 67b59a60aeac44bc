"""The documents say what is there: the map of the code, links, verbs."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.support import ROOT
from twotower_client.cli import VERBS
from twotower_engines.cli.plan import plan

PACKAGES = (
    "export/twotower_contract",
    "export/twotower_export",
    "engines/twotower_engines",
    "client/twotower_client",
)
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def first_sentence(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.split("\n\n")[0].split())


def test_the_map_names_every_module_and_no_other():
    text = (ROOT / "docs/contributing.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `([\w/.]+\.py)` \|", text, re.M))
    modules = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert named == modules


def test_every_module_says_what_it_is():
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            assert first_sentence(path), path


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
        if not re.match(r"\w+:", target):
            assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_in_documents_are_verbs(document):
    text = document.read_text(encoding="utf-8")
    blocks = re.findall(r"```(?:sh|bash|console)?\n(.*?)```", text, re.S)
    verbs = re.findall(r"^\s*(?:\$ )?twotower ([a-z]+)", "\n".join(blocks), re.M)
    assert set(verbs) <= set(VERBS)


def test_the_table_of_plans_is_what_the_command_prints():
    """But for the last SKU, which is the machine that prints it."""
    text = (ROOT / "docs/plan.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"```\n(63\.19 B parameters.*?)```", text, re.S)
    done = CliRunner().invoke(plan, [str(ROOT / "tests/data/full_size"), "--sku", "all"])
    printed = done.output.partition("\n\nWhat would fit instead")[0]

    def lines(table):
        return [line.split() for line in table.splitlines() if line and not line.startswith("cpu")]

    assert len(lines(shown)) > 20
    assert lines(shown) == lines(printed)
