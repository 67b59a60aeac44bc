"""The kernels on a real GPU. Each check is a process of its own: see `tests.support.gpu_checks`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from tests.support import ROOT

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def check(compiled: Callable[..., Any]) -> Callable[[str], Any]:
    """What one of the checks prints."""

    def run(name: str) -> Any:
        paths = [str(ROOT), str(ROOT / "engines"), os.environ.get("PYTHONPATH", "")]
        source = f"import runpy, sys\nsys.argv = ['', {name!r}]\n"
        source += "runpy.run_module('tests.support.gpu_checks', run_name='__main__')"
        environment = {
            "PYTHONPATH": os.pathsep.join(paths),
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # deterministic torch asks for it
        }
        return compiled(source, **environment)

    return run


def test_refine(check: Callable[[str], Any]) -> None:
    found = check("refine")
    assert found["wrong"] == 0
    assert found["full_size_wrong"] == 0
    assert found["confidence"] < 1e-5
    assert found["failed_row"] == -1
    assert found["same"]


def test_experts(check: Callable[[str], Any]) -> None:
    found = check("experts")
    assert found["errors"].pop("float32") < 1e-5
    for tokens, error in found["errors"].items():
        assert error < 4e-3, tokens
    assert found["same"]


def test_quantized_experts(check: Callable[[str], Any]) -> None:
    for name, error in check("quantized")["errors"].items():
        assert error < 4e-3, name


def test_mamba(check: Callable[[str], Any]) -> None:
    found = check("mamba")
    for name, error in found["errors"].items():
        bound = 1e-4 if name.startswith("fp32") else 6e-3
        assert error <= (0.0 if name.endswith("conv") else bound), name
    assert found["same"]


def test_plugins_through_the_driver(check: Callable[[str], Any]) -> None:
    """TensorRT's way of launching our kernels, without TensorRT: see `plugin_launches`."""
    pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings")
    found = check("plugins")
    assert {name.split()[0] for name in found["errors"]} == {
        *("RefineBlock", "Router", "SparseExperts", "MambaBlockStep"),
        *("LinearINT4", "LinearNVFP4"),
    }
    for name, error in found["errors"].items():
        assert error < 2e-2, name
    for name, same in found["same"].items():
        assert same, name
