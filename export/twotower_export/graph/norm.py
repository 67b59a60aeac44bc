"""RMS norm, float32 inside and multiplied by its weight before it is rounded.

NVIDIA's `modeling_nemotron_h.py`, `NemotronHRMSNorm`. (The native class of transformers rounds
before the multiplication in its gated norm.)
"""

from __future__ import annotations

import onnx_ir as ir

from twotower_contract.config import ModelConfig
from twotower_export.graph.body import FLOAT, Body, inputs


def rms_norm(config: ModelConfig, dtype: ir.DataType) -> ir.Function:
    """`twotower::RMSNorm`; inputs: x [B, L, hidden] T, weight [hidden]; output T."""
    b = Body(dtype)
    args = inputs("x", "weight")
    x, weight = b.up(args[0]), b.cast(args[1], FLOAT)
    mean = b.op.ReduceMean(b.op.Mul(x, x), b.i64([-1]), keepdims=1)
    normed = b.op.Div(x, b.op.Sqrt(b.op.Add(mean, b.f32(config.norm_eps, 3))))
    outputs = {"y": b.down(b.op.Mul(normed, weight))}
    return b.function("RMSNorm", args, outputs, "x / sqrt(mean(x^2) + epsilon) * weight.")
