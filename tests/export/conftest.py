"""A bundle to verify."""

from __future__ import annotations

import shutil

import pytest

from tests.support.exports import without_golden


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """A checkpoint with tensors in both dtypes, and its bundle."""
    from tests.support.sabotage import PATTERN
    from twotower_export.bundle import write_bundle
    from twotower_export.checkpoint import open_checkpoint
    from twotower_export.tiny.checkpoints import write_random_checkpoint

    folder = tmp_path_factory.mktemp("verify")
    write_random_checkpoint(
        folder / "checkpoint", PATTERN, 32, seed=5, float32_suffixes=("A_log", "gate.weight")
    )
    with without_golden():
        write_bundle(open_checkpoint(folder / "checkpoint"), folder / "bundle")
    return folder


@pytest.fixture
def copied(exported, tmp_path):
    """The same, to be damaged."""
    shutil.copytree(exported / "bundle", tmp_path / "bundle")
    (tmp_path / "checkpoint").symlink_to(exported / "checkpoint")
    return tmp_path
