"""The folders of the path, of the pretrained checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.command import twotower


@pytest.fixture(scope="session")
def path_folders(tmp_path_factory) -> Path:
    """A folder with checkpoint, bundle and engines (for the CPU, of 256 tokens)."""
    folder = tmp_path_factory.mktemp("path")
    for words in (
        "tiny checkpoint --pretrained",
        "export checkpoint bundle",
        "build bundle engines --sku cpu --context 256",
    ):
        ran = twotower(*words.split(), cwd=folder, XDG_CACHE_HOME=str(folder / "cache"))
        assert ran.returncode == 0, ran.stderr
    return folder
