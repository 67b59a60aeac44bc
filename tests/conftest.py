"""Fixtures that every folder of tests shares."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT

pytest_plugins = ["tests.support.served"]
WITH_SERVERS = ("tests/client/", "tests/serving/")

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


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give a whole file to one worker, and all files that start servers to the same one.

    Fixtures of modules are so made once, one server serves a session, and two servers that start
    at a time never choose the same free port.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "servers" if file.startswith(WITH_SERVERS) else file

    return ByFile(config, log)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this tree."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path
