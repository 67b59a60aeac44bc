"""`SparseExperts` in four kernels: tokens are sorted by expert, then only routed experts are read.

    indices [n, K] --> route_tokens --> counts [E], pairs [n * K]
    x, up          --> experts_up   --> inner [n * K, I]      relu(up x)^2, one row per (token, k)
    inner, down    --> experts_down --> partial [n * K, h]    float32
    partial        --> experts_sum  --> y [n, h]              in the order of k

At 16 tokens a layer of the released model uses about 34 of its 128 experts, and their weights are
the time: 0.68 of 2.6 GB. A (token, k) pair is row `token * K + k` of every intermediate. Each is
written once and added in one order, so a result does not depend on which program ran first: there
are no atomics. Nothing is read back by the host: the grid has as many programs as routing can need,
and those that find no work end at once. Working ones come first.

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
def route_tokens(
    indices: tl.tensor,
    PAIRS: tl.tensor,
    counts: tl.tensor,
    pairs: tl.tensor,
    CHUNK: tl.constexpr,
) -> None:
    """Write the pairs of one expert, in order, at its place in the sorted list; grid (E,).

    Where an expert's pairs start is the number of pairs of lower experts, which every program
    counts for itself: programs need not meet. Negative indices belong to no expert.
    """
    expert = tl.program_id(0)
    below = 0
    count = 0
    for start in range(0, PAIRS, CHUNK):
        pair = start + tl.arange(0, CHUNK)
        index = tl.load(indices + pair, mask=pair < PAIRS, other=-1)
        below += tl.sum(((index >= 0) & (index < expert)).to(tl.int32), axis=0)
        count += tl.sum((index == expert).to(tl.int32), axis=0)
    tl.store(counts + expert, count)
    if count == 0:
        return
    for start in range(0, PAIRS, CHUNK):
        pair = start + tl.arange(0, CHUNK)
        index = tl.load(indices + pair, mask=pair < PAIRS, other=-1)
        mine = (index == expert).to(tl.int32)
        tl.store(pairs + below + tl.cumsum(mine, axis=0) - 1, pair, mask=mine > 0)
        below += tl.sum(mine, axis=0)


@kernel
def tile_of(
    tile: tl.tensor,
    counts: tl.tensor,
    PAIRS: tl.tensor,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
) -> tl.tensor:
    """Return (expert, first sorted pair, number of pairs) of a tile; 0 pairs without work.

    Tiles number the experts' pairs in groups of BLOCK_T. Safe for any counts: TensorRT times a
    plugin on inputs of its own making.
    """
    expert = tl.arange(0, BLOCK_E)
    count = tl.load(counts + expert, mask=expert < E, other=0)
    tiles = (count + BLOCK_T - 1) // BLOCK_T
    end = tl.cumsum(tiles, axis=0)
    mine = tl.sum((end <= tile).to(tl.int32), axis=0)
    here = expert == mine
    skipped = (tile - tl.sum(tl.where(here, end - tiles, 0), axis=0)) * BLOCK_T
    start = tl.sum(tl.where(expert < mine, count, 0), axis=0) + skipped
    left = tl.sum(tl.where(here, count, 0), axis=0) - skipped
    rows = tl.minimum(tl.minimum(left, BLOCK_T), PAIRS - start)
    return mine, start, tl.where((mine < E) & (start >= 0), rows, 0)


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

    weight [FEATURES, DEPTH] and tokens [*, DEPTH] are contiguous, `used` marks real rows.
    """
    feature = first + tl.arange(0, BLOCK_F)
    depth = tl.arange(0, BLOCK_K)
    real = feature < FEATURES
    left = weight + feature.to(tl.int64)[:, None] * DEPTH + depth[None, :]
    right = tokens + rows.to(tl.int64)[None, :] * DEPTH + depth[:, None]
    result = tl.zeros((BLOCK_F, BLOCK_T), dtype=tl.float32)
    for start in range(0, DEPTH, BLOCK_K):
        if DEPTH % BLOCK_K == 0:
            w = tl.load(left, mask=real[:, None], other=0.0)
            x = tl.load(right, mask=used[None, :], other=0.0)
        else:
            inside = depth < DEPTH - start
            w = tl.load(left, mask=real[:, None] & inside[None, :], other=0.0)
            x = tl.load(right, mask=inside[:, None] & used[None, :], other=0.0)
        if UPCAST:
            w, x = w.to(tl.float32), x.to(tl.float32)
        result = tl.dot(w, x, result, input_precision="ieee")
        left += BLOCK_K
        right += BLOCK_K
    return result


