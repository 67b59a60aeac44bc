"""The vocabulary pass of `RefineBlock`: from logits to five numbers and a token per split.

The vocabulary is cut into P splits of a few tiles of `TILE` tokens; a program has one split at one
position of one row. `refine_decision` merges the splits' results.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton.language as tl

from twotower_engines.kernels import jit
from twotower_engines.kernels.jit import Launch, kernel
from twotower_engines.kernels.noise import MOST_NOISE, gumbel, noise_keys
from twotower_engines.kernels.policies import ENTROPY

TILE = 2048
"""Tokens that a program reads together: 16 for each of its 128 threads. Four tiles of 4 or 8 kB
are in flight."""

TILES = 2
"""Tiles of a split per row of the batch, up to `MOST_ROWS` rows. 4096 tokens at one row of 16
positions make 512 programs, about four per multiprocessor of an H200; with more rows there are as
many programs of more tokens each, which start and meet less often."""

MOST_ROWS = 4
"""Rows beyond which splits grow no longer."""

FIELDS = 5
"""Numbers that a split leaves: maximum logit; sum of e = exp(logit - maximum); sum of
e * (logit - maximum); best score; logit of the best token."""

INTERPRETED = tl.constexpr(jit.INTERPRETED)

NO_TOKEN = tl.constexpr(2**31 - 1)
"""The prediction where nothing can be predicted: after every token, and in no vocabulary."""


@kernel
def exponential(x: tl.tensor) -> tl.tensor:
    """Return e^x as `tl.exp` does, but 0 for results below 2^-126: half the instructions.

    Such a result is a weight next to one of 1, so no sum over a vocabulary changes by it.
    """
    if INTERPRETED:
        return tl.exp(x)
    scaled = [x * 1.4426950408889634]
    return tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", scaled, dtype=tl.float32, is_pure=True, pack=1
    )


@kernel
def scan(
    logits: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    V: tl.constexpr,
    MASK_ID: tl.constexpr,
    TILE: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Reduce the logits [first, last) of one position in 128 lanes.

    Each keeps its own running maximum, so that lanes meet once, at the end of the split, and not
    once per tile; a lane's logits are 8 neighbours at a time, 16 bytes of bf16.

    Returns:
        Per lane: maximum; sum of e = exp(logit - maximum); sum of e * (logit - maximum), or 0
        without entropy; lowest token with that maximum, NO_TOKEN where all logits are -inf.
    """
    LANES: tl.constexpr = 128
    ROWS: tl.constexpr = TILE // (8 * LANES)
    lane = (
        (tl.arange(0, ROWS) * (8 * LANES))[:, None, None]
        + (tl.arange(0, LANES) * 8)[None, :, None]
        + tl.arange(0, 8)[None, None, :]
    )
    peak = tl.full((LANES,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((LANES,), dtype=tl.float32)
    mean = tl.zeros((LANES,), dtype=tl.float32)
    token = tl.full((LANES,), NO_TOKEN, dtype=tl.int32)
    for start in tl.range(first, last, TILE, num_stages=4):
        if V % TILE == 0:
            x = tl.load(logits + start + lane).to(tl.float32)
        else:
            x = tl.load(logits + start + lane, mask=lane < V - start, other=float("-inf"))
            x = x.to(tl.float32)
        if (start <= MASK_ID) & (start + TILE > MASK_ID):
            x = tl.where(lane == MASK_ID - start, float("-inf"), x)
        new = tl.maximum(peak, tl.max(tl.max(x, axis=2), axis=0))
        # Nothing but -inf until now: -inf - -inf would be NaN. A NaN or a +inf makes one, and it
        # stays in the sum: so it is reported.
        base = tl.where(new == float("-inf"), 0.0, new)
        shifted = x - base[None, :, None]
        weight = exponential(shifted)
        change = exponential(peak - base)
        if WITH_ENTROPY:
            # 0 * -inf is not a number; both bounds are beyond what has a weight.
            part = tl.sum(tl.sum(weight * tl.maximum(shifted, -1e12), axis=2), axis=0)
            mean = change * (mean + tl.maximum(peak - base, -1e12) * total) + part
        total = total * change + tl.sum(tl.sum(weight, axis=2), axis=0)
        here = tl.min(tl.min(tl.where(x == new[None, :, None], lane, TILE), axis=2), axis=0)
        token = tl.where(new > peak, start + here, token)
        peak = new
    return peak, total, mean, token


@kernel
def sample(
    logits: tl.tensor, first: tl.tensor, last: tl.tensor, heat: tl.tensor, first_key: tl.tensor,
    second_key: tl.tensor, top: tl.tensor, top_token: tl.tensor,
    MASK_ID: tl.constexpr,
    PIECE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Return (best score, its token) of a split, with noise; the lowest token of equal ones.

    Reads the split again, from the cache and in pieces, and computes noise only for pieces that
    can hold the winner: the split's best token has its score, and no noise is above MOST_NOISE.
    Rounding is monotone, so what is skipped loses in any case.
    """
    lane = tl.arange(0, PIECE)
    best = tl.full((PIECE,), float("-inf"), dtype=tl.float32)
    token = tl.full((PIECE,), NO_TOKEN, dtype=tl.int32)
    to_beat = tl.div_rn(top, heat) + gumbel(top_token, first_key, second_key)
    for start in range(first, last, PIECE):
        candidate = start + lane
        real = (candidate < last) & (candidate != MASK_ID)
        x = tl.load(logits + candidate, mask=candidate < last, other=float("-inf"))
        x = tl.where(real, x.to(tl.float32), float("-inf"))
        if tl.div_rn(tl.max(x, axis=0), heat) + MOST_NOISE >= to_beat:
            noise = gumbel(candidate, first_key, second_key)
            score = tl.div_rn(x, tl.zeros_like(x) + heat) + noise
            better = real & ((score > best) | (token == NO_TOKEN))  # all scores may be -inf
            best = tl.where(better, score, best)
            token = tl.where(better, candidate, token)
            to_beat = tl.maximum(to_beat, tl.max(best, axis=0))
    winner = tl.max(best, axis=0)
    return winner, tl.min(tl.where(best == winner, token, NO_TOKEN), axis=0)


@kernel
def refine_vocabulary(
    logits: tl.tensor, ids: tl.tensor, lengths: tl.tensor, temperature: tl.tensor,
    policy: tl.tensor, seed: tl.tensor, S: tl.tensor, TILES: tl.tensor, partials: tl.tensor,
    partial_ids: tl.tensor,
    V: tl.constexpr, MASK_ID: tl.constexpr, TILE: tl.constexpr, PIECE: tl.constexpr,
) -> None:  # fmt: skip
    """Reduce one split of the vocabulary, TILES tiles, at one position; grid (splits, S, B).

    Reads its logits once. Positions that are not masked are left alone: their logits are not read
    and their partials not written.
    """
    split = tl.program_id(0)
    position = tl.program_id(1)
    row = tl.program_id(2)
    place = row * S + position
    if (position >= tl.load(lengths + row)) | (tl.load(ids + place) != MASK_ID):
        return

    logits += place.to(tl.int64) * V
    first = split * TILES * TILE
    last = tl.minimum(first + TILES * TILE, V)
    if tl.load(policy + row) == ENTROPY:
        peak, sums, means, tokens = scan(logits, first, last, V, MASK_ID, TILE, True)
    else:
        peak, sums, means, tokens = scan(logits, first, last, V, MASK_ID, TILE, False)
    top = tl.max(peak, axis=0)
    drop = peak - tl.where(top == float("-inf"), 0.0, top)
    change = exponential(drop)
    total = tl.sum(sums * change, axis=0)
    mean = tl.sum(change * (means + tl.maximum(drop, -1e12) * sums), axis=0)
    chosen = tl.min(tl.where(peak == top, tokens, NO_TOKEN), axis=0)

    best, logit = top, top
    heat = tl.load(temperature + row)
    if heat > 0.0:
        a, b = noise_keys(tl.load(seed + row), position)
        best, chosen = sample(logits, first, last, heat, a, b, top, chosen, MASK_ID, PIECE)
        found = chosen != NO_TOKEN
        logit = tl.load(logits + chosen, mask=found, other=float("-inf")).to(tl.float32)

    count = tl.num_programs(0)
    out = partials + place.to(tl.int64) * (5 * count) + split
    tl.store(out, top)
    tl.store(out + count, total)
    tl.store(out + 2 * count, mean)
    tl.store(out + 3 * count, best)
    tl.store(out + 4 * count, logit)
    tl.store(partial_ids + place.to(tl.int64) * count + split, chosen)


def tiles(rows: Any, minimum: Callable[[Any, int], Any] = min) -> Any:
    """Return the tiles of a split in a batch of `rows`, an integer or one of TensorRT's symbols."""
    return minimum(rows, MOST_ROWS) * TILES


VOCABULARY_LAUNCH = Launch({"TILE": TILE, "PIECE": 512}, num_warps=4)
"""Tiles of the vocabulary pass, and pieces of the sampling."""
