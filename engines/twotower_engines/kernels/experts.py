"""`SparseExperts` in four kernels: tokens are sorted by expert, then only routed experts are read.

    indices [n, K] --> route_tokens --> pairs [n * K], tiles: (expert, first pair, missing) each
    x, up          --> experts_up   --> inner [n * K, I]      relu(up x)^2, one row per (token, k)
    inner, down    --> experts_down --> partial [n * K, h]    float32
    partial        --> experts_sum  --> y [n, h]              in the order of k

At 16 tokens a layer of the released model uses about 34 of its 128 experts, and their weights are
the time: 0.68 of 2.6 GB. A (token, k) pair is row `token * K + k` of every intermediate. Each is
written once and added in one order, so a result does not depend on which program ran first: there
are no atomics. Nothing is read back by the host: the grid has as many programs as routing can need.
The routing pass writes a table of tiles for each tactic of the products, so a program of theirs
reads its work in one place, and one without work ends at once. Working ones come first.

Weights are the left operand of the products (`weight [BLOCK_F, k] @ tokens [k, BLOCK_T]`): tensor
cores take 64 rows at a time on Hopper, weights have them, and a handful of tokens does not.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from twotower_engines.kernels.jit import INTERPRETED, Launch, kernel, launch
from twotower_engines.kernels.spec import KernelSpec, Sizes


@kernel
def write_tiles(
    tiles: tl.tensor,
    counts: tl.tensor,
    expert: tl.tensor,
    first: tl.tensor,
    PAIRS: tl.tensor,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
) -> None:
    """Write one expert's tiles of BLOCK_T pairs at their place, and its share of those left over.

    tiles: [most, 4], of which three are used: expert, first sorted pair, and how many pairs a full
    tile would have more; a tile of zeros is a full one of expert 0. counts: [BLOCK_E] pairs of each
    expert; first: sorted pairs of lower experts.
    """
    lane = tl.arange(0, BLOCK_E)
    needed = tl.where(lane < E, (counts + BLOCK_T - 1) // BLOCK_T, 0)
    below = tl.sum(tl.where(lane < expert, needed, 0), axis=0)
    count = tl.sum(tl.where(lane == expert, counts, 0), axis=0)
    for start in range(0, count, BLOCK_E * BLOCK_T):
        pair = start + lane * BLOCK_T
        out = tiles + 4 * (below + start // BLOCK_T + lane)
        tl.store(out, lane * 0 + expert, mask=pair < count)
        tl.store(out + 1, first + pair, mask=pair < count)
        tl.store(out + 2, tl.maximum(BLOCK_T - count + pair, 0), mask=pair < count)
    most = tl.minimum(PAIRS, PAIRS // BLOCK_T + E)
    for free in range(tl.sum(needed, axis=0) + expert, most, E):
        tl.store(tiles + 4 * free + 2, BLOCK_T)


@kernel
def route_tokens(
    indices: tl.tensor,
    PAIRS: tl.tensor,
    pairs: tl.tensor,
    few: tl.tensor,
    many: tl.tensor,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    FEW: tl.constexpr,
    MANY: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """Sort the pairs of one expert, and write its tiles of FEW and of MANY tokens; grid (E,).

    Where an expert's pairs start is the number of pairs of lower experts, which every program
    counts for itself: programs need not meet. Indices that no expert has are left out.
    """
    expert = tl.program_id(0)
    counts = tl.zeros((BLOCK_E,), dtype=tl.int32)
    for start in range(0, PAIRS, CHUNK):
        pair = start + tl.arange(0, CHUNK)
        index = tl.load(indices + pair, mask=pair < PAIRS, other=-1)
        known = (index >= 0) & (index < E)
        counts += tl.histogram(tl.where(known, index, E), BLOCK_E)  # the bin after the last: none
    lane = tl.arange(0, BLOCK_E)
    first = tl.sum(tl.where(lane < expert, counts, 0), axis=0)
    write_tiles(few, counts, expert, first, PAIRS, E, BLOCK_E, FEW)
    write_tiles(many, counts, expert, first, PAIRS, E, BLOCK_E, MANY)
    if tl.sum(tl.where(lane == expert, counts, 0), axis=0) == 0:
        return
    for start in range(0, PAIRS, CHUNK):
        pair = start + tl.arange(0, CHUNK)
        index = tl.load(indices + pair, mask=pair < PAIRS, other=-1)
        mine = (index == expert).to(tl.int32)
        tl.store(pairs + first + tl.cumsum(mine, axis=0) - 1, pair, mask=mine > 0)
        first += tl.sum(mine, axis=0)


@kernel
def tile_of(
    tiles: tl.tensor, pairs: tl.tensor, PAIRS: tl.tensor, E: tl.constexpr, BLOCK_T: tl.constexpr
) -> tl.tensor:
    """Return (expert, its pairs [BLOCK_T], which are real, how many) of this program's tile.

    Safe for any table: TensorRT times a plugin on inputs of its own making.
    """
    place = tiles + 4 * tl.program_id(1)
    expert, start, missing = tl.load(place), tl.load(place + 1), tl.load(place + 2)
    rows = tl.minimum(BLOCK_T - missing, PAIRS - start)
    rows = tl.where((expert >= 0) & (expert < E) & (start >= 0) & (missing >= 0), rows, 0)
    lane = tl.arange(0, BLOCK_T)
    pair = tl.load(pairs + start + lane, mask=lane < rows, other=-1)
    return expert.to(tl.int64), pair, (pair >= 0) & (pair < PAIRS), rows


@kernel
def product_tile(
    weight: tl.tensor,
    tokens: tl.tensor,
    rows: tl.tensor,
    used: tl.tensor,
    first: tl.tensor,
    FEATURES: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
) -> tl.tensor:
    """Return weight[first : first + BLOCK_F] @ tokens[rows].T, [BLOCK_F, BLOCK_T] float32.

    weight [FEATURES, DEPTH] and tokens [*, DEPTH] are contiguous, `used` marks real rows. What a
    last, narrower step has is in a product of its own: the loop masks no depth.
    """
    WHOLE: tl.constexpr = DEPTH - DEPTH % BLOCK_K
    feature = first + tl.arange(0, BLOCK_F)
    real = feature < FEATURES
    weight += feature.to(tl.int64)[:, None] * DEPTH
    tokens += rows.to(tl.int64)[None, :] * DEPTH
    depth = tl.arange(0, BLOCK_K)
    left, right = weight + depth[None, :], tokens + depth[:, None]
    result = tl.zeros((BLOCK_F, BLOCK_T), dtype=tl.float32)
    for _ in range(0, WHOLE, BLOCK_K):
        w = tl.load(left, mask=real[:, None], other=0.0)
        x = tl.load(right, mask=used[None, :], other=0.0)
        if UPCAST:
            w, x = w.to(tl.float32), x.to(tl.float32)
        result = tl.dot(w, x, result, input_precision="ieee")
        left += BLOCK_K
        right += BLOCK_K
    if WHOLE < DEPTH:
        rest = WHOLE + tl.arange(0, triton.next_power_of_2(max(16, DEPTH - WHOLE)))
        inside = rest < DEPTH
        w = tl.load(weight + rest[None, :], mask=real[:, None] & inside[None, :], other=0.0)
        x = tl.load(tokens + rest[:, None], mask=inside[:, None] & used[None, :], other=0.0)
        if UPCAST:
            w, x = w.to(tl.float32), x.to(tl.float32)
        result = tl.dot(w, x, result, input_precision="ieee")
    return result


@kernel
def experts_up(
    x: tl.tensor,
    up: tl.tensor,
    pairs: tl.tensor,
    few: tl.tensor,
    many: tl.tensor,
    PAIRS: tl.tensor,
    inner: tl.tensor,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MANY: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """Compute relu(up[e] x)^2 for a tile of pairs and features; grid (features / BLOCK_F, tiles).

    Rounded to T before the square and after, as the op's function is.
    """
    expert, pair, used, count = tile_of(many if MANY else few, pairs, PAIRS, E, BLOCK_T)
    if count <= 0:
        return
    first = tl.program_id(0) * BLOCK_F
    weight = up + expert * (INNER * HIDDEN)
    result = product_tile(
        weight, x, pair // K, used, first, INNER, HIDDEN, BLOCK_F, BLOCK_T, BLOCK_K, UPCAST
    )
    result = tl.maximum(result, 0.0).to(inner.dtype.element_ty).to(tl.float32)
    feature = first + tl.arange(0, BLOCK_F)
    out = inner + pair.to(tl.int64)[None, :] * INNER + feature[:, None]
    mask = (feature < INNER)[:, None] & used[None, :]
    tl.store(out, (result * result).to(inner.dtype.element_ty), mask=mask)


@kernel
def experts_down(
    inner: tl.tensor,
    down: tl.tensor,
    pairs: tl.tensor,
    few: tl.tensor,
    many: tl.tensor,
    PAIRS: tl.tensor,
    partial: tl.tensor,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    E: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MANY: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """Compute down[e] inner for a tile of pairs and features; grid (features / BLOCK_F, tiles)."""
    expert, pair, used, count = tile_of(many if MANY else few, pairs, PAIRS, E, BLOCK_T)
    if count <= 0:
        return
    first = tl.program_id(0) * BLOCK_F
    weight = down + expert * (INNER * HIDDEN)
    result = product_tile(
        weight, inner, pair, used, first, HIDDEN, INNER, BLOCK_F, BLOCK_T, BLOCK_K, UPCAST
    )
    feature = first + tl.arange(0, BLOCK_F)
    out = partial + pair.to(tl.int64)[None, :] * HIDDEN + feature[:, None]
    tl.store(out, result, mask=(feature < HIDDEN)[:, None] & used[None, :])


@kernel
def experts_sum(
    partial: tl.tensor,
    indices: tl.tensor,
    weights: tl.tensor,
    y: tl.tensor,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_F: tl.constexpr,
) -> None:
    """Compute y = sum over k of weight * partial, in float32 and in the order of k.

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
    out = y + token.to(tl.int64) * HIDDEN + feature
    tl.store(out, total.to(y.dtype.element_ty), mask=real)


