"""The chains of `SparseExperts`, and of its forms with weights of 8 and 4 bits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from twotower_engines.kernels import expert_products, expert_routing, experts
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

TOKENS = ("x", "indices", "weights", "shared", "hidden", "gate")
"""Inputs of the op before its banks."""


def _bound(pairs: Dim, tokens: int, count: int, minimum: Callable[[Dim, Any], Dim]) -> Dim:
    """Return the most tiles that any routing of so many pairs can need; sizes may be symbolic.

    Every expert has at most one tile that is not full, and no tile is empty.
    """
    return minimum(pairs, pairs // tokens + count)


def _route_outputs(call: Call) -> tuple[Output, ...]:
    n, K = call.dims["indices"]
    count = call.attributes["num_experts"]
    sizes = expert_routing.TILE_TOKENS
    bounds = (_bound(n * K, tokens, count, call.minimum) for tokens in sizes)
    return Output("i32", (n * K,)), *(Output("i32", (bound, 4)) for bound in bounds)


def _route(call: Call) -> Launching:
    n, K = call.dims["indices"]
    count = call.attributes["num_experts"]
    spec = spec_of("route_tokens", [expert_routing.route_spec(count)], call)
    return Launching(spec, (count,), {"PAIRS": n * K})


def _product_outputs(which: str, form: str, call: Call) -> tuple[Output, ...]:
    features = call.dims[which][expert_products.FEATURE_AXIS[form]]
    dtype = call.dtypes["x"] if which == "up" else "fp32"
    return (Output(dtype, (call.dims["pairs"][0], features)),)


def _product(which: str, form: str, call: Call) -> Launching:
    """Return the launch of one of the products, in the call's tactic."""
    tokens = "x" if which == "up" else "inner"
    expert_products.require_bf16(form, call.dtypes[tokens])
    count, depth = call.size(which, 0), call.size(tokens, -1)
    features = call.size(which, expert_products.FEATURE_AXIS[form])
    sizes = Sizes(
        hidden=depth if which == "up" else features,
        inner=features if which == "up" else depth,
        experts=count,
        experts_per_token=call.size("indices", 1),
        dtype=call.dtypes[tokens],
        experts_format=form,
    )
    groups = call.size(f"{which}_scale", 2) if form == "int4" else 1
    specs = expert_products.product_specs(sizes, depth // groups)
    spec = spec_of(f"experts_{which}.{call.tactic}", specs, call)
    pairs, tiles = call.dims["pairs"][0], spec.launch.constants
    bound = _bound(pairs, tiles["BLOCK_T"], count, call.minimum)
    return Launching(spec, (integer_cdiv(features, tiles["BLOCK_F"]), bound), {"PAIRS": pairs})


def _sum_outputs(call: Call) -> tuple[Output, ...]:
    return (Output(call.dtypes["x"], tuple(call.dims["hidden"])),)


def _sum(call: Call) -> Launching:
    sizes = Sizes(
        hidden=call.size("hidden", 1),
        experts=call.size("up", 0),
        experts_per_token=call.size("indices", 1),
        dtype=call.dtypes["x"],
    )
    is_gated = bool(call.attributes["gated"])
    (spec,) = (one for one in experts.sum_specs(sizes) if ("gate" in one.types) == is_gated)
    spec = spec_of(spec.name, [spec], call)
    tiles = integer_cdiv(sizes.hidden, spec.launch.constants["BLOCK_F"])
    rows = call.dims["gate"][0]
    integers = {"L": call.dims["hidden"][0] // rows} if is_gated else {}
    return Launching(spec, (call.dims["hidden"][0], tiles), integers)


def sparse_experts(form: str) -> Op:
    """Return the op of one format of banks; each bank's scales follow it."""
    suffix = expert_products.SUFFIXES[form]
    up, down = (
        (which, *(f"{which}_{name}" for name in expert_products.SCALES[form]))
        for which in ("up", "down")
    )
    inputs = (*TOKENS, *up, *down)
    work = ("pairs", "few", "many", "indices")
    counted: dict[str, type] = {"num_experts": int}
    tactics = expert_products.TACTICS
    chain = (
        Node(
            f"ExpertsRoute{suffix}",
            ("indices",),
            ("pairs", "few", "many"),
            counted,
            _route_outputs,
            _route,
            "nothing",
        ),
        Node(
            f"ExpertsUp{suffix}",
            ("x", *up, *work),
            ("inner",),
            {},
            partial(_product_outputs, "up", form),
            partial(_product, "up", form),
            "nothing",
            tactics,
        ),
        Node(
            f"ExpertsDown{suffix}",
            ("inner", *down, *work),
            ("partial",),
            {},
            partial(_product_outputs, "down", form),
            partial(_product, "down", form),
            "nothing",
            tactics,
        ),
        Node(
            f"ExpertsSum{suffix}",
            (*inputs, "partial"),
            ("y",),
            {"gated": int},
            _sum_outputs,
            _sum,
            "op",
        ),
    )
    return Op(inputs, ("y",), chain)


EXPERT_OPS = {
    f"SparseExperts{suffix}": sparse_experts(form)
    for form, suffix in expert_products.SUFFIXES.items()
}
"""The routed experts of a layer, by name."""
