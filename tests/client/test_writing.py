"""`--dry-run` writes nothing and `--force` replaces anything, in each verb that writes folders."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-m", "twotower_client.cli"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A function that runs a verb among folders named checkpoint, bundle and engines."""
    folder = tmp_path_factory.mktemp("made")
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}

    def run_verb(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *words], capture_output=True, text=True, cwd=folder, env=environment
        )

    for words in (
        "tiny checkpoint --pretrained",
        "export checkpoint bundle",
        "build bundle engines --sku cpu --context 256",
    ):
        ran = run_verb(*words.split())
        assert ran.returncode == 0, ran.stderr
    run_verb.folder = folder
    return run_verb


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
def test_dry_run_then_force(run, words: str) -> None:
    folder = run.folder
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
