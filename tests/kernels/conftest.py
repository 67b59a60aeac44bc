"""Runs the kernels on the CPU: Triton's interpreter is chosen when a kernel's module is imported.

The variable is set for the import and for each test here only, so that no other test's subprocess
inherits it. Tests that compile for a GPU start a process of their own (`compiled`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests.support import ROOT

os.environ["TRITON_INTERPRET"] = "1"
from twotower_engines.kernels import (
    experts,  # noqa: F401
    jit,
    linear,  # noqa: F401
    mamba,  # noqa: F401
    refine,  # noqa: F401
    router,  # noqa: F401
)

del os.environ["TRITON_INTERPRET"]
assert jit.INTERPRETED, "a kernel module was imported before tests/kernels/conftest.py"


def _bfloat16_like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds float32 to the nearest bf16: this version of the interpreter truncates."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def converted(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, rounding)
        bits = np.asarray(values).view(np.uint32).astype(np.uint64)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(values), 0x7FC0, nearest).astype(np.uint16)

    monkeypatch.setattr(interpreter, "_convert_float", converted)


@pytest.fixture
def overflow_fails() -> None:
    """Let every sum and product of integers be made in int64 too: tests of extremes ask for it."""


@pytest.fixture(autouse=True)
def _interpreter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, interpreted kernels, and outputs that are NaN or huge until they are written.

    Looking for overflows takes a third of the time, and small sizes have none.
    """
    import torch
    from triton.runtime.interpreter import interpreter_builder

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    looks = "overflow_fails" in request.fixturenames
    options = replace(interpreter_builder.options, sanitize_overflow=looks)
    monkeypatch.setattr(interpreter_builder, "options", options)
    _bfloat16_like_a_gpu(monkeypatch)
    torch.use_deterministic_algorithms(True)  # with it, torch.empty is filled
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def compiled() -> Callable[[str], Any]:
    """Runs Python source in a process whose kernels are compiled; what it prints is JSON."""

    def run(source: str, **environment: str) -> Any:
        clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        done = subprocess.run(
            [sys.executable, "-c", source],
            env={**clean, "OMP_NUM_THREADS": "1", **environment},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout)

    return run
