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

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from twotower_engines.kernels.expert_products import (
    FEATURE_AXIS,
    SCALES,
    bank_constants,
    experts_down,
    experts_up,
    matmul_launch,
    product_specs,
)
from twotower_engines.kernels.expert_routing import (
    TILE_TOKENS,
    route_launch,
    route_spec,
    route_tokens,
    tile_bound,
)
from twotower_engines.kernels.jit import INTERPRETED, Launch, kernel, launch
from twotower_engines.kernels.spec import KernelSpec, Sizes


@kernel
def experts_sum(
    partial: tl.tensor,
    indices: tl.tensor,
    weights: tl.tensor,
    shared: tl.tensor,
    hidden: tl.tensor,
    y: tl.tensor,
    gate: tl.tensor,
    L: tl.tensor,
    HIDDEN: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_F: tl.constexpr,
) -> None:
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


def sum_launch() -> Launch:
    """Return the tiles of the weighted sum."""
    return Launch({"BLOCK_F": 512}, num_warps=4)


def sum_specs(sizes: Sizes) -> list[KernelSpec]:
    """Return the weighted sum of a model's context tower, and of its denoiser, which has a gate."""
    dims = {"HIDDEN": sizes.hidden, "E": sizes.experts, "K": sizes.experts_per_token}
    T = f"*{sizes.dtype}"
    types = {
        **{"partial": "*fp32", "indices": "*i32", "weights": "*fp32", "shared": T, "hidden": T},
        "y": T,
    }
    gated, absent = {**types, "gate": T, "L": "i32"}, {"gate": None, "L": None}
    return [
        KernelSpec("experts_sum", experts_sum, types, {**dims, **absent}, sum_launch()),
        KernelSpec("experts_sum_gated", experts_sum, gated, dims, sum_launch()),
    ]


@dataclass(frozen=True)
class Bank:
    """A bank of weights of a format in `SCALES`; codes are uint8 tensors."""

    codes: Any
    form: str
    scale: Any
    scale_2: Any = None


def _bank_arguments(which: str, bank: Any, depth: int) -> tuple[Any, dict[str, Any]]:
    """Return a bank's weights, and the products' arguments beside them."""
    if not isinstance(bank, Bank):
        return bank, bank_constants(which, "plain", depth, 0)
    groups = bank.scale.shape[2] if bank.scale.ndim == 3 else 0
    scales = {f"{which}_{name}": getattr(bank, name) for name in SCALES[bank.form]}
    return bank.codes, {**bank_constants(which, bank.form, depth, groups), **scales}


def sparse_experts(
    x: Any,
    indices: Any,
    weights: Any,
    up: Any,
    down: Any,
    config: Launch | None = None,
    *,
    shared: Any = None,
    hidden: Any = None,
    gate: Any = None,
) -> Any:
    """Return the routed experts' weighted sum on torch tensors, without synchronizing.

    With the rest of a layer where it is given: hidden + gate * (shared + sum).

    Args:
        x: [n, hidden] T (bf16 or float32), contiguous, as all others.
        indices: [n, K] int32, -1 for none.
        weights: [n, K] float32.
        up: [E, inner, hidden] T, or a `Bank`; x is bf16 then.
        down: [E, hidden, inner] T, or a `Bank` of the same format.
        config: Tiles of the products; by default `matmul_launch`.
        shared: [n, hidden] T; 0 where absent.
        hidden: [n, hidden] T; 0 where absent.
        gate: [rows, hidden] T, each for n / rows tokens; 1 where absent.

    Returns:
        y [n, hidden] T.
    """
    import torch

    (n, width), per_token = x.shape, indices.shape[1]
    count = n * per_token
    dtype = "fp32" if x.dtype == torch.float32 else "bf16"
    up_codes, up_given = _bank_arguments("up", up, width)
    experts, inner_size = up_codes.shape[0], up_codes.shape[FEATURE_AXIS[up_given["FORMAT"]]]
    down_codes, down_given = _bank_arguments("down", down, inner_size)
    group = max(up_given["GROUP"], down_given["GROUP"])
    tiles = config or matmul_launch(n, experts, per_token, dtype, up_given["FORMAT"], group)
    block_f, block_t = tiles.constants["BLOCK_F"], tiles.constants["BLOCK_T"]
    sizes = TILE_TOKENS if block_t in TILE_TOKENS else (block_t, block_t)
    pairs = indices.new_empty((max(count, 1),))
    few, many = (indices.new_empty((tile_bound(count, experts, size), 4)) for size in sizes)
    inner = x.new_empty((count, inner_size))
    partial = x.new_empty((count, width), dtype=torch.float32)
    y = torch.empty_like(x)

    launch(
        route_tokens,
        (experts,),
        (indices, count, pairs, few, many),
        {"E": experts, "FEW": sizes[0], "MANY": sizes[1]},
        route_launch(experts),
    )
    dims = {"HIDDEN": width, "INNER": inner_size, "E": experts}
    matmul = {**dims, "MANY": block_t == sizes[1], "UPCAST": INTERPRETED}
    bound = tile_bound(count, experts, block_t)
    launch(
        experts_up,
        (triton.cdiv(inner_size, block_f), bound),
        (x, up_codes, pairs, few, many, count, inner),
        {**matmul, "K": per_token, **up_given},
        tiles,
    )
    launch(
        experts_down,
        (triton.cdiv(width, block_f), bound),
        (inner, down_codes, pairs, few, many, count, partial),
        {**matmul, **down_given},
        tiles,
    )
    config = sum_launch()
    grid = (n, triton.cdiv(width, config.constants["BLOCK_F"]))
    constants = {"HIDDEN": width, "E": experts, "K": per_token}
    shared, hidden = (torch.zeros_like(x) if one is None else one for one in (shared, hidden))
    tokens = n if gate is None else n // gate.shape[0]
    given = (partial, indices, weights, shared, hidden, y, gate, tokens)
    launch(experts_sum, grid, given, constants, config)
    return y


def specs(sizes: Sizes) -> list[KernelSpec]:
    """Return all kernels of one model, the products in every tactic."""
    return [route_spec(sizes.experts), *product_specs(sizes), *sum_specs(sizes)]
