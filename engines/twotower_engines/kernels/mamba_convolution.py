"""The convolution of `MambaBlockStep`, as parts of the scan's kernels: raw xBC to x, B and C.

A row of a call travels as a tuple: xBC of its first token, its history (three columns, newest
last), its length, and how far tokens and the columns of the history are apart.
"""

from __future__ import annotations

import triton.language as tl

from twotower_engines.kernels.jit import kernel

TAPS = tl.constexpr(4)
"""Width of the convolution; a row's history is one less."""


@kernel
def row_of(
    projected: tl.tensor,
    conv_state: tl.tensor,
    lengths: tl.tensor,
    L: tl.tensor,
    D_INNER: tl.constexpr,
    CONV_DIM: tl.constexpr,
    STRIDE: tl.constexpr,
) -> tl.tuple:
    """Return the row of this program, the second of its grid's dimensions."""
    row = tl.program_id(1).to(tl.int64)
    xbc = projected + row * L * STRIDE + D_INNER
    history = conv_state + row * (TAPS - 1) * CONV_DIM
    length = tl.maximum(tl.minimum(tl.load(lengths + row), L), 0)
    return xbc, history, length, STRIDE, CONV_DIM


@kernel
def four_taps(
    weight: tl.tensor,
    first: tl.tensor,
    count: tl.tensor,
    BLOCK: tl.constexpr,
    AGAIN: tl.constexpr,
) -> tl.tensor:
    """Return the taps of BLOCK channels from `first` on, oldest first, [1, BLOCK] float32 each.

    weight: [conv_dim, 4], read as vectors; channels from `count` on get 0. AGAIN: read in every
    turn of a loop, where the compiler would hold them in registers throughout, and there are none
    to spare.
    """
    place = tl.arange(0, TAPS * BLOCK)
    real = place < TAPS * count
    taps = tl.load(weight + first * TAPS + place, mask=real, other=0.0, volatile=AGAIN)
    even, odd = tl.split(tl.reshape(taps.to(tl.float32), (2 * BLOCK, 2)))
    first_tap, third = tl.split(tl.reshape(even, (BLOCK, 2)))
    second, fourth = tl.split(tl.reshape(odd, (BLOCK, 2)))
    return first_tap[None, :], second[None, :], third[None, :], fourth[None, :]


@kernel
def raw_columns(row: tl.tuple, time: tl.tensor, channel: tl.tensor, real: tl.tensor) -> tl.tensor:
    """Return xBC before the convolution, [times, channels] T; times below 0 are history.

    Times outside -3 .. length - 1 give 0.
    """
    xbc, history, length, STRIDE, CONV_DIM = row
    place = time[:, None]
    new = xbc + place * STRIDE + channel[None, :]
    old = history + (place + (TAPS - 1)) * CONV_DIM + channel[None, :]
    used = (place < length) & (place >= 1 - TAPS) & real[None, :]
    return tl.load(tl.where(place >= 0, new, old), mask=used, other=0.0)


@kernel
def convolved(
    row: tl.tuple, weight: tl.tensor, bias: tl.tensor, time: tl.tensor, first: tl.tensor,
    count: tl.tensor,
    BLOCK: tl.constexpr, AGAIN: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return SiLU(conv + bias) of `count` channels from `first`, [times, BLOCK], rounded to T.

    Tokens past a row's length get 0, and so do channels from `count` on. AGAIN: as of `four_taps`.
    """
    lane = tl.arange(0, BLOCK)
    real = lane < count
    channel = first + lane
    w0, w1, w2, w3 = four_taps(weight, first, count, BLOCK, AGAIN)
    shift = tl.load(bias + channel, mask=real, other=0.0).to(tl.float32)
    v0 = raw_columns(row, time - 3, channel, real)
    v1 = raw_columns(row, time - 2, channel, real)
    v2 = raw_columns(row, time - 1, channel, real)
    v3 = raw_columns(row, time, channel, real)
    total = shift[None, :] + v0.to(tl.float32) * w0
    total += v1.to(tl.float32) * w1
    total += v2.to(tl.float32) * w2
    total += v3.to(tl.float32) * w3
    xbc, _, length, _, _ = row
    silu = tl.where((time < length)[:, None], total / (1.0 + tl.exp(-total)), 0.0)
    return silu.to(xbc.dtype.element_ty)


@kernel
def keep_columns(row: tl.tuple, out: tl.tensor, channel: tl.tensor, real: tl.tensor) -> None:
    """Write a row's last three raw columns of some channels; out: the row's new history."""
    _, _, length, _, CONV_DIM = row
    slot = tl.arange(0, TAPS)
    time = length - (TAPS - 1) + slot
    newest = raw_columns(row, time, channel, real)
    place = out + slot[:, None] * CONV_DIM + channel[None, :]
    tl.store(place, newest, mask=(slot < TAPS - 1)[:, None] & real[None, :])
