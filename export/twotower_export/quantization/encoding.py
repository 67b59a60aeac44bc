"""Codes and scales of one matrix, whose scales are searched for the least squared error.

NumPy only, and two tricks make it fast. bfloat16 has 65,536 values, so that the error of a scale
per matrix follows from a histogram, exactly, and the codes from a table. Blocks are laid out one
per column and in pieces that stay in a core's cache, so that each operation runs over long rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from twotower_contract.bfloat16 import from_bfloat16, to_bfloat16
from twotower_contract.quantized import (
    E2M1,
    E2M1_MAX,
    E4M3_MAX,
    INT4_OFFSET,
    NVFP4_BLOCK,
    Format,
    e4m3_value,
)

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Scales = Literal["search", "amax"]
"""`amax`: the largest weight becomes the largest code, as ModelOpt and llm-compressor do."""

PIECE: Final = 2**16
"""Weights that are worked on at once: a few arrays of them fit in a core's cache."""

FP8_STEPS: Final = tuple(2.0 ** (step / 8) for step in range(-8, 9))
"""Scales that are tried for a matrix, relative to the one of `amax`: one octave down and up."""

NVFP4_STEPS: Final = (-1, 1, 4, 5)
"""Scales that are tried for a block: so many E4M3 codes beside the one of `amax`.

Four codes up are 1.5 times the scale: the largest weight becomes a 4 in place of a 6.
"""

INT4_STEPS: Final = (1.07, 1.035, 0.965, 0.93, 0.895, 0.86, 0.825)
"""Scales that are tried for a group, relative to the one of `amax`.

That one makes the largest weight a 7.5, which is clipped if it is positive; 1.07 times it a 7.
"""

_BIASED: Final = np.float32(1.5 * 2**22)  # adding and subtracting it rounds to multiples of 0.5
_EXPONENT: Final = 0x7F800000


@dataclass(frozen=True, slots=True)
class Encoded:
    """A quantized matrix.

    Attributes:
        arrays: Codes and scales in the order of `stored_tensors`, as their bytes lie on disk.
        error: Sum of the squared differences from the weights.
        energy: Sum of the squared weights.
    """

    arrays: tuple[Array, ...]
    error: float
    energy: float


def encode(
    stored: Array,
    format_: Format,
    group: int,
    scales: Scales = "search",
    largest: float | None = None,
) -> Encoded:
    """Quantize a matrix.

    Args:
        stored: [out, in]; float32, or uint16 holding the bits of bfloat16.
        format_: The format.
        group: Weights that share a scale in `int4`, whose scales have the dtype of `stored`.
        scales: How to choose them.
        largest: Magnitude that the scale of the scales of `nvfp4` is made for, where several
            matrices share it; by default the matrix's own.

    Raises:
        ValueError: A weight is infinite or not a number.
    """
    encoders: dict[Format, Callable[[Array, int, Scales], Encoded]] = {
        "fp8": _fp8,
        "nvfp4": functools.partial(_nvfp4, largest=largest),
        "int4": _int4,
    }
    return encoders[format_](stored, group, scales)


def as_float32(stored: Array) -> Floats:
    """Return weights as they are stored in float32."""
    values: Floats = stored if stored.dtype == np.float32 else from_bfloat16(stored)
    return values


def _fp8(stored: Array, _: int, scales: Scales) -> Encoded:
    values, counts, places = _histogram(stored)
    used = counts > 0
    weights, times = values[used].astype(np.float64), counts[used]
    amax = np.float32(_finite(np.abs(weights).max(initial=0.0)))
    first = amax / np.float32(E4M3_MAX) if amax else np.float32(1)

    def error_of(scale: np.float32) -> float:
        decoded = _e4m3()[_e4m3_codes(values[used] / scale)] * np.float64(scale)
        return float(((decoded - weights) ** 2 * times).sum())

    tried = [first]
    if scales == "search":
        # graphs in bfloat16 take the scale in it: one that it holds loses nothing there
        steps = np.array([first * step for step in FP8_STEPS], np.float32)
        tried = list(as_float32(to_bfloat16(steps)))
    error, scale = min(((error_of(one), one) for one in tried), key=lambda pair: pair[0])
    with np.errstate(all="ignore"):  # among all values are NaN and infinities, which no weight has
        table = _e4m3_codes(values / scale)
    codes = np.empty(stored.size, np.uint8)
    flat = places.reshape(-1)
    for begin in range(0, flat.size, PIECE):
        piece = slice(begin, begin + PIECE)
        np.take(table, flat[piece], out=codes[piece], mode="clip")
    arrays = codes.reshape(stored.shape), np.array(scale, np.float32)
    return Encoded(arrays, error, float((weights**2 * times).sum()))


