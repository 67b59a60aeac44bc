"""Mamba-2: the seeded block step and the layers around it.

The scan over a block is written as one masked matrix product, quadratic in the block, because it is
exact in float32 and made of ordinary operators (Dao and Gu, "Transformers are SSMs", section 6:
the dual form).

Sources: NVIDIA's `modeling_nemotron_twotower.py`, `_denoiser_block_mamba` (which also serves
`_extend_context_cache`), and `modeling_nemotron_h.py`, `NemotronHMamba2Mixer`. Rounding points are
those of the former: everything inside the scan is float32, its result is rounded to T before the
gated norm. So it is for prefill and the single step here; NVIDIA's prefill (`_build_context_cache`)
scans inputs in T, which is less exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from twotower_contract.config import ModelConfig
from twotower_export.graph.body import FLOAT, Body, in_section, inputs

NEVER = -1e30
"""Exponent of what may not be seen: exp gives an exact 0, and no arithmetic on it gives NaN."""


def mamba_block_step(config: ModelConfig, dtype: ir.DataType) -> ir.Function:
    """`twotower::MambaBlockStep`: convolution, scan and gated norm over one block.

    Inputs: projected [B, L, d_inner + conv_dim + H] T (z | xBC | dt); conv_state [B, 3, conv_dim] T
    (raw xBC, newest last: NVIDIA's cache keeps four columns, of which a continuation reads three;
    Megatron's keeps three); ssm_state [B, H, P, N] float32; lengths [B] int32; conv_weight
    [conv_dim, 4]; conv_bias [conv_dim]; dt_bias, A_log, D [H]; norm_weight [d_inner].
    Outputs: y [B, L, d_inner] T; both new states. Positions at or past a row's length leave the
    states as they are (dt = 0).
    """
    b = Body(dtype)
    names = (
        "projected conv_state ssm_state lengths conv_weight conv_bias dt_bias A_log D norm_weight"
    )
    args = inputs(*names.split())
    projected, conv_state, ssm_state, lengths = args[:4]
    conv_weight, conv_bias, dt_bias, a_log, d_skip, norm_weight = args[4:]
    d_inner, conv_dim = config.d_inner, config.conv_dim
    H, P = config.mamba_num_heads, config.mamba_head_dim
    G, N = config.n_groups, config.ssm_state_size
    J = H // G  # heads that share one group's B and C

    b.begin("split")
    z, xbc, dt = b.op.several("Split", projected, b.i64([d_inner, conv_dim, H]), axis=2, outputs=3)

    b.begin("history")
    history = b.op.Concat(conv_state, xbc, axis=1)
    b.begin("steps")
    steps = b.arange(b.size(projected, 1))  # [L]
    b.begin("")
    convolved = _convolve(b, history, steps, conv_weight, conv_bias)
    b.begin("inputs")
    x, B, C = b.op.several("Split", convolved, b.i64([d_inner, G * N, G * N]), axis=2, outputs=3)
    x = b.transpose(b.reshape(x, 0, -1, G, J, P), 0, 2, 3, 1, 4)  # [B, G, J, L, P]
    length = b.size(projected, 1)
    per_group = b.op.Concat(b.i64([-1]), length, b.i64([N]), axis=0)
    B, C = (
        b.op.Reshape(b.transpose(b.reshape(part, 0, -1, G, N), 0, 2, 1, 3), per_group)
        for part in (B, C)
    )  # [B * G, L, N]

    b.begin("dt")
    valid = b.op.Less(b.unsqueeze(steps, 0), b.unsqueeze(lengths, 1))  # [B, L]
    # No clamp: `time_step_limit` is (0, inf); min, max and floor in config.json are for training.
    dt = b.op.Softplus(b.op.Add(b.up(dt), b.cast(dt_bias, FLOAT)))
    dt = b.op.Mul(dt, b.unsqueeze(b.cast(valid, FLOAT), 2))  # [B, L, H]
    b.begin("decay")
    rate = b.op.Neg(b.op.Exp(b.cast(a_log, FLOAT)))  # A [H]
    total = b.op.CumSum(b.op.Mul(dt, rate), b.i64(1))  # log of the decay since the block began
    total = b.transpose(b.reshape(total, 0, -1, G, J), 0, 2, 3, 1)  # [B, G, J, L]
    # Of the whole block: the last sum. A sum of its own, added in another order, would not cancel
    # in exp(end - total).
    end = b.op.Gather(total, b.op.Sub(b.size(total, 3), b.i64([1])), axis=3)
    dt = b.transpose(b.reshape(dt, 0, -1, G, J), 0, 2, 3, 1)  # [B, G, J, L]

    b.begin("scan")
    scan = _Scan(b, (G, J, P, N), x, B, C, dt, total, end)
    seed = b.reshape(ssm_state, -1, J * P, N)
    skip = b.reshape(b.cast(d_skip, FLOAT), G, J, 1, 1)
    y = b.op.Add(_within_block(b, scan, steps, skip), _from_seed(b, scan, seed))
    y = b.down(b.reshape(y, 0, -1, d_inner))
    ssm_state_new = b.reshape(_end_state(b, scan, seed), -1, H, P, N)

    b.begin("")
    return b.function(
        "MambaBlockStep",
        args,
        {
            "y": _gated_norm(b, y, z, norm_weight, config),
            "conv_state_new": _newest(b, history, lengths),
            "ssm_state_new": ssm_state_new,
        },
        "Mamba-2 over one block of at most 256 tokens: causal convolution with a history of three, "
        "selective scan seeded by ssm_state, gated group norm.",
        {"n_groups": G, "epsilon": config.norm_eps},
    )


@dataclass(frozen=True)
class _Scan:
    """The scan of a block: what its parts take.

    Products with B and C have three dimensions, groups of all rows and a matrix: TensorRT turns
    such a product round where it would write a larger one's operand anew. For the product with x it
    does not, and each reshape costs the compiler memory in every layer.

    Attributes:
        sizes: G, J, P, N.
        x: [B, G, J, L, P].
        B, C: [B * G, L, N].
        dt: Step sizes, 0 past a row's length; [B, G, J, L].
        total: Logarithm of the decay since the block began, each token's included; like dt.
        end: That of the last token; [B, G, J, 1].
    """

    b: Body
    sizes: tuple[int, int, int, int]
    x: ir.Value
    B: ir.Value
    C: ir.Value
    dt: ir.Value
    total: ir.Value
    end: ir.Value

    def shape(self, *dims: int | None) -> ir.Value:
        """Return a shape, in which None is the number of tokens."""
        length = self.b.size(self.total, 3)
        parts = [length if dim is None else self.b.i64([dim]) for dim in dims]
        made: ir.Value = self.b.op.Concat(*parts, axis=0)
        return made


@in_section("convolution")
def _convolve(
    b: Body, history: ir.Value, steps: ir.Value, weight: ir.Value, bias: ir.Value
) -> ir.Value:
    """Depthwise causal convolution and SiLU; [B, 3 + L, conv_dim] T -> [B, L, conv_dim] float32.

    `causal_conv1d_fn` with `initial_states` in `_denoiser_block_mamba`: float32 inside, gives T.

    Each token's four columns are gathered at once: TensorRT's parser turns every slice of a dynamic
    axis into some fifteen layers of shape arithmetic.
    """
    taps = b.op.Add(b.unsqueeze(steps, 1), b.i32([[0, 1, 2, 3]]))  # [L, 4], the last is the token
    window = b.up(b.op.Gather(history, taps, axis=1))  # [B, L, 4, conv_dim]
    products = b.op.Mul(window, b.transpose(b.cast(weight, FLOAT), 1, 0))
    convolved = b.op.ReduceSum(products, b.i64([2]), keepdims=0)
    return b.up(b.down(b.silu(b.op.Add(convolved, b.cast(bias, FLOAT)))))


@in_section("within_block")
def _within_block(b: Body, scan: _Scan, steps: ir.Value, skip: ir.Value) -> ir.Value:
    """Return the part of each token's output from the block itself; [B, L, G, J, P].

    The token's own input, which skips the state, is part of it.
    """
    causal = b.op.GreaterOrEqual(b.unsqueeze(steps, 1), b.unsqueeze(steps, 0))  # [L, L]
    since = b.op.Sub(b.unsqueeze(scan.total, 4), b.unsqueeze(scan.total, 3))
    decay = b.op.Exp(b.op.Where(causal, since, b.f32(NEVER)))  # [B, G, J, L, L]
    similarity = b.op.MatMul(scan.C, b.transpose(scan.B, 0, 2, 1))  # [B * G, L, L]
    similarity = b.op.Reshape(similarity, scan.shape(-1, scan.sizes[0], 1, None, None))
    taken = b.op.Mul(b.op.Mul(similarity, decay), b.unsqueeze(scan.dt, 3))
    y = b.op.Add(b.op.MatMul(taken, scan.x), b.op.Mul(skip, scan.x))
    return b.transpose(y, 0, 3, 1, 2, 4)


@in_section("from_seed")
def _from_seed(b: Body, scan: _Scan, seed: ir.Value) -> ir.Value:
    """Return the part of each token's output from the state before it; [B, L, G, J, P]."""
    G, J, P, _ = scan.sizes
    # Written as a transposed product, so that the state is read as it lies.
    read = b.transpose(b.op.MatMul(seed, b.transpose(scan.C, 0, 2, 1)), 0, 2, 1)
    read = b.op.Reshape(read, scan.shape(-1, G, None, J, P))
    decay = b.unsqueeze(b.transpose(b.op.Exp(scan.total), 0, 3, 1, 2), 4)  # [B, L, G, J, 1]
    made: ir.Value = b.op.Mul(b.transpose(read, 0, 2, 1, 3, 4), decay)
    return made


@in_section("end_state")
def _end_state(b: Body, scan: _Scan, seed: ir.Value) -> ir.Value:
    """Return the state after the block, [B, G, J, P, N]; padding decays nothing (dt is 0)."""
    G, J, P, N = scan.sizes
    until_end = b.op.Mul(b.op.Exp(b.op.Sub(scan.end, scan.total)), scan.dt)
    weighted = b.transpose(b.op.Mul(scan.x, b.unsqueeze(until_end, 4)), 0, 1, 2, 4, 3)
    gained = b.op.MatMul(b.op.Reshape(weighted, scan.shape(-1, J * P, None)), scan.B)
    kept = b.op.Mul(b.reshape(seed, -1, G, J, P, N), b.unsqueeze(b.op.Exp(scan.end), 4))
    made: ir.Value = b.op.Add(kept, b.reshape(gained, -1, G, J, P, N))
    return made


@in_section("newest")
def _newest(b: Body, history: ir.Value, lengths: ir.Value) -> ir.Value:
    """Return the three raw columns up to each row's length; [B, 3 + L, D] -> [B, 3, D].

    `new_conv` of `_denoiser_block_mamba`: before convolution and SiLU; of history and block where
    the block is shorter.
    """
    columns = b.op.Add(b.unsqueeze(lengths, 1), b.i32([[0, 1, 2]]))
    index = b.unsqueeze(b.cast(columns, ir.DataType.INT64), 2)
    made: ir.Value = b.op.GatherND(history, index, batch_dims=1)
    return made


@in_section("gated_norm")
def _gated_norm(
    b: Body, y: ir.Value, z: ir.Value, weight: ir.Value, config: ModelConfig
) -> ir.Value:
    """u = y * silu(z), then RMS norm within each group (`MambaRMSNormGated`: gate before norm)."""
    gated = b.op.Mul(b.up(y), b.silu(b.up(z)))
    groups = b.reshape(gated, 0, -1, config.n_groups, config.d_inner // config.n_groups)
    mean = b.op.ReduceMean(b.op.Mul(groups, groups), b.i64([-1]), keepdims=1)
    normed = b.op.Div(groups, b.op.Sqrt(b.op.Add(mean, b.f32(config.norm_eps))))
    normed = b.reshape(normed, 0, -1, config.d_inner)
    return b.down(b.op.Mul(normed, b.cast(weight, FLOAT)))


MIXER_WEIGHTS = (
    "in_proj.weight",
    "conv1d.weight",
    "conv1d.bias",
    "dt_bias",
    "A_log",
    "D",
    "norm.weight",
    "out_proj.weight",
)
"""Weights of one Mamba mixer, in the order in which its function takes them."""


def mamba_mixer(config: ModelConfig, dtype: ir.DataType, step: ir.Function) -> ir.Function:
    """`twotower::MambaMixer`: projection, block step, projection.

    Inputs: x [B, L, hidden] T; conv_state; ssm_state; lengths; `MIXER_WEIGHTS`.
    Outputs: y [B, L, hidden] T; both new states.
    """
    b = Body(dtype)
    args = inputs("x", "conv_state", "ssm_state", "lengths", *MIXER_WEIGHTS)
    x, conv_state, ssm_state, lengths, in_proj, *inner, out_proj = args
    b.begin("in_proj")
    projected = b.linear(x, in_proj)
    b.begin("step")
    y, conv_new, ssm_new = b.call(step, [projected, conv_state, ssm_state, lengths, *inner])
    b.begin("out_proj")
    outputs = {
        "y": b.linear(y, out_proj),
        "conv_state_new": conv_new,
        "ssm_state_new": ssm_new,
    }
    return b.function("MambaMixer", args, outputs, "Mamba-2 mixer over one block.")
