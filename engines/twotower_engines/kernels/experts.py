"""`SparseExperts` in four kernels: tokens are sorted by expert, then only routed experts are read.

    indices [n, K] --> route_tokens --> pairs [n * K], tiles: (expert, first pair, missing) each
    x, up          --> experts_up   --> inner [n * K, I]      relu(up x)^2, one row per (token, k)
    inner, down    --> experts_down --> partial [n * K, h]    float32
    partial        --> experts_sum  --> y [n, h]              in the order of k, and the residual

At 16 tokens a layer of the released model uses about 34 of its 128 experts, and their weights are
the time: 0.68 of 2.6 GB. A (token, k) pair is row `token * K + k` of every intermediate. Each is
written once and added in one order, so a result does not depend on which program ran first: there
are no atomics. Nothing is read back by the host: the grid has as many programs as routing can need.
The routing pass writes a table of tiles for each tactic of the products, so a program of theirs
reads its work in one place, and one without work ends at once. Working ones come first.

`expert_routing` has the first kernel, `expert_products` the two in the middle.
"""

from __future__ import annotations

import triton.language as tl

from twotower_engines.kernels.expert_products import product_specs
from twotower_engines.kernels.expert_routing import route_spec
from twotower_engines.kernels.jit import Launch, kernel
from twotower_engines.kernels.spec import KernelSpec, Sizes


@kernel
def experts_sum(
    partial: tl.tensor, indices: tl.tensor, weights: tl.tensor, shared: tl.tensor,
    hidden: tl.tensor, y: tl.tensor, gate: tl.tensor, L: tl.tensor,
    HIDDEN: tl.constexpr, E: tl.constexpr, K: tl.constexpr,
    BLOCK_F: tl.constexpr,
) -> None:  # fmt: skip
    """Compute y = hidden + gate * (shared + sum over k of weight * partial).

    The sum is taken in float32 and in the order of k, and rounded to T after each step, as the op's
    function is. gate: [rows, HIDDEN], one for the L tokens of a row, or None.
    Grid (n, features / BLOCK_F), for only the first dimension of a grid goes beyond 65535. A pair
    without an expert has no partial: it is not read.
    """
    token = tl.program_id(0)
    feature = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    real = feature < HIDDEN
    total = tl.zeros((BLOCK_F,), dtype=tl.float32)
    for k in tl.static_range(K):
        pair = token * K + k
        index = tl.load(indices + pair)
        width = tl.where((index >= 0) & (index < E), HIDDEN, 0)
        place = partial + pair.to(tl.int64) * HIDDEN + feature
        value = tl.load(place, mask=feature < width, other=0.0)
        total += tl.load(weights + pair) * value
    T: tl.constexpr = y.dtype.element_ty
    place = token.to(tl.int64) * HIDDEN + feature
    total = total.to(T).to(tl.float32) + tl.load(shared + place, mask=real).to(tl.float32)
    total = total.to(T).to(tl.float32)
    if gate is not None:
        factor = tl.load(gate + (token // L).to(tl.int64) * HIDDEN + feature, mask=real)
        total = (factor.to(tl.float32) * total).to(T).to(tl.float32)
    total = tl.load(hidden + place, mask=real).to(tl.float32) + total
    tl.store(y + place, total.to(T), mask=real)


SUM_LAUNCH = Launch({"BLOCK_F": 512}, num_warps=4)


def sum_specs(sizes: Sizes) -> list[KernelSpec]:
    """Return the weighted sum of a model's context tower, and of its denoiser, which has a gate."""
    gated = {"HIDDEN": sizes.hidden, "E": sizes.experts, "K": sizes.experts_per_token}
    types = {
        **{"partial": "*fp32", "indices": "*i32", "weights": "*fp32", "L": "i32"},
        **dict.fromkeys(("shared", "hidden", "y", "gate"), f"*{sizes.dtype}"),
    }
    plain = {**gated, "gate": None, "L": None}
    return [
        KernelSpec.of("experts_sum", experts_sum, types, plain, SUM_LAUNCH),
        KernelSpec.of("experts_sum_gated", experts_sum, types, gated, SUM_LAUNCH),
    ]


def specs(sizes: Sizes) -> list[KernelSpec]:
    """Return all kernels of one model, the products in every tactic."""
    return [route_spec(sizes.experts), *product_specs(sizes), *sum_specs(sizes)]
