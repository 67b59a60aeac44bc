"""Matrices of 8 and 4 bits as inputs of a graph, and the nodes that make weights of them.

The inputs are those of `twotower_contract.quantized.input_forms`. FP8 is dequantized by ONNX's own
operator. ONNX Runtime has none for E2M1, and TensorRT writes a matrix with a scale per block out in
T at every call, so 4 bits are a function each, in ordinary operators. Our kernels take the codes in
its place, wherever a product or `SparseExperts` takes what it makes.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from twotower_contract.quantized import (
    E2M1,
    INT4_OFFSET,
    NVFP4_BLOCK,
    Format,
    e4m3_value,
)
from twotower_export.graph.body import FLOAT, INT32, Body, inputs

UINT32 = ir.DataType.UINT32

FUNCTIONS = {"int4": "FromINT4", "nvfp4": "FromNVFP4"}
"""The function that decodes a format, by its name in the domain."""


def from_fp8(b: Body, codes: ir.Value, scale: ir.Value) -> ir.Value:
    """Return FP8 matrices [.., in, out] as weights [.., out, in] in the dtype of their scales.

    TensorRT dequantizes inside of the product then. It copies codes that lie as they are stored,
    and writes all weights out in T where the scale is cast.
    """
    assert scale.shape is not None, "an input's rank is known"
    rank = len(scale.shape)
    wide = b.op.DequantizeLinear(codes, scale, axis=0)
    return b.transpose(wide, *range(rank), rank + 1, rank)


def decoder(format_: Format, dtype: ir.DataType) -> ir.Function:
    """`twotower::FromINT4` or `twotower::FromNVFP4`: weights of 4 bits in T, rounded once.

    Inputs: codes [.., out, in / 8] int32, eight codes in a word, the lowest bits first. INT4: scale
    [.., out, in / group] T. NVFP4: scale [.., out * in / 64] int32, four E4M3 codes in a word, one
    for each 16 weights; scale_2 [..] float32. Output: weights [.., out, in] T.
    """
    b = Body(dtype)
    if format_ == "int4":
        args = inputs("codes", "scale")
        codes, scale = args
        b.begin("values")
        values = b.op.Sub(b.cast(_unpacked(b, codes, 4), FLOAT), b.f32(INT4_OFFSET))
        b.begin("scales")
        wide = b.unsqueeze(b.up(scale), -1)
        groups = b.op.Concat(b.op.Shape(scale), b.i64([-1]), axis=0)
    else:
        args = inputs("codes", "scale", "scale_2")
        codes, scale, scale_2 = args
        b.begin("values")
        signed = [*E2M1, *(-value for value in E2M1)]
        values = b.op.Gather(b.f32(signed), b.cast(_unpacked(b, codes, 4), INT32))
        b.begin("scales")
        table = [value if value == value else 0.0 for value in map(e4m3_value, range(256))]
        each = b.op.Gather(b.f32(table), b.cast(_unpacked(b, scale, 8), INT32))
        wide = b.op.Mul(each, b.unsqueeze(scale_2, -2, -1))
        rows = b.op.Shape(codes, end=-1)
        wide = b.op.Reshape(wide, b.op.Concat(rows, b.i64([-1, 1]), axis=0))
        groups = b.op.Concat(rows, b.i64([-1, NVFP4_BLOCK]), axis=0)
    b.begin("weights")
    weights = b.op.Mul(b.op.Reshape(values, groups), wide)
    shape = b.op.Concat(b.op.Shape(codes, end=-1), b.i64([-1]), axis=0)
    weights = b.down(b.op.Reshape(weights, shape))
    doc = f"Weights of {format_} in the dtype of the graph."
    return b.function(FUNCTIONS[format_], args, {"weights": weights}, doc)


def _unpacked(b: Body, words: ir.Value, bits: int) -> ir.Value:
    """Return the codes of 32-bit words along a new last axis, uint32."""
    shifts = b.const(np.arange(0, 32, bits), UINT32)
    shifted = b.op.BitShift(b.unsqueeze(b.cast(words, UINT32), -1), shifts, direction="RIGHT")
    return b.op.BitwiseAnd(shifted, b.const((1 << bits) - 1, UINT32))
