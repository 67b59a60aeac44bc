"""The chain of `SparseExperts`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twotower_engines.kernels import experts
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


def _bound(pairs: Dim, tokens: int, experts: int, minimum: Callable[[Dim, Any], Dim]) -> Dim:
    """Return `experts.tile_bound` of a size that may be symbolic."""
    return minimum(pairs, pairs // tokens + experts)


def _route_outputs(call: Call) -> tuple[Output, ...]:
    n, K = call.dims["indices"]
    count = call.attributes["num_experts"]
    bounds = (_bound(n * K, tokens, count, call.minimum) for tokens in experts.TILE_TOKENS)
    return Output("i32", (n * K,)), *(Output("i32", (bound, 4)) for bound in bounds)


def _route(call: Call) -> Launching:
    n, K = call.dims["indices"]
    count = call.attributes["num_experts"]
    spec = spec_of("route_tokens", experts.specs(Sizes(experts=count)), call)
    return Launching(spec, (count,), {"PAIRS": n * K})


def _matmul(call: Call, name: str, sizes: Sizes, features: int) -> Launching:
    tiles = experts.matmul_tactics(sizes.dtype)[call.tactic - 1]
    spec = spec_of(name, experts.specs(sizes, tiles), call)
    pairs = call.dims["pairs"][0]
    bound = _bound(pairs, tiles.constants["BLOCK_T"], sizes.experts, call.minimum)
    grid = (integer_cdiv(features, tiles.constants["BLOCK_F"]), bound)
    return Launching(spec, grid, {"PAIRS": pairs})


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
            ("pairs", "few", "many"),
            {"num_experts": int},
            _route_outputs,
            _route,
            "nothing",
        ),
        Node(
            "ExpertsUp",
            ("x", "up", "pairs", "few", "many", "indices"),
            ("inner",),
            {},
            _up_outputs,
            _up,
            "nothing",
            tactics=experts.TACTICS,
        ),
        Node(
            "ExpertsDown",
            ("inner", "down", "pairs", "few", "many", "indices"),
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
