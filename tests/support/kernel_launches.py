"""Each op on torch tensors, kernel after kernel, for tests and benchmarks.

TensorRT launches the kernels of an engine, on the grids that `nodes` gives. These launches are
written apart from those, and take any tiles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton

from twotower_engines.kernels.expert_products import (
    FEATURE_AXIS,
    RELEASED_GROUP,
    SCALES,
    bank_constants,
    experts_down,
    experts_up,
    matmul_tactics,
)
from twotower_engines.kernels.expert_routing import TILE_TOKENS, route_launch, route_tokens
from twotower_engines.kernels.experts import SUM_LAUNCH, experts_sum
from twotower_engines.kernels.jit import INTERPRETED, Kernel, Launch
from twotower_engines.kernels.mamba import mamba_norm, mamba_scan, norm_launch, scan_launch
from twotower_engines.kernels.mamba_chunk import CHUNK
from twotower_engines.kernels.mamba_spans import (
    mamba_scan_states,
    mamba_spans,
    span_sizes,
    span_slots,
    spans_launch,
    states_tactics,
)
from twotower_engines.kernels.refine import decision_launch, refine_decision
from twotower_engines.kernels.router import choice_spec, product_specs
from twotower_engines.kernels.vocabulary import (
    FIELDS,
    TILE,
    VOCABULARY_LAUNCH,
    refine_vocabulary,
    tiles,
)


def launch(
    function: Kernel,
    grid: tuple[int, ...],
    args: tuple[Any, ...],
    constants: Mapping[str, Any],
    config: Launch,
) -> None:
    """Start a kernel on torch tensors, on the current stream.

    Args:
        grid: Programs along each dimension; an empty grid launches nothing.
        args: Tensors and integers in the kernel's order.
        constants: Compile-time constants beside those of `config`.
        config: Tile sizes, warps and stages.
    """
    if not all(grid):
        return
    function[grid](
        *args,
        **constants,
        **config.constants,
        **config.options,
    )


def refine_block(
    logits: Any,
    ids: Any,
    lengths: Any,
    threshold: Any,
    steps_left: Any,
    temperature: Any,
    policy: Any,
    seed: Any,
    mask_id: int,
) -> tuple[Any, Any, Any, Any]:
    """Run one refinement step on torch tensors, without synchronizing.

    Args:
        logits: [B, S, V] bf16 or float32, contiguous.
        ids: [B, S] int32.
        lengths: [B] int32, valid positions; 0 for an inactive row.
        threshold: [B] float32; the factor or the bound for policies 2 and 3.
        steps_left: [B] int32, this one included.
        temperature: [B] float32: 0, or at least 1e-6.
        policy: [B] int32.
        seed: [B] int32, not negative. The noise is a function of seed, position and token; give
            each step a seed of its own, as `sampling.row_seed` does.
        mask_id: Token of a position that is not decided.

    Returns:
        new_ids [B, S] int32, confidence [B, S] float32, committed [B, S] int32, still_masked [B]
        int32.
    """
    B, S, V = logits.shape
    count = tiles(max(B, 1))
    P = -(-V // (count * TILE))
    partials = logits.new_empty((B, S, FIELDS, P), dtype=torch.float32)
    partial_ids = ids.new_empty((B, S, P))
    launch(
        refine_vocabulary,
        (P, S, B),
        (logits, ids, lengths, temperature, policy, seed, S, count, partials, partial_ids),
        {"V": V, "MASK_ID": mask_id},
        VOCABULARY_LAUNCH,
    )
    new_ids, committed = torch.empty_like(ids), torch.empty_like(ids)
    confidence = logits.new_empty((B, S), dtype=torch.float32)
    still_masked = ids.new_empty((B,))
    rows = (ids, lengths, threshold, steps_left, policy)
    launch(
        refine_decision,
        (B,),
        (*rows, partials, partial_ids, S, P, new_ids, confidence, committed, still_masked),
        {"MASK_ID": mask_id},
        decision_launch(S, P),
    )
    return new_ids, confidence, committed, still_masked


def matmul_launch(
    tokens: int,
    experts: int,
    per_token: int,
    dtype: str,
    form: str = "plain",
    group: int = RELEASED_GROUP,
) -> Launch:
    """Return the tiles of both products, by the mean number of tokens of an expert."""
    few, *_, many = matmul_tactics(dtype, form, group)
    return few if tokens * per_token <= 16 * experts else many


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


def tile_bound(pairs: int, experts: int, block_t: int) -> int:
    """Return the most tiles that any routing of that many pairs can need."""
    return min(pairs, experts + pairs // block_t)


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
    config = SUM_LAUNCH
    grid = (n, triton.cdiv(width, config.constants["BLOCK_F"]))
    constants = {"HIDDEN": width, "E": experts, "K": per_token}
    shared, hidden = (torch.zeros_like(x) if one is None else one for one in (shared, hidden))
    tokens = n if gate is None else n // gate.shape[0]
    given = (partial, indices, weights, shared, hidden, y, gate, tokens)
    launch(experts_sum, grid, given, constants, config)
    return y


def mamba_block_step(
    projected: Any,
    conv_state: Any,
    ssm_state: Any,
    lengths: Any,
    conv_weight: Any,
    conv_bias: Any,
    dt_bias: Any,
    A_log: Any,
    D: Any,
    norm_weight: Any,
    n_groups: int,
    epsilon: float,
    *,
    states: bool = True,
    tactic: int = 1,
) -> tuple[Any, Any, Any]:
    """Run one block through convolution, scan and gated norm, on torch tensors.

    Args:
        projected: [B, L, d_inner + conv_dim + H] T: z, xBC, dt; contiguous, as all others.
        conv_state: [B, 3, conv_dim] T, raw xBC, newest last.
        ssm_state: [B, H, P, N] float32.
        lengths: [B] int32.
        conv_weight: [conv_dim, 4].
        conv_bias: [conv_dim].
        dt_bias: [H].
        A_log: [H], logarithm of the decay rates.
        D: [H], weight of the direct path.
        norm_weight: [d_inner].
        n_groups: Groups of heads; the heads of a group share B and C, and a norm.
        epsilon: Epsilon of the norm.
        states: Whether the new states are wanted.
        tactic: Which of `states_tactics` scans where they are, from 1.

    Returns:
        y [B, L, d_inner] T; conv_state and ssm_state after each row's last token, or None twice.
    """
    B, L, _ = projected.shape
    _, H, P, N = ssm_state.shape
    dims = {"H": H, "P": P, "N": N, "G": n_groups, "UPCAST": INTERPRETED}
    scanned = projected.new_empty((B, L, H * P))
    y = torch.empty_like(scanned)
    dtype = "fp32" if projected.dtype == torch.float32 else "bf16"
    conv_new = ssm_new = None
    given: tuple[Any, ...]
    if states:
        conv_new, ssm_new = torch.empty_like(conv_state), torch.empty_like(ssm_state)
        spans, span = span_sizes(B, L)
        convolution = projected.new_empty((B, L, conv_state.shape[2]))
        span_states = ssm_state.new_empty((span_slots(B, spans), H, P, N))
        span_decays = ssm_state.new_empty(span_states.shape[:2])
        tiles = spans_launch(H, P, N, n_groups, dtype)
        given = (projected, conv_state, lengths, conv_weight, conv_bias, dt_bias, A_log)
        made = (convolution, span_states, span_decays)
        grid = (H * triton.cdiv(P, tiles.constants["BLOCK_P"]), B, spans)
        launch(mamba_spans, grid, (*given, L, span, *made), dims, tiles)
        tiles = states_tactics(P, N, dtype)[tactic - 1]
        given = (projected, conv_state, ssm_state, lengths, dt_bias, A_log, D, *made)
        grid = (H * triton.cdiv(P, tiles.constants["BLOCK_P"]), B, spans)
        arguments = (*given, L, span, scanned, conv_new, ssm_new)
        launch(mamba_scan_states, grid, arguments, dims, tiles)
    else:
        tiles = scan_launch(P, N, dtype)
        given = (projected, conv_state, ssm_state, lengths, conv_weight, conv_bias)
        grid = (H * triton.cdiv(P, tiles.constants["BLOCK_P"]), B, triton.cdiv(L, CHUNK))
        launch(mamba_scan, grid, (*given, dt_bias, A_log, D, L, scanned), dims, tiles)
    del dims["UPCAST"]
    launch(
        mamba_norm,
        (n_groups, L, B),
        (projected, scanned, lengths, norm_weight, L, y),
        {**dims, "EPSILON": epsilon},
        norm_launch(H * P // n_groups),
    )
    return y, conv_new, ssm_new


def router(
    x: Any,
    matrix: Any,
    correction: Any,
    lengths: Any,
    per_token: int,
    normalized: bool,
    scaling: float,
) -> tuple[Any, Any]:
    """Return indices and weights [B * L, per_token] on torch tensors, without synchronizing.

    Args:
        x: [B, L, hidden] T, contiguous, as all others.
        matrix: [E, hidden] float32.
        correction: [E], in any type.
        lengths: [B] int32.
        per_token: Experts of a token.
        normalized: Whether a token's weights are divided by their sum.
        scaling: Factor of the weights.
    """
    (B, L, hidden), experts = x.shape, matrix.shape[0]
    n = B * L
    router_logits = matrix.new_empty((n, experts))
    indices = lengths.new_empty((n, per_token))
    weights = matrix.new_empty((n, per_token))
    dtype = "fp32" if x.dtype == torch.float32 else "bf16"
    spec = product_specs(experts, hidden, dtype)[0 if n <= 64 else 1]
    tiles = spec.launch.constants
    grid = (triton.cdiv(experts, tiles["BLOCK_F"]), triton.cdiv(n, tiles["BLOCK_T"]))
    launch(spec.function, grid, (x, matrix, n, router_logits), spec.constants, spec.launch)
    spec = choice_spec(experts, per_token, normalized, scaling, dtype)
    given = (router_logits, correction, lengths, L, indices, weights)
    launch(spec.function, (n,), given, spec.constants, spec.launch)
    return indices, weights
