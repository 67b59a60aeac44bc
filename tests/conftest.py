"""Fixtures that every folder of tests shares."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

# Before anything imports torch: its threads spin while they wait, which on two cores costs small
# models ten times what it gains. Child processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def _has_gpu() -> bool:
    """Ask the driver's own tool: no package that a machine without a GPU lacks is imported."""
    tool = shutil.which("nvidia-smi")
    return tool is not None and subprocess.run([tool, "-L"], capture_output=True).returncode == 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if _has_gpu():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU and its driver")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
