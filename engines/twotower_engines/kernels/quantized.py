"""Weights of 8 and 4 bits as bf16 numbers, in registers: FP8 (E4M3), INT4 and NVFP4 (E2M1).

Only the codes travel. A code's exponent and mantissa are put where bf16 has its last ones: there
they mean a number that is too small by a power of two, also where the code is subnormal, and one
multiplication repairs it exactly. No target needs instructions for 8 or 4 bits.

On a GPU four bytes are decoded together, by a few instructions on pairs of bf16: what a compiler
makes of single elements takes twice as many. The interpreter computes the same numbers in float32.
"""

from __future__ import annotations

import triton.language as tl

from twotower_engines.kernels import jit
from twotower_engines.kernels.jit import kernel

INTERPRETED = tl.constexpr(jit.INTERPRETED)

SHRUNK = tl.constexpr(2.0**-8)
"""Factor of NVFP4 weights: a scale times 2^126, which a code needs, would be beyond bf16."""

E4M3 = tl.constexpr("""{
.reg .b32 a, b, s, t, power, zero;
mov.b32 power, 0x7b807b80;
mov.b32 zero, 0x80008000;
prmt.b32 a, $2, 0, 0x1404;
prmt.b32 b, $2, 0, 0x3424;
shr.u32 s, a, 4;
shr.u32 t, b, 4;
and.b32 s, s, 0x07f007f0;
and.b32 t, t, 0x07f007f0;
lop3.b32 s, a, 0x80008000, s, 0xea;
lop3.b32 t, b, 0x80008000, t, 0xea;
fma.rn.bf16x2 $0, s, power, zero;
fma.rn.bf16x2 $1, t, power, zero;
}""")
"""Four E4M3 codes: sign to bit 15, exponent and mantissa to bits 10 .. 4, times 2^120."""

E2M1 = tl.constexpr("""{
.reg .b32 a, b, c, d, l, h, zero;
mov.b32 zero, 0x80008000;
and.b32 l, $4, 0x0f0f0f0f;
and.b32 h, $4, 0xf0f0f0f0;
prmt.b32 a, l, 0, 0x4140;
prmt.b32 b, l, 0, 0x4342;
prmt.b32 c, h, 0, 0x4140;
prmt.b32 d, h, 0, 0x4342;
mul.lo.u32 a, a, 0x1040;
mul.lo.u32 b, b, 0x1040;
mul.lo.u32 c, c, 0x104;
mul.lo.u32 d, d, 0x104;
and.b32 a, a, 0x81c081c0;
and.b32 b, b, 0x81c081c0;
and.b32 c, c, 0x81c081c0;
and.b32 d, d, 0x81c081c0;
fma.rn.bf16x2 $0, a, $5, zero;
fma.rn.bf16x2 $1, b, $6, zero;
fma.rn.bf16x2 $2, c, $5, zero;
fma.rn.bf16x2 $3, d, $6, zero;
}""")
"""Four bytes of two E2M1 codes, times their scales: sign to bit 15, exponent and mantissa to bits
8 .. 6, both by one product, since the two shifted copies do not meet."""

INT4 = tl.constexpr("""{
.reg .b32 a, b, c, d, unit, middle, zero;
mov.b32 unit, 0x3f803f80;
mov.b32 middle, 0xc308c308;
mov.b32 zero, 0x80008000;
prmt.b32 a, $4, 0, 0x4140;
prmt.b32 b, $4, 0, 0x4342;
shr.u32 c, a, 4;
shr.u32 d, b, 4;
and.b32 a, a, 0x000f000f;
and.b32 b, b, 0x000f000f;
and.b32 c, c, 0x000f000f;
and.b32 d, d, 0x000f000f;
or.b32 a, a, 0x43004300;
or.b32 b, b, 0x43004300;
or.b32 c, c, 0x43004300;
or.b32 d, d, 0x43004300;
fma.rn.bf16x2 a, a, unit, middle;
fma.rn.bf16x2 b, b, unit, middle;
fma.rn.bf16x2 c, c, unit, middle;
fma.rn.bf16x2 d, d, unit, middle;
fma.rn.bf16x2 $0, a, $5, zero;
fma.rn.bf16x2 $1, b, $6, zero;
fma.rn.bf16x2 $2, c, $5, zero;
fma.rn.bf16x2 $3, d, $6, zero;
}""")
"""Four bytes of two codes of value + 8, times their scales: 128 + code is exact, less 136 is the
value, and the product is rounded once."""


