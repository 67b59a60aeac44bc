"""The chain of `SparseExperts`."""

from __future__ import annotations

from twotower_engines.kernels import experts
from twotower_engines.kernels.node import Call, Launching, Node, Op, Output, integer_cdiv, spec_of
from twotower_engines.kernels.spec import Sizes


def _sizes(call: Call, weight: str, *, transposed: bool) -> Sizes:
    outer, inner = call.size(weight, 1), call.size(weight, 2)
    hidden, width = (outer, inner) if transposed else (inner, outer)
    return Sizes(
        hidden=hidden,
        inner=width,
        experts=call.size(weight, 0),
        experts_per_token=call.size("indices", 1),
        dtype=call.dtypes[weight],
    )


def _route_outputs(call: Call) -> tuple[Output, ...]:
    n, K = call.dims["indices"]
    return Output("i32", (call.attributes["num_experts"],)), Output("i32", (n * K,))


def _route(call: Call) -> Launching:
    n, K = call.dims["indices"]
    spec = spec_of("route_tokens", experts.specs(Sizes()), call)
    return Launching(spec, (call.attributes["num_experts"],), {"PAIRS": n * K})


def _matmul(call: Call, name: str, sizes: Sizes, features: int) -> Launching:
    tiles = experts.matmul_tactics(sizes.dtype)[call.tactic - 1]
    spec = spec_of(name, experts.specs(sizes, tiles), call)
    pairs, tile = call.dims["pairs"][0], spec.launch.constants
    bound = call.minimum(pairs, pairs // tile["BLOCK_T"] + sizes.experts)
    return Launching(spec, (integer_cdiv(features, tile["BLOCK_F"]), bound), {"PAIRS": pairs})


def _up_outputs(call: Call) -> tuple[Output, ...]:
    return (Output(call.dtypes["x"], (call.dims["pairs"][0], call.dims["up"][1])),)


def _up(call: Call) -> Launching:
    sizes = _sizes(call, "up", transposed=False)
    return _matmul(call, "experts_up", sizes, sizes.inner)


def _down_outputs(call: Call) -> tuple[Output, ...]:
    return (Output("fp32", (call.dims["pairs"][0], call.dims["down"][1])),)


def _down(call: Call) -> Launching:
    sizes = _sizes(call, "down", transposed=True)
    return _matmul(call, "experts_down", sizes, sizes.hidden)


def _sum_outputs(call: Call) -> tuple[Output, ...]:
    return (Output(call.dtypes["x"], tuple(call.dims["x"])),)


def _sum(call: Call) -> Launching:
    sizes = _sizes(call, "up", transposed=False)
    spec = spec_of("experts_sum", experts.specs(sizes), call)
    tiles = integer_cdiv(sizes.hidden, spec.launch.constants["BLOCK_F"])
    return Launching(spec, (call.dims["x"][0], tiles), {})


SPARSE_EXPERTS = Op(
    ("x", "indices", "weights", "up", "down"),
    ("y",),
    (
        Node(
            "ExpertsRoute",
            ("indices",),
            ("counts", "pairs"),
            {"num_experts": int},
            _route_outputs,
            _route,
            "nothing",
        ),
        Node(
            "ExpertsUp",
            ("x", "up", "counts", "pairs", "indices"),
            ("inner",),
            {},
            _up_outputs,
            _up,
            "nothing",
            tactics=experts.TACTICS,
        ),
        Node(
            "ExpertsDown",
            ("inner", "down", "counts", "pairs", "indices"),
            ("partial",),
            {},
            _down_outputs,
            _down,
            "nothing",
            tactics=experts.TACTICS,
        ),
        Node(
            "ExpertsSum",
            ("x", "indices", "weights", "up", "down", "partial"),
            ("y",),
            {},
            _sum_outputs,
            _sum,
            "op",
        ),
    ),
)
"""The routed experts of a layer."""
