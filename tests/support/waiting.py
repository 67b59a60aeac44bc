"""Waiting until something is so."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Value = TypeVar("Value")


def wait_until(holds: Callable[[], Value], seconds: float = 60.0) -> Value:
    """Ask again and again until the answer is true, and return it."""
    end = time.monotonic() + seconds
    while not (value := holds()):
        assert time.monotonic() < end, f"not so after {seconds:g} s"
        time.sleep(0.02)
    return value
