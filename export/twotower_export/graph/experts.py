"""Mixture of experts: router, routed experts and the shared expert.

NVIDIA's `modeling_nemotron_h.py`: `NemotronHMOE`, `NemotronHTopkRouter`, `NemotronHMLP`.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from twotower_contract.config import ModelConfig
from twotower_contract.layout import BANKS
from twotower_export.graph.body import FLOAT, INT32, Body, in_section, inputs

MIXER_WEIGHTS = (
    "gate.weight",
    "gate.e_score_correction_bias",
    *BANKS,
    "shared_experts.up_proj.weight",
    "shared_experts.down_proj.weight",
)
"""Weights of one MoE mixer, in the order in which its function takes them."""


def sparse_experts(
    config: ModelConfig, dtype: ir.DataType, *, is_flat: bool, is_gated: bool
) -> ir.Function:
    """`twotower::SparseExperts`: the routed experts' weighted sum, and the residual.

    An expert is down(relu(up(x))^2), `NemotronHMLP` without gate projection (`mlp_hidden_act`
    relu2); the sum is taken in the router weights' dtype and then rounded, as by
    `NemotronHMOE.moe`. The body is dense: every expert sees every token and the weight of one not
    routed is 0. A kernel of this name reads only the routed experts, and adds the layer's end where
    it sums.

    Inputs: x [B, L, hidden] T; indices [n, k] int32 (-1: none; n is B * L); weights [n, k] float32;
    shared [n, hidden] T; hidden [n, hidden] T; gate [B, 1, hidden] T; up [E, inner, hidden]; down
    [E, hidden, inner]. Output: hidden + gate * (sum + shared), [n, hidden] T; the sum is taken in
    float32, and each step is rounded.

    Args:
        is_gated: Whether the result is multiplied by `gate`, which is not read otherwise.
        is_flat: Take the second product over all experts at once, which keeps [E, n, hidden] out of
            memory. It needs `down` as one matrix: builders of engines that run this body lay the
            bank out so. Quantized banks cannot be: TensorRT would write them out in T.
    """
    b = Body(dtype)
    args = inputs("x", "indices", "weights", "shared", "hidden", "gate", "up", "down")
    x, indices, weights, shared, hidden, gate, up, down = args
    b.begin("share")
    every = np.arange(config.num_experts, dtype=np.int32).reshape(1, 1, -1)
    routed = b.cast(b.op.Equal(b.unsqueeze(indices, 2), b.i32(every)), FLOAT)  # [n, k, E]
    share = b.op.ReduceSum(
        b.op.Mul(routed, b.unsqueeze(weights, 2)), b.i64([1]), keepdims=0
    )  # [n, E]
    b.begin("up")
    made = _flat if is_flat else _each
    y = made(b, config, b.op.Flatten(x, axis=-1), share, up, down)
    b.begin("residual")
    y = b.op.Add(y, shared)
    if is_gated:
        by_row = b.op.Reshape(y, b.op.Shape(x))
        y = b.op.Flatten(b.op.Mul(gate, by_row), axis=-1)
    return b.function(
        "SparseExperts",
        args,
        {"y": b.op.Add(hidden, y)},
        "Ungated relu-squared experts, weighted; this body computes all of them.",
        {"num_experts": config.num_experts, "gated": int(is_gated)},
    )


def _each(
    b: Body,
    config: ModelConfig,
    x: ir.Value,
    share: ir.Value,
    up: ir.Value,
    down: ir.Value,
) -> ir.Value:
    """Return the weighted sum of each expert's result; share [n, E]."""
    inner = b.op.Relu(b.op.MatMul(b.unsqueeze(x, 0), b.transpose(up, 0, 2, 1)))  # [E, n, inner]
    b.begin("down")
    each = b.up(b.op.MatMul(b.op.Mul(inner, inner), b.transpose(down, 0, 2, 1)))  # [E, n, hidden]
    b.begin("sum")
    share = b.unsqueeze(b.transpose(share, 1, 0), 2)
    return b.down(b.op.ReduceSum(b.op.Mul(each, share), b.i64([0]), keepdims=0))


def _flat(
    b: Body,
    config: ModelConfig,
    x: ir.Value,
    share: ir.Value,
    up: ir.Value,
    down: ir.Value,
) -> ir.Value:
    """Return the same sum as one product over all experts' activations, which hold their shares.

    The first product is transposed before anything else is made of it: TensorRT then computes it
    that way round, with its square and the shares, and writes nothing but the activations. Their
    rows are tokens, which it would copy to a multiple of eight; so the few tokens are filled up.
    """
    width = config.num_experts * config.moe_intermediate_size
    count = b.size(x, 0)
    x, share = _filled_up(b, x, config.hidden_size), _filled_up(b, share, config.num_experts)
    inner = b.op.MatMul(b.unsqueeze(x, 0), b.transpose(up, 0, 2, 1))
    inner = b.up(b.op.Relu(b.transpose(inner, 0, 2, 1)))  # [E, inner, n]
    b.begin("weighted")
    each = b.unsqueeze(b.transpose(share, 1, 0), 1)
    inner = b.down(b.op.Mul(b.op.Mul(inner, inner), each))
    b.begin("down")
    bank = b.reshape(b.transpose(down, 1, 0, 2), config.hidden_size, width)
    y = b.transpose(b.op.MatMul(bank, b.reshape(inner, width, -1)), 1, 0)
    return b.op.Slice(y, b.i64([0]), count, b.i64([0]))


