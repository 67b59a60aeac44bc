"""Attention over cached context and the block: grouped queries, no positional encoding.

The cache is read where it lies: scores over it and over the block are computed apart and meet in
one softmax, because concatenating keys would copy the whole cache at every step.

Scores are float32, as in NVIDIA's fused attention: rounded to bfloat16, large ones put the result
off by up to 3 %. The standard operators have no product of bfloat16 matrices with a float32 result,
so queries and keys are cast before it. Where an engine writes the cast keys out, that is 4 bytes
instead of 2 for each of their elements: at the released model's 2 heads of 128, 1 KiB of workspace
per context token and row, one layer at a time (8 MiB for 8192 tokens), beside 192 bytes of float32
scores and bfloat16 weights for each query token (3 KiB for a block of 16). Six layers write and
read 12 KiB per context token: 0.1 GB of traffic for 8192 tokens, where a block pass reads 31 GB of
weights or more. (TF32 tensor cores would multiply bfloat16 values exactly, but they are off for the
whole plan: the scan needs float32.)

Softmax weights are rounded to T for their product with the values, as in flash attention. Each
part's result is rounded to T before the sum of the two; the PyTorch tower rounds only that sum.

Sources: NVIDIA's `modeling_nemotron_h.py`, `NemotronHAttention` (it applies no rotary embedding,
whatever `rope_theta` in config.json), and `modeling_nemotron_twotower.py`,
`_denoiser_block_attention`.
"""

from __future__ import annotations

import onnx_ir as ir

from twotower_contract.config import ModelConfig
from twotower_export.graph.body import INT64, Body, inputs

HIDDEN_SCORE = -1e30
"""Score of a key that may not be seen. Finite, so that a row that sees nothing stays finite."""

MIXER_WEIGHTS = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")
"""Weights of one attention mixer, in the order in which its function takes them."""


def attention_mixer(config: ModelConfig, dtype: ir.DataType, *, causal: bool) -> ir.Function:
    """`twotower::CausalAttention` (context) or `twotower::BlockAttention` (denoiser).

    The context tower is causal inside the block; in the denoiser every position of the block sees
    every other (NVIDIA's `_run_denoiser_step_diffusion`). Both see the whole context.

    Inputs: x [B, L, hidden] T; k_cache, v_cache [B, kv, C, D] T; lengths, context_lengths [B]
    int32; `MIXER_WEIGHTS`. Outputs: y [B, L, hidden] T; k_new, v_new [B, kv, L, D] T.
    """
    b = Body(dtype)
    args = inputs("x", "k_cache", "v_cache", "lengths", "context_lengths", *MIXER_WEIGHTS)
    x, k_cache, v_cache, lengths, context_lengths, *projections = args
    heads, kv, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    group = heads // kv

    b.begin("qkv")
    q, k, v = (b.linear(x, weight) for weight in projections[:3])
    q = b.transpose(b.reshape(q, 0, -1, kv, group, D), 0, 2, 3, 1, 4)  # [B, kv, group, L, D]
    q = b.reshape(q, 0, kv, -1, D)  # one product for all queries that share a key
    k, v = (b.transpose(b.reshape(new, 0, -1, kv, D), 0, 2, 1, 3) for new in (k, v))

    b.begin("visible.cache")
    cached = b.arange(b.size(k_cache, 2))
    sees_cache = b.op.Less(b.unsqueeze(cached, 0), b.unsqueeze(context_lengths, 1))
    sees_cache = b.unsqueeze(sees_cache, 1, 2)  # [B, 1, 1, C]
    b.begin("visible.block")
    steps = b.arange(b.size(x, 1))
    sees_block = b.unsqueeze(b.op.Less(b.unsqueeze(steps, 0), b.unsqueeze(lengths, 1)), 1, 2)
    if causal:
        earlier = b.op.GreaterOrEqual(b.unsqueeze(steps, 1), b.unsqueeze(steps, 0))  # [L, L]
        sees_block = b.op.And(sees_block, b.op.Tile(earlier, b.i64([group, 1])))

    b.begin("scores")
    scale = b.f32(D**-0.5)
    queries = b.up(q)

    def scores(keys: ir.Value, seen: ir.Value) -> ir.Value:
        product = b.op.MatMul(queries, b.up(b.transpose(keys, 0, 1, 3, 2)))
        made: ir.Value = b.op.Where(seen, b.op.Mul(product, scale), b.f32(HIDDEN_SCORE))
        return made

    b.begin("softmax")
    joined = b.op.Concat(scores(k_cache, sees_cache), scores(k, sees_block), axis=3)
    weights = b.down(b.op.Softmax(joined, axis=3))
    b.begin("values")
    sizes = b.op.Concat(b.size(k_cache, 2), b.size(k, 2), axis=0)
    on_cache, on_block = b.op.Split(weights, sizes, axis=3, _outputs=2)
    y = b.op.Add(b.op.MatMul(on_cache, v_cache), b.op.MatMul(on_block, v))

    b.begin("o_proj")
    y = b.transpose(b.reshape(y, 0, kv, group, -1, D), 0, 3, 1, 2, 4)
    y = b.linear(b.reshape(y, 0, -1, heads * D), projections[3])
    return b.function(
        "CausalAttention" if causal else "BlockAttention",
        args,
        {"y": y, "k_new": k, "v_new": v},
        "Grouped-query attention over the cached context and the block, scale 1/sqrt(head_dim).",
    )


def last_valid(b: Body, x: ir.Value, lengths: ir.Value) -> ir.Value:
    """Each row's last valid position; x [B, L, h], lengths [B] int32 -> [B, h]."""
    last = b.op.Max(b.op.Sub(lengths, b.i32(1)), b.i32(0))
    made: ir.Value = b.op.GatherND(x, b.unsqueeze(b.cast(last, INT64), 1), batch_dims=1)
    return made
