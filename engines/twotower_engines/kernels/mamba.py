"""`MambaBlockStep` of a denoise step in two kernels: the scan per head, the gated norm per group.

    projected (xBC, dt), states --> mamba_scan --> scanned [B, L, d_inner] T
                                    one program per (head, chunk of tokens, row)
    projected (z), scanned      --> mamba_norm --> y [B, L, d_inner] T
                                    one program per (group, token, row)

Where new states are wanted, the first is two others: see `mamba_spans`.

The work is the state, 2 MB a row in the released model: a program reads its part of one head's
state once and keeps it in registers. Eight heads share B and C and each convolves them anew: 16
tokens of 256 channels come from the cache, and a launch of their own costs more. The norm spans a
group of heads, so it cannot be in the scan's launch without a barrier across programs. Results of
convolution and scan are rounded to T by the op's definition.

Within a chunk of 16 tokens the recurrence is a masked matrix product (Dao and Gu, "Transformers
are SSMs", section 6). A program has one chunk, and sees the row's earlier ones through the same
masked product: right for any length, meant for a denoiser's block, which is one chunk, and without
the registers that an update of the state takes. Exponents are sums of decays between two tokens,
which never overflow.

Where T is bf16, x, B and C come rounded to 8 bits. The products with the state run on the tensor
cores with the state as the sum of two bf16 numbers, 16 bits, and accumulate in float32: 2^-17 of a
factor is lost where its partner lost 2^-9 before. The state itself stays float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from twotower_engines.kernels.jit import Launch, kernel
from twotower_engines.kernels.mamba_chunk import (
    CHUNK,
    attended,
    decays,
    product,
    similar,
    steps_of,
    within,
)
from twotower_engines.kernels.mamba_convolution import convolved, row_of
from twotower_engines.kernels.mamba_spans import (
    mamba_scan_states,
    mamba_spans,
    spans_launch,
    states_tactics,
)
from twotower_engines.kernels.spec import KernelSpec, Sizes


@kernel
def mamba_scan(
    projected: tl.tensor, conv_state: tl.tensor, ssm_state: tl.tensor, lengths: tl.tensor,
    weight: tl.tensor, bias: tl.tensor, dt_bias: tl.tensor, A_log: tl.tensor, D: tl.tensor,
    L: tl.tensor, scanned: tl.tensor,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, G: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, UPCAST: tl.constexpr,
) -> None:  # fmt: skip
    """Scan one chunk of a row, for one head or part of it; grid (H * cdiv(P, BLOCK_P), B, chunks).

    Tokens past a row's length get 0.
    """
    WIDE: tl.constexpr = projected.dtype.element_ty == tl.float32
    D_INNER: tl.constexpr = H * P
    CONV_DIM: tl.constexpr = D_INNER + 2 * G * N
    STRIDE: tl.constexpr = D_INNER + CONV_DIM + H
    PARTS: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    head = tl.program_id(0) // PARTS
    first = (tl.program_id(0) % PARTS) * BLOCK_P
    row = tl.program_id(1).to(tl.int64)
    group = head // (H // G)
    source = row_of(projected, conv_state, lengths, L, D_INNER, CONV_DIM, STRIDE)
    length = source[2]
    p, n = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    width = BLOCK_P if P % BLOCK_P == 0 else P - first  # a constant where nothing is masked
    real_p, real_n = p < width, n < N
    x0, b0 = head * P + first, D_INNER + group * N
    c0 = b0 + G * N
    state_place = (row * D_INNER + x0 + p)[:, None] * N + n[None, :]
    real_state = real_p[:, None] & real_n[None, :]
    start = tl.program_id(2) * BLOCK_L
    time = start + tl.arange(0, BLOCK_L)
    # A row that is over reads nothing.
    real_state = real_state & (p < tl.where(start < length, BLOCK_P, 0))[:, None]
    state = tl.load(ssm_state + state_place, mask=real_state, other=0.0)
    steps = steps_of(source, dt_bias, A_log, head)
    skip = tl.load(D + head).to(tl.float32)
    lane = tl.arange(0, BLOCK_L)
    c = convolved(source, weight, bias, time, c0, N, BLOCK_N, WIDE)
    b = convolved(source, weight, bias, time, b0, N, BLOCK_N, WIDE)
    x = convolved(source, weight, bias, time, x0, width, BLOCK_P, WIDE).to(tl.float32)
    step, since, end = decays(steps, time)
    begun = since  # from the state on
    for back in range(BLOCK_L, start + BLOCK_L, BLOCK_L):
        end = decays(steps, time - back)[2]
        begun += end
    y = attended(c, b, x, step, within(since, lane), state, begun, UPCAST) + skip * x
    # The row's earlier chunks, newest first; `since` begins at the end of the next one.
    for back in range(BLOCK_L, start + BLOCK_L, BLOCK_L):
        earlier = time - back
        b = convolved(source, weight, bias, earlier, b0, N, BLOCK_N, True)
        x = convolved(source, weight, bias, earlier, x0, width, BLOCK_P, True).to(tl.float32)
        step, total, end = decays(steps, earlier)
        decay = tl.exp(since[:, None] + (end - total)[None, :])
        y = product(similar(c, b, decay, UPCAST), x * step[:, None], y, "none", UPCAST)
        since += end
    out = scanned + (row * L + time)[:, None] * D_INNER + (x0 + p)[None, :]
    tl.store(out, y.to(scanned.dtype.element_ty), mask=(time < L)[:, None] & real_p[None, :])


@kernel
def mamba_norm(
    projected: tl.tensor, scanned: tl.tensor, lengths: tl.tensor, norm_weight: tl.tensor,
    L: tl.tensor, y: tl.tensor,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, G: tl.constexpr, EPSILON: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:  # fmt: skip
    """Compute scanned * silu(z) over its root mean square in the group; grid (G, L, B).

    Tokens past a row's length get 0.
    """
    D_INNER: tl.constexpr = H * P
    STRIDE: tl.constexpr = 2 * D_INNER + 2 * G * N + H
    WIDTH: tl.constexpr = D_INNER // G
    group, time = tl.program_id(0), tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    lane = tl.arange(0, BLOCK_C)
    real = lane < tl.where(time < tl.load(lengths + row), WIDTH, 0)
    channel = group * WIDTH + lane
    token = row * L + time
    z = tl.load(projected + token * STRIDE + channel, mask=real, other=0.0).to(tl.float32)
    value = tl.load(scanned + token * D_INNER + channel, mask=real, other=0.0).to(tl.float32)
    gated = value * (z / (1.0 + tl.exp(-z)))
    mean = tl.sum(gated * gated, axis=0) / WIDTH
    factor = tl.load(norm_weight + channel, mask=real, other=0.0).to(tl.float32)
    normed = gated / tl.sqrt(mean + EPSILON) * factor
    out = y + token * D_INNER + channel
    tl.store(out, normed.to(y.dtype.element_ty), mask=lane < WIDTH)


def scan_launch(head_dim: int, state: int, dtype: str) -> Launch:
    """Return the tiles of the scan without new states.

    A program has a whole head, 64 of them at one row of the released model, and 128 registers a
    thread: a multiprocessor holds two.

    Args:
        head_dim: Channels of a head.
        state: Numbers of a channel's state.
        dtype: "bf16" or "fp32"; float32 products are made of scalar ones and need more registers.
    """
    channels = max(16, triton.next_power_of_2(head_dim))
    constants = {"BLOCK_L": CHUNK, "BLOCK_N": max(16, triton.next_power_of_2(state))}
    if dtype == "fp32":
        return Launch({**constants, "BLOCK_P": 16}, num_warps=8)
    return Launch({**constants, "BLOCK_P": min(64, channels)}, num_warps=8, max_registers=128)


def norm_launch(width: int) -> Launch:
    """Return the tiles of the gated norm: one group of one token, by one warp."""
    return Launch({"BLOCK_C": triton.next_power_of_2(width)}, num_warps=1)


def specs(sizes: Sizes) -> list[KernelSpec]:
    """Return the kernels of one model: the scan with and without new states, and the norm."""
    T = f"*{sizes.dtype}"
    weights = ("weight", "bias", "dt_bias", "A_log", "D", "norm_weight")
    types = {
        **dict.fromkeys(("projected", "conv_state", "convolution", "conv_state_new"), T),
        **dict.fromkeys(("scanned", "y"), T),
        **dict.fromkeys(("ssm_state", "ssm_state_new", "span_states", "span_decays"), "*fp32"),
        **dict.fromkeys(weights, f"*{sizes.small_dtype}"),
        **{"lengths": "*i32", "L": "i32", "span": "i32"},
    }
    heads, head_dim, state, groups = sizes.heads, sizes.head_dim, sizes.state, sizes.groups
    constants: dict[str, int | float] = {"H": heads, "P": head_dim, "N": state, "G": groups}
    constants |= {"EPSILON": sizes.epsilon, "UPCAST": False}
    launches = [
        (mamba_scan, "", scan_launch(head_dim, state, sizes.dtype)),
        (mamba_spans, "", spans_launch(heads, head_dim, state, groups, sizes.dtype)),
        *(
            (mamba_scan_states, f".{tactic}", tiles)
            for tactic, tiles in enumerate(states_tactics(head_dim, state, sizes.dtype), 1)
        ),
        (mamba_norm, "", norm_launch(heads * head_dim // groups)),
    ]
    return [
        KernelSpec.of(function.__name__ + suffix, function, types, constants, tiles)
        for function, suffix, tiles in launches
    ]
