"""Products in 8 bits, for a CPU that multiplies bytes several times as fast as float32.

A row of a matrix, one output, has a scale; so has each token's row of what it is multiplied with,
found while it runs. A token's result is the same alone and in a batch. The router and the time
conditioning stay in float32: what they decide or scale, a rounding moves. So do small matrices:
rounding the rows takes longer than it saves.

(ONNX Runtime's `MatMulNBits` reads 4-bit weights as they lie, with 8 bits of each token at accuracy
level 4. At one token it is five times as fast as float32; at the 16 of a block it is slower. Its
8-bit products of rows, `MatMulIntegerToFloat`, take a quarter of the time at either.)
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from twotower_engines.runtime.nodes import MICROSOFT, Nodes
from twotower_engines.runtime.packed_session import write_shapes
from twotower_engines.runtime.routed_experts import Parts

Array = npt.NDArray[Any]

MOST, ZERO = 127, 128
"""Codes are whole numbers up to `MOST`, plus `ZERO`. Both sides are without sign: where a CPU has
no instruction for whole products of bytes (AVX-512 VNNI, AVX-VNNI), ONNX Runtime adds two products
with a signed byte in 16 bits, which are too few."""

REDUCED_FROM = 2**17
"""Least weights of a matrix that is reduced. With 16 tokens, 352 x 512 weights take 27 in place of
61 microseconds (one core of a Xeon with AMX); 128 x 128 take longer than in float32."""

LEAST = 1e-30
"""Least scale times `MOST`: a row of zeros has no other."""


def use_int8(model: onnx.ModelProto) -> dict[str, Parts]:
    """Compute the products with projections, experts and heads in 8 bits.

    Args:
        model: A graph whose weights are inputs, `SparseExperts` replaced; it is changed.

    Returns:
        Name of each matrix, which is no input any more, to what the new inputs are made of.
    """
    graph = model.graph
    write_shapes(graph)
    inputs = {value.name: value for value in graph.input}
    parts: dict[str, Parts] = {}
    rows: dict[str, tuple[str, str]] = {}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type != "Gemm" or not _is_reduced(inputs.get(node.input[1])):
            nodes.append(node)
            continue
        x, weight = node.input
        b = Nodes(node.name)
        if x not in rows:
            rows[x] = _quantized_rows(b, x)
        codes, scale = rows[x]
        weight_codes, weight_scale = f"{weight}.codes", f"{weight}.scale"
        zero = b.constant(ZERO, np.uint8)
        y = b.add(
            "MatMulIntegerToFloat",
            *(codes, weight_codes, b.constant(1.0, np.float32), weight_scale, zero, zero),
            domain=MICROSOFT,
        )
        b.add("Mul", y, scale, output=node.output[0])
        nodes += b.written
        if weight not in parts:
            out, into = (size.dim_value for size in inputs[weight].type.tensor_type.shape.dim)
            value = helper.make_tensor_value_info
            graph.input.append(value(weight_codes, TensorProto.UINT8, [into, out]))
            graph.input.append(value(weight_scale, TensorProto.FLOAT, [out]))
            graph.input.remove(inputs[weight])
            parts[weight] = _int8_parts(weight_codes, weight_scale)
    del graph.node[:]
    graph.node.extend(nodes)
    return parts


def _is_reduced(weight: onnx.ValueInfoProto | None) -> bool:
    if weight is None or not ("_proj" in weight.name or weight.name.endswith("lm_head.weight")):
        return False
    size: int = math.prod(each.dim_value for each in weight.type.tensor_type.shape.dim)
    return size >= REDUCED_FROM


def _quantized_rows(b: Nodes, x: str) -> tuple[str, str]:
    """Return the codes of each row of a matrix, and its scale, [rows, 1]."""
    most = b.add("ReduceMax", b.add("Abs", x), b.constant([1]), keepdims=1)
    bounded = b.add("Max", most, b.constant(LEAST, np.float32))
    scale = b.add("Div", bounded, b.constant(MOST, np.float32))
    whole = b.add("Round", b.add("Div", x, scale))
    shifted = b.add("Add", whole, b.constant(ZERO, np.float32))
    return b.add("Cast", shifted, to=TensorProto.UINT8), scale


def _int8_parts(codes: str, scale: str) -> Parts:
    def parts(array: Array) -> dict[str, Array]:
        most = np.maximum(np.abs(array).max(axis=1), np.float32(LEAST))
        each = (most / MOST).astype(np.float32)
        whole = (np.rint(array.T / each) + ZERO).astype(np.uint8)
        return {codes: np.ascontiguousarray(whole), scale: each}

    return parts
