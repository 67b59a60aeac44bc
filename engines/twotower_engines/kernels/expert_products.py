"""The products of `SparseExperts`: tiles of one expert's weights with a few of its tokens.

Weights are the left operand (`weight [BLOCK_F, k] @ tokens [k, BLOCK_T]`): tensor cores take 64
rows at a time on Hopper, weights have them, and a handful of tokens does not. Weights of 8 and 4
bits are decoded in registers on the way (`quantized`), so only their codes travel.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from twotower_contract.quantized import INT4_GROUPS
from twotower_engines.errors import BuildError
from twotower_engines.kernels.expert_routing import TILE_TOKENS, TYPES, tile_of
from twotower_engines.kernels.jit import Launch, kernel
from twotower_engines.kernels.quantized import SHRUNK, from_e4m3, from_nibbles
from twotower_engines.kernels.spec import KernelSpec, Sizes

SCALES = {
    "plain": {},
    "fp8": {"scale": "*bf16"},
    "int4": {"scale": "*bf16"},
    "nvfp4": {"scale": "*u8", "scale_2": "*fp32"},
}
"""Formats of banks: the types of what stands beside the codes. Plain weights have the type T.

fp8: E4M3 [E, depth, features], as TensorRT's own products take it too, scale [E]. int4 and nvfp4:
two codes in a byte [E, features, depth / 2], the first one low; int4 is value + 8 with scales
[E, features, depth / group], nvfp4 is E2M1 with E4M3 scales of groups of 16 and scale_2 [E]. To
TensorRT these bytes are words of 32 bits, whose order in memory is the same.
"""

SUFFIXES = {"plain": "", "fp8": "FP8", "int4": "INT4", "nvfp4": "NVFP4"}
"""Endings of the names of an op and its nodes, by the format of the weights."""

PACKED = ("int4", "nvfp4")
FEATURE_AXIS = {"plain": 1, "fp8": 2, "int4": 1, "nvfp4": 1}
"""Axis of the output features in a bank."""

RELEASED_GROUP = 64
"""Weights of INT4 that share a scale at the released sizes."""

TACTICS = 3
"""Ways to cut the products: two with small tiles of tokens, one with large ones."""


@kernel
def weight_tile(
    weight: tl.tensor, scale: tl.tensor, real: tl.tensor, start: tl.tensor,
    FEATURES: tl.constexpr, DEPTH: tl.constexpr,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, FORMAT: tl.constexpr, MASKED: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return the weights of some features for WIDTH inputs from `start` on, as factors.

    weight, scale: [features, 1] addresses of the features' first ones; `real` features are read.
    MASKED: the tile goes beyond the last input, DEPTH; whole tiles ask for none.
    """
    STRIDE: tl.constexpr = FEATURES if FORMAT == "fp8" else 1
    PACKED: tl.constexpr = 2 if FORMAT == "int4" or FORMAT == "nvfp4" else 1
    place = start // PACKED + tl.arange(0, WIDTH // PACKED)
    mask = real[:, None] & (place < DEPTH // PACKED)[None, :] if MASKED else real[:, None]
    codes = tl.load(weight + place[None, :] * STRIDE, mask=mask, other=0)
    if FORMAT == "fp8":
        codes = from_e4m3(codes)
    elif PACKED == 2:
        group = start // GROUP + tl.arange(0, WIDTH // GROUP)
        mask = real[:, None] & (group < DEPTH // GROUP)[None, :] if MASKED else real[:, None]
        codes = from_nibbles(codes, tl.load(scale + group[None, :], mask=mask, other=0), FORMAT)
    return codes


@kernel
def product_tile(
    bank: tl.tensor, scale: tl.tensor, expert: tl.tensor, tokens: tl.tensor, rows: tl.tensor,
    used: tl.tensor, first: tl.tensor,
    FEATURES: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, FORMAT: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return bank[expert, first : first + BLOCK_F] @ tokens[rows].T, [BLOCK_F, BLOCK_T] float32.

    bank [E, FEATURES, DEPTH], in FP8 [E, DEPTH, FEATURES], and tokens [*, DEPTH] are contiguous;
    `used` marks real rows. A last, narrower step has a product of its own: the loop
    masks no depth.
    """
    PACKED: tl.constexpr = 2 if FORMAT == "int4" or FORMAT == "nvfp4" else 1
    WHOLE: tl.constexpr = DEPTH - DEPTH % BLOCK_K
    feature = first + tl.arange(0, BLOCK_F)
    real = feature < FEATURES
    if FORMAT == "fp8":
        weight = bank + (expert * (FEATURES * DEPTH) + feature)[:, None]
    else:
        weight = bank + (expert * FEATURES + feature)[:, None] * (DEPTH // PACKED)
    if PACKED == 2:
        scale = scale + (expert * FEATURES + feature)[:, None] * (DEPTH // GROUP)
    tokens += rows.to(tl.int64)[None, :] * DEPTH
    depth = tl.arange(0, BLOCK_K)
    result = tl.zeros((BLOCK_F, BLOCK_T), dtype=tl.float32)
    for start in range(0, WHOLE, BLOCK_K):
        w = weight_tile(weight, scale, real, start, FEATURES, DEPTH, BLOCK_K, GROUP, FORMAT, False)
        x = tl.load(tokens + (start + depth)[:, None], mask=used[None, :], other=0.0)
        if UPCAST:
            w, x = w.to(tl.float32), x.to(tl.float32)
        result = tl.dot(w, x, result, input_precision="ieee")
    if WHOLE < DEPTH:
        WIDTH: tl.constexpr = triton.next_power_of_2(max(GROUP, DEPTH - WHOLE))
        rest = WHOLE + tl.arange(0, WIDTH)
        w = weight_tile(weight, scale, real, WHOLE, FEATURES, DEPTH, WIDTH, GROUP, FORMAT, True)
        mask = (rest < DEPTH)[:, None] & used[None, :]
        x = tl.load(tokens + rest[:, None], mask=mask, other=0.0)
        if UPCAST:
            w, x = w.to(tl.float32), x.to(tl.float32)
        result = tl.dot(w, x, result, input_precision="ieee")
    return result


@kernel
def factor(
    scale: tl.tensor, scale_2: tl.tensor, expert: tl.tensor, FORMAT: tl.constexpr
) -> tl.tensor:
    """Return what a product is multiplied by, once it is summed."""
    if FORMAT == "fp8":
        return tl.load(scale + expert).to(tl.float32)
    if FORMAT == "nvfp4":
        return tl.load(scale_2 + expert) / SHRUNK
    return 1.0


@kernel
def experts_up(
    x: tl.tensor, up: tl.tensor, pairs: tl.tensor, few: tl.tensor, many: tl.tensor,
    PAIRS: tl.tensor, inner: tl.tensor, up_scale: tl.tensor, up_scale_2: tl.tensor,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, E: tl.constexpr, K: tl.constexpr,
    GROUP: tl.constexpr, FORMAT: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, MANY: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:  # fmt: skip
    """Compute relu(up[e] x)^2 for a tile of pairs and features; grid (features / BLOCK_F, tiles).

    Rounded to T before the square and after, as the op's function is. The scales are None where
    the FORMAT has none.
    """
    expert, pair, used, count = tile_of(many if MANY else few, pairs, PAIRS, E, BLOCK_T)
    if count <= 0:
        return
    first = tl.program_id(0) * BLOCK_F
    result = product_tile(
        up, up_scale, expert, x, pair // K, used, first, INNER, HIDDEN, GROUP, FORMAT,
        BLOCK_F, BLOCK_T, BLOCK_K, UPCAST,
    )  # fmt: skip
    if FORMAT != "plain":
        result *= factor(up_scale, up_scale_2, expert, FORMAT)
    result = tl.maximum(result, 0.0).to(inner.dtype.element_ty).to(tl.float32)
    feature = first + tl.arange(0, BLOCK_F)
    out = inner + pair.to(tl.int64)[None, :] * INNER + feature[:, None]
    mask = (feature < INNER)[:, None] & used[None, :]
    tl.store(out, (result * result).to(inner.dtype.element_ty), mask=mask)


@kernel
def experts_down(
    inner: tl.tensor, down: tl.tensor, pairs: tl.tensor, few: tl.tensor, many: tl.tensor,
    PAIRS: tl.tensor, partial: tl.tensor, down_scale: tl.tensor, down_scale_2: tl.tensor,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, E: tl.constexpr, GROUP: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, MANY: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:  # fmt: skip
    """Compute down[e] inner for a tile of pairs and features; grid (features / BLOCK_F, tiles)."""
    expert, pair, used, count = tile_of(many if MANY else few, pairs, PAIRS, E, BLOCK_T)
    if count <= 0:
        return
    first = tl.program_id(0) * BLOCK_F
    result = product_tile(
        down, down_scale, expert, inner, pair, used, first, HIDDEN, INNER, GROUP, FORMAT,
        BLOCK_F, BLOCK_T, BLOCK_K, UPCAST,
    )  # fmt: skip
    if FORMAT != "plain":
        result *= factor(down_scale, down_scale_2, expert, FORMAT)
    feature = first + tl.arange(0, BLOCK_F)
    out = partial + pair.to(tl.int64)[None, :] * HIDDEN + feature[:, None]
    tl.store(out, result, mask=(feature < HIDDEN)[:, None] & used[None, :])


def deep_launch(group: int) -> Launch:
    """Return the tiles for many tokens and weights of codes; a step has at least a whole group."""
    if group > 64:
        return Launch({"BLOCK_F": 64, "BLOCK_T": TILE_TOKENS[1], "BLOCK_K": group}, 8, 2)
    return Launch({"BLOCK_F": 64, "BLOCK_T": TILE_TOKENS[1], "BLOCK_K": 64}, 4, 3)


def matmul_tactics(
    dtype: str, form: str = "plain", group: int = RELEASED_GROUP
) -> tuple[Launch, ...]:
    """Return the tiles of both products, one set for each tactic.

    Few tokens: the time is the weights', so tiles are small in tokens. Plain weights: 40 kB of
    shared memory hold four tiles of 64 deep or two of 128, which need half the barriers and fewer
    instructions for a weight, and have less in flight; five programs of a multiprocessor keep 100
    to 150 kB of weights in flight, several times what bandwidth times latency asks for. Codes: two
    warps, because four would take Hopper's `wgmma`, whose operands in registers ask for 1.6 times
    the instructions; that form is the second tactic. Many tokens: larger tiles, so that weights
    are read once or twice. All within what a plugin may use.
    """
    few, many = TILE_TOKENS
    if form != "plain":
        return (
            Launch({"BLOCK_F": 64, "BLOCK_T": few, "BLOCK_K": 128}, 2, 3),
            Launch({"BLOCK_F": 64, "BLOCK_T": few, "BLOCK_K": 128}, 4, 3),
            deep_launch(group),
        )
    short = 2 if dtype == "fp32" else 1  # a float32 tile has half the depth
    return (
        Launch({"BLOCK_F": 64, "BLOCK_T": few, "BLOCK_K": 64 // short}, 4, 4),
        Launch({"BLOCK_F": 64, "BLOCK_T": few, "BLOCK_K": 128 // short}, 4, 2),
        Launch({"BLOCK_F": 64, "BLOCK_T": many, "BLOCK_K": 64 // short}, 4, 3),
    )


def require_bf16(form: str, dtype: str) -> None:
    """Refuse weights of 4 bits in a graph that does not compute in bf16.

    Raises:
        BuildError: It computes in another type.
    """
    if form in PACKED and dtype != "bf16":
        raise BuildError(
            f"{form} weights are multiplied in bf16, and this graph computes in {dtype}; quantize "
            "to fp8, or export a bfloat16 model"
        )


def bank_constants(which: str, form: str, depth: int, groups: int) -> dict[str, Any]:
    """Return what a product must know of a bank beside its sizes.

    Args:
        which: "up" or "down".
        form: One of `SCALES`.
        depth: Inputs of the product.
        groups: Scales of an output's weights; 0 where there is one for all.

    Raises:
        BuildError: There are no kernels for groups of that size.
    """
    group = depth // groups if form in PACKED else 16
    if form in PACKED and (group * groups != depth or group not in INT4_GROUPS):
        raise BuildError(
            f"{which} projection: {groups} scales for {depth} weights of {form}; kernels take "
            f"groups of {', '.join(map(str, sorted(INT4_GROUPS)))} weights"
        )
    absent = {f"{which}_{name}" for name in ("scale", "scale_2") if name not in SCALES[form]}
    return {"GROUP": group, "FORMAT": form, **dict.fromkeys(absent)}


def product_specs(sizes: Sizes, group: int = RELEASED_GROUP) -> list[KernelSpec]:
    """Return both products in every tactic; a tactic's number ends their names.

    Args:
        sizes: Sizes of the model, and the format of its banks.
        group: Weights of a group, for int4.
    """
    T, form = f"*{sizes.dtype}", sizes.experts_format
    group = group if form == "int4" else 16
    bank = T if form == "plain" else "*u8"
    types = {**TYPES, "x": T, "inner": T, "partial": "*fp32", "up": bank, "down": bank}
    dims = {"HIDDEN": sizes.hidden, "INNER": sizes.inner, "E": sizes.experts}
    dims |= {"K": sizes.experts_per_token, "UPCAST": False}
    made = []
    for which, function, depth in (
        ("up", experts_up, sizes.hidden),
        ("down", experts_down, sizes.inner),
    ):
        types |= {f"{which}_{name}": kind for name, kind in SCALES[form].items()}
        constants = {**dims, **bank_constants(which, form, depth, depth // group)}
        for tactic, tiles in enumerate(matmul_tactics(sizes.dtype, form, group), 1):
            constants["MANY"] = tiles.constants["BLOCK_T"] == TILE_TOKENS[1]
            name = f"experts_{which}.{tactic}"
            made.append(KernelSpec.of(name, function, types, constants, tiles))
    return made
