"""Denormal numbers count as zero in an engine's call, and nowhere else."""

from __future__ import annotations

import platform
import sys

import numpy as np
import pytest

from twotower_engines.runtime.interface import ExtendRow
from twotower_engines.runtime.onnxruntime import OnnxRuntime

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64",
    reason="only x86-64 Linux lets a thread flush denormal numbers here",
)


def has_denormals():
    return bool(np.float32(1e-38) * np.float32(0.01) != 0)


def test_calls_flush_them_and_leave_the_thread_as_it_was(random_engines):
    """The first session of a process would change its thread for good."""
    made = random_engines()
    seen = []
    runtime = OnnxRuntime(made.engines, threads=1)
    assert has_denormals()
    session = runtime._bindings["extend"].session

    class Watched:
        def run_with_iobinding(self, io):
            seen.append(has_denormals())
            session.run_with_iobinding(io)
            raise RuntimeError("as a call may fail")

    runtime._bindings["extend"].session = Watched()
    with pytest.raises(RuntimeError, match="may fail"):
        runtime.extend([ExtendRow(0, np.array([5], np.int32))])
    runtime.close()
    assert seen == [False]
    assert has_denormals()
