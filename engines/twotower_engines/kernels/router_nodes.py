"""The chain of `Router`."""

from __future__ import annotations

from twotower_engines.kernels import router
from twotower_engines.kernels.node import (
    Call,
    Dim,
    Launching,
    Node,
    Op,
    Output,
    integer_cdiv,
    spec_of,
)

INPUTS = ("x", "matrix", "correction", "lengths")
OUTPUTS = ("indices", "weights")


def _tokens(call: Call) -> Dim:
    return call.dims["x"][0] * call.dims["x"][1]


def _product_outputs(call: Call) -> tuple[Output, ...]:
    return (Output("fp32", (_tokens(call), call.dims["matrix"][0])),)


def _product(call: Call) -> Launching:
    """Return the launch in the call's tactic."""
    experts, tokens = call.size("matrix", 0), _tokens(call)
    specs = router.product_specs(experts, call.size("x", 2), call.dtypes["x"])
    spec = spec_of(f"router_product.{call.tactic}", specs, call)
    tiles = spec.launch.constants
    grid = (integer_cdiv(experts, tiles["BLOCK_F"]), call.cdiv(tokens, tiles["BLOCK_T"]))
    return Launching(spec, grid, {"TOKENS": tokens})


def _choice_outputs(call: Call) -> tuple[Output, ...]:
    dims = (_tokens(call), call.attributes["per_token"])
    return Output("i32", dims), Output("fp32", dims)


def _choice(call: Call) -> Launching:
    given = call.attributes
    spec = router.choice_spec(
        call.size("matrix", 0),
        given["per_token"],
        bool(given["normalized"]),
        given["scaling"],
        call.dtypes["correction"],
    )
    return Launching(spec, (_tokens(call),), {"L": call.dims["x"][1]})


ROUTER = Op(
    INPUTS,
    OUTPUTS,
    (
        Node(
            "RouterProduct",
            ("x", "matrix"),
            ("router_logits",),
            {},
            _product_outputs,
            _product,
            "nothing",
            len(router.TACTICS),
        ),
        Node(
            "RouterChoice",
            (*INPUTS, "router_logits"),
            OUTPUTS,
            {"per_token": int, "normalized": int, "scaling": float},
            _choice_outputs,
            _choice,
            "op",
        ),
    ),
)
"""From a layer's tokens to their experts, in float32."""
