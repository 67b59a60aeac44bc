"""Each op on torch tensors, kernel after kernel, for tests and benchmarks.

The chains of `nodes` are launched node by node: every node is given exactly the outputs that it
says it has, on the grid and with the integers that it says. `sparse_experts` is written apart from
its chain, and takes any tiles.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from tests.support.plugin_launches import DTYPES, made_tensors, node_call
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
from twotower_engines.kernels.node import POINTERS, Node
from twotower_engines.kernels.nodes import OPS, STATES


def _read_bounds_of_loops() -> None:
    """Make the interpreter of Triton 3.6 work with numpy 2.4, where int() of [3] is an error."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def _patch_once() -> None:
    """Let functions that a kernel calls take the language as the kernel's start has patched it.

    The interpreter patches it anew for each call, which takes longer than most of our functions.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang
    modules = (tl, tl.core)  # Triton's own functions see the second

    @functools.cache
    def seen_by(function: Any) -> list[Any]:
        values = list(function.__globals__.values())
        return [module for module in modules if any(value is module for value in values)]

    def patched(function: Any) -> Any:
        if any(tl.core.is_builtin(module.load) for module in seen_by(function)):
            return patch(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patched


if INTERPRETED:
    _read_bounds_of_loops()
    _patch_once()


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


def run_node(
    node: Node, inputs: list[torch.Tensor], attributes: dict[str, Any], tactic: int = 1
) -> list[torch.Tensor]:
    """Launch a node as TensorRT would, on the outputs, grid and integers that it says."""
    tensors = dict(zip(node.takes, inputs, strict=True))
    call = node_call(node, inputs, attributes, tactic)
    made = made_tensors(node, call, inputs[0].device)
    launching = node.launching(call)
    spec = launching.spec
    outputs = iter(made)
    values = {**tensors, **launching.integers}
    arguments = [values[name] if name in values else next(outputs) for name in spec.types]
    assert next(outputs, None) is None, "an output without a parameter"
    for name, value in zip(spec.types, arguments, strict=True):
        if isinstance(value, torch.Tensor):
            assert spec.types[name] in ("*u8", POINTERS[DTYPES[value.dtype]]), name
        else:
            assert spec.types[name] == "i32", name
    arguments = [
        value.view(torch.uint8) if spec.types[name] == "*u8" else value
        for name, value in zip(spec.types, arguments, strict=True)
    ]
    constants = dict(spec.constants)
    if "UPCAST" in constants:
        constants["UPCAST"] |= INTERPRETED
    launch(spec.function, launching.grid, tuple(arguments), constants, spec.launch)
    return made


def run_chain(
    op: str, inputs: list[torch.Tensor], attributes: dict[str, Any], tactic: int = 1
) -> dict[str, Any]:
    """Launch an op's nodes one after another, and return every tensor by name."""
    tensors = dict(zip(OPS[op].inputs, inputs, strict=True))
    for node in OPS[op].chain:
        given = [tensors[name] for name in node.takes]
        made = run_node(node, given, attributes, min(tactic, node.tactics))
        tensors.update(zip(node.makes, made, strict=True))
    return tensors


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
) -> tuple[Any, ...]:
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
    rows = (lengths, threshold, steps_left, temperature, policy, seed)
    made = run_chain("RefineBlock", [logits, ids, *rows], {"mask_id": mask_id})
    return tuple(made[name] for name in OPS["RefineBlock"].outputs)


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
    op = f"MambaBlockStep{STATES if states else ''}"
    given = [projected, conv_state, ssm_state, lengths, conv_weight, conv_bias, dt_bias, A_log, D]
    attributes = {"n_groups": n_groups, "epsilon": epsilon}
    made = run_chain(op, [*given, norm_weight], attributes, tactic)
    return made["y"], made.get("conv_state_new"), made.get("ssm_state_new")


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
    attributes = {"per_token": per_token, "normalized": normalized, "scaling": scaling}
    made = run_chain("Router", [x, matrix, correction, lengths], attributes)
    return made["indices"], made["weights"]
