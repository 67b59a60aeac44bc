"""Fixtures that every folder of tests shares."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT
from tests.support.exports import without_golden

pytest_plugins = ["tests.support.served"]
WITH_SERVERS = ("tests/client/", "tests/serving/")

# Before anything imports torch: its threads spin while they wait, which on two cores costs small
# models ten times what it gains. Child processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests import ONNX Runtime themselves, where our code goes through twotower_contract.onnxruntime.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
# A shell lets what it starts in the background ignore Ctrl-C, and that is inherited: by the
# processes, too, which tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def _has_gpu() -> bool:
    """Ask the driver's own tool: no package that a machine without a GPU lacks is imported."""
    tool = shutil.which("nvidia-smi")
    return tool is not None and subprocess.run([tool, "-L"], capture_output=True).returncode == 0


@pytest.hookimpl(trylast=True)  # of the tests that run
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    _soak_beside(items)
    if _has_gpu():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU and its driver")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def _soak_beside(items: list[pytest.Item]) -> None:
    """Let the two minutes' soak begin with the first test that has servers, and be asked last."""
    asked = [item for item in items if "soaking" in getattr(item, "fixturenames", ())]
    if asked:
        first = next(item for item in items if item.nodeid.startswith(WITH_SERVERS))
        first.fixturenames.insert(0, "soaking")  # type: ignore[attr-defined]
        items[:] = [item for item in items if item not in asked] + asked


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
def tensorrt_environment(tmp_path_factory) -> dict[str, str]:
    """Variables of a process that imports `tensorrt_bindings`, the Python API of TensorRT 11.4.

    The package holds bindings alone, and NVIDIA promises no other library under them: this is for
    tests of our plugins' definitions, and of names. The bindings ask the dynamic linker for
    TensorRT's file names, so a folder of links gives TensorRT-RTX under them. It has no library of
    plugins, of which the bindings need one function.
    """
    folder = tmp_path_factory.mktemp("tensorrt")
    (package,) = importlib.util.find_spec("tensorrt_rtx_libs").submodule_search_locations
    libraries = {"nvinfer": "tensorrt_rtx", "nvonnxparser": "tensorrt_onnxparser_rtx"}
    for asked, given in libraries.items():
        (folder / f"lib{asked}.so.11").symlink_to(Path(package) / f"lib{given}.so.1")
    source = folder / "plugins.c"
    source.write_text("_Bool initLibNvInferPlugins(void *log, char const *space) { return 1; }\n")
    library = folder / "libnvinfer_plugin.so.11"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    return {**os.environ, "LD_LIBRARY_PATH": str(folder)}


@pytest.fixture(scope="module")
def quick_exports():
    """For modules whose bundles need no golden answer: exports compute none."""
    with without_golden():
        yield


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this tree."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path