@kernel
def e4m3_magnitude(codes: tl.tensor) -> tl.tensor:
    """Return what E4M3 codes without their signs mean, float32."""
    bits = (codes.to(tl.int32) & 0x7F) << 20
    return bits.to(tl.float32, bitcast=True) * (2.0**120)


@kernel
def from_e4m3(codes: tl.tensor) -> tl.tensor:
    """Return E4M3 codes as bf16, exactly. The two codes of NaN give 480."""
    if INTERPRETED:
        size = e4m3_magnitude(codes)
        return tl.where(codes >= 128, -size, size).to(tl.bfloat16)
    return tl.inline_asm_elementwise(
        E4M3, "=r,=r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4
    )


@kernel
def from_e2m1(codes: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """Return the low and the high E2M1 codes of bytes times `scale` * 2^-126, bf16.

    scale: of each byte, bf16; a multiple of 2^-126 that leaves the products exact.
    """
    if INTERPRETED:
        both = codes.to(tl.int32)
        low = ((both & 7) << 22).to(tl.float32, bitcast=True)
        high = (((both >> 4) & 7) << 22).to(tl.float32, bitcast=True)
        wide = scale.to(tl.float32)
        low = tl.where((both & 8) != 0, -low, low) * wide
        high = tl.where((both & 128) != 0, -high, high) * wide
        return low.to(tl.bfloat16), high.to(tl.bfloat16)
    return tl.inline_asm_elementwise(
        E2M1,
        "=r,=r,=r,=r,r,r,r",
        [codes, scale],
        dtype=(tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=4,
    )


@kernel
def from_int4(codes: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """Return the low and the high codes of bytes, less 8, times `scale`, rounded to bf16 once.

    scale: of each byte, bf16.
    """
    if INTERPRETED:
        both = codes.to(tl.int32)
        wide = scale.to(tl.float32)
        low, high = ((both & 15) - 8).to(tl.float32), ((both >> 4) - 8).to(tl.float32)
        return (low * wide).to(tl.bfloat16), (high * wide).to(tl.bfloat16)
    return tl.inline_asm_elementwise(
        INT4,
        "=r,=r,=r,=r,r,r,r",
        [codes, scale],
        dtype=(tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=4,
    )


@kernel
def from_nibbles(codes: tl.tensor, scale: tl.tensor, FORMAT: tl.constexpr) -> tl.tensor:
    """Return a tile of weights from bytes of two codes, low first; bf16, NVFP4 times `SHRUNK`.

    codes: [features, depth / 2] uint8. scale: [features, depth / group], bf16 for INT4 and E4M3
    codes for NVFP4.
    """
    ROWS: tl.constexpr = codes.shape[0]
    BYTES: tl.constexpr = codes.shape[1]
    GROUPS: tl.constexpr = scale.shape[1]
    if FORMAT == "nvfp4":
        scale = (e4m3_magnitude(scale) * (2.0**118)).to(tl.bfloat16)
    each = tl.broadcast_to(scale[:, :, None], (ROWS, GROUPS, BYTES // GROUPS))
    each = tl.reshape(each, (ROWS, BYTES))
    if FORMAT == "nvfp4":
        low, high = from_e2m1(codes, each)
    else:
        low, high = from_int4(codes, each)
    return tl.reshape(tl.join(low, high), (ROWS, 2 * BYTES))
