"""Arithmetic that takes denormal numbers for zero, where that is many times faster.

A softmax over masked keys and the decay within a block leave numbers below float32's normal range
(1.2e-38) by the thousand, and an x86 core takes some 150 cycles for each that it meets. No sum can
tell them from zero. ONNX Runtime has an option for the threads of its own; it leaves the calling
thread as it is, but for the first session of a process, where it changes it for good.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import platform
import sys
from collections.abc import Iterator
from typing import Any

FLUSH = 0x8040  # in the control word of vector arithmetic: denormal results and operands are zero

OPTION = "session.set_denormal_as_zero"
"""ONNX Runtime's, to be set only where `can_flush`, and inside `denormals_as_zero`."""


class _Environment(ctypes.Structure):
    """C's fenv_t on x86-64 Linux."""

    _fields_ = (("x87", ctypes.c_uint32 * 7), ("mxcsr", ctypes.c_uint32))


@functools.cache
def _library() -> Any:
    """Return the library that knows the state of a thread's arithmetic; None elsewhere."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return None
    library = ctypes.CDLL(None)  # the process itself, which has C's mathematics in it
    return library if hasattr(library, "fesetenv") else None


def can_flush() -> bool:
    """Return whether a thread can be told to take denormal numbers for zero, and back."""
    return _library() is not None


@contextlib.contextmanager
def denormals_as_zero() -> Iterator[None]:
    """Take denormal numbers for zero in this thread, and leave it as it was."""
    library = _library()
    if library is None:
        yield
        return
    before = _Environment()
    library.fegetenv(ctypes.byref(before))
    inside = _Environment(before.x87, before.mxcsr | FLUSH)
    library.fesetenv(ctypes.byref(inside))
    try:
        yield
    finally:
        library.fesetenv(ctypes.byref(before))