def tile_bound(pairs: int, experts: int, block_t: int) -> int:
    """Return the most tiles that any routing of that many pairs can need.

    Every expert has at most one tile that is not full, and no tile is empty.
    """
    return min(pairs, experts + pairs // block_t)


TILE_TOKENS = (16, 64)
"""Pairs of a small tile and of a large one; `route_tokens` lists the tiles of both sizes."""

TACTICS = 3
"""Ways to cut the products: two with small tiles of tokens, one with large ones."""


def matmul_tactics(dtype: str) -> tuple[Launch, ...]:
    """Return the tiles of both products, one set for each tactic.

    Few tokens: the time is the weights', so tiles are small in tokens, and 40 kB of shared memory
    hold four of 64 deep or two of 128, which need half the barriers and fewer instructions for a
    weight, and have less in flight. Five programs of a multiprocessor keep 100 to 150 kB of weights
    in flight, several times what bandwidth times latency asks for. Many tokens: larger tiles, so
    that weights are read once or twice. All within what a plugin may use.
    """
    short = 2 if dtype == "fp32" else 1  # a float32 tile has half the depth
    few, many = TILE_TOKENS
    return (
        Launch({"BLOCK_F": 64, "BLOCK_T": few, "BLOCK_K": 64 // short}, 4, 4),
        Launch({"BLOCK_F": 64, "BLOCK_T": few, "BLOCK_K": 128 // short}, 4, 2),
        Launch({"BLOCK_F": 64, "BLOCK_T": many, "BLOCK_K": 64 // short}, 4, 3),
    )


def matmul_launch(tokens: int, experts: int, per_token: int, dtype: str) -> Launch:
    """Return the tiles of both products, by the mean number of tokens of an expert."""
    few, *_, many = matmul_tactics(dtype)
    return few if tokens * per_token <= 16 * experts else many


def route_launch(experts: int) -> Launch:
    """Return the tiles of the routing pass: 1024 pairs, as many as a step of 10 rows has."""
    return Launch({"CHUNK": 1024, "BLOCK_E": triton.next_power_of_2(experts + 1)}, num_warps=4)


def sum_launch() -> Launch:
    """Return the tiles of the weighted sum."""
    return Launch({"BLOCK_F": 512}, num_warps=4)


def sparse_experts(
    x: Any, indices: Any, weights: Any, up: Any, down: Any, config: Launch | None = None
) -> Any:
    """Return the routed experts' weighted sum on torch tensors, without synchronizing.

    Args:
        x: [n, hidden] T (bf16 or float32), contiguous, as all others.
        indices: [n, K] int32, -1 for none.
        weights: [n, K] float32.
        up: [E, inner, hidden] T.
        down: [E, hidden, inner] T.
        config: Tiles of the products; by default `matmul_launch`.

    Returns:
        y [n, hidden] T.
    """
    import torch

    (n, hidden), (experts, inner_size, _), per_token = x.shape, up.shape, indices.shape[1]
    count = n * per_token
    dtype = "fp32" if x.dtype == torch.float32 else "bf16"
    tiles = config or matmul_launch(n, experts, per_token, dtype)
    block_f, block_t = tiles.constants["BLOCK_F"], tiles.constants["BLOCK_T"]
    sizes = TILE_TOKENS if block_t in TILE_TOKENS else (block_t, block_t)
    pairs = indices.new_empty((max(count, 1),))
    few, many = (indices.new_empty((tile_bound(count, experts, size), 4)) for size in sizes)
    inner = x.new_empty((count, inner_size))
    partial = x.new_empty((count, hidden), dtype=torch.float32)
    y = torch.empty_like(x)

    launch(
        route_tokens,
        (experts,),
        (indices, count, pairs, few, many),
        {"E": experts, "FEW": sizes[0], "MANY": sizes[1]},
        route_launch(experts),
    )
    dims = {"HIDDEN": hidden, "INNER": inner_size, "E": experts}
    matmul = {**dims, "MANY": block_t == sizes[1], "UPCAST": INTERPRETED}
    bound = tile_bound(count, experts, block_t)
    launch(
        experts_up,
        (triton.cdiv(inner_size, block_f), bound),
        (x, up, pairs, few, many, count, inner),
        {**matmul, "K": per_token},
        tiles,
    )
    launch(
        experts_down,
        (triton.cdiv(hidden, block_f), bound),
        (inner, down, pairs, few, many, count, partial),
        matmul,
        tiles,
    )
    config = sum_launch()
    grid = (n, triton.cdiv(hidden, config.constants["BLOCK_F"]))
    launch(experts_sum, grid, (partial, indices, weights, y), {**dims, "K": per_token}, config)
    return y


def specs(sizes: Sizes, tiles: Launch | None = None) -> list[KernelSpec]:
    """Return all four kernels for one model.

    Args:
        sizes: Sizes of the model and of a call.
        tiles: Tiles of the products; by default `matmul_launch`.
    """
    T = f"*{sizes.dtype}"
    dims = {"HIDDEN": sizes.hidden, "INNER": sizes.inner, "E": sizes.experts}
    tiles = tiles or matmul_launch(
        sizes.tokens, sizes.experts, sizes.experts_per_token, sizes.dtype
    )
    few, many = TILE_TOKENS
    matmul = {**dims, "MANY": tiles.constants["BLOCK_T"] == many, "UPCAST": False}
    work = {"pairs": "*i32", "few": "*i32", "many": "*i32"}
    return [
        KernelSpec(
            "route_tokens",
            route_tokens,
            {"indices": "*i32", "PAIRS": "i32", **work},
            {"E": sizes.experts, "FEW": few, "MANY": many},
            route_launch(sizes.experts),
        ),
        KernelSpec(
            "experts_up",
            experts_up,
            {"x": T, "up": T, **work, "PAIRS": "i32", "inner": T},
            {**matmul, "K": sizes.experts_per_token},
            tiles,
        ),
        KernelSpec(
            "experts_down",
            experts_down,
            {"inner": T, "down": T, **work, "PAIRS": "i32", "partial": "*fp32"},
            matmul,
            tiles,
        ),
        KernelSpec(
            "experts_sum",
            experts_sum,
            {"partial": "*fp32", "indices": "*i32", "weights": "*fp32", "y": T},
            {**dims, "K": sizes.experts_per_token},
            sum_launch(),
        ),
    ]
