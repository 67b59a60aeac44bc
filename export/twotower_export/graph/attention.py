"""Attention over cached context and the block: grouped queries, no positional encoding.

Keys and values of a call are written into the cache's own room (`TensorScatter`, opset 24), and one
operator reads the cache (`Attention`, opset 23) under a boolean mask. Where the cache that comes
out is the memory of the cache that went in, only the call's tokens move. The context tower writes
them behind the context's, where they stay; the denoiser at the cache's end, where they disturb
nothing. TensorRT makes one kernel of the attention, in which scores are float32 and never written,
and ONNX Runtime computes all of it on a CPU.

- TensorRT asks that an updated cache is an input and an output of the engine, of the same address,
  and has one size. It learned `Attention` in 10.14 and the update in 10.15; TensorRT-RTX 1.7 has
  both.
- The queries are an output, which nobody reads. TensorRT lays out an output as it is written here,
  and then reads the caches where they lie. Of queries that are its own affair it makes another
  layout, and copies both caches into it.
- The kernel is given a list of the 64-key tiles that the mask of a row uses. Its cost follows the
  context's length; only the mask itself has the size of the cache.
- What a cache holds past a row's tokens must be finite, because 0 * NaN is NaN.
- The softmax's precision is not given: TensorRT refuses the attribute. Softmax weights may be
  rounded to T for their product with the values, as in flash attention.
- Not opset 24's `nonpad_kv_seqlen`: TensorRT's parser drops it without a word.

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

    Inputs: x [B, L, hidden] T; k_cache, v_cache [B, kv, C, D] T, C at least L more than a row's
    context; lengths, context_lengths [B] int32; `MIXER_WEIGHTS`. Outputs: y [B, L, hidden] T;
    k_cache_new, v_cache_new; queries [B, heads, L, D] T.
    """
    b = Body(dtype)
    args = inputs("x", "k_cache", "v_cache", "lengths", "context_lengths", *MIXER_WEIGHTS)
    x, k_cache, v_cache, lengths, context_lengths, *projections = args
    heads, kv, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim

    b.begin("qkv")
    q, k, v = (
        b.transpose(b.linear(x, weight, config.hidden_size, count, D), 0, 2, 1, 3)
        for weight, count in zip(projections[:3], (heads, kv, kv), strict=True)
    )

    b.begin("visible")
    capacity, tokens = b.size(k_cache, 2), b.size(x, 1)
    place = b.unsqueeze(b.arange(capacity), 0)  # [1, C]
    # At least one key is seen, also by a row that takes no part: its states must stay finite.
    known = b.unsqueeze(b.op.Max(lengths, b.i32(1)), 1)  # [B, 1]
    context = b.unsqueeze(context_lengths, 1)  # [B, 1]
    if causal:
        start = b.cast(context_lengths, INT64)
        step = b.op.Min(b.unsqueeze(b.arange(tokens), 0), b.op.Sub(known, b.i32(1)))
        last = b.op.Add(context, step)  # [B, L]
        seen = b.op.LessOrEqual(b.unsqueeze(place, 1), b.unsqueeze(last, 2))
        mask = b.unsqueeze(seen, 1)  # [B, 1, L, C]
    else:
        first = b.op.Sub(capacity, tokens)
        start = b.op.Expand(first, b.size(x, 0))
        step = b.op.Sub(place, b.cast(first, INT32))
        in_block = b.op.And(b.op.GreaterOrEqual(step, b.i32(0)), b.op.Less(step, known))
        seen = b.op.Or(b.op.Less(place, context), in_block)
        queries = b.op.Concat(b.i64([1, 1]), tokens, b.i64([1]), axis=0)
        mask = b.op.Expand(b.unsqueeze(seen, 1, 2), queries)  # [B, 1, L, C]

    b.begin("cache")
    keys, values = (
        b.op.TensorScatter(cache, new, start, axis=2) for cache, new in ((k_cache, k), (v_cache, v))
    )
    b.begin("attention")
    y = b.op.Attention(q, keys, values, mask, scale=D**-0.5)
    b.begin("o_proj")
    y = b.linear(b.transpose(y, 0, 2, 1, 3), projections[3], heads * D, config.hidden_size)
    return b.function(
        "CausalAttention" if causal else "BlockAttention",
        args,
        {"y": y, "k_cache_new": keys, "v_cache_new": values, "queries": q},
        "Grouped-query attention over the cached context and the block, scale 1/sqrt(head_dim).",
    )


def last_valid(b: Body, x: ir.Value, lengths: ir.Value) -> ir.Value:
    """Each row's last valid position; x [B, L, h], lengths [B] int32 -> [B, h]."""
    last = b.op.Max(b.op.Sub(lengths, b.i32(1)), b.i32(0))
    return b.op.GatherND(x, b.unsqueeze(b.cast(last, INT64), 1), batch_dims=1)