def _histogram(stored: Array) -> tuple[Floats, Array, Array]:
    """Return values, how often each occurs, and for each weight the place of its value."""
    if stored.dtype == np.float32:
        bits = stored.view(np.uint32)  # by which -0 is not 0
        values, places, counts = np.unique(bits, return_inverse=True, return_counts=True)
        return values.view(np.float32), counts, places
    counts = np.zeros(2**16, np.int64)
    flat = stored.reshape(-1)
    for begin in range(0, flat.size, 4 * PIECE):
        counts += np.bincount(flat[begin : begin + 4 * PIECE], minlength=2**16)
    return as_float32(np.arange(2**16, dtype=np.uint16)), counts, stored


def _nvfp4(stored: Array, _: int, scales: Scales, largest: float | None = None) -> Encoded:
    amax = np.float32(_finite(largest_magnitude(stored) if largest is None else largest))
    scale_2 = amax / np.float32(E2M1_MAX * E4M3_MAX) if amax else np.float32(1)
    values = _e4m3()[:127].astype(np.float32)

    def quantize(weights: Floats) -> tuple[Array, Floats, Array]:
        magnitudes = np.abs(weights)
        wanted = magnitudes.max(0) / (np.float32(E2M1_MAX) * scale_2)
        wanted[wanted == 0] = 1
        first = _e4m3_codes(np.maximum(wanted, values[1]))
        tried = [first]
        if scales == "search":
            steps = (first.astype(np.int16) + step for step in NVFP4_STEPS)
            tried += [np.clip(one, 1, 126).astype(np.uint8) for one in steps]
        errors = [_e2m1_error(magnitudes, values[one] * scale_2) for one in tried]
        codes, best = _best(tried, errors)
        rounded = _e2m1(magnitudes / (values[codes] * scale_2))
        nibbles = _E2M1_CODES[(2 * rounded).astype(np.uint8)] | (weights < 0).astype(np.uint8) << 3
        return codes, best, nibbles

    chosen, packed, error, energy = _by_blocks(stored, NVFP4_BLOCK, np.uint8, quantize)
    return Encoded((packed, chosen, np.array(scale_2, np.float32)), error, energy)


def _int4(stored: Array, group: int, scales: Scales) -> Encoded:
    _finite(largest_magnitude(stored))
    store = to_bfloat16 if stored.dtype == np.uint16 else np.asarray
    steps = (1.0, *INT4_STEPS) if scales == "search" else (1.0,)

    def quantize(weights: Floats) -> tuple[Array, Floats, Array]:
        first = np.abs(weights).max(0) / np.float32(7.5)
        first[first == 0] = 1
        tried = [as_float32(store(first * np.float32(step))) for step in steps]
        scale, best = _best(tried, [_int4_error(weights, one) for one in tried])
        return scale, best, (_integers(weights / scale) + INT4_OFFSET).astype(np.uint8)

    chosen, packed, error, energy = _by_blocks(stored, group, np.float32, quantize)
    arrays = packed.view("<i4"), store(chosen), np.array(stored.shape, "<i8")
    return Encoded(arrays, error, energy)


