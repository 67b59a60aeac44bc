"""Attention over cached context and the block: grouped queries, no positional encoding.

The standard operator `Attention` (opset 23) under a boolean mask: TensorRT makes one kernel of it,
in which scores are float32 and never written, whatever their number, and ONNX Runtime computes it
on a CPU. Written out as product, softmax and product, keys were transposed and cast to float32, and
the scores of the whole capacity written three times: 136 MiB for each row, layer and 8192 tokens.

- The softmax's precision is not given: TensorRT refuses the attribute. Softmax weights may be
  rounded to T for their product with the values, as in flash attention.
- Not opset 24's `nonpad_kv_seqlen`: TensorRT's parser drops it without a word.
- Keys and values of the context and of the block are joined before: one copy of the cache, 8 MiB
  for each row, layer and 8192 tokens, in which what is not seen becomes 0. Opset 24's
  `TensorScatter` into the cache's own room would save it, where a call may write to its states.
- The cost follows the capacity of the cache that is given, not the context's length.

Sources: NVIDIA's `modeling_nemotron_h.py`, `NemotronHAttention` (it applies no rotary embedding,
whatever `rope_theta` in config.json), and `modeling_nemotron_twotower.py`,
`_denoiser_block_attention`.
"""

from __future__ import annotations

import onnx_ir as ir

from twotower_contract.config import ModelConfig
from twotower_export.graph.body import INT32, INT64, Body, inputs

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

    b.begin("qkv")
    q, k, v = (
        b.transpose(b.reshape(b.linear(x, weight), 0, -1, count, D), 0, 2, 1, 3)
        for weight, count in zip(projections[:3], (heads, kv, kv), strict=True)
    )

    b.begin("visible.cache")
    cached = b.arange(b.size(k_cache, 2))
    sees_cache = b.op.Less(b.unsqueeze(cached, 0), b.unsqueeze(context_lengths, 1))  # [B, C]
    b.begin("visible.block")
    steps = b.arange(b.size(x, 1))
    # At least one key is seen, also by a row that takes no part: its states must stay finite.
    known = b.op.Max(lengths, b.i32(1))
    sees_block = b.op.Less(b.unsqueeze(steps, 0), b.unsqueeze(known, 1))  # [B, L]
    b.begin("visible")
    seen = b.unsqueeze(b.op.Concat(sees_cache, sees_block, axis=1), 1, 2)  # [B, 1, 1, C + L]
    if causal:
        b.begin("visible.causal")
        position = b.op.Sub(b.arange(b.size(seen, 3)), b.cast(b.size(k_cache, 2), INT32))
        earlier = b.op.LessOrEqual(b.unsqueeze(position, 0), b.unsqueeze(steps, 1))
        mask = b.op.And(seen, earlier)  # [B, 1, L, C + L]
    else:
        queries = b.op.Concat(b.i64([1, 1]), b.size(x, 1), b.i64([1]), axis=0)
        mask = b.op.Expand(seen, queries)

    def joined(cache: ir.Value, new: ir.Value) -> ir.Value:
        # What is not seen is zeroed: 0 * NaN would reach the result, and a slot that was given up
        # may hold one.
        clean = b.op.Where(b.unsqueeze(sees_cache, 1, 3), cache, b.const(0.0, dtype))
        made: ir.Value = b.op.Concat(clean, new, axis=2)
        return made

    b.begin("attention")
    keys, values = joined(k_cache, k), joined(v_cache, v)
    y = b.op.Attention(q, keys, values, mask, scale=D**-0.5)
    b.begin("o_proj")
    y = b.reshape(b.transpose(y, 0, 2, 1, 3), 0, -1, heads * D)
    y = b.linear(y, projections[3])
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
