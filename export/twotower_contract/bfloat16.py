"""Numbers in bfloat16, the upper halves of float32 numbers, in NumPy arrays of 16-bit integers."""

from __future__ import annotations

from typing import Any


def to_bfloat16(values: Any) -> Any:
    """Return the bits of an array of finite float32 numbers, rounded to nearest, ties to even."""
    bits = values.view("uint32")
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("uint16")


def from_bfloat16(bits: Any) -> Any:
    """Return the float32 numbers that an array of bits stands for."""
    return (bits.astype("uint32") << 16).view("float32")
