"""`Router` in two kernels: which experts a token goes to, and with which weights.

    x, matrix                   --> router_product --> router_logits [n, E] float32
    router_logits, correction   --> router_choice  --> indices, weights [n, K]

The product is in float32, of tokens that are widened in registers: a compiler would write them to
memory in float32 first. No tensor core multiplies float32; the product is 2% of a layer's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from twotower_engines.kernels.expert_products import bank_constants
from twotower_engines.kernels.jit import Launch, kernel
from twotower_engines.kernels.linear import linear_product
from twotower_engines.kernels.spec import KernelSpec, Sizes

TACTICS = (
    Launch({"BLOCK_F": 16, "BLOCK_T": 16, "BLOCK_K": 32}, num_warps=4, num_stages=3),
    Launch({"BLOCK_F": 64, "BLOCK_T": 64, "BLOCK_K": 16}, num_warps=8, num_stages=3),
)
"""Tiles of the product: small ones, which are more programs, and large ones for many tokens."""

CHOICE = Launch({}, num_warps=1)


@kernel
def router_choice(
    router_logits: tl.tensor, correction: tl.tensor, lengths: tl.tensor, L: tl.tensor,
    indices: tl.tensor, weights: tl.tensor,
    E: tl.constexpr, K: tl.constexpr, NORMALIZED: tl.constexpr, SCALING: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
) -> None:  # fmt: skip
    """Choose a token's K experts; grid (rows * L,).

    The highest sigmoid + correction is first, of equal ones the lowest expert. Weights are the
    sigmoids, without corrections. Tokens past a row's length go nowhere: their indices are -1.
    """
    token = tl.program_id(0)
    lane, place = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    real = lane < E
    score = 1.0 / (1.0 + tl.exp(-tl.load(router_logits + token * E + lane, mask=real, other=0.0)))
    corrected = score + tl.load(correction + lane, mask=real, other=0.0).to(tl.float32)
    corrected = tl.where(real, corrected, float("-inf"))
    chosen = tl.zeros((BLOCK_K,), dtype=tl.int32)
    weight = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for k in tl.static_range(K):
        best = tl.argmax(corrected, axis=0)
        chosen = tl.where(place == k, best, chosen)
        weight = tl.where(place == k, tl.sum(tl.where(lane == best, score, 0.0), axis=0), weight)
        corrected = tl.where(lane == best, float("-inf"), corrected)
    if NORMALIZED:
        weight = weight / (tl.sum(weight, axis=0) + 1e-20)
    is_token = token % L < tl.load(lengths + token // L)
    tl.store(indices + token * K + place, tl.where(is_token, chosen, -1), mask=place < K)
    tl.store(weights + token * K + place, weight * SCALING, mask=place < K)


def product_specs(experts: int, hidden: int, dtype: str) -> list[KernelSpec]:
    """Return the product in every tactic, whose number ends its name."""
    types = {"x": f"*{dtype}", "matrix": "*fp32", "TOKENS": "i32", "y": "*fp32"}
    constants = {"FEATURES": experts, "DEPTH": hidden, "UPCAST": True}
    constants |= bank_constants("matrix", "plain", hidden, 0)
    return [
        KernelSpec(f"router_product.{tactic}", linear_product, types, constants, tiles)
        for tactic, tiles in enumerate(TACTICS, 1)
    ]


def choice_spec(
    experts: int, per_token: int, normalized: bool, scaling: float, small_dtype: str
) -> KernelSpec:
    """Return the choice of a model."""
    types = {"router_logits": "*fp32", "correction": f"*{small_dtype}", "lengths": "*i32"}
    types |= {"L": "i32", "indices": "*i32", "weights": "*fp32"}
    constants = {
        **{"E": experts, "K": per_token, "NORMALIZED": normalized, "SCALING": scaling},
        "BLOCK_E": triton.next_power_of_2(experts),
        "BLOCK_K": triton.next_power_of_2(per_token),
    }
    return KernelSpec("router_choice", router_choice, types, constants, CHOICE)


def specs(sizes: Sizes) -> list[KernelSpec]:
    """Return all kernels of one model."""
    choice = (sizes.experts, sizes.experts_per_token, True, sizes.scaling, sizes.small_dtype)
    return [*product_specs(sizes.experts, sizes.hidden, sizes.dtype), choice_spec(*choice)]
