"""The plugin of a dense product with weights of 4 bits."""

from __future__ import annotations

from functools import partial

from twotower_contract.quantized import CODES_PER_WORD, NVFP4_BLOCK
from twotower_engines.kernels import linear
from twotower_engines.kernels.expert_products import PACKED, SCALES, SUFFIXES, require_bf16
from twotower_engines.kernels.node import Call, Launching, Node, Op, Output, integer_cdiv, spec_of


def _outputs(call: Call) -> tuple[Output, ...]:
    return (Output(call.dtypes["x"], (call.dims["x"][0], call.dims["matrix"][0])),)


def _launching(form: str, call: Call) -> Launching:
    """Return the launch in the call's tactic."""
    require_bf16(form, call.dtypes["x"])
    features, depth = call.size("matrix", 0), CODES_PER_WORD * call.size("matrix", 1)
    groups = call.size("matrix_scale", 1) if form == "int4" else depth // NVFP4_BLOCK
    spec = spec_of(
        f"linear.{call.tactic}", linear.linear_specs(features, depth, form, groups), call
    )
    tokens, tiles = call.dims["x"][0], spec.launch.constants
    grid = (integer_cdiv(features, tiles["BLOCK_F"]), call.cdiv(tokens, tiles["BLOCK_T"]))
    return Launching(spec, grid, {"TOKENS": tokens})


def _linear(form: str) -> Op:
    inputs = ("x", "matrix", *(f"matrix_{name}" for name in SCALES[form]))
    node = Node(
        f"Product{SUFFIXES[form]}",
        inputs,
        ("y",),
        {},
        _outputs,
        partial(_launching, form),
        "op",
        linear.TACTICS,
    )
    return Op(inputs, ("y",), (node,))


LINEAR_OPS = {f"Linear{SUFFIXES[form]}": _linear(form) for form in PACKED}
"""Dense products by name; in a graph each is a Gemm of the weights that a function decodes."""
