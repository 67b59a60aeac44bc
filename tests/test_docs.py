"""The documents say what is there: the map of the code, links, verbs, messages; the site builds."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from docs import code_map
from tests.support import ROOT
from tests.support.command import twotower
from twotower_client.cli import VERBS
from twotower_engines.cli.plan import plan

DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / ".github").rglob("*.md"), *(ROOT / "docs").rglob("*.md")]
)


GENERATED = {"../code-map.md"}  # pages that the site makes


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_the_map_names_every_module_and_no_other():
    heading, modules = "", set()
    for line in code_map.code_map().splitlines():
        if line.startswith("##"):
            heading = line.strip("# ")
            modules.add(f"{heading}/__init__.py")
        elif line.startswith("| `"):
            modules.add(f"{heading}/{line.split('`')[1]}")
    sources = {
        name_of(path)
        for room in ("export", "engines", "client")
        for path in ROOT.glob(f"{room}/**/*.py")
    }
    assert modules == sources


def test_the_map_shows_the_docstrings_of_now(tmp_path):
    package = tmp_path / "export/thing"
    package.mkdir(parents=True)
    wheel = '[tool.hatch.build.targets.wheel]\npackages = ["export/thing"]\n'
    (tmp_path / "pyproject.toml").write_text(wheel)
    (package / "__init__.py").write_text('"""Everything\nabout it.\n\nMore."""\n')
    (package / "part.py").write_text('"""One part.\n\nMore."""\n')
    text = code_map.code_map(tmp_path)
    assert "## export/thing\n\nEverything about it.\n" in text
    assert "| `part.py` | One part. |" in text


def test_every_module_says_what_it_is():
    for package in code_map.packages():
        for path in package.rglob("*.py"):
            sentence = code_map.first_sentence(path)
            assert sentence, path
            assert "|" not in sentence, f"{path}: breaks the table of the map"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_between_documents_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
        if not re.match(r"\w+:", target) and target not in GENERATED:
            assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_files_that_documents_name_are_there(document):
    rooms = r"(?:export|engines|client|tests|docs|benchmarks|triton_repo|\.github|requirements)"
    text = document.read_text(encoding="utf-8")
    for path in re.findall(rf"`({rooms}/[\w./-]*)`", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_commands_in_documents_are_verbs(document):
    text = document.read_text(encoding="utf-8")
    blocks = re.findall(r"```(?:sh|bash|console)?\n(.*?)```", text, re.S)
    verbs = re.findall(r"^\s*(?:\$ )?twotower ([a-z]+)", "\n".join(blocks), re.M)
    assert set(verbs) <= set(VERBS)


def test_the_table_of_plans_is_what_the_command_prints():
    """But for the last SKU, which is the machine that prints it."""
    text = (ROOT / "docs/plan.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"```\n(63\.19 B parameters.*?)```", text, re.S)
    done = CliRunner().invoke(plan, ["--sku", "all"])
    printed = done.output.partition("\n\nWhat would fit instead")[0]

    def lines(table):
        return [line.split() for line in table.splitlines() if line and not line.startswith("cpu")]

    assert len(lines(shown)) > 20
    assert lines(shown) == lines(printed)


def test_the_core_loop_runs_as_its_page_says(tmp_path):
    """Every block of the page, in its order, in one folder."""
    text = (ROOT / "docs/design/core-loop.md").read_text(encoding="utf-8")
    commands, code = (
        re.findall(rf"```{language}\n(.*?)```", text, re.S) for language in ("sh", "python")
    )
    for line in "".join(commands).splitlines():
        arguments = line.removeprefix("twotower ").split()
        ran = twotower(*arguments, cwd=tmp_path)
        assert ran.returncode == 0, ran.stderr
    assert sum(len(block.splitlines()) for block in code) <= 100
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(code)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    printed = done.stdout
    assert "Mia" in printed.partition("mia ->")[2]
    assert printed.rstrip().endswith("denoiser calls for 48 tokens")


def strings_of_code() -> list[str]:
    """Every text in the packages, with an ellipsis for each value that is formatted into it."""

    def text(node: ast.AST) -> str:
        if isinstance(node, ast.JoinedStr):
            return "".join(text(part) for part in node.values)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return text(node.left) + text(node.right)
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        return node.value if is_text else "\u2026"

    return [
        text(node)
        for package in code_map.packages()
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.JoinedStr | ast.Constant | ast.BinOp)
    ]


def test_the_messages_that_troubleshooting_explains_are_those_of_the_code():
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^### `+ ?(.*?) ?`+$", page, re.M)
    known = strings_of_code()
    assert len(messages) > 20
    for message in messages:
        parts = [re.escape(part) for part in message.split("\u2026")]
        pattern = re.compile(".*".join(parts), re.S)
        assert any(pattern.search(text) for text in known), message


def test_the_site_builds_and_fetches_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"<(?:script|img|iframe)[^>]*\ssrc=.?(?:https?:)?//", text), page
        assert "mermaid" not in text, f"{page}: the theme would fetch mermaid for its diagrams"
        assert not re.search(r"<link[^>]*\shref=.?(?:https?:)?//", text), page
    for style in tmp_path.rglob("*.css"):
        assert not re.search(r"url\(.?https?:", style.read_text(encoding="utf-8")), style
