"""The precisions: bits per weight of each part of a tower, scales included.

Two parts are never narrow. The time conditioning stays bf16: its angles are t x 1000, and a port
that quantized it produced degenerate text. Embeddings and heads take at least 8 bits for the same
reason (both found by PipeNetwork/nemotron-twotower-mlx). The router, the norms and the small
per-head parameters are a thousandth of the bytes and stay as the checkpoint has them.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

WIDE = Fraction(32)
NATIVE = Fraction(16)
BYTE = Fraction(8)
NVFP4 = Fraction(4) + Fraction(8, 16)  # an E4M3 scale for each 16 weights
INT4 = Fraction(4) + Fraction(16, 128)  # an fp16 scale for each 128 weights


@dataclass(frozen=True, slots=True)
class Precision:
    """Bits per weight.

    Attributes:
        name: Value of `--precision`.
        experts: Routed and shared experts: 94% of the bytes.
        projections: The in and out projections of Mamba and attention layers.
        vocabulary: Embeddings and heads.
        rest: Router, norms, convolutions, time conditioning.
        summary: One line for people.
    """

    name: str
    experts: Fraction
    projections: Fraction
    vocabulary: Fraction
    rest: Fraction
    summary: str

    def bits(self, part: str) -> Fraction:
        """Return the bits per weight of a part named as in `sizes.PARTS`."""
        if part in ("routed experts", "shared experts"):
            return self.experts
        if part in ("mamba", "attention"):
            return self.projections
        if part in ("embeddings", "head"):
            return self.vocabulary
        return self.rest

    def size(self, part: str, parameters: int) -> int:
        """Return the bytes of a part, rounded up."""
        return -(-parameters * self.bits(part).numerator // (8 * self.bits(part).denominator))


PRECISIONS: dict[str, Precision] = {
    one.name: one
    for one in (
        Precision("float32", WIDE, WIDE, WIDE, WIDE, "all in fp32: the CPU, or an fp32 checkpoint"),
        Precision("bf16", NATIVE, NATIVE, NATIVE, NATIVE, "the weights as released"),
        Precision("fp8", BYTE, BYTE, BYTE, NATIVE, "E4M3 weights, one scale per matrix"),
        Precision(
            "nvfp4", NVFP4, BYTE, BYTE, NATIVE, "experts E2M1 with a scale per 16; the rest FP8"
        ),
        Precision(
            "int4", INT4, BYTE, BYTE, NATIVE, "experts INT4 weight-only, a scale per 128; rest INT8"
        ),
    )
}
"""The precisions by name, from widest to narrowest."""

BUILT = frozenset({"float32", "bf16"})
"""Precisions that `twotower build` can make today."""