@in_section("filled_up")
def _filled_up(b: Body, x: ir.Value, width: int) -> ir.Value:
    """Return rows and, up to a multiple of eight, rows of zeros; [n, width]."""
    eight = b.i64([8])
    count = b.op.Mul(b.op.Div(b.op.Add(b.size(x, 0), b.i64([7])), eight), eight)
    zeros = b.op.Expand(b.op.CastLike(b.f32(0.0), x), b.i64([7, width]))
    filled = b.op.Slice(b.op.Concat(x, zeros, axis=0), b.i64([0]), count, b.i64([0]))
    return b.reshape(b.reshape(filled, -1, 8, width), -1, width)  # so that TensorRT knows


def router(config: ModelConfig, dtype: ir.DataType) -> ir.Function:
    """`twotower::Router`: the experts of each token, and their weights.

    Sigmoid scores, selection by corrected scores (`get_topk_indices`), weights from the uncorrected
    ones, divided by their sum + 1e-20, then scaled (`NemotronHTopkRouter.forward`). With one expert
    group, group selection is no operation.

    The router works in float32, as `NemotronHTopkRouter` does in the base model. TwoTower's release
    has float64 there (revision a203471, to match Megatron's `--moe-router-dtype fp64`). The choice
    is the same unless the last chosen and the first refused expert are within float32's rounding of
    each other, some 1e-6 of a score; the router's input was rounded to bfloat16, 4e-3, before.

    A kernel of this name widens x in registers. Where a compiler does it, x is written to memory in
    float32 and read again.

    Inputs: x [B, L, hidden] T; matrix [E, hidden] float32; correction [E]; lengths [B] int32.
    Outputs, of n = B * L tokens: indices [n, k] int32; weights [n, k] float32. Padding is routed
    nowhere, to -1, so that it costs no expert its weights.
    """
    b = Body(dtype)
    x, matrix, correction, lengths = args = inputs("x", "matrix", "correction", "lengths")
    b.begin("scores")
    scores = b.op.Sigmoid(b.op.Gemm(b.cast(b.op.Flatten(x, axis=-1), FLOAT), matrix, transB=1))
    corrected = b.op.Add(scores, b.cast(correction, FLOAT))  # [n, E]
    b.begin("choice")
    k = b.i64([config.num_experts_per_tok])
    _, chosen = b.op.several("TopK", corrected, k, axis=1, outputs=2)
    b.begin("weights")
    weights = b.op.GatherElements(scores, chosen, axis=1)
    if config.norm_topk_prob:
        total = b.op.ReduceSum(weights, b.i64([1]), keepdims=1)
        weights = b.op.Div(weights, b.op.Add(total, b.f32(1e-20)))
    weights = b.op.Mul(weights, b.f32(config.routed_scaling_factor))
    b.begin("padding")
    steps = b.arange(b.size(x, 1))
    valid = b.op.Less(b.unsqueeze(steps, 0), b.unsqueeze(lengths, 1))  # [B, L]
    valid = b.op.Reshape(valid, b.i64([-1, 1]))
    indices = b.op.Where(valid, b.cast(chosen, INT32), b.i32(-1))
    attributes = {
        "per_token": config.num_experts_per_tok,
        "normalized": int(config.norm_topk_prob),
        "scaling": float(config.routed_scaling_factor),
    }
    outputs = {"indices": indices, "weights": weights}
    return b.function("Router", args, outputs, "Each token's experts, highest first.", attributes)


def experts_mixer(
    config: ModelConfig,
    dtype: ir.DataType,
    choice: ir.Function,
    routed: ir.Function,
    *,
    is_gated: bool,
) -> ir.Function:
    """`twotower::ExpertsMixer`: router, routed experts and the shared expert on the same input.

    The shared expert takes the same input, unscaled. The residual is added where the routed
    experts' kernel sums, which saves a pass over memory.

    Inputs: x [B, L, hidden] T; lengths [B] int32; hidden [B, L, hidden] T, to which the result is
    added; gate [B, 1, hidden] T, where `is_gated`; `MIXER_WEIGHTS`. Output: y [B, L, hidden] T.
    """
    b = Body(dtype)
    args = inputs("x", "lengths", "hidden", *(["gate"] if is_gated else []), *MIXER_WEIGHTS)
    x, lengths, hidden, *gate, matrix, correction, up, down, shared_up, shared_down = args
    b.begin("router")
    indices, weights = b.call(choice, [x, matrix, correction, lengths])
    b.begin("shared")
    inner = b.op.Relu(b.op.Gemm(b.op.Flatten(x, axis=-1), shared_up, transB=1))
    shared = b.op.Gemm(b.op.Mul(inner, inner), shared_down, transB=1)
    b.begin("routed")
    rows = b.reshape(hidden, -1, config.hidden_size)
    (factor,) = gate or [rows]
    (y,) = b.call(routed, [x, indices, weights, shared, rows, factor, up, down])
    y = b.op.Reshape(y, b.op.Shape(hidden))
    return b.function("ExpertsMixer", args, {"y": y}, "Mixture of experts with a shared expert.")
