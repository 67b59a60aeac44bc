"""The routing pass of `SparseExperts`: (token, k) pairs sorted by expert, and tables of tiles.

A program of the products finds its work in one row of a table: it counts nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from twotower_engines.kernels.jit import Launch, kernel
from twotower_engines.kernels.spec import KernelSpec

TILE_TOKENS = (16, 64)
"""Pairs of a small tile and of a large one; `route_tokens` lists the tiles of both sizes."""

TYPES = {**dict.fromkeys(("indices", "pairs", "few", "many"), "*i32"), "PAIRS": "i32"}
"""Types of what the pass takes and makes."""


@kernel
def write_tiles(
    tiles: tl.tensor, counts: tl.tensor, expert: tl.tensor, first: tl.tensor, PAIRS: tl.tensor,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr,
) -> None:  # fmt: skip
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
    indices: tl.tensor, PAIRS: tl.tensor, pairs: tl.tensor, few: tl.tensor, many: tl.tensor,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr, FEW: tl.constexpr, MANY: tl.constexpr, CHUNK: tl.constexpr,
) -> None:  # fmt: skip
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


def route_launch(experts: int) -> Launch:
    """Return the tiles of the routing pass: 1024 pairs, as many as a step of 10 rows has."""
    return Launch({"CHUNK": 1024, "BLOCK_E": triton.next_power_of_2(experts + 1)}, num_warps=4)


def route_spec(experts: int) -> KernelSpec:
    """Return the routing pass of a model."""
    few, many = TILE_TOKENS
    constants = {"E": experts, "FEW": few, "MANY": many}
    return KernelSpec.of("route_tokens", route_tokens, TYPES, constants, route_launch(experts))
