"""Dense products with weights of 4 bits, decoded in registers: y = x @ weight.T.

TensorRT dequantizes FP8 inside of its own products. It copies weights with a scale per block that
come as inputs to bf16 first, at every call, so those products are ours.
"""

from __future__ import annotations

from dataclasses import replace

import triton.language as tl

from twotower_contract.quantized import NVFP4_BLOCK
from twotower_engines.kernels.expert_products import (
    PACKED,
    RELEASED_GROUP,
    SCALES,
    bank_constants,
    deep_launch,
    factor,
    product_tile,
)
from twotower_engines.kernels.jit import Launch, kernel
from twotower_engines.kernels.spec import KernelSpec, Sizes

TACTICS = 3
"""Ways to cut the product: two with small tiles of tokens, one with large ones."""


@kernel
def linear_product(
    x: tl.tensor, matrix: tl.tensor, TOKENS: tl.tensor, y: tl.tensor, matrix_scale: tl.tensor,
    matrix_scale_2: tl.tensor,
    FEATURES: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, FORMAT: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
) -> None:  # fmt: skip
    """Compute a tile of y [TOKENS, FEATURES]; grid (features / BLOCK_F, tokens / BLOCK_T).

    Summed in float32 and rounded once. The second scale is None where the FORMAT has none.
    """
    first = tl.program_id(0) * BLOCK_F
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    used = token < TOKENS
    only = tl.program_id(0).to(tl.int64) * 0  # a bank of one
    result = product_tile(
        matrix, matrix_scale, only, x, token, used, first, FEATURES, DEPTH, GROUP, FORMAT,
        BLOCK_F, BLOCK_T, BLOCK_K, UPCAST,
    )  # fmt: skip
    if FORMAT == "nvfp4":
        result *= factor(matrix_scale, matrix_scale_2, only, FORMAT)
    feature = first + tl.arange(0, BLOCK_F)
    out = y + token.to(tl.int64)[None, :] * FEATURES + feature[:, None]
    tl.store(out, result.to(y.dtype.element_ty), mask=(feature < FEATURES)[:, None] & used[None, :])


def linear_tactics(group: int) -> tuple[Launch, ...]:
    """Return the tiles of a product, one set for each tactic.

    Few tokens: the time is the weights'. A narrow matrix has few programs, and then the second
    tactic has more of them, with deeper tiles that keep as many weights in flight.
    """
    return (
        Launch({"BLOCK_F": 64, "BLOCK_T": 16, "BLOCK_K": 128}, 2, 3),
        Launch({"BLOCK_F": 32, "BLOCK_T": 16, "BLOCK_K": 256}, 2, 3),
        deep_launch(group),
    )


def linear_specs(features: int, depth: int, form: str, groups: int) -> list[KernelSpec]:
    """Return the product of one size in every tactic, whose number ends its name.

    Args:
        features: Outputs.
        depth: Inputs.
        form: "int4" or "nvfp4".
        groups: Scales of an output's weights.
    """
    scales = {f"matrix_{name}": kind for name, kind in SCALES[form].items()}
    types = {"x": "*bf16", "matrix": "*u8", "TOKENS": "i32", "y": "*bf16", **scales}
    constants = {
        **{"FEATURES": features, "DEPTH": depth, "UPCAST": False},
        **bank_constants("matrix", form, depth, groups),
    }
    return [
        KernelSpec(f"linear.{tactic}", linear_product, types, constants, tiles)
        for tactic, tiles in enumerate(linear_tactics(constants["GROUP"]), 1)
    ]


def specs(sizes: Sizes) -> list[KernelSpec]:
    """Return the products of a model's Mamba projections, where they have 4 bits."""
    form = sizes.experts_format
    if form not in PACKED:
        return []
    d_inner = sizes.heads * sizes.head_dim
    group = RELEASED_GROUP if form == "int4" else NVFP4_BLOCK
    width = 2 * d_inner + 2 * sizes.groups * sizes.state + sizes.heads
    shapes = {"in": (width, sizes.hidden), "out": (sizes.hidden, d_inner)}
    return [
        replace(spec, name=spec.name.replace("linear", f"linear_{which}"))
        for which, (features, depth) in shapes.items()
        for spec in linear_specs(features, depth, form, depth // group)
    ]
