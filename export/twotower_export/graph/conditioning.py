"""Time conditioning of the denoiser: how masked a block still is, as shift, scale and gate.

NVIDIA's `modeling_nemotron_twotower.py`: t is the masked fraction (`generate_mask_diffusion`, which
takes one mean over a batch; here, as in Megatron, each row has its own), rounded to the model's
dtype (`_run_denoiser_step_diffusion`) before and after its multiplication by 1000
(`TimestepEmbedder.forward`; 15 of 16 masked is 936 in bfloat16, not 937.5); frequencies and angles
are float32 whatever the model's dtype (`TimestepEmbedder.timestep_embedding`).
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from twotower_contract.config import ModelConfig
from twotower_export.graph.body import FLOAT, INT32, Body, inputs

WEIGHTS = (
    "t_embedder.mlp.0.weight",
    "t_embedder.mlp.0.bias",
    "t_embedder.mlp.2.weight",
    "t_embedder.mlp.2.bias",
    "t_block.1.weight",
    "t_block.1.bias",
)
"""Weights of the embedder, in the order in which its function takes them; names as stored."""


def time_embedding(
    config: ModelConfig, dtype: ir.DataType, rounding: ir.DataType, mask_id: int
) -> ir.Function:
    """`twotower::TimeEmbedding`: the masked fraction of each row as three vectors.

    `TimestepEmbedder`, then `t_block`.

    Args:
        rounding: The checkpoint's dtype. A float32 graph of a bfloat16 checkpoint rounds t as that
            checkpoint was trained to see it.

    Inputs: ids [B, S] int32; lengths [B] int32; `WEIGHTS`. Output: [B, 3, hidden] T.
    """
    b = Body(dtype)
    args = inputs("ids", "lengths", *WEIGHTS)
    ids, lengths, *weights = args

    def rounded(x: ir.Value) -> ir.Value:
        return x if rounding == FLOAT else b.cast(b.cast(x, rounding), FLOAT)

    b.begin("masked")
    steps = b.arange(b.size(ids, 1))
    inside = b.op.Less(b.unsqueeze(steps, 0), b.unsqueeze(lengths, 1))
    masked = b.op.And(inside, b.op.Equal(ids, b.i32(mask_id)))
    b.begin("fraction")
    count = b.op.ReduceSum(b.cast(masked, INT32), b.i64([1]), keepdims=1)
    size = b.op.Max(b.unsqueeze(lengths, 1), b.i32(1))
    fraction = rounded(b.op.Div(b.cast(count, FLOAT), b.cast(size, FLOAT)))  # [B, 1]
    time = rounded(b.op.Mul(fraction, b.f32(1000.0)))

    b.begin("sinusoid")
    half = config.time_frequency_dim // 2
    exponent = np.float32(-math.log(10000.0)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequency = np.exp(exponent.astype(np.float64))  # NumPy's own float32 exp is one unit off
    angle = b.op.Mul(time, b.f32(frequency.reshape(1, half)))
    features = rounded(b.op.Concat(b.op.Cos(angle), b.op.Sin(angle), axis=1))  # cosines first

    def dense(x: ir.Value, weight: ir.Value, bias: ir.Value) -> ir.Value:
        return b.op.Gemm(x, weight, bias, transB=1)  # rounded once, bias included

    def activated(x: ir.Value) -> ir.Value:
        return b.down(b.silu(b.up(x)))

    b.begin("mlp.0")
    hidden = dense(b.down(features), *weights[0:2])
    b.begin("mlp.2")
    hidden = dense(activated(hidden), *weights[2:4])
    b.begin("t_block")
    embedding = dense(activated(hidden), *weights[4:6])
    output = b.reshape(embedding, 0, 3, config.hidden_size)
    return b.function(
        "TimeEmbedding", args, {"embedding": output}, "Masked fraction -> (shift, scale, gate)."
    )


def modulation(config: ModelConfig, dtype: ir.DataType) -> ir.Function:
    """`twotower::Modulation`: one layer's shift, scale and gate (`_get_mod_params`).

    A row that is not conditioned gets (0, 0, 1), with which a denoiser layer is a plain one: the
    pass that mock-AR makes (`_run_denoiser_step_mock_ar`, which has no time conditioning).

    Inputs: embedding [B, 3, hidden] T; table [3, hidden]; conditioned [B] int32.
    Outputs: scale (1 + scale), shift, gate, each [B, 1, hidden] T.
    """
    b = Body(dtype)
    args = inputs("embedding", "table", "conditioned")
    embedding, table, conditioned = args
    b.begin("sum")
    both = b.op.Add(embedding, b.unsqueeze(table, 0))
    b.begin("conditioned")
    neutral = np.array([0.0, 0.0, 1.0]).reshape(1, 3, 1)
    on = b.op.Greater(b.unsqueeze(conditioned, 1, 2), b.i32(0))
    both = b.op.Where(on, both, b.const(neutral, dtype))
    b.begin("parts")
    shift, scale, gate = b.op.several("Split", both, b.i64([1, 1, 1]), axis=1, outputs=3)
    outputs = {"scale": b.op.Add(scale, b.const(1.0, dtype)), "shift": shift, "gate": gate}
    return b.function("Modulation", args, outputs, "Shift, scale and gate of one denoiser layer.")