def _by_blocks(
    stored: Array,
    size: int,
    dtype: npt.DTypeLike,
    quantize: Callable[[Floats], tuple[Array, Floats, Array]],
) -> tuple[Array, Array, float, float]:
    """Quantize a matrix [out, in] in pieces of blocks of one size.

    Args:
        dtype: Dtype of the blocks' scales.
        quantize: Returns the scales [blocks] and squared errors [blocks] of weights [size, blocks],
            and their codes of 4 bits.

    Returns:
        Scales [out, in / size], codes [out, in / 2], two in a byte, the error and the energy.
    """
    out, into = stored.shape
    chosen = np.empty(stored.size // size, dtype)
    packed = np.empty((chosen.size, size // 2), np.uint8)
    error = energy = 0.0
    for begin, weights in _columns(stored, size):
        scale, errors, nibbles = quantize(weights)
        piece = slice(begin, begin + scale.size)
        chosen[piece] = scale
        packed[piece] = (nibbles[0::2] | nibbles[1::2] << 4).T
        error += float(errors.sum(dtype=np.float64))
        energy += float(np.square(weights).sum(dtype=np.float64))
    return chosen.reshape(out, into // size), packed.reshape(out, into // 2), error, energy


def _columns(stored: Array, size: int) -> Iterator[tuple[int, Floats]]:
    """Yield pieces of a matrix as float32 [size, blocks], and the number of each one's first."""
    blocks = stored.reshape(-1, size)
    step = PIECE // size
    for begin in range(0, len(blocks), step):
        yield begin, np.ascontiguousarray(as_float32(blocks[begin : begin + step]).T)


def _best(tried: list[Array], errors: list[Floats]) -> tuple[Array, Floats]:
    """Return for each block the first of the scales with the least error, and that error."""
    best, least = tried[0], errors[0]
    for one, error in zip(tried[1:], errors[1:], strict=True):
        is_less = error < least
        best, least = np.where(is_less, one, best), np.where(is_less, error, least)
    return best, least


def _e2m1(scaled: Floats) -> Floats:
    """Round magnitudes [.., blocks] to the nearest of E2M1, ties to the even code."""
    steps = (scaled.view(np.int32) & _EXPONENT).view(np.float32)  # the power of two below
    np.maximum(steps, 1, out=steps)
    np.minimum(steps, 4, out=steps)
    steps *= _BIASED
    rounded = scaled + steps
    rounded -= steps
    return np.minimum(rounded, np.float32(E2M1_MAX), out=rounded)


def _e2m1_error(magnitudes: Floats, scale: Floats) -> Floats:
    """Return each block's squared error [blocks] under a scale."""
    scaled = magnitudes / scale
    scaled -= _e2m1(scaled)
    np.square(scaled, out=scaled)
    return np.asarray(scaled.sum(0) * np.square(scale))


def _integers(scaled: Floats) -> Floats:
    np.rint(scaled, out=scaled)
    return np.clip(scaled, -INT4_OFFSET, INT4_OFFSET - 1, out=scaled)


def _int4_error(weights: Floats, scale: Floats) -> Floats:
    """Return each group's squared error [groups] under a scale."""
    scaled = weights / scale
    scaled -= _integers(scaled.copy())
    np.square(scaled, out=scaled)
    return np.asarray(scaled.sum(0) * np.square(scale))


_E2M1_CODES: Final = np.zeros(13, np.uint8)
"""Code of each magnitude, by its double."""
for _code, _value in enumerate(E2M1):
    _E2M1_CODES[int(2 * _value)] = _code


@functools.cache
def _e4m3() -> npt.NDArray[np.float64]:
    """Return the number of each of the 256 codes."""
    return np.array([e4m3_value(code) for code in range(256)])


@functools.cache
def _e4m3_bounds() -> Floats:
    """Return the least number above each of the codes 0 to 125 that is nearer to the next one.

    A number in the middle goes to the even code. Middles of neighbours are exact in float32.
    """
    values = _e4m3()[:127]
    middles = ((values[:-1] + values[1:]) / 2).astype(np.float32)
    after = np.nextafter(middles, np.float32(np.inf))
    return np.where(np.arange(126) % 2 == 0, after, middles)


def _e4m3_codes(scaled: Floats) -> npt.NDArray[np.uint8]:
    """Return the codes of the nearest E4M3 numbers; what is larger than all becomes the largest."""
    codes = np.searchsorted(_e4m3_bounds(), np.abs(scaled), side="right").astype(np.uint8)
    return np.asarray(codes | np.left_shift(np.signbit(scaled), 7, dtype=np.uint8))


def largest_magnitude(stored: Array) -> float:
    """Return the largest magnitude; NaN or infinity where there is one."""
    if stored.dtype == np.float32:
        return float(np.abs(stored).max(initial=0.0))
    return float(as_float32((stored & 0x7FFF).max(initial=0, keepdims=True)).reshape(-1)[0])


def _finite(largest: float) -> float:
    if not np.isfinite(largest):
        raise ValueError("a weight is infinite or not a number")
    return float(largest)
