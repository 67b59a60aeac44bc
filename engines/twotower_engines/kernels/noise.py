"""Gumbel noise of `RefineBlock`: a function of (seed, position, token), and no state.

A keyed permutation of the field of 2^31 - 1 elements, x -> x^5 with round keys, as in the cipher
MiMC. The ONNX function computes the same bits with int64 products and remainders; here elements are
uint32, a product is one wide multiplication, and 2^31 = 1 takes the place of the remainder.
"""

from __future__ import annotations

import triton.language as tl

from twotower_engines.kernels.jit import kernel

PRIME = tl.constexpr(2**31 - 1)
"""Elements of the field."""

TAIL = tl.constexpr(2.0**-6)
"""Where U is at most this far from 1, -log(U) is the first four terms of its series: the GPU's fast
log is off by a fixed 4e-7 there, six times the least -log(U)."""

MOST_NOISE = tl.constexpr(16.64)
"""Upper bound of the noise: U is at most 1 - 2^-24, and -log(-log(U)) then 16.6355."""


@kernel
def folded(x: tl.tensor) -> tl.tensor:
    """Return x less PRIME where it is at least that; x is a uint32 below 2 * PRIME."""
    return tl.minimum(x, x - PRIME)  # the difference wraps round to a large number otherwise


@kernel
def multiply(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    """Return x * y in the field; both are uint32 below PRIME.

    The product's upper and lower 31 bits add up to it, since 2^31 = 1: no division.
    """
    product = x.to(tl.uint64) * y.to(tl.uint64)
    return folded((product.to(tl.uint32) & PRIME) + (product >> 31).to(tl.uint32))


@kernel
def fifth_power(x: tl.tensor) -> tl.tensor:
    """Return x^5 in the field: a permutation, since 5 does not divide 2^31 - 2."""
    square = multiply(x, x)
    return multiply(multiply(square, square), x)


@kernel
def noise_keys(seed: tl.tensor, position: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Return the two round keys of a position, int32 scalars as uint32."""
    place = seed.to(tl.uint32) + 7919 * (position.to(tl.uint32) + 1) + 1
    first = fifth_power(folded((place & PRIME) + (place >> 31)))
    return first, fifth_power(folded(first + 104729))


@kernel
def gumbel(token: tl.tensor, first: tl.tensor, second: tl.tensor) -> tl.tensor:
    """Return the Gumbel noise of a token under a position's keys, float32.

    U lies strictly inside (0, 1) and is exact in float32: 23 bits and a half.
    """
    mixed = fifth_power(folded(token.to(tl.uint32) + first))
    mixed = fifth_power(folded(mixed + second))
    uniform = ((mixed >> 8).to(tl.float32) + 0.5) * (1.0 / 8388608.0)
    rest = 1.0 - uniform
    tail = (((0.25 * rest + 1.0 / 3.0) * rest + 0.5) * rest + 1.0) * rest
    return -tl.log(tl.where(rest < TAIL, tail, -tl.log(uniform)))