@kernel
def experts_up(
    x: tl.tensor,
    up: tl.tensor,
    counts: tl.tensor,
    pairs: tl.tensor,
    PAIRS: tl.tensor,
    inner: tl.tensor,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """Compute relu(up[e] x)^2 for a tile of pairs and features; grid (features / BLOCK_F, tiles).

    Rounded to T before the square and after, as the op's function is.
    """
    expert, start, count = tile_of(tl.program_id(1), counts, PAIRS, E, BLOCK_E, BLOCK_T)
    if count <= 0:
        return
    lane = tl.arange(0, BLOCK_T)
    used = lane < count
    pair = tl.load(pairs + start + lane, mask=used, other=0)
    used = used & (pair >= 0) & (pair < PAIRS)
    first = tl.program_id(0) * BLOCK_F
    weight = up + expert.to(tl.int64) * (INNER * HIDDEN)
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
    counts: tl.tensor,
    pairs: tl.tensor,
    PAIRS: tl.tensor,
    partial: tl.tensor,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """Compute down[e] inner for a tile of pairs and features; grid (features / BLOCK_F, tiles)."""
    expert, start, count = tile_of(tl.program_id(1), counts, PAIRS, E, BLOCK_E, BLOCK_T)
    if count <= 0:
        return
    lane = tl.arange(0, BLOCK_T)
    used = lane < count
    pair = tl.load(pairs + start + lane, mask=used, other=0)
    used = used & (pair >= 0) & (pair < PAIRS)
    first = tl.program_id(0) * BLOCK_F
    weight = down + expert.to(tl.int64) * (INNER * HIDDEN)
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


TACTICS = 2
"""Ways to cut the products: tiles for few tokens, and for many."""


def matmul_tactics(dtype: str) -> tuple[Launch, ...]:
    """Return the tiles of both products, one set for each tactic.

    Few tokens: the time is the weights', so tiles are small in tokens and four are in flight. A
    program's shared memory is 40 kB there, and five programs of a multiprocessor keep 160 kB of
    weights in flight, several times what bandwidth times latency asks for. Many tokens: larger
    tiles, so that weights are read once or twice. All within what a plugin may use.
    """
    wide = dtype == "fp32"
    few = {"BLOCK_F": 64, "BLOCK_T": 16, "BLOCK_K": 32 if wide else 64}
    many = {"BLOCK_F": 64, "BLOCK_T": 64, "BLOCK_K": 16 if wide else 32}
    return tuple(Launch(tiles, num_warps=4, num_stages=4) for tiles in (few, many))


def matmul_launch(tokens: int, experts: int, per_token: int, dtype: str) -> Launch:
    """Return the tiles of both products, by the mean number of tokens of an expert."""
    few, many = matmul_tactics(dtype)
    return few if tokens * per_token <= 16 * experts else many


def route_launch() -> Launch:
    """Return the tiles of the routing pass: 1024 pairs, as many as a step of 10 rows has."""
    return Launch({"CHUNK": 1024}, num_warps=4)


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
    block_f, bound = (
        tiles.constants["BLOCK_F"],
        tile_bound(count, experts, tiles.constants["BLOCK_T"]),
    )
    counts, pairs = indices.new_empty((experts,)), indices.new_empty((max(count, 1),))
    inner = x.new_empty((count, inner_size))
    partial = x.new_empty((count, hidden), dtype=torch.float32)
    y = torch.empty_like(x)

    launch(route_tokens, (experts,), (indices, count, counts, pairs), {}, route_launch())
    sizes = {"HIDDEN": hidden, "INNER": inner_size, "E": experts}
    matmul = {**sizes, "BLOCK_E": triton.next_power_of_2(experts), "UPCAST": INTERPRETED}
    launch(
        experts_up,
        (triton.cdiv(inner_size, block_f), bound),
        (x, up, counts, pairs, count, inner),
        {**matmul, "K": per_token},
        tiles,
    )
    launch(
        experts_down,
        (triton.cdiv(hidden, block_f), bound),
        (inner, down, counts, pairs, count, partial),
        matmul,
        tiles,
    )
    config = sum_launch()
    grid = (n, triton.cdiv(hidden, config.constants["BLOCK_F"]))
    constants = {"HIDDEN": hidden, "E": experts, "K": per_token}
    launch(experts_sum, grid, (partial, indices, weights, y), constants, config)
    return y


def specs(sizes: Sizes, tiles: Launch | None = None) -> list[KernelSpec]:
    """Return all four kernels for one model.

    Args:
        sizes: Sizes of the model and of a call.
        tiles: Tiles of the products; by default `matmul_launch`.
    """
    T = f"*{sizes.dtype}"
    dims = {"HIDDEN": sizes.hidden, "INNER": sizes.inner, "E": sizes.experts}
    matmul = {**dims, "BLOCK_E": triton.next_power_of_2(sizes.experts), "UPCAST": False}
    tiles = tiles or matmul_launch(
        sizes.tokens, sizes.experts, sizes.experts_per_token, sizes.dtype
    )
    sorted_pairs = {"counts": "*i32", "pairs": "*i32", "PAIRS": "i32"}
    return [
        KernelSpec(
            "route_tokens",
            route_tokens,
            {"indices": "*i32", "PAIRS": "i32", "counts": "*i32", "pairs": "*i32"},
            {},
            route_launch(),
        ),
        KernelSpec(
            "experts_up",
            experts_up,
            {"x": T, "up": T, **sorted_pairs, "inner": T},
            {**matmul, "K": sizes.experts_per_token},
            tiles,
        ),
        KernelSpec(
            "experts_down",
            experts_down,
            {"inner": T, "down": T, **sorted_pairs, "partial": "*fp32"},
            matmul,
            tiles,
        ),
        KernelSpec(
            "experts_sum",
            experts_sum,
            {"partial": "*fp32", "indices": "*i32", "weights": "*fp32", "y": T},
            {"HIDDEN": sizes.hidden, "E": sizes.experts, "K": sizes.experts_per_token},
            sum_launch(),
        ),
    ]
