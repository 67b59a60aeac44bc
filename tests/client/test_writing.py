"""`--dry-run` writes nothing and `--force` replaces anything, in each verb that writes folders."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest

from tests.support.command import twotower


@pytest.fixture
def run(path_folders):
    """A function that runs a verb among folders named checkpoint, bundle and engines."""
    return partial(twotower, cwd=path_folders, XDG_CACHE_HOME=str(path_folders / "cache"))


def tree(folder: Path) -> dict[str, int]:
    found = (path for path in folder.rglob("*") if "cache" not in path.parts)
    return {str(path): path.stat().st_mtime_ns for path in found}


@pytest.mark.parametrize(
    "words",
    [
        "export checkpoint out",
        "export checkpoint out --target tensorrt-llm",
        "build bundle out --sku cpu --context 512",
        "package engines out",
    ],
)
def test_dry_run_then_force(run, path_folders, words: str) -> None:
    folder = path_folders
    out = folder / "out"
    before = tree(folder)
    dry = run(*words.split(), "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "would write" in dry.stdout
    assert tree(folder) == before
    strange = (out / "cpu" if words.startswith("build") else out) / "notes.txt"
    strange.parent.mkdir(parents=True)
    strange.write_text("mine")
    refused = run(*words.split())
    assert refused.returncode == 2
    assert strange.read_text() == "mine"
    forced = run(*words.split(), "--force")
    assert forced.returncode == 0, forced.stderr
    assert not strange.exists()
    shutil.rmtree(out)


def test_a_forced_build_builds_what_is_up_to_date(run) -> None:
    words = ["build", "bundle", "engines", "--sku", "cpu", "--context", "256"]
    assert "up to date" in run(*words).stdout
    assert "built in" in run(*words, "--force").stdout


def test_a_dry_run_still_refuses(run) -> None:
    ran = run("export", "bundle", "out", "--dry-run")
    assert ran.returncode == 2
    assert ran.stderr.startswith("error: ")
