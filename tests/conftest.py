"""Fixtures that every folder of tests shares."""

from __future__ import annotations

import shutil
import subprocess

import pytest


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
