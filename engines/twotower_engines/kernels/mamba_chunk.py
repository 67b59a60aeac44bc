"""The recurrence of `MambaBlockStep` within a chunk of tokens, as parts of the scan's kernels.

See `mamba` for the mathematics, and for how products split a float32 factor.
"""

from __future__ import annotations

import triton.language as tl

from twotower_engines.kernels.jit import kernel

CHUNK = 16
"""Tokens of a chunk of the scan; a denoiser's block is one chunk."""


@kernel
def softplus(x: tl.tensor) -> tl.tensor:
    """Return log(1 + e^x), accurate where e^x is far below 1: dt of a closed head is not 0."""
    power = tl.exp(tl.minimum(x, 20.0))
    one_more = 1.0 + power
    # log(u) * e / (u - 1) repairs the rounding of u = 1 + e (Kahan).
    rounded = one_more - 1.0
    safe = tl.where(rounded == 0.0, 1.0, rounded)
    small = tl.where(rounded == 0.0, power, tl.log(one_more) * (power / safe))
    return tl.where(x > 20.0, x, small)


@kernel
def product(
    a: tl.tensor, b: tl.tensor, c: tl.tensor, SPLIT: tl.constexpr, UPCAST: tl.constexpr
) -> tl.tensor:
    """Return a @ b + c, accumulated in float32.

    SPLIT: which factor is float32 while the other is bf16, "left" or "right"; it enters as the sum
    of two bf16 numbers, the smaller first. "none": both are of one type.
    """
    if SPLIT == "none":
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        c = tl.dot(a, b, c, input_precision="ieee")
    else:
        whole = a if SPLIT == "left" else b
        high = whole.to(tl.bfloat16)
        low = (whole - high.to(tl.float32)).to(tl.bfloat16)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
            high, low = high.to(tl.float32), low.to(tl.float32)
        if SPLIT == "left":
            c = tl.dot(low, b, c)
            c = tl.dot(high, b, c)
        else:
            c = tl.dot(a, low, c)
            c = tl.dot(a, high, c)
    return c


@kernel
def steps_of(row: tl.tuple, dt_bias: tl.tensor, A_log: tl.tensor, head: tl.tensor) -> tl.tuple:
    """Return what gives a head's steps: raw ones of the row, and the head's bias and rate."""
    xbc, _, length, STRIDE, CONV_DIM = row
    rate = -tl.exp(tl.load(A_log + head).to(tl.float32))
    bias = tl.load(dt_bias + head).to(tl.float32)
    return xbc + CONV_DIM + head, length, bias, rate, STRIDE


@kernel
def decays(steps: tl.tuple, time: tl.tensor) -> tl.tuple:
    """Return steps, the decay's logarithm up to each token, and over the chunk, of one head.

    Tokens past a row's length take no step.
    """
    dt, length, bias, rate, STRIDE = steps
    there = time < length
    raw = tl.load(dt + time * STRIDE, mask=there, other=0.0).to(tl.float32)
    step = tl.where(there, softplus(raw + bias), 0.0)
    total = tl.cumsum(step * rate, axis=0)
    return step, total, tl.min(total, axis=0)  # it only falls: its last value


@kernel
def within(total: tl.tensor, lane: tl.tensor) -> tl.tensor:
    """Return the decay from each token of a chunk (columns) to each (rows); 0 from later ones."""
    since = total[:, None] - total[None, :]
    return tl.exp(tl.where(lane[:, None] >= lane[None, :], since, float("-inf")))


@kernel
def similar(c: tl.tensor, b: tl.tensor, decay: tl.tensor, UPCAST: tl.constexpr) -> tl.tensor:
    """Return how much of a chunk's tokens (columns) each of some tokens (rows) sees."""
    zero = tl.zeros((c.shape[0], b.shape[0]), dtype=tl.float32)
    return product(c, tl.trans(b), zero, "none", UPCAST) * decay


@kernel
def attended(
    c: tl.tensor, b: tl.tensor, x: tl.tensor, step: tl.tensor, decay: tl.tensor, state: tl.tensor,
    since: tl.tensor,
    UPCAST: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return what a chunk's tokens see of the chunk and of a state, [tokens, channels].

    decay: within the chunk; since: its logarithm from the state to each token. Where x is bf16, a
    chunk of more than 16 tokens is multiplied with on the tensor cores.
    The products are one chain on purpose: with two accumulators the compiler
    lays the second product out anew, and spills kilobytes.
    """
    SPLIT: tl.constexpr = "none" if c.dtype == tl.float32 else "right"
    similarity = similar(c, b, decay, UPCAST)
    y = tl.zeros((c.shape[0], state.shape[0]), dtype=tl.float32)
    y = product(c, tl.trans(state), y, SPLIT, UPCAST) * tl.exp(since)[:, None]
    if c.dtype == tl.float32 or c.shape[0] <= 16:
        y = product(similarity, x * step[:, None], y, "none", UPCAST)
    else:
        y = product(similarity * step[None, :], x.to(c.dtype), y, "left", UPCAST)
    return y
